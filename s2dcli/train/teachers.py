"""Teachers: who gives a micro-batch's targets, in one of the forms of train/targets.py.

An objective (objectives.py) asks its teacher for targets and takes the forms that its loss is defined for.

Shapes: N completion tokens of a micro-batch, E hidden width of the teacher, K ids.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from s2dcli.errors import UsageError
from s2dcli.files.teacher_cache import HEAD, Meta, Shard, TeacherCache
from s2dcli.models.batching import MicroBatch
from s2dcli.models.forward import Head
from s2dcli.models.policy import Policy
from s2dcli.models.readers import token_logprobs, top_k_logprobs
from s2dcli.options import Estimator, Keep
from s2dcli.train.rows import TrainingRow
from s2dcli.train.targets import ExactTargets, MixedTargets, SampledTargets, Targets, TopKTargets


class Teacher(Protocol):
    """Whoever knows the distributions to learn from; they get no gradient.

    `others`: models that are given the micro-batches, which must have a layout that suits all of them. `sources`: where it
    matters, the sources (TrainingRow.dataset) whose rows must not share a micro-batch. `waited`: seconds so far in which
    `targets` waited for a disk or a server, computing not included; None where there is none to wait for.
    """

    @property
    def others(self) -> Sequence[Policy]: ...

    @property
    def sources(self) -> Sequence[str]: ...

    @property
    def waited(self) -> float | None: ...

    def begin(self, rows: Sequence[TrainingRow]) -> None:
        """Make ready for rows whose micro-batches come next: a teacher that works elsewhere starts now. Does not wait."""

    def targets(self, batch: MicroBatch) -> Targets:
        """Return the targets of a micro-batch's completion tokens, always in the same form."""


@dataclass(frozen=True, kw_only=True)
class LiveTeacher:
    """A frozen model in memory, at a temperature: exact, or with `top_k` its most likely ids, all that there are at most,
    or with `sampled` the log-probs of the completion tokens, and with `baseline` the distributions around them."""

    sources = ()
    waited = None
    policy: Policy
    temperature: float = 1.0
    top_k: int | None = None
    sampled: bool = False
    baseline: bool = False

    @property
    def others(self) -> list[Policy]:
        return [self.policy]

    def begin(self, rows: Sequence[TrainingRow]) -> None:
        """Nothing to start: it works where the student does."""

    @torch.no_grad()
    def targets(self, batch: MicroBatch) -> Targets:
        hidden_NE, head = self.policy.states(batch), self.policy.head()
        exact = ExactTargets(hidden_NE, head, self.temperature)
        if self.sampled:
            return SampledTargets(
                token_logprobs(hidden_NE, head, batch.targets_N, self.temperature), around=exact if self.baseline else None
            )
        if self.top_k is None:
            return exact
        return TopKTargets(*top_k_logprobs(hidden_NE, head, min(self.top_k, self.policy.vocabulary), self.temperature))


class Waiting:
    """Counts the seconds in which a teacher's `targets` waits for what is elsewhere."""

    waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start


class CachedTeacher(Waiting):
    """A teacher whose distributions are on disk (files/teacher_cache.py), read for each micro-batch.

    Values that are stored in fewer digits no longer add up to 1: the K ids and their tail are normalised again, by less
    than the rounding that the cache tells of, so that a KL of them is never negative.
    """

    others = sources = ()

    def __init__(
        self,
        cache: TeacherCache,
        rows: Iterable[TrainingRow],
        device: torch.device,
        estimator: Estimator,
        top_k: int | None,
        temperature: float,
        *,
        baseline: bool = False,
    ) -> None:
        """`baseline`: sampled targets come with the distributions around them.

        Raises DataError for rows that are not in the cache, UsageError for what it does not hold.
        """
        require_holds(cache.meta, estimator, top_k, temperature, baseline=baseline)
        self.cache, self.device, self.estimator, self.temperature, self.baseline = cache, device, estimator, temperature, baseline
        self.top_k = top_k if estimator is Estimator.top_k else None
        # By name: a row may be cut, or be a copy without weight, which a process computes while others have more to do.
        self._places = {(row.group_id, row.sample_index): place for row, place in cache.find(rows).items()}
        self._head = _cached_head(cache, device) if cache.meta.keep is Keep.hidden else None
        self._dtype = getattr(torch, cache.meta.compute_dtype)

    def begin(self, rows: Sequence[TrainingRow]) -> None:
        """Have the system read ahead what is on disk of these rows."""
        for row in rows:
            self.cache.read_ahead(self._place(row), len(row.completion_ids))

    @torch.no_grad()
    def targets(self, batch: MicroBatch) -> Targets:
        if self.cache.meta.keep is Keep.hidden:
            (hidden_NE,) = self._read(batch, "hidden")
            hidden_NE = hidden_NE.to(self._dtype)
            exact = ExactTargets(hidden_NE, self._head, self.temperature)
            if self.estimator is Estimator.full:
                return exact
            if self.estimator is Estimator.sampled:
                sampled_N = token_logprobs(hidden_NE, self._head, batch.targets_N, self.temperature)
                return SampledTargets(sampled_N, around=exact if self.baseline else None)
            return TopKTargets(*top_k_logprobs(hidden_NE, self._head, self.top_k or self.cache.meta.vocabulary, self.temperature))
        if self.estimator is Estimator.sampled:
            (sampled_N,) = self._read(batch, "sampled")
            return SampledTargets(sampled_N.float(), around=self._top_k(batch) if self.baseline else None)
        return self._top_k(batch)

    def _top_k(self, batch: MicroBatch) -> TopKTargets:
        ids_NK, logprobs_NK, tails_N = self._read(batch, "ids", "logprobs", "tails")
        outcomes_NJ = torch.cat([logprobs_NK.float(), tails_N[:, None]], dim=1)  # J = K + 1
        outcomes_NJ -= outcomes_NJ.logsumexp(-1, keepdim=True)
        k = min(self.top_k or ids_NK.shape[1], ids_NK.shape[1])
        return TopKTargets(ids_NK[:, :k].long(), outcomes_NJ[:, :k], outcomes_NJ[:, k:].logsumexp(-1))

    def _place(self, row: TrainingRow) -> tuple[Shard, int]:
        """Where the numbers of a row, or of the whole row that it was cut from, begin."""
        return self._places[row.group_id, row.sample_index]

    def _read(self, batch: MicroBatch, *names: str) -> list[torch.Tensor]:
        with self.waiting():
            rows = [self.cache.read(self._place(row), len(row.completion_ids), names) for row in batch.rows]
            columns = [torch.from_numpy(np.concatenate([row[name] for row in rows])) for name in names]
        return [column.to(self.device) for column in columns]  # which on a GPU may wait for the student


