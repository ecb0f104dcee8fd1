"""What a probe reports of graded samples of two models and of the student's tokens: accuracies, C1, C2 and the verdict.

Shapes: T completion tokens of a row.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from s2dcli import stats
from s2dcli.assembly.evaluation import Seen
from s2dcli.errors import DataError
from s2dcli.files.records import Graded, Problem, read_verdicts
from s2dcli.stats.clustered import Estimate, auc, contrast, per_token, share, within_groups_auc
from s2dcli.stats.routes import Evidence, favoured
from s2dcli.train.rows import THIRDS, RowMaker, TrainingRow, thirds

QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)  # of the tokens' KL; nearest rank
DECIMALS = 6  # of what a file tells of a token
# What an evaluation reports that a probe tells of either model
TOLD = ("avg_at_k", "se", "ci95", "pass_at_k", "truncated", "mean_tokens", "ungraded", "no_answer_rate")


@dataclass
class Samples:
    """Graded rollouts of one model: what is counted of each problem, and where the tokens are looked at, the rows with their labels."""

    summary: stats.Summary = field(default_factory=stats.Summary)
    seen: Seen = field(default_factory=Seen)
    problems: dict[str, Problem] = field(default_factory=dict)
    rows: dict[TrainingRow, bool | None] = field(default_factory=dict)
    problem_of: dict[TrainingRow, str] = field(default_factory=dict)
    picked: list[Graded] = field(default_factory=list)  # one of each problem, by which another tokenizer is noticed

    def add_all(self, rollouts: Iterable[Graded], *, rows: bool = True) -> Samples:
        """Take rollouts one by one, with their `rows` or only their counts. Raises DataError for those of different samplers."""
        maker = RowMaker()
        for rollout in rollouts:
            self.count(rollout.to_record())
            if not rows:
                continue
            row = maker.row(rollout)
            self.rows[row], self.problem_of[row] = rollout.label, rollout.problem_id
            if rollout.problem_id not in self.problems:
                told = (rollout.problem_id, rollout.prompt, rollout.answer, rollout.problem_sha256, rollout.source)
                self.problems[rollout.problem_id] = Problem(*told)
                self.picked.append(rollout)
        return self

    def groups(self) -> dict[str, list[TrainingRow]]:
        """Return the rows problem by problem."""
        members: dict[str, list[TrainingRow]] = {}
        for row, problem in self.problem_of.items():
            members.setdefault(problem, []).append(row)
        return members

    def count(self, record: Mapping[str, Any]) -> None:
        self.seen.note(record)
        self.summary.add(record)


def count_stored(path: str) -> Samples:
    """Count the graded rollouts of a file. Raises DataError."""
    samples = Samples()
    for line in read_verdicts(path):
        samples.count(line.record)
    return samples


def figures_of(samples: Samples, where: str) -> dict[str, Any]:
    """Return what an evaluation reports of samples. Raises DataError where they cannot tell what the probe needs."""
    try:
        figures = samples.summary.report()
    except ValueError as error:
        raise DataError(f"cannot be counted: {error}", where=where) from None
    if figures["avg_at_k"] is None:
        raise DataError(stats.NO_NOTION, where=where, hint=stats.NO_NOTION_HINT)
    if figures["k"] < 2:
        raise DataError("one sample of each problem: whether a group is mixed shows from two on", where=where, hint="sample with -n 8")
    return figures


def require_same_problems(student: Samples, teacher: Samples) -> None:
    """Raise DataError unless both models have answered the same problems, each as often."""
    (ours, k), (theirs, other) = (
        ({row["problem_id"]: row["samples"] for row in samples.summary.rows()}, samples.summary.figures()["k"])
        for samples in (student, teacher)
    )
    if missing := sorted(ours.keys() ^ theirs.keys()):
        whose = "student" if missing[0] in ours else "teacher"
        raise DataError(
            f"student and teacher were sampled on different problems: {missing[0]!r} has rollouts of the {whose} only",
            hint="probe both on one set of problems",
        )
    if k != other:
        raise DataError(f"{k} samples a problem of the student and {other} of the teacher", hint=f"sample both with -n {k}")


class TokenFigures(NamedTuple):
    """Of each completion token of a row, [T]: KL(student || teacher) in nats; how many of the K ids both have in their top k,
    the probability of these under either; and the teacher's log-prob of the token itself."""

    kl: np.ndarray
    shared_ids: np.ndarray
    student_mass: np.ndarray
    teacher_mass: np.ndarray
    teacher_logprobs: np.ndarray


