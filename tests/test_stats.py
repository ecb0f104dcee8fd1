"""Averages and standard errors against values worked out by hand."""

import itertools
import math

import pytest

from s2dcli import stats
from s2dcli.errors import DataError


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
    second = {name: draw.integers(0, 2, 4).astype(float).tolist() for name in [*names, "only there"]}
    found = stats.paired_difference(first, second)
    a, b = (np.array([np.mean(side[name]) for name in names]) for side in (first, second))
    error = np.std(b - a, ddof=1) / np.sqrt(len(names))
    assert found["problems"] == 40
    assert (found["a"], found["b"], found["difference"]) == pytest.approx((a.mean(), b.mean(), (b - a).mean()), abs=1e-15)
    assert (found["se"], found["t"]) == pytest.approx((error, (b - a).mean() / error), rel=1e-12)
    # Two-sided tail of Student's t with 39 degrees of freedom, by integrating the density.
    grid = np.linspace(abs(found["t"]), 400, 4_000_001)
    scale = math.exp(math.lgamma(20) - math.lgamma(19.5)) / math.sqrt(39 * math.pi)
    assert found["p_t"] == pytest.approx(2 * np.trapezoid(scale * (1 + grid**2 / 39) ** -20, grid), rel=1e-6)
    assert found["ci95"] == pytest.approx(found["difference"] + error * 2.022690920036762 * np.array([-1, 1]), rel=1e-9)


def test_a_paired_difference_without_spread_has_no_interval():
    same = {"a": [1.0, 0.0], "b": [0.0, 0.0]}
    none = dict.fromkeys(["t", "p_t", "ci95", "detectable", "more_problems", "more_samples"])
    counts = {"wins": 0, "losses": 0, "ties": 2, "p": 1.0, "p_method": "exact", "resolved": False}
    assert stats.paired_difference(same, same) == {
        **{"problems": 2, "k": [2, 2], "a": 0.25, "b": 0.25, "difference": 0.0, "se": 0.0},
        **none,
        **counts,
    }
    with pytest.raises(ValueError, match="no problem is in both"):
        stats.paired_difference(same, {"c": [1.0]})


def test_differences_that_are_equal_up_to_rounding_have_no_spread():
    # 1/5 more on each problem: 0.2 - 0.0, 0.4 - 0.2, 0.6 - 0.4 and so on are not the same floats.
    first = {f"p{right}": [1.0] * right + [0.0] * (5 - right) for right in range(5)}
    second = {name: [1.0, *scores[:-1]] for name, scores in first.items()}
    assert len({stats.mean(second[name]) - stats.mean(first[name]) for name in first}) > 1
    found = stats.paired_difference(first, second)
    assert found["difference"] == pytest.approx(0.2)
    assert (found["se"], found["t"], found["p_t"], found["ci95"], found["detectable"]) == (0.0, None, None, None, None)
    assert found["p"] == 2 / 2**5  # all five problems alike: two of 32 patterns of signs are as far from zero


def test_unequal_sample_counts_within_a_set_are_never_compared():
    four = {"a": [1.0, 0.0, 0.0, 1.0], "b": [0.0, 0.0, 0.0, 1.0]}
    found = stats.paired_difference(four, {name: scores[:3] for name, scores in four.items()})
    assert (found["k"], found["b"]) == ([4, 3], pytest.approx(1 / 6))
    with pytest.raises(ValueError, match="problem 'b' has 2 samples in A"):
        stats.paired_difference({**four, "b": [1.0, 0.0]}, four)


# scipy 1.17.1: 2 * scipy.stats.t.sf(abs(t), degrees)
T_TAILS = [
    (0.5, 1, 0.7048327646991335),
    (12.7, 1, 0.050024327689344165),
    (2.0, 2, 0.18350341907227397),
    (-3.2, 9, 0.010831302589901321),
    (1.96, 30, 0.05934231289605049),
    (0.001, 5, 0.9992407867721976),
    (8.5, 319, 7.393933057282513e-16),
    (40.0, 319, 2.4721112404044773e-126),
    (2.5, 100_000, 0.012420919192559051),
]
# scipy 1.17.1: scipy.stats.t.isf(p / 2, degrees)
T_QUANTILES = [
    (0.05, 1, 12.706204736174705),
    (0.05, 2, 4.302652729749464),
    (0.05, 9, 2.2621571627982053),
    (0.05, 319, 1.967428386902372),
    (0.01, 4, 4.604094871349993),
    (0.05, 100_000, 1.95998770753461),
]


