"""Means, their standard errors over problems, and pass@k. All rates are fractions between 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from s2dcli.stats.student import SIGNIFICANT, t_quantile


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean. Raises ValueError if there are no values."""
    values = list(values)
    if not values:
        raise ValueError("the mean of no values")
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean: sample standard deviation (n - 1) / sqrt(n).

    One value has no spread to estimate it from; the result is then 0.0, since JSON has no NaN.
    Raises ValueError if there are no values.
    """
    centre = mean(values)
    if len(values) == 1:
        return 0.0
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def avg_at_k(scores_by_problem: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Return avg@k and its standard error over problems.

    A problem's score is the mean of its k samples (1.0 right, 0.0 wrong), avg@k the mean over
    problems; the standard error is that of the problems' scores, so that the k samples of one
    problem are never counted as k independent observations. With a single problem it is 0.0,
    see `standard_error`. Raises ValueError, naming the problem, if the sample counts differ.
    """
    if not scores_by_problem:
        raise ValueError("no problems were scored")
    first, num_samples = next((problem, len(scores)) for problem, scores in scores_by_problem.items())
    for problem, scores in scores_by_problem.items():
        if not scores:
            raise ValueError(f"problem {problem!r} has no samples")
        if len(scores) != num_samples:
            raise ValueError(f"problem {problem!r} has {len(scores)} samples, but problem {first!r} has {num_samples}")
    means = [mean(scores) for scores in scores_by_problem.values()]
    return mean(means), standard_error(means)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of the chance that at least one of k samples is right.

    1 - C(n - c, k) / C(n, k) for c right ones among n samples: the share of all subsets of size k
    that hold a right one (Chen et al. 2021, arXiv 2107.03374, Eq. 1). Computed with whole numbers.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} correct among {num_samples} samples")
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} cannot be estimated from {num_samples} samples")
    subsets = math.comb(num_samples, k)
    return (subsets - math.comb(num_samples - num_correct, k)) / subsets


class Parts(NamedTuple):
    """Where the variance of avg@k comes from; None where k = 1 cannot tell the two apart."""

    between: float | None  # variance of the problems' true scores
    within: float | None  # variance of a single sample of one problem, mean over problems


def variance_parts(right: Sequence[int], k: int) -> Parts:
    """Split the variance of n problems' scores, of `right[i]` right ones among k samples, in two.

    A problem's score is p_i + noise, with p_i its chance of a right answer. A single sample varies by
    p_i (1 - p_i), estimated without bias by c (k - c) / (k (k - 1)); the scores' sample variance estimates
    between + within / k. So the error of avg@k is sqrt(between / n + within / (k n)): its first part falls with
    more problems only, the second with more samples too. A negative estimate of `between` is 0.
    """
    if k < 2 or len(right) < 2:
        return Parts(None, None)
    within = mean(c * (k - c) / (k * (k - 1)) for c in right)
    total = standard_error([c / k for c in right]) ** 2 * len(right)
    return Parts(max(0.0, total - within / k), within)


def score_interval(average: float, error: float, num_problems: int) -> list[float] | None:
    """Return the 95 % confidence interval of a mean of scores between 0 and 1; None for a single problem.

    Wilson's score interval with Student's t for the normal quantile, and as many independent 0-or-1 problems as would have this
    standard error: n / d, where d = n error^2 / (average (1 - average)) says how much less than such problems these vary. One
    imaginary problem with d = 1 is averaged in, for few problems estimate d from few that were solved. In simulations of
    30 problems of many shapes (tests/stats/test_intervals.py) it holds the true value in 94 to 97 % of evaluations, average +- t error
    in 90 to 95 %.
    """
    if num_problems < 2:
        return None
    variance = average * (1 - average)
    design = num_problems * error**2 / variance if variance > 0 else 1.0
    effective = num_problems * (num_problems + 1) / (num_problems * design + 1)
    t = t_quantile(SIGNIFICANT, num_problems - 1)
    shrink = 1 + t * t / effective
    centre = (average + t * t / (2 * effective)) / shrink
    margin = t * math.sqrt(variance / effective + (t / (2 * effective)) ** 2) / shrink
    return [max(0.0, centre - margin), min(1.0, centre + margin)]
