"""Distillation in phases: sampling, scoring by the teacher and learning take turns, so that one large model is on the device at a time.

RUN/phases/step-000007/ rollouts.jsonl  what the student sampled, whole when it has its name
                        scores/         a teacher cache of them (files/teacher_cache.py); of several teachers, and of a reference,
                                        one each: scores-1/, ..., scores-reference/

A restart picks up what is there; a step's files go when a checkpoint of it, or of a later one, is saved.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from s2dcli.assembly.loading import compute_dtype
from s2dcli.assembly.scoring import CacheForm, LiveScorer, fill_cache, hidden_width
from s2dcli.files.manifest import describe
from s2dcli.files.teacher_cache import CacheFolder, TeacherCache
from s2dcli.models.batching import MicroBatch
from s2dcli.models.checkpoints import Checkpoint, return_freed_memory
from s2dcli.options import Estimator, Keep, ValueType
from s2dcli.train.loop import TrainingRun
from s2dcli.train.rows import TrainingRow
from s2dcli.train.targets import Targets
from s2dcli.train.teachers import CachedTeacher

if TYPE_CHECKING:
    from s2dcli.assembly.training import TrainingSetup

SHARD_TOKENS = 65536  # completion tokens whose scores a kill may cost
KEEP = {Estimator.full: Keep.hidden, Estimator.top_k: Keep.top_k, Estimator.sampled: Keep.sampled}


class PhasedTeacher:
    """A teacher that is loaded for the rows of a step, scores them to disk, and is gone before the student learns from there."""

    others = sources = ()
    waited = None  # the scoring is a phase of its own

    def __init__(
        self,
        setup: TrainingSetup,
        run: TrainingRun,
        checkpoint: Checkpoint,
        estimator: Estimator,
        top_k: int | None,
        temperature: float,
        *,
        baseline: bool = False,
        name: str = "scores",
    ) -> None:
        """`baseline`: as CachedTeacher takes it; `name`: of its folder within that of a step."""
        self.setup, self.run, self.checkpoint = setup, run, checkpoint
        self.estimator, self.temperature, self.baseline, self.name = estimator, temperature, baseline, name
        self.keep = Keep.hidden if baseline else KEEP[estimator]
        self.top_k = top_k and min(top_k, run.policy.vocabulary)
        self._cached: CachedTeacher

    def begin(self, rows: Sequence[TrainingRow]) -> None:
        """Score rows, unless that was done before a restart. Raises ModelError or DataError."""
        folder = self.run.folder.phase(self.run.number) / self.name
        manifest = describe("score", {"estimator": self.estimator, "top_k": self.top_k}, parents=[("model", self.checkpoint)])
        with CacheFolder(folder, manifest, resume=True) as cache:
            if not cache.finished:
                self._score(cache, rows)
        form = (self.estimator, self.top_k, self.temperature)
        self._cached = CachedTeacher(TeacherCache(folder), rows, self.run.device, *form, baseline=self.baseline)

    def targets(self, batch: MicroBatch) -> Targets:
        return self._cached.targets(batch)

    def _score(self, cache: CacheFolder, rows: Sequence[TrainingRow]) -> None:
        setup = self.setup
        with self.run.away():
            how = {**setup.loading.of_load(), "dtype": compute_dtype(setup.loading, setup.training)}
            scorer = LiveScorer(self.checkpoint, setup.tokenizer, how, setup.training.tokens_per_batch, announce=self.run.number == 1)
            # bfloat16 states have fewer digits than float16
            dtype = ValueType.float16 if scorer.dtype == torch.bfloat16 and self.keep is Keep.hidden else ValueType.float32
            form = CacheForm(self.keep, self.top_k or 0, dtype, self.temperature)
            width = hidden_width(self.checkpoint, setup.loading) if form.keep is Keep.hidden else 0
            rows = list(dict.fromkeys(rows))  # one that is drawn twice is scored once
            meta = fill_cache(cache, self.checkpoint, setup.tokenizer, scorer, setup.loading, form, width, rows, SHARD_TOKENS)
            cache.finish(meta, {})
            del scorer
            gc.collect()
            return_freed_memory()
