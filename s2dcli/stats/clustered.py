"""Figures of tokens and samples whose independent observations are the problems: errors count problems, not tokens or samples."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from s2dcli.stats.basic import mean, score_interval, standard_error
from s2dcli.stats.pairs import inference, is_resolved, sign_flip_test
from s2dcli.stats.student import SIGNIFICANT

ROUNDING = 1e-12  # a spread of problems' numbers below it is none
CHANCE = 0.5  # AUC of a score that says nothing


class Estimate(NamedTuple):
    """A figure with its standard error over problems and its 95 % interval; None where there are too few problems to tell."""

    value: float
    se: float | None
    ci95: list[float] | None

    def side(self, threshold: float) -> bool | None:
        """Whether the figure is above a threshold, as far as its interval tells; None if the threshold is within it."""
        if self.ci95 is None or self.ci95[0] <= threshold <= self.ci95[1]:
            return None
        return self.value > threshold


def share(values: Sequence[float]) -> Estimate:
    """Return the mean of one number between 0 and 1 for each problem, with `basic.score_interval`."""
    value, error = mean(values), standard_error(values)
    return Estimate(value, error if len(values) > 1 else None, score_interval(value, error, len(values)))


def per_token(totals: Sequence[tuple[float, int]], most: float = math.inf) -> Estimate:
    """Return the mean over all tokens of a number of 0 up to `most`, from each problem's (sum over its tokens, number of them).

    r = sum s_i / sum n_i is a ratio of two sums over n problems. Its standard error is that of its linear terms,
    sqrt(n / (n - 1) sum (s_i - r n_i)^2) / sum n_i (Cochran, Sampling Techniques, 1977, Eq. 6.13); the interval is
    Student's, within what the number can be. Raises ValueError if there are no tokens.
    """
    tokens = sum(count for _, count in totals)
    if not tokens:
        raise ValueError("the mean of no tokens")
    value, problems = math.fsum(total for total, _ in totals) / tokens, sum(count > 0 for _, count in totals)
    if problems < 2:
        return Estimate(value, None, None)
    error = math.sqrt(problems / (problems - 1) * math.fsum((total - value * count) ** 2 for total, count in totals)) / tokens
    low, high = inference(value, error, problems - 1)["ci95"] or (value, value)
    return Estimate(value, error, [max(0.0, low), min(most, high)])


def contrast(values: Sequence[float], k: int) -> dict[str, Any]:
    """Test whether the mean of one difference for each problem, a multiple of 1 / k, is zero.

    value, se, ci95 by Student's t; p, two-sided, by flipping signs (`pairs.sign_flip_test`); resolved: both say that it is not.
    Where all differences are equal there is no spread, and p alone decides.
    """
    value, error = mean(values), standard_error(values)
    spread = max(values) - min(values) >= ROUNDING
    p, _ = sign_flip_test(values, k)
    found = {"value": value, "se": error if len(values) > 1 else None, "p": p}
    found["ci95"] = inference(value, error if spread else 0.0, len(values) - 1)["ci95"]
    return {**found, "resolved": is_resolved(found) if spread else p < SIGNIFICANT}


Labelled = Sequence[tuple[float, bool]]  # the score of each sample of a problem, and whether the sample is right


def auc(by_problem: Mapping[str, Labelled]) -> dict[str, Any]:
    """Return how well a score tells right samples from wrong ones: the chance that a right one has the higher score, ties counted half.

    value, se, ci95, right and wrong (numbers of samples), reason. Samples of one problem are not independent: the
    standard error is Obuchowski's (1997, Biometrics 53:567) for clustered data, with the problems as clusters; where each has
    one sample it is DeLong's. The interval is `basic.score_interval` with as many problems as have right samples, or wrong
    ones, whichever are fewer. Where a figure cannot be had it is None, and `reason` says why.
    """
    right = sorted(score for samples in by_problem.values() for score, label in samples if label)
    wrong = sorted(score for samples in by_problem.values() for score, label in samples if not label)
    counts = {"right": len(right), "wrong": len(wrong)}
    if not right or not wrong:
        missing = "right" if not right else "wrong"
        return {"value": None, "se": None, "ci95": None, **counts, "reason": f"no {missing} answer among {len(right) + len(wrong)}"}
    value = sum(_below(wrong, score) for score in right) / (len(right) * len(wrong))
    sums = []  # of each problem: of what its right and its wrong samples win more than the average
    for samples in by_problem.values():
        wins = math.fsum(_below(wrong, score) / len(wrong) - value for score, label in samples if label)
        losses = math.fsum(1 - _below(right, score) / len(right) - value for score, label in samples if not label)
        sums.append((wins, losses))
    clusters = [sum(any(label is kind for _, label in samples) for samples in by_problem.values()) for kind in (True, False)]
    if min(clusters) < 2:
        few = "right" if clusters[0] < 2 else "wrong"
        return {"value": value, "se": None, "ci95": None, **counts, "reason": f"{few} answers to one problem only: no error can be told"}
    spread_right, spread_wrong, both = (
        correction / (correction - 1) * math.fsum(products)
        for correction, products in (
            (clusters[0], [wins * wins for wins, _ in sums]),
            (clusters[1], [losses * losses for _, losses in sums]),
            (len(sums), [wins * losses for wins, losses in sums]),
        )
    )
    variance = spread_right / len(right) ** 2 + spread_wrong / len(wrong) ** 2 + 2 * both / (len(right) * len(wrong))
    error = math.sqrt(max(0.0, variance))
    return {"value": value, "se": error, "ci95": score_interval(value, error, min(clusters)), **counts, "reason": ""}


def within_groups_auc(by_problem: Mapping[str, Labelled]) -> dict[str, Any]:
    """Return the mean over problems of the AUC among a problem's own samples, of those that have both right and wrong ones.

    value, se, ci95, groups (number of such problems), reason. An easy problem's high scores count for nothing.
    """
    values = []
    for samples in by_problem.values():
        right, wrong = ([score for score, label in samples if label is kind] for kind in (True, False))
        if right and wrong:
            values.append(sum(_below(sorted(wrong), score) for score in right) / (len(right) * len(wrong)))
    if not values:
        return {"value": None, "se": None, "ci95": None, "groups": 0, "reason": "no group has both right and wrong answers"}
    found = share(values)
    reason = "one group has both right and wrong answers: no error can be told" if len(values) == 1 else ""
    return {**found._asdict(), "groups": len(values), "reason": reason}


def _below(ordered: Sequence[float], score: float) -> float:
    """Return how many numbers of an ascending sequence are below a score, equal ones counted half."""
    return (bisect_left(ordered, score) + bisect_right(ordered, score)) / 2
