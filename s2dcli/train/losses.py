"""Advantages and losses as pure functions of tensors; nothing here knows files or models.

Every loss is sum over tokens of weight * value. The weights come from `token_weights`, which fixes
the denominators over the whole batch before the step, so the split into micro-batches never changes
the gradient.

Shapes: N completion tokens of a micro-batch, R rows of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from s2dcli.options import Advantage, Aggregate, Correction, Importance, KlEstimator, Surrogate

# Added to a group's standard deviation (DeepSeekMath's code and its descendants use 1e-4 to 1e-6).
# With 0/1 rewards and up to 64 samples the smallest non-zero deviation is 0.12: nothing explodes.
ADVANTAGE_EPSILON = 1e-6
# Rewards closer than this are one reward: float noise must not become a signal of size one.
EQUAL_REWARDS = 1e-8
# exp of more than this would overflow once it is squared; such a ratio is cut or masked anyway.
MAX_LOG_RATIO = 40.0


def token_weights(lengths_R: Sequence[int], aggregate: Aggregate, max_tokens: int) -> list[float]:
    """Weight of every completion token of each row, [R]; the sum over all tokens of a full batch is at most 1.

    token: 1 / number of completion tokens in the batch (DAPO, arXiv 2503.14476, Eq. 8).
    sequence: 1 / (rows * tokens of the row), a mean of means (GRPO, arXiv 2402.03300, Eq. 3).
    constant: 1 / (rows * max_tokens) (Dr. GRPO, arXiv 2503.20783).
    Rows count also where they are empty or carry no signal; rows that must not be learnt from
    (ungradable ones) are left out of `lengths_R` by the caller.
    """
    if aggregate is Aggregate.token:
        total = sum(lengths_R)
        return [1.0 / total if total else 0.0] * len(lengths_R)
    if aggregate is Aggregate.sequence:
        return [1.0 / (len(lengths_R) * length) if length else 0.0 for length in lengths_R]
    return [1.0 / (len(lengths_R) * max_tokens)] * len(lengths_R)


def weights_of(chosen: Sequence[int], lengths_R: Sequence[int], aggregate: Aggregate, max_tokens: int) -> dict[int, float]:
    """Token weights of the chosen rows of a batch, by row; see `token_weights`."""
    return dict(zip(chosen, token_weights([lengths_R[row] for row in chosen], aggregate, max_tokens), strict=True))


def group_advantages(rewards: Sequence[float | None], kind: Advantage) -> list[float]:
    """Advantage of each sample of one group relative to the group (DeepSeekMath, arXiv 2402.03300, §4.1).

    group-std: (reward - mean) / (standard deviation + epsilon); group-mean: reward - mean (Dr. GRPO).
    The deviation is the sample's, with n - 1. A null reward takes part in neither mean nor deviation
    and gets advantage 0. A group whose rewards are all equal gets exactly 0.
    """
    known = [reward for reward in rewards if reward is not None]
    if not is_mixed(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(known) / len(known)
    scale = 1.0
    if kind is Advantage.group_std:
        scale = math.sqrt(math.fsum((reward - mean) ** 2 for reward in known) / (len(known) - 1)) + ADVANTAGE_EPSILON
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]


def is_mixed(rewards: Sequence[float | None]) -> bool:
    """Whether a group's known rewards differ, so that it has something to teach."""
    known = [reward for reward in rewards if reward is not None]
    return bool(known) and max(known) - min(known) > EQUAL_REWARDS


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

    Metrics are sums over tokens: `clipped` (where clipping changed the objective), `ratio` (unclipped).
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
    return -(weights_N * objective_N).sum(), {"clipped": clipped_N.sum().detach(), "ratio": ratio_N.detach().sum()}


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


def kl_estimates(kind: KlEstimator, logprobs: Sequence[float], reference: Sequence[float]) -> list[float]:
    """`kl_estimate` for one row of plain numbers."""
    return kl_estimate(kind, torch.tensor(logprobs, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)).tolist()


def mean_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Mean of the differences of two rows of log-probs: the log of a sequence's ratio, whatever its length."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    return math.fsum(gaps) / len(gaps) if gaps else 0.0


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13): 0 down to -1 over the last `buffer` tokens."""
    return -min(1.0, max(0.0, (length - (max_tokens - buffer)) / buffer))


def corrections(
    trainer: Sequence[Sequence[float]], sampler: Sequence[Sequence[float]], kind: Correction, level: Importance, cap: float
) -> list[list[float]]:
    """Weights, per token of each row, that correct for sampling from probabilities other than the trainer's.

    The ratio is exp(trainer - sampler) of each token, or of its sequence by the mean of the logs, which
    does not grow with the length. truncate: min(ratio, cap) (truncated importance sampling, Ionides
    2008); mask: the ratio where it lies within [1 / cap, cap], else 0.
    """
    weights = []
    for ours, theirs in zip(trainer, sampler, strict=True):
        gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
        if level is Importance.sequence:
            gaps = [mean_gap(ours, theirs)] * len(gaps)
        ratios = [math.exp(min(gap, MAX_LOG_RATIO)) for gap in gaps]
        if kind is Correction.truncate:
            weights.append([min(ratio, cap) for ratio in ratios])
        else:
            weights.append([ratio if 1 / cap <= ratio <= cap else 0.0 for ratio in ratios])
    return weights
