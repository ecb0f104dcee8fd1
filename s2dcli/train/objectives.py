"""What a mini-batch is trained on: objects whose `loss` runs inside the policy's forward.

An objective reads the annotations of a micro-batch's rows (rows.TrainingRow). All of them are fixed before
the update, so the split into micro-batches never changes the gradient.

Shapes: N completion tokens of a micro-batch, C those of a chunk, D hidden width of the student, E of the teacher, K of its ids.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from s2dcli.models.batching import MicroBatch
from s2dcli.models.forward import Head
from s2dcli.models.policy import Policy
from s2dcli.options import KlEstimator, Surrogate
from s2dcli.train.losses import kl_estimate, policy_loss
from s2dcli.train.rows import THIRDS, thirds
from s2dcli.train.targets import Distributions, ExactTargets, MixedTargets, TopKTargets
from s2dcli.train.teachers import Teacher
from s2dcli.train.vocab import Divergence, Figures, divergence_loss, reverse_kl, token_loss, top_k_divergence_loss

Loss = tuple[torch.Tensor, Figures]
WATCH_EVERY = 8  # tokens; at one of them the most likely ids of teacher and student are compared, which costs a sort


def _weights(batch: MicroBatch) -> torch.Tensor:
    return batch.per_row([row.weight for row in batch.rows])


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """The clipped group-relative objective (losses.policy_loss), with a KL term where `kl_coef` is not 0.

    Without `old_logprobs` the policy itself is the one that sampled: the ratio is 1 and its gradient exact.
    `logprobs`, the sampler's, only serve to measure how far it is from the trainer before the step's updates;
    `importance_weights` multiplies each token's weight, `sequence_log_ratio` makes the ratio its row's.
    """

    others = sources = ()
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
    student's distribution is softmax(logits / temperature), the teacher's has its own temperature. A token whose divergence
    exceeds `clamp` (nats) counts that much, and has no gradient. Figures: `kl`, the divergence; `kl_first`, `kl_middle`, `kl_last`, with
    the `tokens_` of each third; those of vocab.agreement.
    """

    teacher: Teacher
    divergence: Divergence
    temperature: float
    clamp: float | None = None

    @property
    def others(self) -> Sequence[Policy]:
        return self.teacher.others

    @property
    def sources(self) -> Sequence[str]:
        return self.teacher.sources

    def loss(self, batch: MicroBatch, hidden_ND: torch.Tensor, head: Head) -> Loss:
        how = {"temperature": self.temperature, "clamp": self.clamp, "watched": _watched(batch)}
        loss, figures = _divergence(hidden_ND, head, self.teacher.targets(batch), _weights(batch), self.divergence, **how)
        return loss, figures | _thirds(batch, figures["kl"])


def _divergence(
    hidden_ND: torch.Tensor, head: Head, targets: Distributions, weights_N: torch.Tensor, divergence: Divergence, **how: object
) -> Loss:
    """The loss of `divergence` for either form of distributions."""
    match targets:
        case ExactTargets() | MixedTargets():
            return divergence_loss(hidden_ND, head, targets, weights_N, divergence, **how)
        case TopKTargets():
            return top_k_divergence_loss(hidden_ND, head, targets, weights_N, divergence, **how)
    raise TypeError(f"a divergence is not defined for {type(targets).__name__}")


def _watched(batch: MicroBatch) -> np.ndarray:
    """Every WATCH_EVERY-th completion token of each row, from one that the row's name decides: positions in [N], ascending.

    So what is watched does not depend on how rows are put into micro-batches.
    """
    found, start = [], 0
    for row, length in zip(batch.rows, batch.lengths_B, strict=True):
        first = zlib.crc32(f"{row.group_id}/{row.sample_index}".encode()) % WATCH_EVERY
        found.append(np.arange(start + first, start + length, WATCH_EVERY))
        start += length
    return np.concatenate(found)


