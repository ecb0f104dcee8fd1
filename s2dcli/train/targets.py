"""What a teacher says of a micro-batch's completion tokens, in the forms that losses are defined for.

    exact    final hidden states and the head: the whole distribution, in a few numbers a token
    mixed    two of these, a teacher and the model that its reinforcement learning began with, and a weight
    top-k    the k most likely ids, their log-probs, and the log of the mass of all others
    sampled  the log-prob of each completion token, and what a baseline is taken from

All log-probs are nats, float32, and normalised over the whole vocabulary, never over the k.

Shapes: N completion tokens of a micro-batch, C those of a chunk, E hidden width of the teacher, K ids, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from s2dcli.models.forward import Head
from s2dcli.models.readers import log_normaliser


@dataclass(frozen=True)
class ExactTargets:
    """softmax(head.logits(hidden) / temperature) at each token."""

    hidden_NE: torch.Tensor
    head: Head
    temperature: float = 1.0
    models = 1  # whose logits `logprobs` holds at once

    @property
    def vocabulary(self) -> int:
        return self.head.weight_VD.shape[0]

    def logprobs(self, rows: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probs of a chunk of tokens [C, V], without gradient, in the first rows of `out` or a new tensor."""
        logits_CV = self.head.logits(self.hidden_NE[rows].detach(), out)
        if self.temperature != 1.0:
            logits_CV = logits_CV.div_(self.temperature)
        return logits_CV.sub_(log_normaliser(logits_CV))


@dataclass(frozen=True)
class MixedTargets:
    """softmax(log r + weight (log q - log r)) of a teacher q and a reference r at each token.

    Eq. 3 of the paper puts the two rewards of a step on one axis, J = E[(1 - weight) sum_t r_T + weight R] + beta H. Where
    R is the one that made the teacher out of the reference, its value for a token is, up to a constant of the state,
    beta (log q - log r), the implicit reward of KL-regularised RL (arXiv 2602.12125); with the reference as the dense
    teacher, r_T = beta log r, J rewards a token by beta (log r + weight (log q - log r)), and the policy of largest J is the softmax of
    that over beta. Weight 1 is the teacher itself, 0 the reference; beyond 1 the teacher's learning is extrapolated.
    """

    teacher: ExactTargets
    reference: ExactTargets
    weight: float
    models = 2

    @property
    def vocabulary(self) -> int:
        return self.teacher.vocabulary

    def logprobs(self, rows: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """As those of ExactTargets."""
        teacher_CV, reference_CV = self.teacher.logprobs(rows, out), self.reference.logprobs(rows)
        mixed_CV = teacher_CV.sub_(reference_CV).mul_(self.weight).add_(reference_CV)
        del reference_CV  # or it would be there beside the normaliser's
        return mixed_CV.sub_(log_normaliser(mixed_CV))


@dataclass(frozen=True)
class TopKTargets:
    """The K most likely ids at each token, in descending order of their log-probs, and the log of the mass of all other ids."""

    ids_NK: torch.Tensor
    logprobs_NK: torch.Tensor
    tails_N: torch.Tensor


Distributions = ExactTargets | MixedTargets | TopKTargets


@dataclass(frozen=True)
class SampledTargets:
    """Log-probs of the completion tokens themselves; `around`, where it was asked for, what is known of the distributions."""

    logprobs_N: torch.Tensor
    around: ExactTargets | TopKTargets | None = None


Targets = Distributions | SampledTargets
