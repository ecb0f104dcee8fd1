"""Averages and standard errors against values worked out by hand."""

import itertools
import math

import pytest

from s2dcli import stats


def test_avg_at_k_is_the_mean_over_problems_with_the_spread_over_problems():
    # Problem means 1, 0.5, 0: mean 0.5, sample variance 0.25, standard error sqrt(0.25 / 3).
    average, error = stats.avg_at_k({"a": [1.0, 1.0], "b": [1.0, 0.0], "c": [0.0, 0.0]})
    assert average == 0.5
    assert error == pytest.approx(math.sqrt(0.25 / 3), abs=1e-15)


def test_samples_of_one_problem_are_not_independent_observations():
    twice = {"a": [1.0, 1.0], "b": [0.0, 0.0]}
    often = {"a": [1.0] * 100, "b": [0.0] * 100}
    assert stats.avg_at_k(twice) == stats.avg_at_k(often) == (0.5, 0.5)


def test_equal_problems_have_no_spread():
    assert stats.avg_at_k({"a": [1.0, 0.0], "b": [0.0, 1.0]}) == (0.5, 0.0)


def test_one_problem_has_a_standard_error_of_zero_not_nan():
    assert stats.avg_at_k({"only": [1.0, 0.0, 0.0, 1.0]}) == (0.5, 0.0)


def test_unequal_sample_counts_name_the_problem():
    with pytest.raises(ValueError, match=r"'short' has 1 samples.*'long' has 2"):
        stats.avg_at_k({"long": [1.0, 0.0], "short": [1.0]})
    with pytest.raises(ValueError, match="'empty' has no samples"):
        stats.avg_at_k({"empty": []})
    with pytest.raises(ValueError, match="no problems"):
        stats.avg_at_k({})


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 4, 3), (6, 1, 6), (4, 0, 2), (4, 4, 1)])
def test_pass_at_k_counts_the_subsets_that_hold_a_right_sample(n, c, k):
    right = [True] * c + [False] * (n - c)
    subsets = [any(subset) for subset in itertools.combinations(right, k)]
    assert stats.pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-15)


def test_pass_at_k_by_hand_and_for_many_samples():
    assert stats.pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the right one
    assert stats.pass_at_k(10_000, 1, 5_000) == 0.5


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_the_impossible(n, c, k):
    with pytest.raises(ValueError, match=r"correct among|cannot be estimated"):
        stats.pass_at_k(n, c, k)


def test_mean_of_nothing_is_an_error():
    assert stats.mean([0.1] * 10) == pytest.approx(0.1, abs=1e-17)
    with pytest.raises(ValueError, match="no values"):
        stats.mean([])


def test_a_paired_difference_equals_the_formula_in_float64():
    import numpy as np

    draw = np.random.default_rng(0)
    names = [f"p{i}" for i in range(40)]
    first = {name: draw.integers(0, 2, 4).astype(float).tolist() for name in [*names, "only here"]}
    second = {name: draw.integers(0, 2, 8).astype(float).tolist() for name in [*names, "only there"]}
    found = stats.paired_difference(first, second)
    a, b = (np.array([np.mean(side[name]) for name in names]) for side in (first, second))
    error = np.std(b - a, ddof=1) / np.sqrt(len(names))
    assert found["problems"] == 40
    assert (found["a"], found["b"], found["difference"]) == pytest.approx((a.mean(), b.mean(), (b - a).mean()), abs=1e-15)
    assert (found["se"], found["z"]) == pytest.approx((error, (b - a).mean() / error), rel=1e-12)
    # Two-sided normal tail, by integrating the density.
    grid = np.linspace(abs(found["z"]), 40, 4_000_001)
    assert found["p"] == pytest.approx(2 * np.trapezoid(np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi), grid), rel=1e-6)


def test_a_paired_difference_without_spread_has_no_z():
    same = {"a": [1.0, 0.0], "b": [0.0, 0.0]}
    assert stats.paired_difference(same, same) == {"problems": 2, "a": 0.25, "b": 0.25, "difference": 0.0, "se": 0.0, "z": None, "p": None}
    with pytest.raises(ValueError, match="no problem is in both"):
        stats.paired_difference(same, {"c": [1.0]})


def test_pairing_takes_out_how_hard_the_problems_are():
    # The second is right once more on every second problem, whatever the problem's difficulty.
    first = {f"p{i}": [1.0] * (i % 5) + [0.0] * (5 - i % 5) for i in range(20)}
    second = {name: [*scores[1:], scores[0]] if i % 2 else [1.0, *scores[:-1]] for i, (name, scores) in enumerate(first.items())}
    found = stats.paired_difference(first, second)
    assert found["se"] < min(stats.avg_at_k(first)[1], stats.avg_at_k(second)[1]) / 2
