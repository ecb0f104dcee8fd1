#!/usr/bin/env python3
"""What the paper's runs need: memory per GPU, tokens, hours and disk, as the tables of PLANNING.md.

    examples/planning.py                     # minutes of CPU time; needs s2d on the PATH, no GPU, no network, no weights
    examples/planning.py --mean-tokens 8000  # other assumptions: --help
    examples/planning.py OPD                 # memory of stages with that in their name alone

Memory is what `s2d ... --dry-run --device cuda --processes N` says with the options of qwen3/settings.sh and llama/settings.sh, for model
folders that hold config.json and a tokenizer alone (the toy family's: a plan reads no more of it than the lengths of prompts).
A stage that does not fit an H100 is planned again with --weights bfloat16, and where that fits no card on twice as many GPUs.
Hours are those of the formulas below, and no better than their assumptions.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from s2dcli.console import markdown
from s2dcli.files.records import Rollout
from s2dcli.files.teacher_cache import bytes_per_token
from s2dcli.options import Keep, ValueType

HERE = Path(__file__).parent
TOKENIZER = HERE / "toy" / "student"
DIGIT = "2"  # is one token of its, however many stand in a row
TEMPLATE = 2  # tokens that its chat template adds to a message
PROBLEMS = 17_398  # of DAPO-Math-17k without duplicates, 1H and 2H together
EPOCHS = 10  # of the teacher's RL, and of direct GRPO
STEP = 32 * 8  # rollouts of a step that samples: --problems-per-step, -n
PROMPTS, COMPLETION = (3072, 2048), 16_384  # tokens at most: prompts of RL and of distillation
CARDS = {"H100": 80e9, "H200": 141e9}  # bytes
FIT_SHARE = 0.9  # of a card that a plan may fill: Python, torch, CUDA and NCCL come on top
MOST_GPUS = 64
KEPT_IDS = 128  # of --keep top-k
SAMPLER = "http://sampler:8000"  # is not asked by a plan: which GPUs sample is a question of hours


@dataclass(frozen=True)
class Model:
    """A model's shape, as config.json on the hub has it."""

    family: str
    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    tied: bool
    positions: int
    kv_heads: int = 8
    head_size: int = 128

    @property
    def parameters(self) -> int:
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        head_norms = 2 * self.head_size if self.family == "qwen3" else 0
        layer = 2 * self.hidden * (queries + keys) + 3 * self.hidden * self.inner + 2 * self.hidden + head_norms
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.layers * layer + self.hidden

    def config(self) -> dict[str, object]:
        ends = json.loads((TOKENIZER / "config.json").read_text())
        return {
            "model_type": self.family,
            "architectures": [f"{self.family.capitalize()}ForCausalLM"],
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.positions,
            **{name: ends[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        }


MODELS = {
    "Qwen3-1.7B": Model("qwen3", 151_936, 2048, 6144, 28, 16, True, 40_960),
    "Qwen3-8B": Model("qwen3", 151_936, 4096, 12_288, 36, 32, False, 40_960),
    "Qwen3-14B": Model("qwen3", 151_936, 5120, 17_408, 40, 40, False, 40_960),
    "Llama-3.1-8B": Model("llama", 128_256, 4096, 14_336, 32, 32, False, 131_072),
    "Llama-3.3-70B": Model("llama", 128_256, 8192, 28_672, 80, 64, False, 131_072),
}
# Student, teachers, settings, GPUs to begin with
PAIRS = (("Qwen3-1.7B", ("Qwen3-8B", "Qwen3-14B"), "qwen3", 8), ("Llama-3.1-8B", ("Llama-3.3-70B",), "llama", 16))


@dataclass(frozen=True)
class Assumptions:
    """What is not known before a run. The first two are an H100's (SXM), by its data sheet."""

    peak: float = 989e12  # FLOP/s in bfloat16
    bandwidth: float = 3.35e12  # bytes/s
    share_of_peak: float = 0.35  # that updates and scoring reach
    share_of_bandwidth: float = 0.5  # that decoding reaches
    mean_tokens: float = 4000  # of a completion
    mean_prompt: float = 200  # tokens
    sequences: int = 256  # that a sampling GPU decodes at once, if its memory and the step have so many

    @property
    def row(self) -> float:
        return self.mean_prompt + self.mean_tokens

    def forward_flops(self, model: Model) -> float:
        """FLOPs of a token's forward pass, 2 P + 2 A L row: A is the width of all heads, and attention sees half of a row."""
        return 2 * model.parameters + 2 * model.heads * model.head_size * model.layers * self.row

    def decoding(self, model: Model, per_gpu: float) -> tuple[float, float]:
        """Return tokens per second and GPU, and seconds of a token, of a sampler with `per_gpu` sequences on each GPU at most.

        With B sequences on g GPUs, which keep at most half of their memory for weights,

            seconds = (2 P + B kv row / 2) / (g * share_of_bandwidth * bandwidth),   kv = 4 * layers * key-value width bytes

        as each token reads all weights and the cache of its row, half full on average.
        """
        weights, cache = 2 * model.parameters, 4 * model.layers * model.kv_heads * model.head_size
        gpus, memory = 1, FIT_SHARE * CARDS["H100"]
        while weights > memory * gpus / 2:
            gpus *= 2
        together = min(self.sequences * gpus, per_gpu * gpus, (memory * gpus - weights) / (cache * self.row))
        seconds = (weights + together * cache * self.row / 2) / (gpus * self.share_of_bandwidth * self.bandwidth)
        return together / seconds / gpus, seconds


def settings(name: str) -> dict[str, list[str]]:
    """Return arrays of a settings file."""
    shown = "; ".join(f'printf "%s\\n" {array} "${{{array}[@]}}" ""' for array in ("trainer", "sampling", "grpo", "warmup", "opd"))
    told = subprocess.run(
        ["bash", "-c", f'source "$1"; {shown}', "-", HERE / name / "settings.sh"], check=True, capture_output=True, text=True
    )
    return {lines[0]: lines[1:] for lines in (part.split("\n") for part in told.stdout.strip().split("\n\n"))}


def stages(folder: Path) -> dict[str, tuple[list[str], int]]:
    """Return the trainers of the routes by the stage's name: command, GPUs to begin with."""
    found = {}
    for student, teachers, name, gpus in PAIRS:
        options = settings(name)
        sampled = [folder / "problems.jsonl", "--engine", SAMPLER, *options["sampling"], *options["trainer"], "--steps", 1]
        warmup = [
            "fkl-warmup",
            "--student",
            folder / student,
            "--rollouts",
            folder / "rollouts.jsonl",
            *options["trainer"],
            *options["warmup"],
        ]
        for model in (*teachers, student):
            found[f"{model}: GRPO"] = ["grpo", "--model", folder / model, *sampled, *options["grpo"]], gpus
        # From a cache it holds what plain SFT does: no teacher
        found[f"{student}: warm-up from a cache"] = [*warmup, "--hard-labels"], gpus
        for teacher in teachers:
            pair = ["--teacher", folder / teacher, "--student", folder / student]
            found[f"{student}: warm-up from {teacher}"] = [*warmup, *pair[:2]], gpus
            found[f"{student}: OPD from {teacher}"] = ["opd", *pair, *sampled, *options["opd"]], gpus
    return {stage: ([str(word) for word in command], gpus) for stage, (command, gpus) in found.items()}


def make_inputs(folder: Path) -> None:
    """Write models without weights, problems two of which reach the limits, and rollouts of the shorter ones, of which one does."""
    for name, model in MODELS.items():
        shutil.copytree(TOKENIZER, folder / name, ignore=shutil.ignore_patterns("*.safetensors", "generation_config.json"))
        (folder / name / "config.json").write_text(json.dumps(model.config()))
    digit = json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"][DIGIT]
    with open(folder / "problems.jsonl", "w") as problems, open(folder / "rollouts.jsonl", "w") as rollouts:
        for index, length in enumerate([*PROMPTS, *[16] * 64]):
            prompt = [{"role": "user", "content": DIGIT * (length - TEMPLATE)}]
            identity = {"answer": DIGIT, "problem_sha256": f"{index:064x}", "source": {}}
            problems.write(json.dumps({"id": f"p{index}", "prompt": prompt, **identity}) + "\n")
            if length <= PROMPTS[1]:
                size = COMPLETION if length == PROMPTS[1] else 16
                rollout = Rollout(
                    problem_id=f"p{index}",
                    group_id=f"p{index}",
                    sample_index=0,
                    prompt=prompt,
                    completion=[{"role": "assistant", "content": DIGIT * size}],
                    prompt_ids=[digit] * length,
                    completion_ids=[digit] * size,
                    completion_logprobs=[0.0] * size,
                    finish_reason="stop",
                    seed=0,
                    sampler={"max_tokens": COMPLETION},
                    template_sha256="",
                    **identity,
                )
                rollouts.write(json.dumps(rollout.to_record()) + "\n")


def plans(folder: Path, command: list[str], gpus: int) -> list[tuple[int, str, dict]]:
    """Return the plans of a stage with GPUs and more options, the last of which fits a card."""
    found: list[tuple[int, str, dict]] = []
    while gpus <= MOST_GPUS:
        more = ["--weights", "bfloat16"] if found else []
        asked = ["--device", "cuda", "--processes", str(gpus), "--dry-run", "-q", "-o", str(folder / "none")]
        done = subprocess.run(["s2d", *command, *more, *asked], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(['s2d', *command, *more, *asked])}\n{done.stderr}")
        found.append((gpus, " ".join(more), json.loads(done.stdout)))
        if card(found[-1][2]) == "H100" or (more and card(found[-1][2])):
            break
        gpus *= 2 if more else 1
    return found


def card(plan: dict) -> str:
    """Return the smallest card that a plan fits, "" if none."""
    return next((name for name, size in CARDS.items() if plan["total_bytes"] <= FIT_SHARE * size), "")


def gigabytes(number: float) -> str:
    return f"{number / 1e9:,.1f}"


MEMORY = {
    "weights, masters, moments": ("weights", "masters", "optimizer"),
    "frozen": ("frozen",),
    "gradients": ("gradients",),
    "gathered, casts": ("gathered", "casts"),
    "activations": ("activations",),
    "loss": ("logits",),
    "in all": ("total",),
}


def memory_table(found: dict[str, list[tuple[int, str, dict]]]) -> list[list[str]]:
    """What one process holds; `free to sample` is what an engine in the same process could take of an H100 meanwhile."""
    table = [["", "GPUs", "longest row", *MEMORY, "free to sample", "fits"]]
    for stage, tried in found.items():
        for gpus, more, plan in tried:
            parts = [gigabytes(sum(plan[f"{name}_bytes"] for name in names)) for names in MEMORY.values()]
            always = sum(plan[f"{name}_bytes"] for name in ("weights", "masters", "optimizer", "frozen"))
            free = gigabytes(max(0.0, FIT_SHARE * CARDS["H100"] - always))
            table.append([f"{stage} {more}".strip(), str(gpus), f"{plan['row_tokens_at_most']:,}", *parts, free, card(plan) or "neither"])
    return table


def hours_table(gpus_of: dict[str, int], assumed: Assumptions) -> list[list[str]]:
    """Rollouts, tokens and hours of the stages of R3-full, and of direct GRPO of the student (R1)."""
    table = [["", "GPUs", "rollouts", "tokens (G)", "sampling", "scoring", "updating", "hours"]]
    once = 8 * PROBLEMS

    def add(stage: str, gpus: int, rollouts: int, sampler: Model | None, steps: bool, scoring: list[Model], updating: list[Model]) -> None:
        speed = gpus * assumed.share_of_peak * assumed.peak
        seconds = [0.0, *(rollouts * assumed.row * sum(map(assumed.forward_flops, passes)) / speed for passes in (scoring, updating))]
        if sampler:
            rate, latency = assumed.decoding(sampler, STEP / gpus if steps else assumed.sequences)
            seconds[0] = rollouts * assumed.mean_tokens / (rate * gpus)
            if steps:  # each waits for its longest completion
                seconds[0] = max(seconds[0], rollouts / STEP * COMPLETION * latency)
        hours = [f"{part / 3600:,.1f}" if part else "-" for part in seconds]
        table.append([stage, str(gpus), f"{rollouts:,}", f"{rollouts * assumed.row / 1e9:,.2f}", *hours, f"{sum(seconds) / 3600:,.0f}"])

    for student, teachers, *_ in PAIRS:
        small = MODELS[student]
        for teacher in teachers:
            large, gpus = MODELS[teacher], gpus_of[f"{teacher}: GRPO"]
            add(f"{teacher}: GRPO, {EPOCHS} epochs", gpus, EPOCHS * once, large, True, [large] * 2, [large] * 4)
            add(f"{teacher}: rollout", gpus, once, large, False, [], [])
            add(f"{teacher}: score", gpus, once, None, False, [large], [])
        gpus = gpus_of[f"{student}: warm-up from a cache"]
        add(f"{student}: warm-up from a cache", gpus, once, None, False, [], [small] * 4)
        for teacher in teachers:
            gpus = gpus_of[f"{student}: OPD from {teacher}"]
            add(f"{student}: OPD from {teacher}", gpus, once, small, True, [MODELS[teacher]], [small] * 4)
        add(f"{student}: direct GRPO, {EPOCHS} epochs", gpus_of[f"{student}: GRPO"], EPOCHS * once, small, True, [small] * 2, [small] * 4)
    return table


def disk_table(assumed: Assumptions) -> list[list[str]]:
    """What 8 rollouts of every problem, their teacher caches, and a checkpoint take, and the first process's main memory."""
    tokens = 8 * PROBLEMS * assumed.mean_tokens
    # A token's id, its log-prob, and some four characters of text
    line = len(json.dumps([100_000] * 1000) + json.dumps([-0.123456] * 1000)) / 1000 + 4
    table = [["GB", "rollouts", *(f"cache, {keep}" for keep in Keep), "checkpoint", "training state", "main memory"]]
    for name, model in MODELS.items():
        caches = [tokens * bytes_per_token(keep, KEPT_IDS, model.hidden, ValueType.float16) for keep in Keep]
        table.append([name, *map(gigabytes, [tokens * line, *caches, *(size * model.parameters for size in (2, 12, 4))])])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="plan the memory of stages with these words in their name alone")
    for name, value in asdict(Assumptions()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    words = given.pop("words")
    assumed = Assumptions(**given)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        make_inputs(folder)
        chosen = {stage: how for stage, how in stages(folder).items() if all(word in stage for word in words)}
        found = dict(zip(chosen, pool.map(lambda how: plans(folder, *how), chosen.values()), strict=True))
    print(f"### Memory of one process (GB)\n\n{markdown(memory_table(found))}")
    if not words:
        print(f"### Hours\n\n{markdown(hours_table({stage: tried[-1][0] for stage, tried in found.items()}, assumed))}")
        print(f"### Disk and main memory\n\n{markdown(disk_table(assumed))}", end="")


if __name__ == "__main__":
    main()
