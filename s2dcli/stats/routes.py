"""Which route the evidence about a teacher and a student favours, why, and how sure that is.

    distil      on-policy distillation from this teacher
    warm-up     forward-KL warm-up on its rollouts, then on-policy distillation
    rl-teacher  sparse-reward RL of the teacher first, then distillation
    rl-student  sparse-reward RL of the student itself
    neither     no reward tells samples apart, and the teacher knows nothing that the student does not

Accuracy decides whether to distil, never the KL: a teacher that is near the student may have nothing to teach. What
distillation can bring is what the teacher is ahead by, its *lead*; what a reward can bring is what some of a group's k
samples solve beyond their average, pass@k - avg@k, the *headroom* of the policy that gets it. Where the teacher's own
headroom is known to exceed its lead, labels are worth more on it than a transfer is now; else a lead that is known is taken
first, for distillation spends no label. KL and shared mass (C2) then only decide whether a warm-up comes before on-policy
distillation. pass@k is no bound of what RL reaches, and the teacher's accuracy none of
what distillation does: the rule names the route to try first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from s2dcli.stats.clustered import CHANCE, Estimate

# Nats a token up to which on-policy distillation starts without a warm-up. No value is published; on the toy family (examples/toy/
# probe_pairs.sh) distillation without one fell 13 points short from a KL of 0.15, and 16 from 0.71; after one it was 0.04.
CLOSE_KL = 0.1
SHARED_MASS = 0.97  # where on-policy distillation succeeds, 97 to 99 % of the mass is on the shared top-k set (arXiv 2604.13016)
# Share of groups with mixed rewards up to which RL is called uninformative: nine rollouts in ten carry no gradient then.
INFORMATIVE = 0.1
NO_LEAD = 0.05  # a lead below five points counts as none where nothing else is to be learnt from


class Route(StrEnum):
    distil = "distil"
    warm_up = "warm-up"
    rl_teacher = "rl-teacher"
    rl_student = "rl-student"
    neither = "neither"


IN_WORDS = {
    Route.distil: "distil from this teacher, on-policy (s2d opd)",
    Route.warm_up: "warm the student up on the teacher's rollouts by forward KL, then distil on-policy (s2d fkl-warmup, s2d opd)",
    Route.rl_teacher: "spend the labels on the teacher by RL, then distil from it (s2d grpo on the teacher)",
    Route.rl_student: "spend the labels on the student by RL (s2d grpo on the student)",
    Route.neither: "neither RL nor distillation from this teacher",
}


@dataclass(frozen=True)
class Evidence:
    """What was measured of a pair, on k samples of each problem. Differences are `clustered.contrast` of the problems' numbers."""

    k: int
    problems: int
    student: float  # avg@k
    teacher: float
    lead: Mapping[str, Any]  # avg@k of the teacher - avg@k of the student
    headroom: Mapping[str, Any]  # pass@k - avg@k of the teacher
    balance: Mapping[str, Any]  # lead - headroom
    reach: Mapping[str, Any]  # pass@k of the teacher - pass@k of the student
    student_mixed: Estimate  # share of groups with right and wrong answers
    teacher_mixed: Estimate
    kl: Estimate  # of the student's distribution from the teacher's, nats a token
    shared_mass: Estimate  # of both, the lower
    top_k: int
    separation: Mapping[str, Any] | None = None  # `clustered.within_groups_auc` of the teacher's log-ratio to its base; None: not measured


@dataclass(frozen=True)
class Step:
    """One step to the verdict: what was found, with its figures, and whether these settle it. None: it does not bear on the route."""

    found: str
    resolved: bool | None


@dataclass
class Verdict:
    """The route that is favoured; it is resolved if every step to it is."""

    route: Route
    steps: list[Step] = field(default_factory=list)

    @property
    def resolved(self) -> bool:
        return all(step.resolved is not False for step in self.steps)

    def to_record(self, evidence: Evidence) -> dict[str, Any]:
        open_steps = [step.found for step in self.steps if step.resolved is False]
        return {
            "route": self.route.value,
            "resolved": self.resolved,
            "text": f"{'The evidence favours' if self.resolved else 'Not resolved; the figures lean to'}: {IN_WORDS[self.route]}.",
            "why": [step.found for step in self.steps],
            "not_resolved": open_steps,
            "surer": "" if self.resolved else f"more problems than {evidence.problems}, or more than {evidence.k} samples of each",
        }


def favoured(evidence: Evidence) -> Verdict:
    """Return the route that the evidence favours."""
    balance, leads = evidence.balance, _leads(evidence)
    outweighs = balance["value"] > 0 if balance["resolved"] else leads
    return _distillation(evidence) if outweighs or (leads and not _learnable(evidence)) else _reinforcement(evidence)