def _thirds(batch: MicroBatch, kl_N: torch.Tensor) -> Figures:
    """The KL within each third of the completions, and how many tokens that has."""
    third_N = torch.from_numpy(np.concatenate([thirds(length) for length in batch.lengths_B])).to(kl_N.device)
    figures: Figures = {}
    for number, name in enumerate(THIRDS):
        within_N = (third_N == number).float()
        figures |= {f"kl_{name}": kl_N * within_N, f"tokens_{name}": within_N}
    return figures


@dataclass(frozen=True, kw_only=True)
class SampledDistillation:
    """KL(student || teacher) from the sampled tokens alone: the log-ratio as a policy gradient's reward.

    For a token y that the sampler drew with probability s(y), the loss's gradient is

        (p(y) / s(y)) * (log p(y) - log q(y) - b) * grad log p(y)

    with student p, teacher q: its mean over y is the gradient of the exact KL at that position, whatever b is, as long as it
    depends on the position alone. Without `baseline` b is 0, and the teacher's log-probs of the sampled tokens are all that is
    needed. With it b is KL(p || q) at the position, without gradient (arXiv 2605.07865), which the teacher's distribution there must be
    known for: exact, or over its most likely ids and a bucket for the rest. Far from the teacher it lowers the variance,
    close to it, where log-ratios are about as often above as below 0, it may raise it; where the distribution is exact, the loss of
    `Distillation` costs the same and has no variance of this kind at all.

    The log-ratio is kept within +-`clamp` (nats). Figures: `kl`, `clamped`, and as Distillation has them, of the tokens of
    each third, and of agreement where there is a baseline.
    """

    teacher: Teacher  # of SampledTargets
    temperature: float
    baseline: bool = False
    clamp: float | None = None

    @property
    def others(self) -> Sequence[Policy]:
        return self.teacher.others

    @property
    def sources(self) -> Sequence[str]:
        return self.teacher.sources

    def loss(self, batch: MicroBatch, hidden_ND: torch.Tensor, head: Head) -> Loss:
        weights_N, targets = _weights(batch), self.teacher.targets(batch)
        sampler_N = batch.per_token([row.logprobs for row in batch.rows])
        seen, baseline_N = {}, None
        if self.baseline:
            with torch.no_grad():
                how = {"temperature": self.temperature, "watched": _watched(batch)}
                _, seen = _divergence(hidden_ND, head, targets.around, weights_N, reverse_kl, **how)
            baseline_N = seen.pop("kl")
            del seen["entropy"]  # which the loss has too

        def per_token(logprobs_C: torch.Tensor, at: slice) -> Loss:
            now_C = logprobs_C.detach()
            ratio_C, log_ratio_C = (now_C - sampler_N[at]).exp(), now_C - targets.logprobs_N[at]
            kept_C = log_ratio_C if self.clamp is None else log_ratio_C.clamp(-self.clamp, self.clamp)
            signal_C = ratio_C * (kept_C if baseline_N is None else kept_C - baseline_N[at])
            figures = {"kl": ratio_C * log_ratio_C} | ({} if self.clamp is None else {"clamped": (kept_C != log_ratio_C).float()})
            return (weights_N[at] * (ratio_C * kept_C + signal_C * (logprobs_C - now_C))).sum(), figures

        loss, figures = token_loss(hidden_ND, head, batch.targets_N, per_token, self.temperature)
        return loss, figures | seen | _thirds(batch, figures["kl"])


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-prob of the tokens as they stand: supervised fine-tuning on samples ("hard labels")."""

    others = sources = ()

    def loss(self, batch: MicroBatch, hidden_ND: torch.Tensor, head: Head) -> Loss:
        weights_N = _weights(batch)

        def per_token(logprobs_C: torch.Tensor, at: slice) -> Loss:
            return -(weights_N[at] * logprobs_C).sum(), {"cross_entropy": -logprobs_C.detach()}

        return token_loss(hidden_ND, head, batch.targets_N, per_token)
