"""Step time, tokens/s and peak memory of GRPO and on-policy distillation, here and in TRL, in one call.

    python tests/bench/bench_train.py                         both shapes, as many threads as cores
    python tests/bench/bench_train.py --shape toy --threads 1 --pairs 5
    python tests/bench/bench_train.py --shape wide --only s2d
    python tests/bench/bench_train.py --shape qwen3-1.7b --dtype bfloat16      on a GPU

Needs the extra `bench`. Both sides get the same model, prompts, group size, lengths and number of
updates, each in a process of its own. The policy is random and draws its EOS as often as any other token, on both
sides alike: of the toy shape's completions 61 % reach the limit, of the other shapes' all; rewards come from the parity of the text's
length. s2d grades through its real pool, TRL calls the same function.

  toy          Qwen3, 112,000 parameters, 256 rollouts of 16 tokens
  wide         Qwen3's vocabulary (151,936), 42 million parameters, 32 rollouts of 64 tokens
  qwen3-1.7b   Qwen3-1.7B's shape, random weights, 64 rollouts of 256 tokens

Single runs mislead on a machine that does other work too: the sides alternate, `--pairs` times, and "speed" is the
median of the pairs' ratios, with the least and the largest. "CPU s/step" is user and system time, of child processes
too, and "CPU speed" the ratios of that: what other processes take counts less there.

"beyond" is the peak of the process's memory less what it held before the model came, less weights,
gradients and optimizer state (16 bytes a parameter trained, 4 or 2 a parameter frozen).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SHAPES = {
    "toy": {
        "hidden": 64,
        "layers": 2,
        "heads": 2,
        "head_dim": 32,
        "mlp": 192,
        "vocabulary": 33,
        "rollouts": 256,
        "tokens": 16,
        "steps": 12,
        "positions": 8192,
    },
    "wide": {
        "hidden": 256,
        "layers": 4,
        "heads": 4,
        "head_dim": 64,
        "mlp": 768,
        "vocabulary": 151_936,
        "rollouts": 32,
        "tokens": 64,
        "steps": 3,
        "positions": 512,
    },
    "qwen3-1.7b": {
        "hidden": 2048,
        "layers": 28,
        "heads": 16,
        "kv_heads": 8,
        "head_dim": 128,
        "mlp": 6144,
        "vocabulary": 151_936,
        "rollouts": 64,
        "tokens": 256,
        "steps": 4,
        "positions": 16384,
    },
}
GROUP = 8
FOUND = "found.json"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def parity(completion, *_) -> float:
    """A reward that is as good as random, and the same for both sides."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return float(sum(map(ord, text)) % 2)


def make(folder: Path, shape: dict) -> None:
    """Write a random checkpoint with a tokenizer of one token per word, and problems of 14 words."""
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    words = ["<pad>", "<eos>", *(f"w{index}" for index in range(shape["vocabulary"] - 2))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape.get("kv_heads", shape["heads"]),
        head_dim=shape["head_dim"],
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name in ("policy", "teacher"):
        if name == "teacher":
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.01 * parameter.std())
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    with open(folder / "problems.jsonl", "w") as file:
        for index in range(256):
            text = " ".join(draw.choice(words[2:]) for _ in range(14))
            row = {
                "id": f"p{index}",
                "prompt": [{"role": "user", "content": text}],
                "answer": "1",
                "problem_sha256": f"{index:064x}",
                "source": {"dataset": "bench", "split": "train", "index": index},
            }
            file.write(json.dumps(row) + "\n")


