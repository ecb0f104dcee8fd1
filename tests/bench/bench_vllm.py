"""Wall time of `s2d rollout --engine vllm` beside a bare `LLM.generate`, on the same engine, prompts and seeds.

    OMP_NUM_THREADS=1 python tests/bench/bench_vllm.py --model CKPT [--problems P.jsonl] [--rows 64] [--max-tokens 128]

Loading is left out on both sides. s2d's side is what `rollout` does: requests, decoded text, records, JSON
lines written to a file. The rounds are taken in turn and begin with an empty prefix cache; shown are the
medians, and the median of the rounds' ratios. The last line is the bare call without seeds: a seed per
request keeps vLLM from its batched sampler, on GPUs from its fast kernels. On a CPU vLLM runs in this
process, whose CPU time tells the same on a machine that has other work.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from s2dcli.assembly.sampling import make_tasks, open_sampler
from s2dcli.engines.base import SamplingParams
from s2dcli.files import jsonl
from s2dcli.files.records import read_problems, row_seed
from s2dcli.models.checkpoints import resolve
from s2dcli.models.prompts import PromptEncoder, load_tokenizer
from s2dcli.options import EngineOptions, ModelOptions

TOY = Path(__file__).parents[2] / "examples" / "toy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TOY / "teacher"))
    parser.add_argument("--problems", default=str(TOY / "problems" / "1H.jsonl"))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    checkpoint = resolve(options.model)
    encoder = PromptEncoder(load_tokenizer(checkpoint.folder))
    params = SamplingParams(1.0, 1.0, 0, options.max_tokens)
    tasks = make_tasks(read_problems(options.problems), encoder)[: options.rows // options.samples]
    rows = [(task, index) for task in tasks for index in range(options.samples)]
    prompts = [{"prompt_token_ids": task.prompt_ids} for task, _ in rows]

    with open_sampler(checkpoint, encoder, params, EngineOptions(engine="vllm"), ModelOptions(), seed=0) as sampler:
        engine = sampler.engine

        def ours(folder: Path) -> None:
            with jsonl.open_output(folder / "rollouts.jsonl", overwrite=True) as writer:
                for group in sampler.sample(tasks, options.samples):
                    for row in group:
                        writer.write(row.to_record())
                    writer.flush()

        def bare(folder: Path, seeded: bool = True) -> None:
            seeds = [row_seed(0, task.group_id, index) if seeded else None for task, index in rows]
            engine.llm.generate(prompts, [engine.vllm_params(params, seed) for seed in seeds], use_tqdm=False)

        runs = {"LLM.generate": bare, "s2d rollout": ours, "LLM.generate, no seeds": lambda folder: bare(folder, seeded=False)}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}  # wall, this process's CPU
        with tempfile.TemporaryDirectory() as folder:
            for measured in [False] + [True] * options.rounds:
                for name, run in runs.items():
                    engine.llm.reset_prefix_cache()
                    start, busy = time.perf_counter(), time.process_time()
                    run(Path(folder))
                    if measured:
                        seconds[name].append((time.perf_counter() - start, time.process_time() - busy))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{len(rows)} rows of {len(tasks)} problems, at most {options.max_tokens} tokens, {options.rounds} rounds, {where}")
    for kind, clock in enumerate(("wall time", "CPU time of this process")):
        print(clock)
        for name, values in seconds.items():
            ratio = statistics.median(ours[kind] / bare[kind] for ours, bare in zip(values, seconds["LLM.generate"], strict=True))
            print(f"{name:>24} {statistics.median(value[kind] for value in values):8.3f} s  {ratio:.3f}x")


if __name__ == "__main__":
    main()
