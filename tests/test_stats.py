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
