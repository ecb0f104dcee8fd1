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

from s2dcli.options import Advantage, Aggregate

# Added to a group's standard deviation (DeepSeekMath's code and its descendants use 1e-4 to 1e-6).
# With 0/1 rewards and up to 64 samples the smallest non-zero deviation is 0.12: nothing explodes.
ADVANTAGE_EPSILON = 1e-6
# Rewards closer than this are one reward: float noise must not become a signal of size one.
EQUAL_REWARDS = 1e-8


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


def clipped_policy_loss(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    weights_N: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped objective per token (arXiv 1707.06347, Eq. 7; separate bounds as DAPO's Eq. 10).

    loss = sum_n w_n * -min(r_n A_n, clip(r_n, 1 - low, 1 + high) A_n),  r_n = exp(logp_n - old_n).
    Metrics are sums over tokens: `clipped` (where the clip stopped the gradient), `ratio`.
    """
    ratio_N = (logprobs_N - old_logprobs_N).exp()
    clipped_N = ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    stopped_N = clipped_N * advantages_N < ratio_N * advantages_N
    return -(weights_N * objective_N).sum(), {"clipped": stopped_N.sum().detach(), "ratio": ratio_N.sum().detach()}


def k3(logprobs_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    """Schulman's low-variance estimate of KL(policy || reference) per sampled token, [N], never negative.

    exp(d) - d - 1 with d = reference - policy (DeepSeekMath, Eq. 4).
    """
    difference_N = reference_N - logprobs_N
    return difference_N.exp() - difference_N - 1.0
