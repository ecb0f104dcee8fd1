"""What a mini-batch is trained on: objects whose `loss` runs inside the policy's forward.

An objective reads the annotations of a micro-batch's rows (rows.TrainingRow). All of them are fixed before
the update, so the split into micro-batches never changes the gradient.

Shapes: N completion tokens of a micro-batch, C those of a chunk, D hidden width of the student, E of the teacher, K of its ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from s2dcli.models.batching import MicroBatch
from s2dcli.models.forward import Head
from s2dcli.models.policy import Policy
from s2dcli.options import KlEstimator, Surrogate
from s2dcli.train.losses import kl_estimate, policy_loss
from s2dcli.train.teachers import ExactTargets, Teacher, TopKTargets
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
    """A divergence between a teacher and the student at every completion token: exact over the vocabulary, or over the
    teacher's most likely ids and one bucket for all others, as the teacher's targets are.

    vocab.reverse_kl on the student's own samples is the paper's Eq. 4, vocab.forward_kl on the teacher's Eq. 5. The
    student's distribution is softmax(logits / temperature), the teacher's has its own temperature.
    """

    teacher: Teacher
    divergence: Divergence
    temperature: float

    @property
    def others(self) -> Sequence[Policy]:
        return self.teacher.others

    def loss(self, batch: MicroBatch, hidden_ND: torch.Tensor, head: Head) -> Loss:
        weights_N, how = _weights(batch), {"divergence": self.divergence, "temperature": self.temperature}
        match self.teacher.targets(batch):
            case ExactTargets(teacher_NE, teacher_head, temperature):
                return divergence_loss(hidden_ND, head, teacher_NE, teacher_head, weights_N, **how, teacher_temperature=temperature)
            case TopKTargets(ids_NK, logprobs_NK, tails_N):
                return top_k_divergence_loss(hidden_ND, head, ids_NK, logprobs_NK, tails_N, weights_N, **how)
            case targets:
                raise TypeError(f"a divergence is not defined for {type(targets).__name__}")


@dataclass(frozen=True, kw_only=True)
class SampledDistillation:
    """KL(student || teacher) from the sampled tokens alone: the log-ratio as a policy gradient's reward.

    For a token y that the sampler drew with probability s(y), the loss's gradient is (p(y) / s(y)) * (log p(y) -
    log q(y)) * grad log p(y), student p and teacher q: its mean over y is the gradient of the exact KL at that
    position. Needs the teacher's log-probs of the sampled tokens only.
    """

    teacher: Teacher  # of SampledTargets
    temperature: float

    @property
    def others(self) -> Sequence[Policy]:
        return self.teacher.others

    def loss(self, batch: MicroBatch, hidden_ND: torch.Tensor, head: Head) -> Loss:
        weights_N, teacher_N = _weights(batch), self.teacher.targets(batch).logprobs_N
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
