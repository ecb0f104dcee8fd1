"""Tokens per second of the transformers engine beside `generate`, on the same model and prompts.

    OMP_NUM_THREADS=1 python tests/bench/bench_sampling.py [--model examples/toy/student] [--rows 256]

Both sample at temperature 1 up to the same length; what is counted are completion tokens up to and
including EOS. The best of several rounds is shown, rounds taken in turn.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from s2dcli.engines.base import Request, SamplingParams
from s2dcli.engines.transformers import TransformersEngine
from s2dcli.files.records import read_problems
from s2dcli.models.checkpoints import load, resolve
from s2dcli.models.prompts import PromptEncoder

TOY = Path(__file__).parents[2] / "examples" / "toy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TOY / "student"))
    parser.add_argument("--problems", default=str(TOY / "problems" / "1H.jsonl"))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    loaded = load(resolve(options.model), device="auto", dtype="auto")
    encoder = PromptEncoder(loaded.tokenizer)
    prompts = [encoder.encode(problem.prompt) for problem in read_problems(options.problems)]
    prompts = [prompts[row % len(prompts)] for row in range(options.rows)]
    engine = TransformersEngine(
        loaded.model, eos_ids=loaded.eos_ids, pad_id=loaded.pad_id, vocabulary=loaded.vocabulary, batch_tokens=10**9
    )
    params = SamplingParams(1.0, 1.0, 0, options.max_tokens)
    loaded.tokenizer.padding_side = "left"
    padded = loaded.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(loaded.model.device)

    def ours(seed: int) -> int:
        requests = [Request(prompt, seed * options.rows + row) for row, prompt in enumerate(prompts)]
        return sum(len(sample.completion_ids) for _, sample in engine.generate(requests, params))

    def theirs(seed: int) -> int:
        torch.manual_seed(seed)
        with torch.inference_mode():
            ids = loaded.model.generate(
                **padded,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=options.max_tokens,
                pad_token_id=loaded.pad_id,
                eos_token_id=list(loaded.eos_ids),
                output_logits=False,
            )
        return int((ids[:, padded["input_ids"].shape[1] :] != loaded.pad_id).sum())

    best = {"s2d": 0.0, "generate": 0.0}
    for seed in range(options.rounds):
        for name, sample in (("s2d", ours), ("generate", theirs)):
            start = time.perf_counter()
            tokens = sample(seed)
            best[name] = max(best[name], tokens / (time.perf_counter() - start))
    print(f"{options.rows} rows, {options.max_tokens} tokens at most, {torch.get_num_threads()} thread(s), {loaded.model.device}")
    for name, rate in best.items():
        print(f"{name:>10} {rate:10,.0f} tokens/s  {rate / best['generate']:.2f}x")


if __name__ == "__main__":
    main()