def memory_now() -> int:
    """Bytes that this process holds: on the GPU if there is one in use, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_peak() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_seconds() -> float:
    """User and system time of this process and its descendants, seconds."""
    import psutil

    this = psutil.Process()
    times = [process.cpu_times() for process in [this, *this.children(recursive=True)]]
    return sum(time.user + time.system for time in times)


def run_s2d(folder: Path, method: str, shape: dict, dtype: str) -> dict:
    """Run the stage as the command line does, in this process, so that its memory can be read."""
    from transformers import AutoModelForCausalLM  # noqa: F401 - what both sides import is no part of the measure

    from s2dcli.cli import app
    from s2dcli.files.run_folder import RunFolder

    marks: list[float] = []
    add_row = RunFolder.add_row

    def marked(folder, row):
        marks.append(cpu_seconds())
        add_row(folder, row)

    RunFolder.add_row = marked
    shutil.rmtree(folder / f"s2d-{method}", ignore_errors=True)  # of the pair before
    start = memory_now()
    arguments = ["--problems-per-step", shape["rollouts"] // GROUP, "-n", GROUP, "--max-tokens", shape["tokens"], "--steps", shape["steps"]]
    arguments += [
        "--lr",
        "1e-5",
        "--dtype",
        dtype,
        "--tokens-per-batch",
        shape["positions"],
        "-o",
        folder / f"s2d-{method}",
        "--save-every",
        10**6,
        "-q",
    ]
    if method == "grpo":
        arguments += ["--model", folder / "policy", "--reward", "python:bench_train:parity"]
    else:
        arguments += ["--student", folder / "policy", "--teacher", folder / "teacher"]
    app([method, str(folder / "problems.jsonl"), *map(str, arguments)], standalone_mode=False)
    rows = [json.loads(line) for line in (folder / f"s2d-{method}" / "metrics.jsonl").read_text().splitlines()]
    return {"seconds": [row["seconds"] for row in rows], "cpu": marks, "beyond": memory_peak() - start}


def run_trl(folder: Path, method: str, shape: dict, dtype: str) -> dict:
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    rows = load_dataset("json", data_files=str(folder / "problems.jsonl"), split="train", cache_dir=str(folder / "cache"))
    rows = rows.select_columns(["prompt"])
    seconds: list[float] = []
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)
            marks.append(cpu_seconds())

    cuda = torch.cuda.is_available()
    common = {
        "output_dir": str(folder / f"trl-{method}"),
        "per_device_train_batch_size": shape["rollouts"],
        "gradient_accumulation_steps": 1,
        "max_steps": shape["steps"],
        "max_completion_length": shape["tokens"],
        "temperature": 1.0,
        "top_k": 0,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": dtype == "bfloat16",
        "use_cpu": not cuda,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    start = memory_now()
    if method == "grpo":
        config = GRPOConfig(**common, num_generations=GROUP, beta=0.0, loss_type="grpo")
        rewards = lambda completions, **_: [parity(completion) for completion in completions]  # noqa: E731
        trainer = GRPOTrainer(str(folder / "policy"), rewards, config, train_dataset=rows, callbacks=[Clock()])
    else:
        config = DistillationConfig(**common, beta=1.0)
        # One prompt gives one completion in this trainer: the groups of 8 are 8 copies of a prompt.
        rows = rows.select([index // GROUP for index in range(len(rows) * GROUP)])
        trainer = DistillationTrainer(str(folder / "policy"), str(folder / "teacher"), config, train_dataset=rows, callbacks=[Clock()])
    trainer.train()
    return {"seconds": seconds, "cpu": marks, "beyond": memory_peak() - start}


def measure(side: str, method: str, folder: Path, shape: dict, dtype: str, threads: int) -> dict:
    """Run one side in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--inner",
        side,
        "--method",
        method,
        "--folder",
        str(folder),
        "--dtype",
        dtype,
        "--shape",
        shape["name"],
    ]
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.PIPE, check=False
    )
    if done.returncode:
        sys.stderr.write((done.stderr or b"").decode()[-3000:])
        raise SystemExit(f"{side} {method} failed")
    return json.loads((folder / FOUND).read_text())


def parameters(folder: Path) -> int:
    from s2dcli.models.checkpoints import num_parameters, resolve

    return num_parameters(resolve(str(folder / "policy")))


class Figures(NamedTuple):
    """Of one run: wall and CPU seconds per step without the first one, bytes beyond the model and its optimizer."""

    seconds: float
    cpu: float
    beyond: float

    @classmethod
    def of(cls, found: dict, held: int) -> Figures:
        marks = found["cpu"]
        cpu = statistics.median(end - start for start, end in itertools.pairwise(marks))
        return cls(statistics.median(found["seconds"][1:]), cpu, found["beyond"] - held)


def ratios(base: list[Figures], runs: list[Figures], field: str) -> str:
    """Median, least and largest of how many times faster the runs are than those they alternated with."""
    found = [getattr(one, field) / getattr(other, field) for one, other in zip(base, runs, strict=True)]
    return f"{statistics.median(found):.2f}x ({min(found):.2f} to {max(found):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--only", choices=["s2d", "trl"])
    parser.add_argument("--method", choices=["grpo", "opd"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, default=5, help="alternating runs of each side")
    parser.add_argument("--inner", choices=["s2d", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        run = {"s2d": run_s2d, "trl": run_trl}[options.inner]
        found = run(options.folder, options.method, SHAPES[options.shape], options.dtype)
        (options.folder / FOUND).write_text(json.dumps(found))  # standard output belongs to the stages
        return

    print(f"{options.threads} threads, {options.pairs} runs of each side\n")
    print(f"| shape | method | side | s/step | CPU s/step | tokens/s | beyond, MB | speed | CPU speed | memory |\n|{'---|' * 10}")
    for name in ["toy", "wide"] if options.shape == "both" else [options.shape]:
        shape = {**SHAPES[name], "name": name}
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            make(folder, shape)
            count = parameters(folder)
            for method in [options.method] if options.method else ["grpo", "opd"]:
                frozen = count * (2 if options.dtype == "bfloat16" else 4) if method == "opd" else 0
                sides: dict[str, list[Figures]] = {side: [] for side in ([options.only] if options.only else ["trl", "s2d"])}
                for _ in range(options.pairs):
                    for side, runs in sides.items():
                        found = measure(side, method, folder, shape, options.dtype, options.threads)
                        runs.append(Figures.of(found, 16 * count + frozen))
                first = next(iter(sides.values()))
                for side, runs in sides.items():
                    seconds, cpu, beyond = (statistics.median(getattr(run, field) for run in runs) for field in Figures._fields)
                    tokens = shape["rollouts"] * shape["tokens"]
                    memory = statistics.median(run.beyond / base.beyond for base, run in zip(first, runs, strict=True))
                    print(
                        f"| {name} | {method} | {side} | {seconds:.3f} | {cpu:.3f} | {tokens / seconds:,.0f} | {beyond / 1e6:,.0f} "
                        f"| {ratios(first, runs, 'seconds')} | {ratios(first, runs, 'cpu')} | {memory:.0%} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
