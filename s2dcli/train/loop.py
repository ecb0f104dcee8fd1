"""The training loop: owns steps, optimizer, metrics, saving, resuming and evaluation; the algorithm stays in the stage.

with open_run("grpo", settings, ...) as folder:
    run = TrainingRun(folder, settings, policy, ...)
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
from s2dcli.files.checkpoint import TRAINING_STATE, read_training_state, save_weights, write_checkpoint, write_training_state
from s2dcli.files.manifest import HOW_STARTED, describe
from s2dcli.files.records import Problem
from s2dcli.files.run_folder import RunFolder
from s2dcli.models.batching import MicroBatch, Row, micro_batches
from s2dcli.models.checkpoints import Checkpoint, LoadedModel, saved_dtype
from s2dcli.models.policy import Loss, Policy, score
from s2dcli.models.selftest import can_pack, can_share_prompts
from s2dcli.options import Schedule, parse_cadence
from s2dcli.train.optimizer import MasterOptimizer


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


def open_run(
    stage: str,
    settings: Mapping[str, Any],
    *,
    steps: int,
    inputs: Sequence[str],
    parents: Sequence[Checkpoint],
    problems: Sequence[Problem] = (),
    rollouts: Sequence[dict[str, Any]] = (),
) -> RunFolder:
    """Describe a run by its resolved options and what it reads, and return its folder, to be entered.

    `problems`, which the folder keeps, or `rollouts` are what was read from the first of `inputs`.
    """
    given = [problem.to_record() for problem in problems]
    manifest = describe(stage, settings, inputs=inputs, parents=parents, rollouts=rollouts)
    manifest["options"] = {name: value for name, value in manifest["options"].items() if name not in HOW_STARTED}
    if jsonl.is_stream(inputs[0]):  # so that a resume is given the same
        manifest["inputs"][0]["sha256"] = jsonl.sha256([*given, *rollouts])
    return RunFolder(
        settings["out"],
        manifest,
        steps=steps,
        problems=given,
        keep_last=settings["keep_last"],
        keep_states=settings["keep_states"],
        overwrite=settings["overwrite"],
        resume=settings["resume"],
    )


class TrainingRun:
    """Iterates over the steps of a run that are left to do; between two steps it logs, evaluates and saves.

    What a step does depends on its number, the seed and the weights: which items it takes (order.py) and
    the noise of each sample (files/records.row_seed) are functions of them, and no model drops out. So the
    number of steps done, the masters and the moments are all that going on needs.
    """

    def __init__(
        self,
        folder: RunFolder,
        settings: Mapping[str, Any],
        policy: Policy,
        loaded: LoadedModel,
        *,
        phases: Sequence[str],
        evaluate: Callable[[], dict[str, Any]] | None,
    ) -> None:
        """Make an optimizer, and put it and `policy` where the run stands that `folder` holds.

        `settings` are the stage's resolved options; of these the loop reads the ones that all trainers
        share: the optimizer's, tokens_per_batch, save_every, eval_every. `loaded`
        is the model in training as it came from disk; `phases` names the parts of a step to be timed.
        `evaluate` returns the figures of an evaluation; it is called before the first step too.
        """
        self.folder, self.settings, self.policy, self.loaded = folder, settings, policy, loaded
        self.phases, self.evaluate = tuple(phases), evaluate
        self.dtype = saved_dtype(loaded.checkpoint)
        self.device = loaded.model.device
        self.optimizer = MasterOptimizer(policy, settings)
        # The problems whose answers the run has learnt from; stages add to it.
        self.labels = set(folder.labels)
        self.counts = {"steps": 0, "updates": 0, "rollouts": 0, "tokens": 0, "seconds": 0.0, **folder.counts}
        self.out, self.updates = folder.out, self.counts["updates"]  # for engines that follow the weights
        self._cadence = parse_cadence(settings["save_every"])
        self._save_seconds = 0.0  # that saving has taken since the last row
        if folder.step:
            self.optimizer.restore(read_training_state(folder.checkpoint / TRAINING_STATE))

    def __iter__(self) -> Iterator[Step]:
        steps, saved = self.folder.steps, time.monotonic()
        with console.training(steps) as show:
            if not self.folder.step:
                self._evaluate(0)
            for number in range(self.folder.step + 1, steps + 1):
                step = Step(number, seconds=dict.fromkeys(self.phases, 0.0))
                yield step
                row = self._row(step)
                self.folder.add_row(row)
                show(row)
                if number % self.settings["eval_every"] == 0 or number == steps:
                    self._evaluate(number)
                every_steps, every_seconds = self._cadence
                due = number % every_steps == 0 or time.monotonic() - saved >= every_seconds
                if due or number == steps:
                    self._save(number)
                    saved = time.monotonic()
        self.folder.finish()

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
                    where=str(self.folder.out),
                    hint="a lower --lr or --dtype float32 usually mends it; checkpoints saved so far are untouched",
                )
            self.optimizer.step(learning_rate(step.number, self.folder.steps, self.settings))
        step.updates += 1
        self.updates += 1
        step.tokens += sum(sum(batch.lengths_B) for batch in batches)
        step.grad_norms.append(grad_norm)
        step.positions += sum(batch.num_positions for batch in batches)
        step.padding += sum(batch.num_padding for batch in batches)

    def identity(self, step: Step) -> dict[str, Any]:
        """Whose weights sample in a step: the parent's, or this run's after some updates, which no file holds."""
        parent = self.loaded.checkpoint
        if not self.counts["updates"]:
            return {"model": parent.name, "revision": parent.revision, "step": parent.step, "checkpoint": parent.weights_sha256}
        return {"model": str(self.folder.out), "revision": "", "step": step.number - 1, "checkpoint": ""}

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the state dict of a plain model that is what this run has learnt, at full precision or in `dtype`."""
        adapter = self.policy.adapter
        return adapter.merged(dtype) if adapter else self.optimizer.full_precision(self.policy.model)

    def weights_bytes(self, dtype: torch.dtype) -> int:
        return sum(parameter.numel() for parameter in self.policy.parameters()) * dtype.itemsize

    def write_weights(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the weights as they are now, in `dtype`, for an engine to load."""
        save_weights(folder, self.policy.model, self.weights(dtype), dtype)

    def score(self, rows: Sequence[tuple[list[int], list[int]]], temperature: float) -> list[list[float]]:
        """Log-probs (nats) of completions' tokens, of rows of (prompt ids, completion ids), under the weights as they are now."""
        return score(
            self.policy,
            [Row(*row) for row in rows],
            tokens_per_batch=self.settings["tokens_per_batch"],
            pad_id=self.loaded.pad_id,
            temperature=temperature,
        )

    def _row(self, step: Step) -> dict[str, Any]:
        row = {
            "step": step.number,
            "loss": float(step.sums.get("loss", 0.0)) / max(1, step.updates),
            "lr": learning_rate(step.number, self.folder.steps, self.settings),
            "grad_norm": math.fsum(step.grad_norms) / max(1, len(step.grad_norms)),
            "updates": step.updates,
            "seconds": time.perf_counter() - step.started,
            "tokens": step.tokens,
            "padding": step.padding / max(1, step.positions),
            **step.metrics,
            "labels": len(self.labels),
            **{f"{phase}_seconds": seconds for phase, seconds in step.seconds.items()},
            "save_seconds": self._save_seconds,
        }
        self._save_seconds = 0.0
        self.counts["steps"] = step.number
        for name in ("updates", "rollouts", "tokens", "seconds"):
            self.counts[name] += row[name]
        return row

    def _evaluate(self, number: int) -> None:
        if self.evaluate is None:
            return
        row = {"step": number, **self.evaluate()}
        self.folder.add_eval(row)
        console.info(f"step {number}: avg@{row['k']} {row['avg_at_k']:.1%} ± {row['se']:.1%} on {row['problems']} problems")

    def _save(self, number: int) -> None:
        started = time.perf_counter()

        def fill(draft: Path) -> None:
            model, adapter = self.policy.model, self.policy.adapter
            state = self.weights(self.dtype)
            save_adapter = adapter.save if adapter else None
            write_checkpoint(draft, model, self.loaded.checkpoint.folder, self.dtype, state=state, save_adapter=save_adapter)
            write_training_state(draft / TRAINING_STATE, self.optimizer.state())

        self.folder.save(number, self.counts, self.labels, fill)
        self._save_seconds = time.perf_counter() - started
