"""Sampling ahead (--async-depth 1): while the model learns from the rollouts of a step, those of the next one are sampled.

A step's rollouts are so sampled from the weights before the last step's updates; only the first step's are from its own.

RUN/phases/step-000008/rollouts.jsonl   what was sampled ahead when step 7 was saved: a restart takes it from there
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s2dcli import console, world
from s2dcli.assembly.rollouts import read_groups
from s2dcli.assembly.sampling import Ahead, Sampler, Task
from s2dcli.files.checkpoint import step_of
from s2dcli.files.records import Rollout
from s2dcli.files.run_folder import PHASE_ROLLOUTS, PHASES
from s2dcli.train.loop import Step, TrainingRun


@dataclass(frozen=True)
class Batch:
    """The groups of a step, and the number of updates that the weights had seen which sampled them."""

    groups: list[list[Rollout]]
    updates: int
    seconds: float = 0.0  # that sampling took; 0: they come from a file


class AheadBatches:
    """Gives each step its batch, and has the next one sampled meanwhile: by one engine, which does one thing at a time."""

    def __init__(self, sampler: Sampler, run: TrainingRun, num_samples: int) -> None:
        self.sampler, self.run, self.num_samples = sampler, run, num_samples
        self._under_way: tuple[Ahead, int] | None = None  # with the updates that its weights have seen
        self._next: Batch | None = None
        self._stored = world.from_main(self._find_stored)  # steps of which a file has the batch

    def batch(self, step: Step, tasks: Sequence[Task], following: Sequence[Task]) -> list[list[Rollout]]:
        """Return the groups of a step's tasks, and begin to sample the tasks of the next one. Raises EngineError or DataError."""
        self.settle()
        batch = self._next or self._read(step.number, self.run.updates - self.run.folder.last_row.get("updates", 0))
        if batch is None:
            self.sampler.identity = self.run.identity(step)
            batch = Batch(list(self.sampler.sample(tasks, self.num_samples)), self.run.updates)
        step.sampling_seconds = batch.seconds
        step.log(off_policy_steps=self.run.updates - batch.updates)
        self._next = self._read(step.number + 1, self.run.updates) if following else None
        if following and self._next is None:
            self.sampler.identity = self.run.identity(step)
            self._under_way = self.sampler.start(following, self.num_samples), self.run.updates
        return batch.groups

    def settle(self) -> None:
        """Wait until the engine is free. Raises EngineError."""
        if self._under_way is None:
            return
        (ahead, updates), self._under_way = self._under_way, None
        groups = ahead.take()
        if groups is None:
            console.warn("the server was interrupted while it sampled ahead: the batch is sampled again, from the weights as they are then")
        else:
            self._next = Batch(groups, updates, ahead.seconds)

    def keep(self, number: int) -> None:
        """Write the batch that comes after a step, which is about to be saved, for a restart. Raises EngineError or DataError."""
        self.settle()
        if self._next is not None:
            self.run.folder.write_phase(number + 1, self._next.groups)

    def _find_stored(self) -> set[int]:
        return {step_of(path.parent) for path in (self.run.folder.folder / PHASES).glob(f"step-*/{PHASE_ROLLOUTS}")}

    def _read(self, number: int, updates: int) -> Batch | None:
        if number not in self._stored:
            return None
        return Batch(world.from_main(read_groups, self.run.folder.phase(number) / PHASE_ROLLOUTS, self.num_samples), updates)