def test_the_t_distribution_equals_scipy():
    for t, degrees, tail in T_TAILS:
        assert stats.t_test(t, degrees) == pytest.approx(tail, rel=1e-9)
    for p, degrees, quantile in T_QUANTILES:
        assert stats.t_quantile(p, degrees) == pytest.approx(quantile, rel=1e-9)


@pytest.mark.parametrize("problems", [3, 10])
def test_false_positives_of_small_comparisons_are_as_rare_as_p_says(problems):
    import numpy as np

    draw = np.random.default_rng(0)
    found = 0
    for _ in range(1000):
        # Means of 400 fair coins: as good as normal, no difference between the two sides.
        a, b = draw.binomial(400, 0.5, (2, problems)) / 400
        p = stats.paired_difference({str(i): [x] for i, x in enumerate(a)}, {str(i): [x] for i, x in enumerate(b)})["p_t"]
        found += p is not None and p < 0.05
    assert 30 <= found <= 70  # 50 expected, standard deviation 7; the normal distribution gives 170 and 85


def row(problem="p", **fields):
    return {"problem_id": problem, "reward": 1.0, "finish_reason": "stop", "completion_ids": [1, 2], "answer": "3", **fields}


def test_what_is_right_is_the_label_and_rewards_stand_beside_it():
    rows = [
        row(reward=7.5, label=True),
        row(reward=-7.5, label=False),
        row("q", reward=1.0, label=False),
        row("q", reward=None, label=None),
    ]
    found = stats.summarize(rows)
    assert (found["avg_at_k"], found["se"], found["pass_at_k"], found["ungraded"]) == (0.25, 0.25, 0.5, 1)
    assert (found["mean_reward"], found["mean_reward_se"]) == (0.5, 0.5)  # of 0.0 and 1.0; the null is left out


def test_a_row_without_a_label_is_judged_by_a_reward_of_one_or_zero():
    assert [stats.is_right({"reward": reward}) for reward in (1, 1.0, 0, 0.0, None, 0.5, -1.0, 2.0)] == [
        *(True, True, False, False),
        *[None] * 4,
    ]
    assert stats.is_right({"reward": 1.0, "label": False}) is False
    assert stats.is_right({"reward": 0.0, "label": True}) is True


def test_rewards_without_a_notion_of_right_claim_no_avg_at_k():
    found = stats.summarize([row(reward=-7.5, label=None), row(reward=2.5, label=None), row("q", reward=None), row("q", reward=4.5)])
    assert (found["avg_at_k"], found["se"], found["pass_at_k"]) == (None, None, None)
    assert (found["mean_reward"], found["mean_reward_se"], found["ungraded"]) == (1.0, 3.5, 1)
    partial = stats.summarize([row(reward=0.5), row(reward=1.0)])  # one is right: the others are not
    assert (partial["avg_at_k"], partial["ungraded"]) == (0.5, 1)


def test_problems_without_an_answer_are_refused():
    unlabelled = row("q", answer="", reward=None, label=None)
    with pytest.raises(DataError, match="1 of 2 problems have no answer to grade against, the first is 'q'"):
        stats.summarize([row(), unlabelled])
    assert stats.summarize([row(answer="", reward=3.0)])["mean_reward"] == 3.0  # this reward needs none


def test_pairing_takes_out_how_hard_the_problems_are():
    # The second is right once more on every second problem, whatever the problem's difficulty.
    first = {f"p{i}": [1.0] * (i % 5) + [0.0] * (5 - i % 5) for i in range(20)}
    second = {name: [*scores[1:], scores[0]] if i % 2 else [1.0, *scores[:-1]] for i, (name, scores) in enumerate(first.items())}
    found = stats.paired_difference(first, second)
    assert found["se"] < min(stats.avg_at_k(first)[1], stats.avg_at_k(second)[1]) / 2
