"""Runs of every trainer as one process and as several, and how far apart what they leave is."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from conftest import TOY, Launched, Result, environments_of, read_jsonl, write_jsonl
from safetensors.torch import load_file, save_file
from tiny import training_row
from torch.distributed.tensor import DTensor
from zygote import DEADLINE_SECONDS

from s2dcli import console, world

STEPS = 2
# Micro-batches of a few rows, so that every process has several; every step is saved, with the optimizer's state.
COMMON = ["--steps", STEPS, "--lr", "1e-4", "--tokens-per-batch", 64, "--save-every", 1, "--keep-states", STEPS, "--save-dtype", "float32"]
SAMPLING = ["--problems-per-step", 5, "-n", 4, "--max-tokens", 16]
# In bfloat16 the shape of a product decides how it rounds, in one process as in several. So both sides run each row by itself,
# with its prompt, as FSDP2 does, and sample each group by itself, however many a process samples.
NARROW = ["--weights", "bfloat16", "--gradient-checkpointing", "--sample-tokens", 128, "--tokens-per-batch", 24]
VARIANTS = {"tied": [], "untied": [], "lora": ["--lora-rank", 4], "bfloat16": NARROW, "lora, bfloat16": ["--lora-rank", 4, *NARROW]}
# What measures rounding itself; and padding, as rows are cut into more micro-batches where there would be fewer than processes.
NOT_COMPARED = {"logprob_mismatch", "saved", "padding"}
SMALL = 1e-2  # below this a metric's difference is taken relative to this: GRPO's loss is a sum of advantages, 0 but for rounding


def make_inputs(folder: Path, run: Callable[..., Result]) -> None:
    """Make models with untied heads, some problems, and graded rollouts of the toy teacher."""
    for name in ("teacher", "student"):
        untie(TOY / name, folder / name)
    for half, name in (("1H", "problems"), ("2H", "eval")):
        lines = (TOY / "problems" / f"{half}.jsonl").read_bytes().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_bytes(b"".join(lines[:24]))
    problems = read_jsonl(folder / "problems.jsonl")
    for problem in problems[::3]:
        problem["source"]["dataset"] = "other"
    write_jsonl(folder / "sources.jsonl", problems)
    rollouts = run("rollout", "-m", TOY / "teacher", folder / "problems.jsonl", "-n", 2, "--max-tokens", 16, "-q")
    graded = run("verify", stdin=rollouts.out)
    (folder / "graded.jsonl").write_bytes(graded.out)
    run("score", "-m", TOY / "teacher", folder / "graded.jsonl", "-o", folder / "cache", "--top-k", 8, "-q")


def untie(source: Path, target: Path) -> None:
    """Copy a checkpoint with a head of its own, equal to the embedding."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def commands(folder: Path, variant: str) -> dict[str, list[object]]:
    """Return a command, without its output, for everything that trainers do differently."""
    models = folder if variant == "untied" else TOY
    more = [*COMMON, *VARIANTS[variant]]
    problems, graded = folder / "problems.jsonl", folder / "graded.jsonl"
    pair = ["--teacher", models / "teacher", "--student", models / "student"]
    cached = [*pair[2:], "--rollouts", graded, "--cache", folder / "cache"]
    grpo = ["grpo", "--model", models / "teacher"]
    exact = ["--reward", "exact", "--workers", 1]  # sympy takes seconds to start
    updates = ["--mini-batch-size", 8, "--dynamic-sampling", 1, "--kl-coef", 0.1, "--importance", "sequence", "--correction", "truncate"]
    evaluated = ["--max-tokens", 16, "--eval-problems", folder / "eval.jsonl", "--eval-every", 2, "--eval-samples", 1]
    by_source = [f"toy-arithmetic={models / 'teacher'}", "--teacher", f"other={TOY / 'teacher'}", "--reference", models / "student"]
    forms = ["--task-reward-weight", 1.5, "--divergence", "jsd", "--clamp", 0.1, "--loss-tokens", 6, "--tokens-per-batch", 24]
    return {
        "grpo": [*grpo, problems, *SAMPLING, *exact, *more],
        "grpo, all options": [*grpo, problems, *SAMPLING, *exact, *updates, *more],
        "grpo from disk": [*grpo, "--rollouts", graded, "--problems-per-step", 4, "--kl-coef", 0.1, "--kl-in", "reward", *more],
        "fkl-warmup": ["fkl-warmup", *pair, "--rollouts", graded, "--mini-batch-size", 18, *more, *evaluated],
        "fkl-warmup, cache": ["fkl-warmup", *cached, "--mini-batch-size", 18, *more],
        "opd, cache": ["opd", *cached, "--estimator", "top-k", "--top-k", 8, "--problems-per-step", 9, *more],
        "hard labels": ["fkl-warmup", *pair[2:], "--hard-labels", "--only-correct", "--rollouts", graded, "--mini-batch-size", 9, *more],
        "opd": ["opd", *pair, problems, *SAMPLING, *more],
        "opd, all forms": ["opd", "--teacher", *by_source, *pair[2:], folder / "sources.jsonl", *SAMPLING, *more, *forms],
        "opd, baseline": ["opd", *pair, problems, *SAMPLING, "--estimator", "sampled", "--baseline", "kl", *more],
        "opd, top k": ["opd", *pair, problems, *SAMPLING, "--estimator", "top-k", "--top-k", 8, *more],
        "opd, sampled": ["opd", *pair, problems, *SAMPLING, "--estimator", "sampled", *more],
    }