def closeness(samples: Samples, tokens: Mapping[TrainingRow, TokenFigures], k: int, *, exact: bool) -> dict[str, Any]:
    """Return C2: the KL a token, its quantiles and by thirds of the completions, and how much of the top k is shared."""
    by_problem: dict[str, dict[str, list[float]]] = {}
    counts: dict[str, int] = {}
    by_third: list[dict[str, tuple[float, int]]] = [{} for _ in THIRDS]
    values = array("f")
    for row, found in tokens.items():
        problem, length = samples.problem_of[row], len(found.kl)
        counts[problem] = counts.get(problem, 0) + length
        for name, numbers in found._asdict().items():
            by_problem.setdefault(name, {}).setdefault(problem, []).append(float(numbers.sum(dtype=np.float64)))
        third_T = thirds(length)
        for third, totals in enumerate(by_third):
            here = found.kl[third_T == third]
            total, number = totals.get(problem, (0.0, 0))
            totals[problem] = (total + float(here.sum(dtype=np.float64)), number + len(here))
        values.extend(found.kl.tolist())

    def mean(name: str, most: float = math.inf) -> dict[str, Any]:
        return per_token([(math.fsum(sums), counts[problem]) for problem, sums in by_problem[name].items()], most)._asdict()

    ordered = np.sort(np.frombuffer(values, np.float32))
    overlap = {name: value and _over(value, k) for name, value in mean("shared_ids", k).items()}
    return {
        "tokens": len(ordered),
        "estimator": "full" if exact else "top-k",
        "top_k": k,
        "kl": mean("kl"),
        "kl_quantiles": {f"{part:g}": float(ordered[max(0, math.ceil(part * len(ordered)) - 1)]) for part in QUANTILES},
        "kl_by_position": {
            name: per_token(list(totals.values()))._asdict() if any(number for _, number in totals.values()) else None
            for name, totals in zip(THIRDS, by_third, strict=True)
        },
        "overlap": overlap,
        "shared_mass": {"student": mean("student_mass", 1.0), "teacher": mean("teacher_mass", 1.0)},
    }


def _over(value: Any, k: int) -> Any:
    return [part / k for part in value] if isinstance(value, list) else value / k


def separation(samples: Samples, ratios: Mapping[TrainingRow, np.ndarray]) -> dict[str, Any]:
    """Return C1: how well the sequences' log-ratio tells right from wrong answers, over all and within the groups."""
    scored = {problem: _labelled(samples, ratios, rows) for problem, rows in samples.groups().items()}
    left_out = sum(right is None for right in samples.rows.values())
    return {"auc": auc(scored), "within_groups": within_groups_auc(scored), "ungraded": left_out}


def _labelled(samples: Samples, ratios: Mapping[TrainingRow, np.ndarray], rows: Iterable[TrainingRow]) -> list[tuple[float, bool]]:
    """Return the log-ratio of each row that is right or wrong; that of an empty completion is 0."""
    labels = ((row, samples.rows[row]) for row in rows)
    return [(float(ratios[row].sum()) if row in ratios else 0.0, right) for row, right in labels if right is not None]


def compare_answers(student: Samples, teacher: Samples, k: int) -> dict[str, Any]:
    """Return lead, headroom, balance and reach (stats/routes.Evidence), and the share of mixed groups of either."""
    (ours, theirs) = ({row["problem_id"]: row["right"] for row in samples.summary.rows()} for samples in (student, teacher))
    pairs = [(theirs[problem], ours[problem]) for problem in ours]
    return {
        "lead": contrast([(t - s) / k for t, s in pairs], k),
        "headroom": contrast([(t > 0) - t / k for t, _ in pairs], k),
        "balance": contrast([(t - s) / k - ((t > 0) - t / k) for t, s in pairs], k),
        "reach": contrast([float((t > 0) - (s > 0)) for t, s in pairs], k),
        "student_mixed": share([float(0 < s < k) for _, s in pairs]),
        "teacher_mixed": share([float(0 < t < k) for t, _ in pairs]),
    }


