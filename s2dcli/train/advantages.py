"""What a row is worth: advantages relative to its group, and the weight of its tokens. Plain numbers, no tensors.

Shapes: R rows of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def group_advantages(rewards: Sequence[float | None], kind: Advantage, outcomes: Sequence[float | None] | None = None) -> list[float]:
    """Advantage of each sample of one group: relative to the group (DeepSeekMath, arXiv 2402.03300, §4.1), or its reward.

    group-std: (reward - mean) / (standard deviation + epsilon); group-mean: reward - mean (Dr. GRPO); reward: the reward
    itself, without a baseline (REINFORCE, Williams 1992), whatever the rest of the group got.
    In the first two the deviation is the sample's, with n - 1. A null reward takes part in neither mean nor deviation
    and gets advantage 0. A group whose `outcomes`, the rewards themselves unless given, are all equal gets exactly 0:
    where rewards are less a KL estimate, their differences alone would be noise scaled up to 1.
    """
    if kind is Advantage.reward:
        return [0.0 if reward is None else reward for reward in rewards]
    known = [reward for reward in rewards if reward is not None]
    if not is_mixed(rewards if outcomes is None else outcomes):
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


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13): 0 down to -1 over the last `buffer` tokens."""
    return -min(1.0, max(0.0, (length - (max_tokens - buffer)) / buffer))
