"""The training loop: owns steps, optimizer, metrics, saving, resuming and evaluation; the algorithm stays in the stage.

run = TrainingRun(folder, policy, loaded, training, running, phases=("sample", "update"))
for step in run:
    with step.phase("sample"): ...
    run.update(step, rows, objective)
    step.log(reward=..., ...)
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from s2dcli import console, stats, world
from s2dcli.errors import S2DError
from s2dcli.files.checkpoint import ADAPTER, TRAINING_STATE, read_training_state, save_weights, write_checkpoint, write_training_state
from s2dcli.files.run_folder import RunFolder
from s2dcli.models.batching import MicroBatch, micro_batches
from s2dcli.models.checkpoints import LoadedModel, saved_dtype
from s2dcli.models.policy import Objective, Policy
from s2dcli.models.readers import free_bytes
from s2dcli.models.rows import Row
from s2dcli.models.scoring import score
from s2dcli.models.selftest import common_fast_paths
from s2dcli.models.sharding import whole_state
from s2dcli.options import Dtype, RunOptions, Schedule, TrainingOptions, parse_cadence
from s2dcli.train.optimizer import MasterOptimizer
from s2dcli.train.rows import TrainingRow
from s2dcli.train.saving import CHECKED_ROWS, MUCH_KL, MUCH_LOST, rounding_loss, saved_kl
from s2dcli.train.tracking import Trackers


def learning_rate(step: int, steps: int, training: TrainingOptions) -> float:
    """Learning rate of a step (from 1): linear warm-up to `lr`, then the schedule down to min_lr_ratio * lr."""
    if step <= training.warmup_steps:
        return training.lr * step / training.warmup_steps
    if training.schedule is Schedule.constant:
        return training.lr
    progress = (step - 1 - training.warmup_steps) / max(1, steps - training.warmup_steps)
    share = 1 - progress if training.schedule is Schedule.linear else 0.5 * (1 + math.cos(math.pi * progress))
    return training.lr * (training.min_lr_ratio + (1 - training.min_lr_ratio) * share)


def _parts(rows: Sequence[TrainingRow], sources: Sequence[str]) -> list[Sequence[TrainingRow]]:
    """Rows that may share micro-batches: all, or those of each source."""
    parts = [[row for row in rows if row.dataset == source] for source in sources] or [rows]
    return [part for part in parts if part]


@dataclass
class Part:
    """What one process has trained on in an update."""

    sums: dict[str, torch.Tensor | float] = field(default_factory=dict)
    tokens: int = 0
    positions: int = 0
    padding: int = 0

    def add(self, batch: MicroBatch, loss: torch.Tensor, figures: Mapping[str, torch.Tensor]) -> None:
        for name, values_N in {"loss": loss.detach(), **figures}.items():
            self.sums[name] = self.sums.get(name, 0.0) + values_N.sum()
        self.tokens += sum(batch.lengths_B)
        self.positions += batch.num_positions
        self.padding += batch.num_padding

    def measured(self) -> Part:
        """Return this with numbers in place of tensors."""
        return replace(self, sums={name: float(value) for name, value in self.sums.items()})


@dataclass
class Step:
    """One step in progress: its number (from 1), timers, and what will become its row in metrics.jsonl."""

    number: int
    rollouts: int = 0
    sampled_tokens: int = 0
    updates: int = 0
    tokens: int = 0  # completion tokens that were trained on
    metrics: dict[str, Any] = field(default_factory=dict)
    num_graded: int = 0
    num_failed: int = 0  # of these, whose rewards failed
    grader_errors: Counter[str] = field(default_factory=Counter)  # failures of rewards by kind
    seconds: dict[str, float] = field(default_factory=dict)
    sampling_seconds: float = 0.0  # that sampling took where the step only waited for it
    sums: dict[str, float] = field(default_factory=dict)
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

    def split(self, phase: str, part: str, seconds: float) -> None:
        """Name a part of a phase that was measured on its own, as a phase beside the rest of it."""
        self.seconds[part] = seconds
        self.seconds[phase] -= seconds

    def log(self, **metrics: Any) -> None:
        self.metrics.update(metrics)

    def take(self, part: Part) -> None:
        """Add what a process has trained on in an update."""
        for name, value in part.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.tokens += part.tokens
        self.positions += part.positions
        self.padding += part.padding

    def per_token(self, name: str, among: str | None = None) -> float | None:
        """Mean over all trained tokens of the step of a figure that the objective returned; None if none were trained on.

        `among`: the figure that counts the tokens, where it was not taken at all of them.
        """
        count = self.sums.get(among, 0.0) if among else self.tokens
        return self.sums[name] / count if name in self.sums and count else None

    def rates(self) -> dict[str, float]:
        """Tokens per second of the parts that handle tokens."""
        timed = {"update": (self.tokens, self.seconds["update"])}
        if "sample" in self.seconds:
            timed["sample"] = self.sampled_tokens, self.sampling_seconds or self.seconds["sample"]
        return {f"{part}_tokens_per_second": tokens / seconds if seconds else 0.0 for part, (tokens, seconds) in timed.items()}


class TrainingRun:
    """Iterates over the steps of a run that are left to do; between two steps it logs, evaluates and saves.

    What a step does depends on its number, the seed and the weights: which items it takes (order.py) and
    the noise of each sample (files/records.row_seed) are functions of them, and no model drops out. So the
    number of steps done, the masters and the moments are all that a resume needs.
    """

    def __init__(
        self,
        folder: RunFolder,
        policy: Policy,
        loaded: LoadedModel,
        training: TrainingOptions,
        running: RunOptions,
        *,
        phases: Sequence[str],
        write_card: Callable[[Path, dict[str, Any], list[dict[str, Any]]], None] | None = None,
    ) -> None:
        """Make an optimizer, and restore it and `policy` to the last whole step that `folder` holds.

        `loaded` is the model in training as it came from disk; `phases` names the parts of a step to be timed;
        `write_card(folder, manifest, evaluations)` writes the model card of a checkpoint.
        """
        self.folder, self.policy, self.loaded, self.training, self.running = folder, policy, loaded, training, running
        self.phases, self.write_card = tuple(phases), write_card
        self.trackers: Trackers | None = None
        self.evaluate: Callable[[], dict[str, Any]] | None = None  # returns figures; also called before the first step
        self.before_saving: Callable[[int], None] | None = None  # given the step
        self.dtype = saved_dtype(loaded.checkpoint) if running.save_dtype is Dtype.auto else getattr(torch, running.save_dtype)
        self.number = 0  # of the step under way
        self._compared: list[TrainingRow] = []  # of the last step, on which a checkpoint is compared with the live policy
        self._proved = False  # that what is saved is what is trained
        self.device = loaded.model.device
        self.optimizer = MasterOptimizer(policy, training)
        policy.collect_gradients(self.optimizer.gradient_of)
        self.labels = set(folder.labels)  # problems whose answers the run has learnt from
        self.counts = {"steps": 0, "updates": 0, "rollouts": 0, "tokens": 0, "seconds": 0.0, **folder.counts}
        self.out, self.updates = folder.out, self.counts["updates"]  # for engines that follow the weights
        self._cadence = parse_cadence(running.save_every)
        self._save_seconds = 0.0  # that saving has taken since the last row
        if folder.step:
            state = read_training_state(folder.checkpoint / TRAINING_STATE) if world.is_main() else None
            self.optimizer.restore(world.stream(state))

    def __iter__(self) -> Iterator[Step]:
        steps, saved = self.folder.steps, time.monotonic()
        with console.training(steps) as show:
            if not self.folder.step:
                self._evaluate(0)
            for number in range(self.folder.step + 1, steps + 1):
                self.number = number
                step = Step(number, seconds=dict.fromkeys(self.phases, 0.0))
                yield step
                row = self._row(step)
                self.folder.add_row(row)
                if self.trackers:
                    self.trackers.log(row)
                show(row, self.folder.last_eval)
                if number % self.running.eval_every == 0 or number == steps:
                    self._evaluate(number)
                every_steps, every_seconds = self._cadence
                due = number % every_steps == 0
                if math.isfinite(every_seconds):
                    due = world.broadcast(time.monotonic() - saved >= every_seconds)
                if due or number == steps:
                    self._save(number)
                    saved = time.monotonic()
        self.folder.finish()

    def update(self, step: Step, rows: Sequence[TrainingRow], objective: Objective) -> None:
        """Make one optimizer update: minus the learning rate times AdamW's direction for the gradient of `objective.loss`.

        The loss runs inside the policy's forward; the gradients of the micro-batches add up to that of all rows. Several
        processes are given the same rows, and share the micro-batches.
        """
        trained = [row for row in rows if len(row.completion_ids)]
        if not trained:
            return
        with step.phase("update"):
            free_bytes.cache_clear()
            paths = common_fast_paths([policy.model for policy in (self.policy, *objective.others)])
            # Prompts are shared through a cache, which layers that run twice would fill twice.
            # Sharded layers run once in each micro-batch, and equally often in each process.
            share = paths.share_prompts and not self.training.gradient_checkpointing and not self.policy.sharded
            layout = {"share_prompts": share, "pack": paths.pack, "deal": True}
            mine = Part()
            for part in _parts(trained, objective.sources):
                filler = replace(min(part, key=len), weight=0.0) if self.policy.sharded else None
                for batch in micro_batches(part, self.training.tokens_per_batch, self.loaded.pad_id, self.device, **layout, filler=filler):
                    loss, figures = self.policy(batch, objective)
                    loss.backward()
                    self.optimizer.end_micro_batch()
                    if not batch.filler:
                        mine.add(batch, loss, figures)
            for other in objective.others:
                if other.sharded:
                    other.reshard()
            self.optimizer.sum_gradients()
            for part in world.gather(mine.measured()):
                step.take(part)
            grad_norm = self.optimizer.clip()
            if not math.isfinite(grad_norm):
                raise S2DError(
                    f"the gradient of step {step.number} is not finite (norm {grad_norm})",
                    where=str(self.folder.out),
                    hint="a lower --lr or --dtype float32 usually helps; checkpoints saved so far are intact",
                )
            self.optimizer.step(learning_rate(step.number, self.folder.steps, self.training))
        step.updates += 1
        self.updates += 1
        step.grad_norms.append(grad_norm)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Leave the GPU to another model within the block: weights, masters and moments wait in main memory."""
        moves = self.device.type == "cuda"
        if moves:
            self.policy.to("cpu")
            self.optimizer.to(torch.device("cpu"))
            torch.cuda.empty_cache()
        try:
            yield
        finally:
            if moves:
                self.policy.to(self.device)
                self.optimizer.to(self.device)

    def log_rollouts(self, step: Step, rows: Sequence[TrainingRow]) -> None:
        """Log the rollouts that a step learns from: how many, how long, and the whole of them where rows hold their records."""
        step.rollouts, self._compared = len(rows), [*rows[:CHECKED_ROWS]]
        step.log(
            rollouts=len(rows),
            mean_tokens=stats.mean(len(row.completion_ids) for row in rows),
            truncated=stats.mean(float(row.truncated) for row in rows),
        )
        if rows[0].record is not None:
            self.folder.write_rollouts(step.number, [row.record for row in rows])

    def identity(self, step: Step) -> dict[str, Any]:
        """Whose weights sample in a step: the parent's, or this run's after some updates, which no file holds."""
        parent = self.loaded.checkpoint
        if not self.counts["updates"]:
            return {"model": parent.name, "revision": parent.revision, "step": parent.step, "checkpoint": parent.weights_sha256}
        return {"model": str(self.folder.out), "revision": "", "step": step.number - 1, "checkpoint": ""}

    def weights(self, dtype: torch.dtype, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """Return the state dict of a plain model that is what this run has learnt, at full precision or in `dtype`.

        Weights that are merged for it are put on `device` one by one, where it is given. What is sharded is gathered to the
        main process's main memory; others get nothing.
        """
        adapter = self.policy.adapter
        if self.policy.sharded:
            self.policy.reshard()
            return whole_state(adapter.merged(dtype) if adapter else self.policy.model.state_dict(), dtype)
        return adapter.merged(dtype, device) if adapter else self.optimizer.full_precision(self.policy.model)

    def weights_bytes(self, dtype: torch.dtype) -> int:
        return sum(parameter.numel() for parameter in self.policy.parameters()) * dtype.itemsize

    def write_weights(self, folder: Path | None, dtype: torch.dtype) -> None:
        """Write the weights as they are now, in `dtype`, for an engine to load; without a folder help the main process to."""
        weights = self.weights(dtype)
        if folder:
            save_weights(folder, self.policy.model, weights, dtype)

    def adapter_bytes(self) -> int:
        adapter = self.policy.adapter
        return sum(tensor.nbytes for tensor in adapter.state().values()) if adapter else 0

    def write_adapter(self, folder: Path | None) -> None:
        """Write the adapter alone as it is now, for an engine to load; without a folder help the main process to."""
        adapter = self.policy.adapter
        if self.policy.sharded:
            self.policy.reshard()
        state = whole_state(adapter.state())
        if folder:
            adapter.save(folder / ADAPTER, state)

    def score(self, rows: Sequence[Row], temperature: float, policy: Policy | None = None) -> Iterator[tuple[Row, np.ndarray]]:
        """Yield rows with the log-probs (nats) of their completion tokens under the weights as they are now, or a frozen `policy`'s.

        Several processes are given the same rows, and share the work.
        """
        layout = {"tokens_per_batch": self.training.tokens_per_batch, "pad_id": self.loaded.pad_id}
        return score(policy or self.policy, rows, **layout, temperature=temperature, deal=True)

    def _row(self, step: Step) -> dict[str, Any]:
        total = time.perf_counter() - step.started
        row = {
            "step": step.number,
            "loss": step.sums["loss"] / step.updates if step.updates else None,
            "lr": learning_rate(step.number, self.folder.steps, self.training),
            "grad_norm": stats.mean(step.grad_norms) if step.updates else None,
            "updates": step.updates,
            "seconds": total,
            "tokens": step.tokens,
            "padding": step.padding / max(1, step.positions),
            **step.metrics,
            "labels": len(self.labels),
            **step.rates(),
            **{f"{phase}_seconds": seconds for phase, seconds in step.seconds.items()},
            **{f"{phase}_share": seconds / max(total, sum(step.seconds.values())) for phase, seconds in step.seconds.items()},
            "save_seconds": self._save_seconds,
        }
        self._save_seconds = 0.0
        self.counts["steps"] = step.number
        self.counts["rollouts"] += step.rollouts
        for name in ("updates", "tokens", "seconds"):
            self.counts[name] += row[name]
        return row

    def _evaluate(self, number: int) -> None:
        if self.evaluate is None:
            return
        row = {"step": number, "weights": "live", **self.evaluate()}  # those in training, before they are rounded to be saved
        self.folder.add_eval(row)
        if self.trackers:
            self.trackers.log(row, "eval/")
        console.info(f"step {number}: {stats.in_words(row)}")

    def _save(self, number: int) -> None:
        started = time.perf_counter()
        if self.before_saving:
            self.before_saving(number)

        def fill(draft: Path | None) -> dict[str, Any]:
            model, adapter = self.policy.model, self.policy.adapter
            state = self.weights(torch.float32, torch.device("cpu"))
            adapter_state = whole_state(adapter.state()) if adapter else None
            if draft:
                save_adapter = partial(adapter.save, state=adapter_state) if adapter else None
                write_checkpoint(draft, model, self.loaded.checkpoint.folder, self.dtype, state=state, save_adapter=save_adapter)
                write_training_state(draft / TRAINING_STATE, self.optimizer.state())
            else:
                for _ in self.optimizer.state():
                    pass
            found = {"saved": self._check_saved(draft, state, last=number == self.folder.steps)}
            if draft and self.write_card:
                self.write_card(draft, {**self.folder.described(), **found}, self.folder.evals())
            return found

        self.folder.save(number, self.counts, self.labels, fill)
        self._save_seconds = time.perf_counter() - started

    def _check_saved(self, folder: Path | None, state: dict[str, torch.Tensor], *, last: bool) -> dict[str, Any]:
        """Compare a checkpoint with the live policy: at this process's first save, at the last, and wherever weights were rounded.

        Returns what the step's manifest says of it, which is the same in a resumed run. Raises ModelError if rounding
        does not explain the difference. The main process compares, with the log-probs that it needs all for.
        """
        narrow, name = self.dtype.itemsize < 4, str(self.dtype).removeprefix("torch.")
        lost = rounding_loss(state, self.loaded.checkpoint.folder, self.dtype) if folder else None
        kl = None
        if narrow or last or not self._proved:
            kl = saved_kl(folder, self.policy, self.loaded, self._compared, state, self.dtype)
            self._proved = True
        if not folder:
            return {}
        share = "an unknown share" if lost is None else f"{lost:.0%}"
        measured = "" if kl is None else f", KL {kl:.2g} nats"
        text = f"saved in {name}: rounding removed {share} of the distance to the parent{measured}"
        if (lost or 0.0) > MUCH_LOST or (kl or 0.0) > MUCH_KL:
            console.warn(f"{text}; --save-dtype float32 keeps it")
        elif narrow:
            console.info(text)
        return {"dtype": name, "kl": kl if narrow or last else None, "rounding_loss": lost}
