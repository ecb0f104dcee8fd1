"""What a mini-batch is trained on: objects whose `loss` runs inside the policy's forward.

An objective reads the annotations of a micro-batch's rows (rows.TrainingRow). All of them are fixed before
the update, so the split into micro-batches never changes the gradient.

Shapes: N completion tokens of a micro-batch, C those of a chunk, D hidden width of the student, E of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from s2dcli.models.batching import MicroBatch
from s2dcli.models.forward import Head
from s2dcli.models.policy import Policy
from s2dcli.models.readers import top_k_logprobs
from s2dcli.options import KlEstimator, Surrogate
from s2dcli.train.losses import kl_estimate, policy_loss
from s2dcli.train.vocab import Divergence, Figures, divergence_loss, token_loss, top_k_divergence_loss

Loss = tuple[torch.Tensor, Figures]


def _weights(batch: MicroBatch) -> torch.Tensor:
    return batch.per_row([row.weight for row in batch.rows])


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """The clipped group-relative objective (losses.policy_loss), with a KL term where `kl_coef` is not 0.

    Without `old_logprobs` the policy itself is the one that sampled: the ratio is 1 and its gradient exact.
    `logprobs`, the sampler's, only serve to measure how far it is from the trainer before the step's updates;
    `importance_weights` multiplies each token's weight, `sequence_log_ratio` makes the ratio its row's.
    """

    others = ()
    temperature: float
    clip_low: float
    clip_high: float
    surrogate: Surrogate = Surrogate.ppo
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = KlEstimator.k3

    def loss(self, batch: MicroBatch, hidden_ND: torch.Tensor, head: Head) -> Loss:
        rows, first = batch.rows, batch.rows[0]  # the rows of an update all have the same annotations
        advantages_N, weights_N = batch.per_row([row.advantage for row in rows]), _weights(batch)
        sampler_N = batch.per_token([row.logprobs for row in rows])
        old_N = None if first.old_logprobs is None else batch.per_token([row.old_logprobs for row in rows])
        reference_N = batch.per_token([row.reference_logprobs for row in rows]) if self.kl_coef else None
        ratios_N = None if first.sequence_log_ratio is None else batch.per_row([row.sequence_log_ratio for row in rows])
        trainer_N = None if first.trainer_logprobs is None else batch.per_token([row.trainer_logprobs for row in rows])
        policy_weights_N = weights_N
        if first.importance_weights is not None:
            policy_weights_N = weights_N * batch.per_token([row.importance_weights for row in rows])

        def per_token(logprobs_C: torch.Tensor, at: slice) -> Loss:
            total, figures = policy_loss(
                logprobs_C,
                logprobs_C.detach() if old_N is None else old_N[at],
                advantages_N[at],
                policy_weights_N[at],
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                surrogate=self.surrogate,
                sequence_log_ratios_N=None if ratios_N is None else ratios_N[at],
            )
            figures["logprob_mismatch"] = ((logprobs_C.detach() if trainer_N is None else trainer_N[at]) - sampler_N[at]).abs()
            if reference_N is not None:
                kl_C = kl_estimate(self.kl_estimator, logprobs_C, reference_N[at])
                total = total + self.kl_coef * (weights_N[at] * kl_C).sum()
                figures["kl"] = kl_C.detach()
            return total, figures

        return token_loss(hidden_ND, head, batch.targets_N, per_token, self.temperature)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A divergence between a frozen teacher and the student at every completion token, exact over the vocabulary.

    vocab.reverse_kl on the student's own samples is the paper's Eq. 4, vocab.forward_kl on the teacher's Eq. 5. Both
    distributions are softmax(logits / temperature). With `top_k` it is the divergence over the teacher's most
    likely ids and one bucket for all others.
    """

    teacher: Policy
    divergence: Divergence
    temperature: float
    top_k: int | None = None

    @property
    def others(self) -> list[Policy]:
        return [self.teacher]

    def loss(self, batch: MicroBatch, hidden_ND: torch.Tensor, head: Head) -> Loss:
        with torch.no_grad():
            teacher_NE, teacher_head = self.teacher.states(batch), self.teacher.head()
        weights_N = _weights(batch)
        if self.top_k is None:
            return divergence_loss(hidden_ND, head, teacher_NE, teacher_head, weights_N, self.divergence, temperature=self.temperature)
        top = top_k_logprobs(teacher_NE, teacher_head, min(self.top_k, self.teacher.vocabulary), self.temperature)
        return top_k_divergence_loss(hidden_ND, head, *top, weights_N, self.divergence, temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class SampledDistillation:
    """KL(student || teacher) from the sampled tokens alone: the log-ratio as a policy gradient's reward.

    For a token y that the sampler drew with probability s(y), the loss's gradient is (p(y) / s(y)) * (log p(y) -
    log q(y)) * grad log p(y), student p and teacher q: its mean over y is the gradient of the exact KL at that
    position. Needs the teacher's log-probs of the sampled tokens only, `teacher_logprobs`.
    """

    others = ()
    temperature: float

    def loss(self, batch: MicroBatch, hidden_ND: torch.Tensor, head: Head) -> Loss:
        weights_N = _weights(batch)
        teacher_N = batch.per_token([row.teacher_logprobs for row in batch.rows])
        sampler_N = batch.per_token([row.logprobs for row in batch.rows])

        def per_token(logprobs_C: torch.Tensor, at: slice) -> Loss:
            now_C = logprobs_C.detach()
            kl_C = (now_C - sampler_N[at]).exp() * (now_C - teacher_N[at])
            return (weights_N[at] * kl_C * (1.0 + logprobs_C - now_C)).sum(), {"kl": kl_C}

        return token_loss(hidden_ND, head, batch.targets_N, per_token, self.temperature)


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-prob of the tokens as they stand: supervised fine-tuning on samples ("hard labels")."""

    others = ()

    def loss(self, batch: MicroBatch, hidden_ND: torch.Tensor, head: Head) -> Loss:
        weights_N = _weights(batch)

        def per_token(logprobs_C: torch.Tensor, at: slice) -> Loss:
            return -(weights_N[at] * logprobs_C).sum(), {"cross_entropy": -logprobs_C.detach()}

        return token_loss(hidden_ND, head, batch.targets_N, per_token)
