"""The forms of distillation: who the teacher is and what is learnt from it, checked before anything is loaded. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from s2dcli.engines.opening import check_served_teacher, is_served
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.records import Problem, dataset_of
from s2dcli.options import Baseline, DistillationOptions, Divergence, Estimator, OnPolicyOptions, WarmupOptions, refuse_given

if TYPE_CHECKING:
    from s2dcli.train.rows import TrainingRow

TEACHER, REFERENCE = "teacher", "reference"  # roles in a manifest; of several teachers "teacher:NAME"


@dataclass(frozen=True)
class Teachers:
    """Who is learnt from: models in memory by their roles, servers, or a cache. `sources` has the role of each source's teacher."""

    checkpoints: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    served: str | None = None
    cache: str | None = None

    @property
    def inputs(self) -> list[str]:
        """Checkpoints and folders that are read."""
        return [*self.checkpoints.values(), *([self.cache] if self.cache else [])]

    @property
    def told(self) -> str | list[str] | None:
        """`--teacher` as manifests have it."""
        if self.sources:
            return [f"{name}={self.checkpoints[role]}" for name, role in self.sources.items()]
        return self.served or self.checkpoints.get(TEACHER)


def is_teacher(role: str) -> bool:
    """Whether a role of a manifest is a teacher's."""
    return role.split(":")[0] == TEACHER


def teachers_of(distilling: DistillationOptions) -> Teachers:
    """Return who the options name. Raises UsageError."""
    given = distilling.teacher or []
    reference = getattr(distilling, "reference", None)
    beside = {REFERENCE: reference} if reference else {}
    if len(given) < 2:
        for name in given:
            if is_served(name):
                return Teachers(beside, served=name)
            if "=" in name and not Path(name).exists():
                raise UsageError(f"--teacher {name}: NAME=CKPT is for several teachers, one for each source", hint="--teacher CKPT")
        return Teachers({TEACHER: given[0], **beside} if given else beside, cache=distilling.cache)
    sources: dict[str, str] = {}
    checkpoints: dict[str, str] = {}
    for text in given:
        name, equals, checkpoint = text.partition("=")
        if not (name and equals and checkpoint) or is_served(text) or is_served(checkpoint):
            raise UsageError(f"--teacher {text}: of several teachers each is a model in memory, NAME=CKPT", hint="NAME is a source.dataset")
        if name in sources:
            raise UsageError(f"--teacher {name}=... was given twice", hint="one teacher for each source")
        sources[name] = f"{TEACHER}:{name}"
        checkpoints[sources[name]] = checkpoint
    return Teachers({**checkpoints, **beside}, sources, cache=distilling.cache)


def require_sources(teachers: Teachers, problems: Sequence[Problem], rows: Sequence[TrainingRow], where: str) -> None:
    """Where each source has a teacher: raise DataError for a row whose source has none, UsageError for a teacher without rows."""
    if not teachers.sources:
        return
    there: dict[str, str] = {}  # source -> its first row
    for problem in problems:
        there.setdefault(dataset_of(problem.source), f"problem {problem.id!r}")
    for row in rows:
        there.setdefault(row.dataset, f"sample {row.sample_index} of group {row.group_id!r}")
    for source, row in there.items():
        if source not in teachers.sources:
            raise DataError(
                f"{row} comes from {source!r}, which has no teacher; {', '.join(teachers.sources)} have one",
                where=where,
                hint=f"--teacher {source or 'NAME'}=CKPT",
            )
    for source in teachers.sources:
        if source not in there:
            raise UsageError(f"--teacher {source}=...: nothing comes from {source!r}", where=where, hint=f"there are {', '.join(there)}")


def check_opd(context: typer.Context, given: Mapping[str, Any], distilling: OnPolicyOptions) -> Teachers:
    """Return who opd learns from. Raises UsageError if options exclude each other, or one would be ignored; `given` are all of them."""
    teachers = teachers_of(distilling)
    if bool(distilling.teacher) == (distilling.cache is not None):
        raise UsageError("choose one teacher", hint="--teacher CKPT or URLs, or --cache DIR with --rollouts FILE")
    if distilling.cache and given["rollouts"] is None:
        raise UsageError("--cache has scores of stored rollouts", hint="name them by --rollouts FILE")
    if given["rollouts"] is not None:
        if given["problems"] != jsonl.STDIN:
            raise UsageError("both PROBLEMS and --rollouts were given", hint="give one of them")
        names = {"num_samples": "-n", "max_prompt_tokens": "--max-prompt-tokens", "async_depth": "--async-depth"}
        if not given["eval_problems"]:
            names |= {"engine": "--engine", "max_tokens": "--max-tokens"}
        refuse_given(context, names, "applies to sampling, and --rollouts samples nothing")
    served = teachers.served is not None
    _check_estimator(context, distilling, served=served)
    _check_divergence(context, distilling)
    _check_mixture(distilling, served=served)
    if not teachers.checkpoints:
        refuse_given(context, {"offload": "--offload", "phases": "--phases"}, "applies to a teacher in memory, and there is none")
    if teachers.served:
        check_served_teacher(distilling.estimator, distilling.teacher_temperature or given["temperature"])
    return teachers


