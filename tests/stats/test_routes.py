"""The verdict on made-up evidence: each route, what settles it and what does not."""

from dataclasses import replace

import numpy as np
import pytest

from s2dcli.stats.clustered import Estimate, contrast, share
from s2dcli.stats.routes import Evidence, Route, favoured

K = 8
NEAR = {"kl": Estimate(0.06, 0.005, [0.05, 0.07]), "shared_mass": Estimate(0.99, 0.001, [0.988, 0.992])}
FAR = {"kl": Estimate(0.7, 0.02, [0.66, 0.74]), "shared_mass": Estimate(0.92, 0.004, [0.912, 0.928])}


def evidence(teacher, student, problems=200, seed=0, **others):
    """Evidence of right answers drawn at a chance that is Beta-distributed over problems: (mean, concentration) of either."""
    draw = np.random.default_rng(seed)
    level = draw.random(problems)  # a hard problem is hard for both
    counts = []
    for mean, concentration in (teacher, student):
        chances = np.sort(draw.beta(mean * concentration, (1 - mean) * concentration, problems))[np.argsort(np.argsort(level))]
        counts.append(draw.binomial(K, chances))
    t, s = (count.tolist() for count in counts)
    headroom = [(right > 0) - right / K for right in t]
    lead = [(a - b) / K for a, b in zip(t, s, strict=True)]
    told = {
        "k": K,
        "problems": problems,
        "student": sum(s) / K / problems,
        "teacher": sum(t) / K / problems,
        "lead": contrast(lead, K),
        "headroom": contrast(headroom, K),
        "balance": contrast([a - b for a, b in zip(lead, headroom, strict=True)], K),
        "reach": contrast([float((a > 0) - (b > 0)) for a, b in zip(t, s, strict=True)], K),
        "student_mixed": share([float(0 < right < K) for right in s]),
        "teacher_mixed": share([float(0 < right < K) for right in t]),
        "top_k": 16,
        **NEAR,
    }
    return Evidence(**(told | others))


GOOD, WEAK, WEAKER = (0.9, 4), (0.22, 8), (0.16, 4)
CERTAIN, HOPELESS = (0.998, 50), (0.002, 50)


@pytest.mark.parametrize(
    ("teacher", "student", "others", "route"),
    [
        (GOOD, WEAKER, NEAR, Route.distil),
        (GOOD, WEAKER, FAR, Route.warm_up),
        (GOOD, WEAKER, {**NEAR, "shared_mass": FAR["shared_mass"]}, Route.warm_up),
        (WEAK, WEAKER, NEAR, Route.rl_teacher),  # a little better, and far from what its own samples hold
        (WEAK, WEAKER, FAR, Route.rl_teacher),
        (WEAKER, WEAK, NEAR, Route.rl_student),  # however near
        (HOPELESS, WEAK, NEAR, Route.rl_student),
        (WEAK, HOPELESS, NEAR, Route.rl_teacher),
        (CERTAIN, CERTAIN, NEAR, Route.neither),
        (HOPELESS, HOPELESS, NEAR, Route.neither),
        (CERTAIN, HOPELESS, FAR, Route.warm_up),  # no reward says anything to either, and the teacher knows it all
    ],
)
def test_each_route_has_its_evidence_and_is_resolved_by_many_problems(teacher, student, others, route):
    found = favoured(evidence(teacher, student, problems=400, **others))
    assert (found.route, found.resolved) == (route, True), found


def test_the_kl_never_ranks_teachers():
    """The weak teacher is ten times nearer; the good one is still the one to distil from."""
    weak, good = favoured(evidence(WEAK, WEAKER, **NEAR)), favoured(evidence(GOOD, WEAKER, **FAR))
    assert weak.route not in (Route.distil, Route.warm_up)
    assert good.route is Route.warm_up


