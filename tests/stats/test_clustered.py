"""Ratios and AUCs over problems, against enumeration, the jackknife, DeLong's own formula and a bootstrap."""

import itertools
import math
import random

import numpy as np
import pytest

from s2dcli.stats.clustered import Estimate, auc, contrast, per_token, share, within_groups_auc


def enumerated(samples):
    """Share of (right, wrong) pairs in which the right one has the higher score, ties half."""
    right, wrong = ([score for score, label in samples if label is kind] for kind in (True, False))
    return sum((x > y) + 0.5 * (x == y) for x, y in itertools.product(right, wrong)) / (len(right) * len(wrong))


def drawn(problems, k, seed, *, rounded=False):
    """Samples whose scores differ between problems and are higher where right; rounding makes ties."""
    draw = np.random.default_rng(seed)
    found = {}
    for problem in range(problems):
        chance, level = draw.beta(0.6, 1.0), draw.normal()
        labels = draw.random(k) < chance
        scores = level + draw.normal(size=k) + 0.8 * labels
        found[str(problem)] = [
            (float(round(score) if rounded else score), bool(label)) for score, label in zip(scores, labels, strict=True)
        ]
    return found


@pytest.mark.parametrize("rounded", [False, True])
def test_auc_is_the_share_of_pairs_in_the_right_order(rounded):
    by_problem = drawn(30, 4, seed=1, rounded=rounded)
    everything = [sample for samples in by_problem.values() for sample in samples]
    found = auc(by_problem)
    assert found["value"] == pytest.approx(enumerated(everything), abs=1e-12)
    assert found["right"] + found["wrong"] == 120
    assert found["reason"] == ""
    mixed = [enumerated(samples) for samples in by_problem.values() if len({label for _, label in samples}) == 2]
    within = within_groups_auc(by_problem)
    assert within["value"] == pytest.approx(np.mean(mixed), abs=1e-12)
    assert within["se"] == pytest.approx(np.std(mixed, ddof=1) / math.sqrt(len(mixed)), abs=1e-12)
    assert within["groups"] == len(mixed)


def test_the_error_of_an_auc_with_one_sample_a_problem_is_delongs():
    by_problem = drawn(80, 1, seed=2)
    samples = [samples[0] for samples in by_problem.values()]
    right, wrong = (np.array([score for score, label in samples if label is kind]) for kind in (True, False))
    wins = (right[:, None] > wrong[None, :]).astype(float)
    variance = wins.mean(1).var(ddof=1) / len(right) + wins.mean(0).var(ddof=1) / len(wrong)
    assert auc(by_problem)["se"] == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_the_error_of_an_auc_is_that_of_a_bootstrap_over_problems():
    by_problem = drawn(150, 6, seed=3)
    draw, groups = random.Random(0), list(by_problem.values())
    again = [auc({str(number): draw.choice(groups) for number in range(len(groups))})["value"] for _ in range(300)]
    found = auc(by_problem)
    assert found["se"] == pytest.approx(np.std(again), rel=0.15)  # 300 draws tell a deviation to 4 %
    alone = {f"{problem}.{index}": [sample] for problem, samples in by_problem.items() for index, sample in enumerate(samples)}
    assert found["se"] > 1.2 * auc(alone)["se"]  # as if samples of one problem were independent


def test_the_interval_of_an_auc_holds_the_true_one():
    truth = auc(drawn(4000, 4, seed=4))["value"]
    held = sum(low <= truth <= high for low, high in (auc(drawn(40, 4, seed=100 + trial))["ci95"] for trial in range(200)))
    assert 0.91 <= held / 200 <= 0.99  # 95 % with an error of 1.5 %


def test_an_auc_that_cannot_be_had_is_null_with_the_reason():
    wrong = {"a": [(1.0, False), (2.0, False)], "b": [(3.0, False)]}
    assert (auc(wrong)["value"], auc(wrong)["reason"]) == (None, "no right answer among 3")
    assert within_groups_auc(wrong)["value"] is None
    assert auc({"a": [(1.0, True)]})["reason"] == "no wrong answer among 1"
    one = auc({**wrong, "c": [(9.0, True), (8.0, False)]})
    assert (one["value"], one["se"], one["ci95"]) == (1.0, None, None)
    assert "right answers to one problem only" in one["reason"]
    assert within_groups_auc({**wrong, "c": [(9.0, True), (8.0, False)]})["ci95"] is None


def test_a_perfect_auc_of_few_problems_still_has_an_interval():
    found = auc({str(number): [(1.0, True), (0.0, False)] for number in range(5)})
    assert found["value"] == 1.0
    assert found["ci95"][0] < 0.7


def test_the_mean_over_tokens_and_its_error_over_problems():
    totals = [(3.0, 4), (0.5, 10), (7.25, 6), (2.0, 2)]
    found = per_token(totals)
    assert found.value == pytest.approx(12.75 / 22)
    without = [
        sum(total for index, (total, _) in enumerate(totals) if index != left)
        / sum(n for index, (_, n) in enumerate(totals) if index != left)
        for left in range(4)
    ]
    jackknife = math.sqrt(3 / 4 * sum((value - np.mean(without)) ** 2 for value in without))
    assert found.se == pytest.approx(jackknife, rel=0.35)  # equal to first order
    many = [(random.Random(index).random() * (5 + index % 7), 5 + index % 7) for index in range(400)]
    sums, counts = np.array(many).T
    without = (sums.sum() - sums) / (counts.sum() - counts)
    assert per_token(many).se == pytest.approx(math.sqrt(399 / 400 * ((without - without.mean()) ** 2).sum()), rel=1e-3)
    assert per_token([(1.0, 2)]) == Estimate(0.5, None, None)
    even = per_token([(1.0, 2), (2.0, 4)])
    assert (even.se, even.ci95) == (0.0, [0.5, 0.5])
    assert per_token([(0.999, 1), (2.0, 2), (0.9, 1)], most=1.0).ci95[1] == 1.0
    with pytest.raises(ValueError, match="no tokens"):
        per_token([(0.0, 0)])


def test_contrasts_are_resolved_by_interval_and_sign_flips_or_where_all_agree_by_the_flips():
    assert contrast([0.5, 0.25, 0.75, 0.5, 0.25, 0.5, 0.75], 4)["resolved"]
    assert not contrast([0.5, -0.5, 0.25, 0.0], 4)["resolved"]
    same = contrast([1.0] * 6, 4)
    assert (same["se"], same["ci95"], same["p"], same["resolved"]) == (0.0, None, 2 / 64, True)
    assert not contrast([1.0] * 5, 4)["resolved"]
    assert not contrast([0.0] * 9, 4)["resolved"]
    assert contrast([1.0], 4)["se"] is None


def test_a_figure_is_on_a_side_of_a_threshold_only_beyond_its_interval():
    assert share([1.0, 0.0] * 20).side(0.1) is True
    assert share([1.0, 0.0] * 20).side(0.9) is False
    assert share([1.0, 0.0] * 20).side(0.45) is None
    assert share([1.0]).side(0.1) is None
