"""Opening what a student is distilled by: its teacher, wherever that is, and the objective."""

from __future__ import annotations

from collections.abc import Sequence

from s2dcli.assembly.loading import load_frozen
from s2dcli.assembly.phases import PhasedTeacher
from s2dcli.assembly.served import ServedTeacher
from s2dcli.assembly.training import Training
from s2dcli.engines.opening import open_served_teacher
from s2dcli.options import Estimator, Keep, OnPolicyOptions, WarmupOptions
from s2dcli.train.objectives import Distillation, SampledDistillation
from s2dcli.train.rows import TrainingRow
from s2dcli.train.teachers import CachedTeacher, LiveTeacher, Teacher
from s2dcli.train.vocab import forward_kl, reverse_kl


def warmup_objective(opened: Training, distilling: WarmupOptions, rows: Sequence[TrainingRow]) -> Distillation:
    """KL(teacher || student): exact where the whole distribution is to be had and --top-k is not given."""
    cache = opened.setup.cache
    whole = distilling.top_k is None and not (cache and cache.meta.keep is Keep.top_k)
    teacher = open_teacher(opened, Estimator.full if whole else Estimator.top_k, distilling.top_k, distilling.temperature, rows)
    return Distillation(teacher=teacher, divergence=forward_kl, temperature=distilling.temperature)


def opd_objective(
    opened: Training, distilling: OnPolicyOptions, temperature: float, rows: Sequence[TrainingRow] = ()
) -> Distillation | SampledDistillation:
    """KL(student || teacher) by the estimator that is asked for; `rows` are stored ones, all that will be learnt from."""
    teacher = open_teacher(opened, distilling.estimator, distilling.top_k, temperature, rows)
    if distilling.estimator is Estimator.sampled:
        return SampledDistillation(teacher=teacher, temperature=temperature)
    return Distillation(teacher=teacher, divergence=reverse_kl, temperature=temperature)


def open_teacher(opened: Training, estimator: Estimator, top_k: int | None, temperature: float, rows: Sequence[TrainingRow]) -> Teacher:
    """Open a training's teacher: its servers, its cache of `rows`, or the model of that role.

    `top_k` counts for Estimator.top_k only; None is all ids that a cache holds. Raises an S2DError for what cannot be had.
    """
    setup, teachers = opened.setup, opened.setup.teachers
    k = top_k if estimator is Estimator.top_k else None
    if teachers.served:
        engine = open_served_teacher(teachers.served, setup.parent, setup.tokenizer, setup.engine, setup.loading)
        return ServedTeacher(engine, setup.tokenizer, k and min(k, opened.loaded.vocabulary), opened.folder.folder)
    if setup.cache:
        return CachedTeacher(setup.cache, rows, opened.run.device, estimator, k, temperature)
    checkpoint = setup.parents["teacher"]
    if opened.phased:
        return PhasedTeacher(setup, opened.run, checkpoint, estimator, k, temperature)
    policy = load_frozen(checkpoint, opened.loaded, setup.loading, setup.training, offload=setup.offload)
    return LiveTeacher(policy=policy, temperature=temperature, top_k=k, sampled=estimator is Estimator.sampled)