@dataclass(frozen=True)
class Differences:
    """Largest relative differences: of the first update's gradient, of metrics.jsonl and evals.jsonl, and of saved weights."""

    gradient: float
    metrics: float
    weights: float


def compare(one: Path, several: Path) -> Differences:
    first, last = (f"step-{step:06d}" for step in (1, STEPS))
    # After one update AdamW's first moment is the gradient, scaled.
    moments = [_load(run / first / "training_state", "exp_avg/") for run in (one, several)]
    return Differences(_apart(*moments), _figures_apart(one, several), _apart(*(_load(run / last) for run in (one, several))))


def _load(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: tensor.double() for name, tensor in tensors.items() if name.startswith(prefix)}


def _apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    assert one
    squares = [((one[name] - other[name]).square().sum(), one[name].square().sum()) for name in one]
    return float((sum(apart for apart, _ in squares) / sum(size for _, size in squares)).sqrt())


def _figures_apart(one: Path, several: Path) -> float:
    worst = 0.0
    for name in ("metrics.jsonl", "evals.jsonl"):
        if not (one / name).exists():
            continue
        for ours, theirs in zip(read_jsonl(one / name), read_jsonl(several / name), strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - NOT_COMPARED:
                if "seconds" in key or "per_second" in key or key.endswith("_share"):
                    continue
                if not isinstance(ours[key], float) or theirs[key] is None:
                    assert ours[key] == theirs[key], key
                    continue
                worst = max(worst, abs(ours[key] - theirs[key]) / max(abs(ours[key]), SMALL))
    return worst


def in_each(number: int, function: Callable[..., Any], *args: Any, sharded: bool = False) -> list[Any]:
    """Return what a function returns in each of several processes."""
    context = multiprocessing.get_context("forkserver")  # a process that has our imports and nothing else
    context.set_forkserver_preload(["accelerate", "s2dcli.assembly.loading", "transformers.models.qwen3.modeling_qwen3"])
    answers = [context.Pipe(duplex=False) for _ in range(number)]
    told = environments_of(number, sharded=sharded)
    children = [
        context.Process(target=_answer, args=(sending, environment, function, *args))
        for (_, sending), environment in zip(answers, told, strict=True)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(DEADLINE_SECONDS)
        assert child.exitcode == 0
    return [receiving.recv() for receiving, _ in answers]


def _answer(connection: Connection, environment: dict[str, str], function: Callable[..., Any], *args: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    console.configure(quiet=True, verbose=False)
    connection.send(function(*args))
    world.leave()


@dataclass(frozen=True)
class Held:
    """Bytes that a process holds of weights, gradients and moments, and whether all weights are distributed tensors."""

    weights: int
    gradients: int
    moments: int
    distributed: bool

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments


def make_wide(folder: Path) -> None:
    """Make a random model of 14 million parameters with the toy's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    config = Qwen3Config.from_pretrained(TOY / "teacher")
    config.update({"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "layer_types": ["full_attention"] * 8})
    config.update({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOY / "teacher").save_pretrained(folder)


def held(checkpoint: Path, narrow: bool = False) -> Held:
    """Train a checkpoint a little and measure what is held when the gradients of a second update are there."""
    from s2dcli.assembly.loading import load_trained
    from s2dcli.models.batching import micro_batches
    from s2dcli.models.checkpoints import resolve
    from s2dcli.models.sharding import part_of
    from s2dcli.options import ModelOptions, TrainingOptions, Weights
    from s2dcli.train.objectives import CrossEntropy
    from s2dcli.train.optimizer import MasterOptimizer

    training = TrainingOptions(weights=Weights.bfloat16 if narrow else Weights.float32)
    _, policy = load_trained(resolve(str(checkpoint)), ModelOptions(), training)
    optimizer = MasterOptimizer(policy, training)
    policy.collect_gradients(optimizer.gradient_of)
    row = training_row([4, 5, 6], [7, 8, 9])
    for update in range(2):
        for batch in micro_batches([row], 100, 0, torch.device("cpu"), share_prompts=False):
            policy(batch, CrossEntropy())[0].backward()
            optimizer.end_micro_batch()
        optimizer.sum_gradients()
        optimizer.clip()
        if not update:
            optimizer.step(1e-6)
    weights = {part_of(weight).untyped_storage().data_ptr(): part_of(weight).nbytes for weight in policy.parameters()}
    weights |= {master.untyped_storage().data_ptr(): master.nbytes for master in optimizer.masters.values()}
    moments = (value for state in optimizer.adamw.state.values() for value in state.values() if value.ndim)
    return Held(
        sum(weights.values()),
        sum(master.grad.nbytes for master in optimizer.masters.values()),
        sum(value.nbytes for value in moments),
        all(isinstance(weight, DTensor) for weight in policy.parameters()),
    )


def start(number: int, command: Sequence[object], out: Path, *more: object, sharded: bool = False) -> Launched:
    return Launched(number, [*command, "-o", out, *more, "-q"], sharded=sharded)