def check_warmup(context: typer.Context, given: Mapping[str, Any], distilling: WarmupOptions) -> Teachers:
    """Return who fkl-warmup learns from, as `check_opd` does."""
    teachers = teachers_of(distilling)
    if not given["eval_problems"]:
        refuse_given(context, {"engine": "--engine", "max_tokens": "--max-tokens"}, "serves evaluations only; add --eval-problems")
    if [not distilling.teacher, distilling.cache is None, not given["hard_labels"]].count(False) != 1:
        raise UsageError(
            "choose a target", hint="--teacher CKPT or --cache DIR for its distributions, or --hard-labels for the sampled tokens"
        )
    if given["hard_labels"]:
        names = ("temperature", "teacher_temperature", "top_k", "divergence", "jsd_beta", "clamp")
        options = {name: "--" + name.replace("_", "-") for name in names}
        refuse_given(context, options, "applies to a teacher's distributions; --hard-labels has none")
    _check_divergence(context, distilling)
    if teachers.served:
        estimator = Estimator.full if distilling.top_k is None else Estimator.top_k
        check_served_teacher(estimator, distilling.teacher_temperature or distilling.temperature)
    return teachers


def _check_estimator(context: typer.Context, distilling: OnPolicyOptions, *, served: bool) -> None:
    sampled, baseline = distilling.estimator is Estimator.sampled, distilling.baseline is Baseline.kl
    if not sampled:
        refuse_given(context, {"baseline": "--baseline"}, "requires --estimator sampled")
    if distilling.estimator is not Estimator.top_k and not (served and baseline):
        refuse_given(context, {"top_k": "--top-k"}, "requires --estimator top-k")
    if sampled and distilling.divergence is not Divergence.reverse_kl:
        raise UsageError(
            f"--divergence {distilling.divergence}: tokens that the student samples estimate KL(student || teacher) alone",
            hint="--estimator full or top-k",
        )


def _check_divergence(context: typer.Context, distilling: DistillationOptions) -> None:
    if distilling.divergence is not Divergence.jsd:
        refuse_given(context, {"jsd_beta": "--jsd-beta"}, "requires --divergence jsd")
    if distilling.clamp is not None and distilling.clamp <= 0:
        raise UsageError(f"--clamp {distilling.clamp:g}: no token would have a gradient", hint="nats above 0, e.g. 10")
    if distilling.divergence is Divergence.jsd and distilling.clamp is not None:
        most = largest_jsd(distilling.jsd_beta)
        if distilling.clamp >= most:
            raise UsageError(
                f"--clamp {distilling.clamp:g}: the divergence of --jsd-beta {distilling.jsd_beta:g} never exceeds {most:.3f} nats",
                hint="a lower one, or leave it out",
            )


def largest_jsd(beta: float) -> float:
    """Least upper bound of vocab.jsd in nats, that of distributions without a common outcome; 0 and 1 stand for KLs, which have none."""
    return math.inf if beta in (0.0, 1.0) else -beta * math.log(beta) - (1.0 - beta) * math.log1p(-beta)


def _check_mixture(distilling: OnPolicyOptions, *, served: bool) -> None:
    weight = distilling.task_reward_weight
    if weight is None:
        if distilling.reference:
            raise UsageError("--reference is the other end of --task-reward-weight", hint="give both, or none")
        return
    if not distilling.reference:
        raise UsageError("--task-reward-weight needs the teacher before its RL", hint="--reference CKPT")
    if weight <= 0:
        raise UsageError(
            f"--task-reward-weight {weight:g}: nothing of the teacher would be learnt", hint="above 0; 1 is the teacher itself"
        )
    if distilling.estimator is not Estimator.full or served:
        raise UsageError(
            "--task-reward-weight mixes two whole distributions, which top-k or sampled log-probs and servers do not give",
            hint="--estimator full, with a teacher in memory or a cache of s2d score --keep hidden",
        )


def tokens_learnt_from(distilling: DistillationOptions, longest: int) -> int:
    """Return how many tokens of a rollout carry loss at most, of completions of up to `longest`. Raises UsageError."""
    if distilling.loss_tokens is not None and distilling.loss_tokens >= longest:
        raise UsageError(
            f"--loss-tokens {distilling.loss_tokens}: completions have {longest} tokens at most", hint="a lower number, or leave it out"
        )
    return distilling.loss_tokens or longest
