"""What a mini-batch is trained on: from numbers per row to the loss of each micro-batch.

An objective is called with a micro-batch and returns the loss to run inside the policy's forward.
All numbers per row are fixed before the update, whatever micro-batches it is cut into.

Shapes: R rows of the batch, N completion tokens of a micro-batch, D hidden width of the student, E
of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from s2dcli.models.batching import MicroBatch
from s2dcli.models.forward import Head
from s2dcli.models.policy import Loss, Policy
from s2dcli.models.readers import top_k_logprobs
from s2dcli.options import KlEstimator, Surrogate
from s2dcli.train.losses import kl_estimate, policy_loss
from s2dcli.train.vocab import Sums, kl_loss, token_loss, top_k_kl_loss


@dataclass(frozen=True)
class PolicyGradient:
    """The clipped group-relative objective, with a KL term where `reference_R` is given.

    Without `old_R` the policy itself is the one that sampled: the ratio is 1 and its gradient exact.
    `sampler_R`, the log-probs noted while sampling, only serve to measure the sampler's distance;
    `corrections_R` multiplies each token's weight, `sequence_log_ratios_R` makes the ratio its row's.
    """

    weights_R: Mapping[int, float]
    advantages_R: Sequence[float]
    sampler_R: Sequence[Sequence[float]]
    old_R: Sequence[Sequence[float]] | None
    temperature: float
    clip_low: float
    clip_high: float
    surrogate: Surrogate = Surrogate.ppo
    sequence_log_ratios_R: Sequence[float] | Mapping[int, float] | None = None
    corrections_R: Sequence[Sequence[float]] | None = None
    reference_R: Sequence[Sequence[float]] | None = None
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = KlEstimator.k3

    def __call__(self, batch: MicroBatch) -> Loss:
        advantages_N, weights_N = batch.spread(self.advantages_R), batch.spread(self.weights_R)
        sampler_N = batch.tokens(self.sampler_R)
        old_N = None if self.old_R is None else batch.tokens(self.old_R)
        reference_N = None if self.reference_R is None else batch.tokens(self.reference_R)
        row_ratios_N = None if self.sequence_log_ratios_R is None else batch.spread(self.sequence_log_ratios_R)
        policy_weights_N = weights_N if self.corrections_R is None else weights_N * batch.tokens(self.corrections_R)

        def per_token(logprobs_C: torch.Tensor, rows: slice) -> tuple[torch.Tensor, Sums]:
            total, sums = policy_loss(
                logprobs_C,
                logprobs_C.detach() if old_N is None else old_N[rows],
                advantages_N[rows],
                policy_weights_N[rows],
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                surrogate=self.surrogate,
                sequence_log_ratios_N=None if row_ratios_N is None else row_ratios_N[rows],
            )
            sums["sampler_gap"] = (logprobs_C.detach() - sampler_N[rows]).abs().sum()
            if reference_N is not None:
                kl_C = kl_estimate(self.kl_estimator, logprobs_C, reference_N[rows])
                total = total + self.kl_coef * (weights_N[rows] * kl_C).sum()
                sums["kl"] = kl_C.detach().sum()
            return total, sums

        return lambda hidden_ND, head: token_loss(hidden_ND, head, batch.targets_N, per_token, self.temperature)


@dataclass(frozen=True)
class Distillation:
    """Exact KL over the vocabulary between a frozen teacher and the student, at every completion token.

    `reverse`: KL(student || teacher), on the student's own samples (paper, Eq. 4); else
    KL(teacher || student), on the teacher's (Eq. 5). Both distributions are softmax(logits / temperature).
    With `top_k` it is the KL over the teacher's likeliest ids and one bucket for all others.
    """

    teacher: Policy
    weights_R: Mapping[int, float]
    reverse: bool
    temperature: float
    top_k: int | None = None

    def __call__(self, batch: MicroBatch) -> Loss:
        weights_N = batch.spread(self.weights_R)
        how = {"reverse": self.reverse, "temperature": self.temperature}

        def loss(hidden_ND: torch.Tensor, head: Head) -> tuple[torch.Tensor, Sums]:
            with torch.no_grad():
                teacher_NE, guide = self.teacher.states(batch), self.teacher.head()
            if self.top_k is None:
                return kl_loss(hidden_ND, head, teacher_NE, guide, weights_N, **how)
            ids_NK, logprobs_NK = top_k_logprobs(teacher_NE, guide, min(self.top_k, self.teacher.vocabulary), self.temperature)
            return top_k_kl_loss(hidden_ND, head, ids_NK, logprobs_NK, weights_N, **how)

        return loss


@dataclass(frozen=True)
class SampledDistillation:
    """KL(student || teacher) from the sampled tokens alone: the log-ratio as a policy gradient's reward.

    For a token y that the sampler drew with probability s(y), the loss's gradient is (p(y) / s(y)) * (log p(y) -
    log q(y)) * grad log p(y), student p and teacher q: its mean over y is the gradient of the exact KL at that
    position. Needs the teacher's log-probs of the sampled tokens only.
    """

    teacher_R: Sequence[Sequence[float]]
    sampler_R: Sequence[Sequence[float]]
    weights_R: Mapping[int, float]
    temperature: float

    def __call__(self, batch: MicroBatch) -> Loss:
        weights_N = batch.spread(self.weights_R)
        teacher_N, sampler_N = batch.tokens(self.teacher_R), batch.tokens(self.sampler_R)

        def per_token(logprobs_C: torch.Tensor, rows: slice) -> tuple[torch.Tensor, Sums]:
            now_C = logprobs_C.detach()
            kl_C = (now_C - sampler_N[rows]).exp() * (now_C - teacher_N[rows])
            return (weights_N[rows] * kl_C * (1.0 + logprobs_C - now_C)).sum(), {"kl": kl_C.sum()}

        return lambda hidden_ND, head: token_loss(hidden_ND, head, batch.targets_N, per_token, self.temperature)


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-prob of the tokens as they stand: supervised fine-tuning on samples ("hard labels")."""

    weights_R: Mapping[int, float]

    def __call__(self, batch: MicroBatch) -> Loss:
        weights_N = batch.spread(self.weights_R)

        def per_token(logprobs_C: torch.Tensor, rows: slice) -> tuple[torch.Tensor, Sums]:
            return -(weights_N[rows] * logprobs_C).sum(), {"cross_entropy": -logprobs_C.detach().sum()}

        return lambda hidden_ND, head: token_loss(hidden_ND, head, batch.targets_N, per_token)
