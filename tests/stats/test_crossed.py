"""Routes of several seeds, against the model that they are computed by."""

import math

import numpy as np
import pytest

from s2dcli import stats
from s2dcli.stats.pairs import inference


def as_scores(table_SN):
    return [{f"p{i}": [value] for i, value in enumerate(row)} for row in table_SN.tolist()]


def routes(draw, seeds, problems, seed_spread, difference=0.1):
    """Scores of two routes drawn from the model: problems shared, seeds their own."""
    shared, own = draw.normal(0, 0.3, problems), draw.normal(0, 0.1, (2, 1, problems))
    table = shared + own + draw.normal(0, seed_spread, (2, seeds, 1)) + draw.normal(0, 0.15, (2, seeds, problems))
    return table[0], table[1] + difference


def test_the_error_is_that_of_the_mean_squares():
    a, b = routes(np.random.default_rng(1), 3, 20, 0.05)
    found = stats.route_difference(as_scores(a), as_scores(b))
    d = b.mean(0) - a.mean(0)
    variance = d.var(ddof=1) / 20
    for table in (a, b):
        residual = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
        variance += table.mean(1).var(ddof=1) / 3 - (residual**2).sum() / (2 * 19) / (3 * 20)
    assert found["difference"] == pytest.approx(d.mean(), abs=1e-12)
    assert found["se"] == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert found["se"] ** 2 == pytest.approx(found["se_problems"] ** 2 + found["se_seeds"] ** 2)
    assert (found["problems"], found["seeds"]) == (20, [3, 3])
    assert found["p"] == pytest.approx(stats.t_test(found["difference"] / found["se"], found["degrees"]))


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.05), (5, 0.02), (3, 0.1)])
def test_the_interval_holds_for_other_seeds_and_problems(seeds, spread):
    draw = np.random.default_rng(seeds)
    held = paired = 0
    for _ in range(400):
        a, b = routes(draw, seeds, 40, spread)
        low, high = stats.route_difference(as_scores(a), as_scores(b))["ci95"]
        held += low <= 0.1 <= high
        alone = (b - a)[0]
        low, high = inference(alone.mean(), alone.std(ddof=1) / math.sqrt(40), 39)["ci95"]
        paired += low <= 0.1 <= high
    assert 0.92 <= held / 400 <= 0.99  # 0.95, standard deviation 0.011; few seeds err on the safe side
    assert paired < held  # one seed of each, problems alone: too sure where seeds differ


def test_seeds_that_are_all_alike_leave_the_paired_comparison():
    a, b = routes(np.random.default_rng(2), 1, 30, 0.0)
    found, one = stats.route_difference(as_scores(a) * 2, as_scores(b) * 2), stats.paired_difference(as_scores(a)[0], as_scores(b)[0])
    assert (found["se"], found["ci95"], found["se_seeds"]) == (pytest.approx(one["se"]), pytest.approx(one["ci95"]), 0.0)


def test_one_seed_says_nothing_about_others():
    a, b = map(as_scores, routes(np.random.default_rng(2), 2, 5, 0.1))
    with pytest.raises(ValueError, match="one training seed says nothing about others"):
        stats.route_difference(a[:1], b)
    with pytest.raises(ValueError, match="no problem is in all of them"):
        stats.route_difference(a, [{"other": [1.0]}, *b])
