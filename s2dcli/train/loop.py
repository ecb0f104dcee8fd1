"""The training loop: owns steps, optimizer, metrics, saving and evaluation; the algorithm stays in the stage.

run = TrainingRun("grpo", settings, policy, ...)
for step in run:
    with step.phase("sample"): ...
    run.update(step, rows, chosen, loss_of)
    step.log(reward=..., ...)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from s2dcli import console
from s2dcli.errors import S2DError
from s2dcli.files import jsonl
from s2dcli.files.checkpoint import create_folder, save_step, step_name
from s2dcli.files.manifest import MANIFEST, describe, write_json
from s2dcli.files.records import Problem
from s2dcli.models.checkpoints import Checkpoint, LoadedModel, saved_dtype
from s2dcli.models.forward import can_pack, can_share_prompts
from s2dcli.options import Schedule
from s2dcli.train.batching import MicroBatch, Row, micro_batches
from s2dcli.train.optimizer import MasterOptimizer
from s2dcli.train.policy import Loss, Policy

METRICS = "metrics.jsonl"
EVALS = "evals.jsonl"
PROBLEMS = "problems.jsonl"
ROLLOUTS = "rollouts"


def learning_rate(step: int, steps: int, settings: Mapping[str, Any]) -> float:
    """Learning rate of a step (from 1): linear warm-up to `lr`, then the schedule down to min_lr_ratio * lr."""
    peak, warmup, floor = settings["lr"], settings["warmup_steps"], settings["min_lr_ratio"]
    if step <= warmup:
        return peak * step / warmup
    if settings["schedule"] is Schedule.constant:
        return peak
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    share = 1 - progress if settings["schedule"] is Schedule.linear else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (floor + (1 - floor) * share)


@dataclass
class Step:
    """One step in progress: its number (from 1), timers, and what will become its row in metrics.jsonl."""

    number: int
    updates: int = 0
    tokens: int = 0  # completion tokens that were trained on
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)
    positions: int = 0  # that went through the model to be trained on, padding included
    padding: int = 0
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step; the parts show where a step's time goes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def log(self, **metrics: Any) -> None:
        self.metrics.update(metrics)

    def per_token(self, name: str) -> float:
        """Mean over all trained tokens of the step of a sum that the losses returned."""
        return float(self.sums[name]) / self.tokens if name in self.sums and self.tokens else 0.0

    def per_second(self, count: int, phase: str) -> float:
        return count / self.seconds[phase] if self.seconds[phase] else 0.0


class TrainingRun:
    """Iterates over the steps of a run; between two steps it logs, evaluates and saves."""

    def __init__(
        self,
        stage: str,
        settings: Mapping[str, Any],
        policy: Policy,
        loaded: LoadedModel,
        *,
        steps: int,
        phases: Sequence[str],
        inputs: Sequence[str],
        parents: Sequence[Checkpoint],
        problems: Sequence[Problem] = (),
        evaluate: Callable[[], dict[str, Any]] | None,
    ) -> None:
        """Make the run folder and a fresh optimizer.

        `settings` are the stage's resolved options; of these the loop reads the ones that all trainers
        share: out, overwrite, the optimizer's, tokens_per_batch, save_every, eval_every. `loaded` is
        the model in training as it came from disk; `phases` names the parts of a step to be timed.
        `evaluate` returns the figures of an evaluation; it is called before the first step too.
        """
        self.out: Path = settings["out"]
        self.settings, self.policy, self.loaded = settings, policy, loaded
        self.steps, self.phases, self.evaluate = steps, tuple(phases), evaluate
        self.dtype = saved_dtype(loaded.checkpoint)
        self.device = loaded.model.device
        self.optimizer = MasterOptimizer(policy, settings)
        self.updates = 0
        self.tokens = 0
        self.last_row: dict[str, Any] = {}
        self.last_eval: dict[str, Any] = {}
        self.checkpoint = Path()
        self.manifest = describe(stage, settings, inputs=inputs, parents=parents)
        create_folder(self.out, settings["overwrite"])
        self._write_manifest(complete=False)
        if problems:
            with jsonl.open_output(self.out / PROBLEMS) as writer:
                for problem in problems:
                    writer.write(problem.to_record())

    def __iter__(self) -> Iterator[Step]:
        with (
            open(self.out / METRICS, "wb") as metrics,
            open(self.out / EVALS, "wb") if self.evaluate else _nothing() as evals,
            console.training(self.steps) as show,
        ):
            self._evaluate(0, evals)
            for number in range(1, self.steps + 1):
                step = Step(number, seconds=dict.fromkeys(self.phases, 0.0))
                yield step
                self.last_row = self._row(step)
                metrics.write(jsonl.dumps(self.last_row))
                metrics.flush()
                show(self.last_row)
                if number % self.settings["eval_every"] == 0 or number == self.steps:
                    self._evaluate(number, evals)
                if number % self.settings["save_every"] == 0 or number == self.steps:
                    self._save(number)
        self._write_manifest(complete=True)

    def update(self, step: Step, rows: Sequence[Row], chosen: Sequence[int], loss_of: Callable[[MicroBatch], Loss]) -> None:
        """Make one optimizer update on the `chosen` rows; micro-batches add up to one exact gradient."""
        with step.phase("update"):
            # Prompts are shared through a cache, which layers that run twice would fill twice.
            share = can_share_prompts(self.loaded.model) and not self.settings["gradient_checkpointing"]
            budget = self.settings["tokens_per_batch"]
            pack = can_pack(self.loaded.model)
            batches = micro_batches(rows, chosen, budget, self.loaded.pad_id, self.device, share_prompts=share, pack=pack)
            for batch in batches:
                loss, sums = self.policy(batch, loss_of(batch))
                loss.backward()
                for name, value in {"loss": loss.detach(), **sums}.items():
                    step.sums[name] = step.sums.get(name, 0.0) + value
            grad_norm = self.optimizer.clip()
            if not math.isfinite(grad_norm):
                raise S2DError(
                    f"the gradient of step {step.number} is not finite (norm {grad_norm})",
                    where=str(self.out),
                    hint="a lower --lr or --dtype float32 usually mends it; checkpoints saved so far are untouched",
                )
            self.optimizer.step(learning_rate(step.number, self.steps, self.settings))
        step.updates += 1
        step.tokens += sum(sum(batch.lengths_B) for batch in batches)
        step.grad_norms.append(grad_norm)
        step.positions += sum(batch.num_positions for batch in batches)
        step.padding += sum(batch.num_padding for batch in batches)

    def identity(self, step: Step) -> dict[str, Any]:
        """Whose weights sample in a step: the parent's, or this run's after some updates, which no file holds."""
        parent = self.loaded.checkpoint
        if not self.updates:
            return {"model": parent.name, "revision": parent.revision, "step": parent.step, "checkpoint": parent.weights_sha256}
        return {"model": str(self.out), "revision": "", "step": step.number - 1, "checkpoint": ""}

    def keep_rollouts(self, step: Step, records: Sequence[dict[str, Any]]) -> None:
        """Write what a step learnt from to rollouts/step-NNNNNN.jsonl."""
        with jsonl.open_output(self.out / ROLLOUTS / f"{step_name(step.number)}.jsonl") as writer:
            for record in records:
                writer.write(record)

    def result(self, **figures: Any) -> dict[str, Any]:
        """What the command prints at its end: the checkpoint, the last step's figures, the last evaluation's."""
        evaluated = {f"eval_{name}": value for name, value in self.last_eval.items() if name != "step"}
        return {"checkpoint": str(self.checkpoint), **figures, **self.last_row, **evaluated}

    def _row(self, step: Step) -> dict[str, Any]:
        self.updates += step.updates
        self.tokens += step.tokens
        return {
            "step": step.number,
            "loss": float(step.sums.get("loss", 0.0)) / max(1, step.updates),
            "lr": learning_rate(step.number, self.steps, self.settings),
            "grad_norm": math.fsum(step.grad_norms) / max(1, len(step.grad_norms)),
            "updates": step.updates,
            "seconds": time.perf_counter() - step.started,
            "tokens": step.tokens,
            "padding": step.padding / max(1, step.positions),
            **step.metrics,
            **{f"{phase}_seconds": seconds for phase, seconds in step.seconds.items()},
        }

    def _evaluate(self, number: int, evals: Any) -> None:
        if self.evaluate is None:
            return
        self.last_eval = {"step": number, **self.evaluate()}
        evals.write(jsonl.dumps(self.last_eval))
        evals.flush()
        row = self.last_eval
        console.info(f"step {number}: avg@{row['k']} {row['avg_at_k']:.1%} ± {row['se']:.1%} on {row['problems']} problems")

    def _save(self, number: int) -> None:
        manifest = {**self.manifest, "complete": True, "counts": self._counts(number)}
        model, adapter = self.policy.model, self.policy.adapter
        state = adapter.merged(self.dtype) if adapter else self.optimizer.full_precision(model)
        parent, save_adapter = self.loaded.checkpoint.folder, adapter.save if adapter else None
        self.checkpoint = save_step(self.out, number, model, parent, self.dtype, manifest, state=state, save_adapter=save_adapter)

    def _write_manifest(self, *, complete: bool) -> None:
        counts = self._counts(self.steps if complete else 0)
        write_json(self.out / MANIFEST, {**self.manifest, "complete": complete, "counts": counts})

    def _counts(self, steps: int) -> dict[str, int]:
        return {"steps": steps, "updates": self.updates, "tokens": self.tokens}


@contextmanager
def _nothing() -> Iterator[None]:
    yield None