def _leads(evidence: Evidence) -> bool:
    """Whether the teacher is known to be better."""
    return bool(evidence.lead["resolved"] and evidence.lead["value"] > 0)


def _learnable(evidence: Evidence) -> bool:
    """Whether a reward says something to either of the two."""
    return max(evidence.student_mixed.value, evidence.teacher_mixed.value) > INFORMATIVE


def _distillation(evidence: Evidence) -> Verdict:
    kl, mass, k = evidence.kl, evidence.shared_mass, evidence.k
    close = kl.value <= CLOSE_KL and mass.value >= SHARED_MASS
    near = kl.side(CLOSE_KL) is False and mass.side(SHARED_MASS) is True
    far = kl.side(CLOSE_KL) is True or mass.side(SHARED_MASS) is False  # one of the two is enough
    ahead = (
        f"the teacher is right more often than the student, {_accuracies(evidence)}: a lead of {points(evidence.lead)}, "
        f"beside {points(evidence.headroom)} that RL could find in the teacher's own samples (pass@{k} - avg@{k})"
        + ("" if evidence.balance["resolved"] else "; which is more is not resolved, and distillation spends no label")
    )
    holds = "holds" if close else "does not hold"
    distance = (
        f"C2 {holds}: KL(student || teacher) is {with_error(kl)} nats a token (at most {CLOSE_KL:g} is near), "
        f"and {percent(mass)} of the mass is on the shared top {evidence.top_k} (at least {SHARED_MASS:.0%} is near)"
    )
    steps = [Step(ahead, _leads(evidence)), Step(distance, near if close else far), *_shaped(evidence)]
    return Verdict(Route.distil if close else Route.warm_up, steps)


def _reinforcement(evidence: Evidence) -> Verdict:
    lead, reach, k = evidence.lead, evidence.reach, evidence.k
    mixed = {"teacher": evidence.teacher_mixed, "student": evidence.student_mixed}
    informative = {who: found.value > INFORMATIVE for who, found in mixed.items()}
    settled = {who: found.side(INFORMATIVE) is not None for who, found in mixed.items()}
    behind = (
        f"what this teacher could give now is its lead of {points(lead)}, {_accuracies(evidence)}; "
        f"RL could find {points(evidence.headroom)} in its own samples (pass@{k} - avg@{k})"
    )
    shares = " and ".join(f"{percent(found)} of the {who}'s" for who, found in mixed.items())
    groups = f"of the groups of {k} samples {shares} have right and wrong answers"
    if not any(informative.values()):
        level = max(evidence.student, evidence.teacher)
        why = "nearly all samples are right: take harder problems" if level > 0.5 else "nearly none is right: take easier problems"
        highest = lead["ci95"][1] if lead["ci95"] else lead["value"]
        steps = [Step(behind, highest <= NO_LEAD), Step(f"{groups}: a reward tells next to nothing; {why}", all(settled.values()))]
        return Verdict(Route.neither, steps)
    steps = [Step(behind, bool(evidence.balance["resolved"])), Step(f"{groups}: there a reward teaches", all(settled.values()))]
    if not all(informative.values()):
        return Verdict(Route.rl_teacher if informative["teacher"] else Route.rl_student, steps)
    ahead = reach["value"] > 0 or (_leads(evidence) and not reach["resolved"])
    further = f"within {k} samples the teacher solves more of the problems than the student by {points(reach)} (pass@{k})"
    return Verdict(Route.rl_teacher if ahead else Route.rl_student, [*steps, Step(further, bool(reach["resolved"]))])


def _shaped(evidence: Evidence) -> Iterator[Step]:
    """Yield what C1 says, where it was measured: it may contradict a distillation, but accuracy is what favours it."""
    found = evidence.separation
    if found is None:
        return
    if found["value"] is None:
        yield Step(f"C1 cannot be measured: {found['reason']}", None)
        return
    estimate = Estimate(found["value"], found["se"], found["ci95"])
    side = estimate.side(CHANCE)
    says = {True: "holds", False: "does not hold: wrong answers are favoured", None: "is not resolved"}[side]
    told = f"C1 {says}: the teacher's log-ratio to its base tells right from wrong answers with AUC {with_error(estimate)} within groups"
    yield Step(told, False if side is False else None)


def _accuracies(evidence: Evidence) -> str:
    return f"{evidence.teacher:.1%} against {evidence.student:.1%}"


def points(found: Mapping[str, Any]) -> str:
    """Write a difference of shares as percentage points with its error."""
    error = "" if found["se"] is None else f" ± {100 * found['se']:.1f}"
    return f"{100 * found['value']:.1f}{error} points"


def percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%}" + ("" if estimate.se is None else f" ± {estimate.se:.1%}")


def with_error(estimate: Estimate) -> str:
    return f"{estimate.value:.3g}" + ("" if estimate.se is None else f" ± {estimate.se:.2g}")
