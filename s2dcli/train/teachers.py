"""Teachers: who gives a micro-batch's targets, and the forms that these have.

    exact    final hidden states and the head: the whole distribution, in a few numbers a token
    top-k    the k most likely ids, their log-probs, and the log of the mass of all others
    sampled  the log-prob of each completion token

An objective (objectives.py) asks its teacher for targets and takes the forms that its loss is defined for. All log-probs
are nats, float32, and normalised over the whole vocabulary, never over the k.

Shapes: N completion tokens of a micro-batch, E hidden width of the teacher, K ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from s2dcli.models.batching import MicroBatch
from s2dcli.models.forward import Head
from s2dcli.models.policy import Policy
from s2dcli.models.readers import top_k_logprobs


@dataclass(frozen=True)
class ExactTargets:
    """softmax(head.logits(hidden) / temperature) at each token."""

    hidden_NE: torch.Tensor
    head: Head
    temperature: float = 1.0


@dataclass(frozen=True)
class TopKTargets:
    """The K most likely ids at each token, in descending order of their log-probs, and the log of the mass of all other ids."""

    ids_NK: torch.Tensor
    logprobs_NK: torch.Tensor
    tails_N: torch.Tensor


@dataclass(frozen=True)
class SampledTargets:
    """Log-probs of the completion tokens themselves."""

    logprobs_N: torch.Tensor


Targets = ExactTargets | TopKTargets | SampledTargets


class Teacher(Protocol):
    """Whoever knows the distributions to learn from; they get no gradient.

    `others`: models that are given the micro-batches, which must have a layout that suits all of them.
    """

    @property
    def others(self) -> Sequence[Policy]: ...

    def targets(self, batch: MicroBatch) -> Targets:
        """Return the targets of a micro-batch's completion tokens, always in the same form."""


@dataclass(frozen=True, kw_only=True)
class LiveTeacher:
    """A frozen model in memory, at a temperature: exact, or with `top_k` its most likely ids, all that there are at most."""

    policy: Policy
    temperature: float = 1.0
    top_k: int | None = None

    @property
    def others(self) -> list[Policy]:
        return [self.policy]

    @torch.no_grad()
    def targets(self, batch: MicroBatch) -> ExactTargets | TopKTargets:
        hidden_NE, head = self.policy.states(batch), self.policy.head()
        if self.top_k is None:
            return ExactTargets(hidden_NE, head, self.temperature)
        return TopKTargets(*top_k_logprobs(hidden_NE, head, min(self.top_k, self.policy.vocabulary), self.temperature))


class ScoredRows:
    """A teacher that has scored the sampled tokens before the update: the rows' `teacher_logprobs`."""

    others = ()

    def targets(self, batch: MicroBatch) -> SampledTargets:
        return SampledTargets(batch.per_token([row.teacher_logprobs for row in batch.rows]))