def test_few_problems_do_not_settle_it_and_the_text_says_so():
    shown = evidence(WEAK, WEAKER, problems=6)
    found = favoured(shown)
    record = found.to_record(shown)
    assert not record["resolved"]
    assert record["text"].startswith("Not resolved; the figures lean to: ")
    assert record["not_resolved"]
    assert set(record["not_resolved"]) <= set(record["why"])
    assert record["surer"] == "more problems than 6, or more than 8 samples of each"
    assert any(" ± " in reason and "points" in reason for reason in record["why"])
    settled = evidence(GOOD, WEAKER)
    told = favoured(settled).to_record(settled)
    assert told["text"].startswith("The evidence favours: distil")
    assert (told["not_resolved"], told["surer"]) == ([], "")


def test_the_policy_that_labels_are_spent_on_is_the_one_that_solves_more_within_a_group():
    shown = evidence(WEAK, WEAKER)
    open_ = {"value": 0.03, "se": 0.03, "ci95": [-0.03, 0.09], "p": 0.4, "resolved": False}
    less = {**open_, "value": -0.01}
    none = {**shown.lead, "value": 0.0, "resolved": False}
    for reach, lead, route in (
        (open_, none, Route.rl_teacher),
        (less, none, Route.rl_student),
        (less, shown.lead, Route.rl_teacher),  # better on average, and not known to be worse in a group
        ({**less, "resolved": True}, shown.lead, Route.rl_student),
    ):
        found = favoured(replace(shown, reach=reach, lead=lead))
        assert (found.route, found.resolved) == (route, reach["resolved"])


def test_one_problem_settles_nothing():
    assert not favoured(evidence(GOOD, WEAKER, problems=1, kl=Estimate(0.06, None, None), shared_mass=Estimate(0.99, None, None))).resolved


def test_a_distance_at_its_threshold_is_not_resolved():
    at = Estimate(0.09, 0.01, [0.07, 0.11])
    found = favoured(evidence(GOOD, WEAKER, kl=at))
    assert (found.route, found.resolved) == (Route.distil, False)
    found = favoured(evidence(GOOD, WEAKER, kl=replace_value(at, 0.11)))
    assert (found.route, found.resolved) == (Route.warm_up, False)
    # the mass alone settles that a warm-up is needed
    found = favoured(evidence(GOOD, WEAKER, kl=at, shared_mass=FAR["shared_mass"]))
    assert (found.route, found.resolved) == (Route.warm_up, True)


def replace_value(estimate, value):
    shift = value - estimate.value
    return Estimate(value, estimate.se, [end + shift for end in estimate.ci95])


def test_a_lead_that_is_not_resolved_is_none_to_distil():
    open_ = {"value": 0.02, "se": 0.03, "ci95": [-0.04, 0.08], "p": 0.5, "resolved": False}
    found = favoured(replace(evidence(WEAK, WEAKER), lead=open_, balance=open_))
    assert found.route is Route.rl_teacher
    assert not found.resolved
    ahead = {**open_, "ci95": [0.01, 0.03], "p": 0.01, "resolved": True}
    found = favoured(replace(evidence(WEAK, WEAKER), lead=ahead, balance=open_))
    assert (found.route, found.resolved) == (Route.distil, True)
    assert "which is more is not resolved" in found.steps[0].found


def test_a_log_ratio_that_favours_wrong_answers_contradicts_distillation():
    auc = {"value": 0.75, "se": 0.02, "ci95": [0.71, 0.79], "groups": 90, "reason": ""}
    holds = favoured(evidence(GOOD, WEAKER, separation=auc))
    assert holds.resolved
    assert "C1 holds" in holds.steps[-1].found
    against = favoured(evidence(GOOD, WEAKER, separation={**auc, "value": 0.3, "ci95": [0.26, 0.34]}))
    assert not against.resolved
    assert "wrong answers are favoured" in against.steps[-1].found
    open_ = favoured(evidence(GOOD, WEAKER, separation={**auc, "value": 0.52, "ci95": [0.45, 0.59]}))
    assert open_.resolved  # accuracy decides
    assert "C1 is not resolved" in open_.steps[-1].found
    missing = {"value": None, "se": None, "ci95": None, "groups": 0, "reason": "no group has both right and wrong answers"}
    assert "cannot be measured: no group" in favoured(evidence(GOOD, WEAKER, separation=missing)).steps[-1].found
