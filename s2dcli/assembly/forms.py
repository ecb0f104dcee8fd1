"""The forms of distillation: who the teacher is and what is learnt from it, checked before anything is loaded. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import typer

from s2dcli.engines.opening import check_served_teacher, is_served
from s2dcli.errors import UsageError
from s2dcli.files import jsonl
from s2dcli.options import DistillationOptions, Estimator, OnPolicyOptions, WarmupOptions, refuse_given


@dataclass(frozen=True)
class Teachers:
    """Who is learnt from: models in memory by their roles, servers, or a cache."""

    checkpoints: dict[str, str] = field(default_factory=dict)
    served: str | None = None
    cache: str | None = None

    @property
    def inputs(self) -> list[str]:
        """Checkpoints and folders that are read."""
        return [*self.checkpoints.values(), *([self.cache] if self.cache else [])]


def teachers_of(distilling: DistillationOptions) -> Teachers:
    if is_served(distilling.teacher):
        return Teachers(served=distilling.teacher)
    return Teachers({"teacher": distilling.teacher} if distilling.teacher else {}, cache=distilling.cache)


def check_opd(context: typer.Context, given: Mapping[str, Any], distilling: OnPolicyOptions) -> Teachers:
    """Return who opd learns from. Raises UsageError if options exclude each other, or one would be ignored; `given` are all of them."""
    teachers = teachers_of(distilling)
    if distilling.estimator is not Estimator.top_k:
        refuse_given(context, {"top_k": "--top-k"}, "requires --estimator top-k")
    if (distilling.teacher is None) == (distilling.cache is None):
        raise UsageError("choose one teacher", hint="--teacher CKPT or URLs, or --cache DIR with --rollouts FILE")
    if distilling.cache and given["rollouts"] is None:
        raise UsageError("--cache has scores of stored rollouts", hint="name them by --rollouts FILE")
    if given["rollouts"] is not None:
        if given["problems"] != jsonl.STDIN:
            raise UsageError("both PROBLEMS and --rollouts were given", hint="give one of them")
        names = {"num_samples": "-n", "max_prompt_tokens": "--max-prompt-tokens"}
        if not given["eval_problems"]:
            names |= {"engine": "--engine", "max_tokens": "--max-tokens"}
        refuse_given(context, names, "applies to sampling, and --rollouts samples nothing")
    if not teachers.checkpoints:
        refuse_given(context, {"offload": "--offload", "phases": "--phases"}, "applies to a teacher in memory, and there is none")
    if teachers.served:
        check_served_teacher(distilling.estimator, given["temperature"])
    return teachers


def check_warmup(context: typer.Context, given: Mapping[str, Any], distilling: WarmupOptions) -> Teachers:
    """Return who fkl-warmup learns from, as `check_opd` does."""
    teachers = teachers_of(distilling)
    if not given["eval_problems"]:
        refuse_given(context, {"engine": "--engine", "max_tokens": "--max-tokens"}, "serves evaluations only; add --eval-problems")
    if [distilling.teacher is None, distilling.cache is None, not given["hard_labels"]].count(False) != 1:
        raise UsageError(
            "choose a target", hint="--teacher CKPT or --cache DIR for its distributions, or --hard-labels for the sampled tokens"
        )
    if given["hard_labels"]:
        names = {"temperature": "--temperature", "top_k": "--top-k"}
        refuse_given(context, names, "applies to a teacher's distributions; --hard-labels has none")
    if teachers.served:
        check_served_teacher(Estimator.full if distilling.top_k is None else Estimator.top_k, distilling.temperature)
    return teachers
