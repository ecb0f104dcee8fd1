"""Paired comparisons against enumeration, simulation and other ways to compute the same."""

import itertools
import math

import numpy as np
import pytest

from s2dcli import stats
from s2dcli.stats.pairs import detectable


def sides(draw, n, k, shift=0.0):
    """Two sets of scores of n problems, k samples each, of related difficulty."""
    chances = draw.beta(0.6, 0.9, n)
    better = np.clip(chances + shift, 0, 1)
    return tuple({f"p{i}": draw.binomial(1, p, k).astype(float).tolist() for i, p in enumerate(side)} for side in (chances, better))


def enumerated(differences):
    """Share of all sign patterns whose sum is at least as far from zero."""
    seen = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(total >= seen - 1e-9 for total in sums) / len(sums)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 3), (6, 1), (10, 4), (13, 16)])
def test_the_sign_flip_p_is_that_of_all_patterns(n, k):
    draw = np.random.default_rng(n)
    for _ in range(5):
        a, b = sides(draw, n, k, shift=0.2)
        differences = [np.mean(b[name]) - np.mean(a[name]) for name in a]
        found = stats.paired_difference(a, b)
        assert (found["p"], found["p_method"]) == (pytest.approx(enumerated(differences), abs=1e-12), "exact")


def test_the_exact_p_of_a_sign_test_is_binomial():
    a = {f"p{i}": [0.0] for i in range(40)} | {f"q{i}": [1.0] for i in range(15)} | {f"r{i}": [1.0] for i in range(1000)}
    b = {f"p{i}": [1.0] for i in range(40)} | {f"q{i}": [0.0] for i in range(15)} | {f"r{i}": [1.0] for i in range(1000)}
    found = stats.paired_difference(a, b)  # McNemar's exact test: 40 of 55
    assert found["p"] == pytest.approx(2 * sum(math.comb(55, i) for i in range(40, 56)) / 2**55, rel=1e-12)
    assert (found["wins"], found["losses"], found["ties"], found["problems"]) == (40, 15, 1000, 1055)


def test_values_that_are_no_multiples_are_enumerated_or_drawn():
    draw = np.random.default_rng(2)
    few = draw.normal(0.3, 1, 9).tolist()
    assert stats.sign_flip_test(few, 1) == (pytest.approx(enumerated(few)), "exact")
    many = draw.normal(0.25, 1, 60)
    p, method = stats.sign_flip_test(many.tolist(), 1)
    assert method == "monte-carlo"
    assert stats.sign_flip_test(many.tolist(), 1) == (p, method)  # the seed is fixed
    t = many.mean() / (many.std(ddof=1) / math.sqrt(60))
    assert p == pytest.approx(stats.t_test(t, 59), abs=0.01)


def test_drawn_and_exact_agree(monkeypatch):
    a, b = sides(np.random.default_rng(4), 80, 4, shift=0.05)
    exact = stats.paired_difference(a, b)
    monkeypatch.setattr("s2dcli.stats.pairs.EXACT_BYTES", 0)
    drawn = stats.paired_difference(a, b)
    assert (exact["p_method"], drawn["p_method"]) == ("exact", "monte-carlo")
    assert drawn["p"] == pytest.approx(exact["p"], abs=4 * math.sqrt(exact["p"] / 100_000) + 1e-5)


def test_p_is_below_5_per_cent_in_at_most_5_per_cent_of_equals():
    draw = np.random.default_rng(6)
    found = [stats.paired_difference(*sides(draw, 40, 16))["p"] for _ in range(1000)]
    assert 30 <= sum(p < 0.05 for p in found) <= 70  # 50 expected, standard deviation 7


@pytest.mark.parametrize(("n", "sigma"), [(30, 0.3), (200, 0.4)])
def test_what_is_called_detectable_is_found_in_80_per_cent(n, sigma):
    draw = np.random.default_rng(9)
    difference = detectable(sigma / math.sqrt(n), n - 1)
    seen = draw.normal(difference, sigma, (20_000, n))
    t = seen.mean(1) / (seen.std(1, ddof=1) / math.sqrt(n))
    assert (abs(t) > stats.t_quantile(0.05, n - 1)).mean() == pytest.approx(0.8, abs=0.015)


def test_more_problems_or_samples_make_the_difference_seen_detectable():
    draw = np.random.default_rng(10)
    a, b = sides(draw, 60, 4, shift=0.06)
    found = stats.paired_difference(a, b)
    deviation, more = found["se"] * math.sqrt(60), found["more_problems"]
    assert not found["resolved"]
    needed = [detectable(deviation / math.sqrt(60 + extra), 59 + extra) for extra in (more - 1, more)]
    assert needed[1] <= abs(found["difference"]) < needed[0]
    # More samples, by the formula: between + within (1 / k_a + 1 / k_b), both parts from the scores by hand
    rights = [np.array([sum(side[name]) for name in a]) for side in (a, b)]
    within = [np.mean(c / 4 * (1 - c / 4)) * 4 / 3 for c in rights]
    between = max(0.0, np.var((rights[1] - rights[0]) / 4, ddof=1) - sum(within) / 4)
    room = 60 * (found["difference"] * found["se"] / found["detectable"]) ** 2 - between
    expected = None if room <= 0 else math.ceil(sum(within) / room) - 4
    assert found["more_samples"] == expected


def test_a_difference_made_of_decoding_noise_needs_samples_and_one_between_problems_does_not():
    noisy = [{f"p{i}": [1.0] * right + [0.0] * (4 - right) for i in range(40)} for right in (2, 2)]
    for i in range(0, 40, 2):  # every problem has the same true score, more or less
        noisy[1][f"p{i}"] = [1.0, 1.0, 1.0, 0.0]
        noisy[0][f"p{i + 1}"] = [1.0, 0.0, 0.0, 0.0] if i % 4 else [1.0, 1.0, 1.0, 0.0]
    assert stats.paired_difference(*noisy)["more_samples"] is not None
    sure = [{f"p{i}": [float(i % 2)] * 4 for i in range(40)}, {f"p{i}": [float(i % 2 if i % 5 else i % 3 > 0)] * 4 for i in range(40)}]
    found = stats.paired_difference(*sure)
    assert found["more_samples"] is None
    assert found["difference"] == 0 or found["more_problems"] > 0
    single = stats.paired_difference({"a": [1.0], "b": [0.0], "c": [1.0]}, {"a": [0.0], "b": [0.0], "c": [1.0]})
    assert single["more_samples"] is None  # k = 1 cannot tell


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.6, 0.001]) == pytest.approx([0.6, 0.002])
    assert stats.holm([0.7, 0.9]) == [1.0, 1.0]
