"""Intervals and the parts of a standard error, against simulations of avg@k data of realistic shape."""

import math

import numpy as np
import pytest

from s2dcli import stats

EVALUATIONS = 6000
# How a problem's chance of a right answer is distributed: most problems of AIME are never solved, most of MATH-500 nearly always
SHAPES = {
    "aime": lambda draw, size: draw.beta(0.3, 1.2, size),
    "hard": lambda draw, size: draw.beta(0.15, 1.35, size),
    "math": lambda draw, size: draw.beta(1.2, 0.4, size),
    "easy": lambda draw, size: draw.beta(4.5, 0.5, size),
    "polar": lambda draw, size: draw.beta(0.5, 0.5, size),
}
MEANS = {"aime": 0.2, "hard": 0.1, "math": 0.75, "easy": 0.9, "polar": 0.5}


@pytest.mark.parametrize(("n", "k"), [(30, 16), (30, 64), (100, 8), (500, 4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_interval_of_avg_at_k_holds_the_true_value_in_93_to_97_per_cent(shape, n, k):
    draw = np.random.default_rng(7)
    scores_EN = draw.binomial(k, SHAPES[shape](draw, (EVALUATIONS, n))) / k
    averages, errors = scores_EN.mean(1), scores_EN.std(1, ddof=1) / math.sqrt(n)
    ends = np.array([stats.score_interval(a, e, n) for a, e in zip(averages.tolist(), errors.tolist(), strict=True)])
    covered = ((ends[:, 0] <= MEANS[shape]) & (MEANS[shape] <= ends[:, 1])).mean()
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(("n", "k"), [(30, 16), (200, 4)])
@pytest.mark.parametrize("shape", ["aime", "math", "polar"])
def test_the_interval_of_a_difference_holds_the_true_one_in_93_to_97_per_cent(shape, n, k):
    draw = np.random.default_rng(8)
    chances = SHAPES[shape](draw, (EVALUATIONS, n))
    better = chances + 0.3 * chances * (1 - chances)  # what training brings, most where a problem is half solved
    differences = (draw.binomial(k, better) - draw.binomial(k, chances)) / k
    many = SHAPES[shape](np.random.default_rng(0), 4_000_000)
    truth = float((0.3 * many * (1 - many)).mean())
    margin = stats.t_quantile(0.05, n - 1) * differences.std(1, ddof=1) / math.sqrt(n)
    assert 0.93 <= (abs(differences.mean(1) - truth) <= margin).mean() <= 0.97
    rights = [draw.binomial(k, side[0]) for side in (chances, better)]  # and the command's own interval is this one
    a, b = ({str(i): [1.0] * c + [0.0] * (k - c) for i, c in enumerate(side.tolist())} for side in rights)
    d = (rights[1] - rights[0]) / k
    half = stats.t_quantile(0.05, n - 1) * d.std(ddof=1) / math.sqrt(n)
    assert stats.paired_difference(a, b)["ci95"] == pytest.approx([d.mean() - half, d.mean() + half], rel=1e-9)


def test_an_interval_stays_between_0_and_1_and_needs_two_problems():
    assert stats.score_interval(0.5, 0.1, 1) is None
    low, high = stats.score_interval(0.0, 0.0, 30)  # none solved: 30 independent problems, t with 29 degrees of freedom
    t = 2.045229642132703  # scipy 1.17.1: t.isf(0.025, 29)
    assert (low, high) == (0.0, pytest.approx(t * t / (30 + t * t), rel=1e-9))
    assert stats.score_interval(1.0, 0.0, 30) == pytest.approx([1 - high, 1.0])
    # With 0-or-1 scores of n problems it is nearly Wilson's interval: of 8 among 10, with t for z
    n, p = 10, 0.8
    low, high = stats.score_interval(p, math.sqrt(p * (1 - p) / n), n)
    t = 2.2621571627982053
    roots = np.roots([1 + t * t / n, -(2 * p + t * t / n), p * p])  # |p - x| = t sqrt(x (1 - x) / n)
    assert (low, high) == pytest.approx((min(roots), max(roots)), rel=1e-9)


def test_the_parts_of_the_variance_are_without_bias():
    draw = np.random.default_rng(3)
    found = []
    for _ in range(300):
        chances = draw.beta(1.2, 0.8, 100)
        found.append(stats.variance_parts(draw.binomial(8, chances).tolist(), 8))
    a, b = 1.2, 0.8
    between, within = a * b / ((a + b) ** 2 * (a + b + 1)), a * b / ((a + b) * (a + b + 1))
    for values, truth in ((np.array([parts.between for parts in found]), between), (np.array([parts.within for parts in found]), within)):
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(found))
    assert stats.variance_parts([1, 0, 1], 1) == (None, None)
    assert stats.variance_parts([2, 2, 2], 4) == (0.0, pytest.approx(4 / 12))  # a negative estimate of between is none


@pytest.mark.parametrize("j", [1, 2, 4, 8])
def test_errors_of_pass_at_k_agree_with_the_bootstrap_over_problems(j):
    draw = np.random.default_rng(5)
    right = draw.binomial(8, draw.beta(0.4, 0.8, 120)).tolist()
    summary = stats.Summary()
    for problem, count in enumerate(right):
        for sample in range(8):
            ok = sample < count
            summary.add({"problem_id": str(problem), "reward": float(ok), "finish_reason": "stop", "completion_ids": 3, "answer": "1"})
    found = summary.report()["pass"][str(j)]
    chances = np.array([1 - math.comb(8 - c, j) / math.comb(8, j) for c in right])
    assert found["value"] == pytest.approx(chances.mean(), abs=1e-12)
    resampled = chances[draw.integers(0, 120, (20_000, 120))].mean(1)
    assert found["se"] == pytest.approx(resampled.std() * math.sqrt(120 / 119), rel=0.03)