def results_of(
    student: Samples,
    teacher: Samples,
    tokens: Mapping[TrainingRow, TokenFigures],
    ratios: Mapping[TrainingRow, np.ndarray] | None,
    top_k: int,
    *,
    exact: bool,
) -> dict[str, Any]:
    """Return what a probe reports. `ratios`: log teacher - log base teacher of each token; None: C1 was not measured."""
    figures = {"student": figures_of(student, "student"), "teacher": figures_of(teacher, "teacher")}
    k = figures["student"]["k"]
    answers = compare_answers(student, teacher, k)
    c1 = None if ratios is None else separation(student, ratios)
    c2 = closeness(student, tokens, top_k, exact=exact)
    masses = [Estimate(**mass) for mass in c2["shared_mass"].values()]
    mixed = {name: answers.pop(name) for name in ("student_mixed", "teacher_mixed")}
    evidence = Evidence(
        k=k,
        problems=figures["student"]["problems"],
        student=figures["student"]["avg_at_k"],
        teacher=figures["teacher"]["avg_at_k"],
        **answers,
        **mixed,
        kl=Estimate(**c2["kl"]),
        shared_mass=min(masses, key=lambda mass: mass.value),
        top_k=top_k,
        separation=c1 and c1["within_groups"],
    )
    told = {
        role: {**{name: found[name] for name in TOLD}, "mixed_groups": mixed[f"{role}_mixed"]._asdict()} for role, found in figures.items()
    }
    return {
        "problems": evidence.problems,
        "k": k,
        "se_over": "problems",
        **told,
        **answers,
        "c1": c1,
        "c2": c2,
        "verdict": favoured(evidence).to_record(evidence),
    }


def token_rows(
    samples: Samples, tokens: Mapping[TrainingRow, TokenFigures], ratios: Mapping[TrainingRow, np.ndarray] | None
) -> Iterator[dict[str, Any]]:
    """Yield what is told of each completion's tokens, in the order of the rollouts."""
    nothing = TokenFigures(*(np.empty(0, np.float32) for _ in TokenFigures._fields))
    for row, right in samples.rows.items():
        found = tokens.get(row, nothing)
        numbers = {name: np.round(values.astype(np.float64), DECIMALS).tolist() for name, values in found._asdict().items()}
        told = {"problem_id": samples.problem_of[row], "group_id": row.group_id, "sample_index": row.sample_index, "label": right}
        more = {} if ratios is None else {"log_ratio": np.round(ratios.get(row, np.empty(0)), DECIMALS).tolist()}
        yield {**told, **numbers, "shared_ids": found.shared_ids.astype(int).tolist(), **more}


def problem_rows(
    student: Samples, teacher: Samples, tokens: Mapping[TrainingRow, TokenFigures], ratios: Mapping[TrainingRow, np.ndarray] | None
) -> Iterator[dict[str, Any]]:
    """Yield what was counted of each problem: right ones among k samples of either, and means over the student's tokens."""
    theirs = {row["problem_id"]: row["right"] for row in teacher.summary.rows()}
    members = student.groups()
    for counted in student.summary.rows():
        problem = counted["problem_id"]
        found = [tokens[row] for row in members[problem] if row in tokens]
        labelled = [] if ratios is None else _labelled(student, ratios, members[problem])
        length = sum(len(figures.kl) for figures in found)
        means = {
            name: sum(float(getattr(figures, name).sum(dtype=np.float64)) for figures in found) / length if length else None
            for name in ("kl", "shared_ids", "student_mass", "teacher_mass")
        }
        yield {
            "problem_id": problem,
            "problem_sha256": counted["problem_sha256"],
            "samples": counted["samples"],
            "student_right": counted["right"],
            "teacher_right": theirs[problem],
            "mixed": 0 < counted["right"] < counted["samples"],
            "tokens": length,
            **means,
            **({} if ratios is None else {"auc": within_groups_auc({problem: labelled})["value"]}),
        }
