"""Losses as pure functions of tensors; nothing here knows files or models.

Every loss is sum over tokens of weight * value. The weights come from advantages.token_weights, which fixes
the denominators over the whole batch before the step, so the split into micro-batches never changes
the gradient.

Shapes: N completion tokens of a micro-batch, T those of one row.
"""

from __future__ import annotations

import numpy as np
import torch

from s2dcli.options import Correction, CorrectionLevel, KlEstimator, Surrogate

# exp of more than this would overflow once it is squared; such a ratio is cut or masked anyway.
MAX_LOG_RATIO = 40.0


def policy_loss(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    weights_N: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    surrogate: Surrogate = Surrogate.ppo,
    sequence_log_ratios_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy objective, a weighted sum over tokens; the weights hold the denominator.

    With r_n = exp(logp_n - old_n):
    ppo: sum w_n * -min(r_n A_n, clip(r_n, 1 - low, 1 + high) A_n)  (arXiv 1707.06347, Eq. 7; separate
    bounds as in DAPO, arXiv 2503.14476, Eq. 10).
    cispo: sum w_n * -stop(min(r_n, 1 + high)) A_n logp_n: the weight is truncated, no token loses its
    gradient (MiniMax-M1, arXiv 2506.13585, Eq. 4, which sets no lower bound; `clip_low` is one).
    With `sequence_log_ratios_N`, the mean over its sequence of logp - old at each token, that ratio
    replaces r_n: its value is the sequence's, its gradient flows through each token's own log-prob
    (GSPO, arXiv 2507.18071, Eq. 5 and 14).

    Figures per token, [N]: `clip_fraction` (1 where clipping changed the objective), `ratio` (unclipped).
    """
    ratio_N = (logprobs_N - old_logprobs_N).exp()
    if sequence_log_ratios_N is not None:
        ratio_N = sequence_log_ratios_N.exp() * (logprobs_N - logprobs_N.detach()).exp()
    bounded_N = ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high)
    if surrogate is Surrogate.cispo:
        objective_N = bounded_N.detach() * advantages_N * logprobs_N
        clipped_N = bounded_N != ratio_N
    else:
        objective_N = torch.minimum(ratio_N * advantages_N, bounded_N * advantages_N)
        clipped_N = bounded_N * advantages_N < ratio_N * advantages_N
    return -(weights_N * objective_N).sum(), {"clip_fraction": clipped_N.detach().float(), "ratio": ratio_N.detach()}


def kl_estimate(kind: KlEstimator, logprobs_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    """Schulman's estimators of KL(policy || reference) at tokens sampled from the policy, [N], nats.

    With d = reference - policy: k1 = -d (unbiased, of either sign); k2 = d^2 / 2 (biased, its gradient
    is that of the KL); k3 = exp(d) - d - 1 (unbiased, never negative; DeepSeekMath, Eq. 4). The gradient of
    k1 as a loss has expectation zero: k1 belongs into the reward.
    """
    difference_N = reference_N - logprobs_N
    if kind is KlEstimator.k1:
        return -difference_N
    if kind is KlEstimator.k2:
        return 0.5 * difference_N.square()
    return difference_N.exp() - difference_N - 1.0


def kl_estimates(kind: KlEstimator, logprobs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`kl_estimate` for the tokens of one row, [T]."""
    return kl_estimate(kind, torch.from_numpy(logprobs).double(), torch.from_numpy(reference).double()).numpy()


def mean_log_ratio(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean of the differences of a row's log-probs: the log of a sequence's ratio, whatever its length. Raises ValueError."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} log-probs of one row")
    return float(np.mean(ours.astype(np.float64) - theirs)) if len(ours) else 0.0


def importance_weights(
    trainer: np.ndarray, sampler: np.ndarray, kind: Correction, level: CorrectionLevel, cap: float, floor: float | None = None
) -> np.ndarray:
    """Weights of a row's tokens, [T], that correct for sampling from probabilities other than the trainer's.

    The ratio is exp(trainer - sampler) of each token, or of its sequence: the exponential of the sum of the log-ratios
    (the exact ratio, TRL's), or of their mean, which does not grow with the length (GSPO's). truncate: min(ratio, cap)
    (truncated importance sampling, Ionides 2008), and no less than `floor` if given; mask: the ratio where it lies within
    [floor, cap], else 0 (IcePop, arXiv 2510.18855), with `floor` 1 / cap unless given.
    """
    log_ratios = trainer.astype(np.float64) - sampler
    if level is not CorrectionLevel.token:
        log_ratio = mean_log_ratio(trainer, sampler) if level is CorrectionLevel.sequence_mean else log_ratios.sum()
        log_ratios = np.full(len(trainer), log_ratio)
    ratios = np.exp(np.minimum(log_ratios, MAX_LOG_RATIO))
    if kind is Correction.truncate:
        return np.clip(ratios, floor, cap)
    return np.where((ratios >= (1 / cap if floor is None else floor)) & (ratios <= cap), ratios, 0.0)