def require_holds(meta: Meta, estimator: Estimator, top_k: int | None, temperature: float, *, baseline: bool = False) -> None:
    """Raise UsageError unless a cache holds targets for an estimator, at a temperature; `top_k` None is as many ids as there are."""
    if baseline and meta.keep is Keep.sampled:
        raise UsageError(
            "--baseline kl is the KL at each token, and the cache holds the sampled tokens' log-probs alone",
            hint="s2d score --keep top-k or hidden",
        )
    hidden = meta.keep is Keep.hidden
    if estimator is Estimator.full and not hidden and meta.k != meta.vocabulary:
        held = f"the {meta.k} most likely ids" if meta.k else "the sampled tokens' log-probs"
        raise UsageError(
            f"the whole distribution is needed, the cache holds {held}",
            hint="s2d score --keep hidden" + (", or opd --estimator top-k" if meta.k else ""),
        )
    if estimator is Estimator.top_k and meta.keep is Keep.sampled:
        raise UsageError("distributions are needed, the cache holds the sampled tokens' log-probs", hint="s2d score --keep top-k or hidden")
    if estimator is Estimator.top_k and not hidden and top_k is not None and min(top_k, meta.vocabulary) > meta.k:
        raise UsageError(f"--top-k {top_k}: the cache holds {meta.k} ids a token", hint=f"--top-k {meta.k}, or score with --top-k {top_k}")
    if not hidden and temperature != meta.temperature:
        raise UsageError(
            f"the cache holds probabilities at temperature {meta.temperature:g}, {temperature:g} is needed",
            hint=f"--teacher-temperature {meta.temperature:g}, s2d score --temperature {temperature:g}, or --keep hidden",
        )


def _cached_head(cache: TeacherCache, device: torch.device) -> Head:
    from safetensors.torch import load_file

    tensors, told = load_file(cache.folder / HEAD, device=str(device)), cache.meta.head
    unused = torch.tensor(told["unused"], device=device) if told["unused"] else None
    return Head(tensors["weight"], tensors.get("bias"), told["scale"], told["soft_cap"], unused_U=unused)


@dataclass(frozen=True)
class MixedTeacher:
    """A teacher and a reference, both exact, whose distributions are mixed (targets.MixedTargets)."""

    teacher: Teacher
    reference: Teacher
    weight: float

    @property
    def others(self) -> list[Policy]:
        return [*self.teacher.others, *self.reference.others]

    @property
    def sources(self) -> Sequence[str]:
        return self.teacher.sources

    @property
    def waited(self) -> float | None:
        return self.teacher.waited

    def begin(self, rows: Sequence[TrainingRow]) -> None:
        for part in (self.teacher, self.reference):
            part.begin(rows)

    def targets(self, batch: MicroBatch) -> MixedTargets:
        return MixedTargets(self.teacher.targets(batch), self.reference.targets(batch), self.weight)


@dataclass(frozen=True)
class TeacherBySource:
    """A teacher in memory for each source; the rows of a micro-batch come from one of them."""

    waited = None
    teachers: Mapping[str, Teacher]

    @property
    def others(self) -> list[Policy]:
        return [policy for teacher in self.teachers.values() for policy in teacher.others]

    @property
    def sources(self) -> list[str]:
        return list(self.teachers)

    def begin(self, rows: Sequence[TrainingRow]) -> None:
        for source, teacher in self.teachers.items():
            if its_rows := [row for row in rows if row.dataset == source]:
                teacher.begin(its_rows)

    def targets(self, batch: MicroBatch) -> Targets:
        (source,) = {row.dataset for row in batch.rows}
        return self.teachers[source].targets(batch)


class ScoredRows:
    """A teacher that has scored the sampled tokens before the update: the rows' `teacher_logprobs`."""

    others = sources = ()
    waited = None

    def begin(self, rows: Sequence[TrainingRow]) -> None:
        """Nothing to start: the rows are scored."""

    def targets(self, batch: MicroBatch) -> SampledTargets:
        return SampledTargets(batch.per_token([row.teacher_logprobs for row in batch.rows]))
