"""Opening what a student is distilled by, its teacher and the objective, and telling how the distillation goes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from s2dcli import console, stats
from s2dcli.assembly.forms import REFERENCE, TEACHER
from s2dcli.assembly.loading import load_frozen
from s2dcli.assembly.phases import PhasedTeacher
from s2dcli.assembly.served import ServedTeacher
from s2dcli.assembly.training import Training
from s2dcli.engines.opening import open_served_teacher
from s2dcli.errors import UsageError
from s2dcli.models.policy import Objective
from s2dcli.options import Baseline, DistillationOptions, Divergence, Estimator, Keep, OnPolicyOptions, WarmupOptions
from s2dcli.train import vocab
from s2dcli.train.loop import Step, TrainingRun
from s2dcli.train.objectives import CrossEntropy, Distillation, SampledDistillation
from s2dcli.train.rows import THIRDS, TrainingRow
from s2dcli.train.teachers import CachedTeacher, LiveTeacher, MixedTeacher, Teacher, TeacherBySource

# Length inflation: over so many steps, against as many before, completions grow and the divergence falls by these shares,
# and completions are within reach of the limit. OPD then trades length for agreement on easy tokens.
INFLATION_STEPS = 5
INFLATION_GROWTH = 0.1
INFLATION_FALL = 0.1
INFLATION_LENGTH = 0.5  # of --max-tokens


@dataclass(frozen=True)
class Wanted:
    """What a teacher is asked for; `top_k` counts for Estimator.top_k, where None is all ids that a cache holds, and for a
    server's `baseline`."""

    estimator: Estimator
    top_k: int | None
    temperature: float
    baseline: bool = False

    @property
    def k(self) -> int | None:
        return self.top_k if self.estimator is Estimator.top_k else None


def warmup_objective(opened: Training, distilling: WarmupOptions, rows: Sequence[TrainingRow]) -> Distillation:
    """The divergence at each token: exact where the whole distribution is to be had and --top-k is not given."""
    cache, temperature = opened.setup.cache, distilling.temperature
    whole = distilling.top_k is None and not (cache and cache.meta.keep is Keep.top_k)
    wanted = Wanted(Estimator.full if whole else Estimator.top_k, distilling.top_k, distilling.teacher_temperature or temperature)
    teacher = open_teacher(opened, wanted, rows)
    return Distillation(teacher=teacher, divergence=divergence_of(distilling), temperature=temperature, clamp=distilling.clamp)


def opd_objective(
    opened: Training, distilling: OnPolicyOptions, temperature: float, rows: Sequence[TrainingRow] = ()
) -> Distillation | SampledDistillation:
    """The divergence by the estimator that is asked for; `rows` are stored ones, all that will be learnt from."""
    baseline = distilling.baseline is Baseline.kl
    wanted = Wanted(distilling.estimator, distilling.top_k, distilling.teacher_temperature or temperature, baseline)
    teacher = open_teacher(opened, wanted, rows)
    if distilling.task_reward_weight is not None:
        teacher = MixedTeacher(teacher, _in_memory(opened, REFERENCE, wanted, "scores-reference"), distilling.task_reward_weight)
    how = {"teacher": teacher, "temperature": temperature, "clamp": distilling.clamp}
    if distilling.estimator is Estimator.sampled:
        return SampledDistillation(**how, baseline=baseline)
    return Distillation(**how, divergence=divergence_of(distilling))


def divergence_of(distilling: DistillationOptions) -> vocab.Divergence:
    beta = distilling.jsd_beta
    if distilling.divergence is Divergence.reverse_kl or (distilling.divergence is Divergence.jsd and beta == 1.0):
        return vocab.reverse_kl
    if distilling.divergence is Divergence.forward_kl or beta == 0.0:
        return vocab.forward_kl
    return partial(vocab.jsd, beta=beta)


def open_teacher(opened: Training, wanted: Wanted, rows: Sequence[TrainingRow]) -> Teacher:
    """Open a training's teacher: its servers, its cache of `rows`, or models. Raises an S2DError for what cannot be had."""
    setup, teachers = opened.setup, opened.setup.teachers
    if teachers.served:
        k = wanted.top_k if wanted.baseline else wanted.k
        engine = open_served_teacher(teachers.served, setup.parent, setup.tokenizer, setup.engine, setup.loading)
        room = opened.folder.folder
        return ServedTeacher(engine, setup.tokenizer, k and min(k, opened.loaded.vocabulary), room, baseline=wanted.baseline)
    if setup.cache:
        if REFERENCE in teachers.checkpoints and setup.cache.meta.keep is not Keep.hidden:
            raise UsageError("--task-reward-weight needs a cache of the whole distribution", hint="s2d score --keep hidden")
        form = (wanted.estimator, wanted.k, wanted.temperature)
        return CachedTeacher(setup.cache, rows, opened.run.device, *form, baseline=wanted.baseline)
    if not teachers.sources:
        return _in_memory(opened, TEACHER, wanted, "scores")
    roles = enumerate(teachers.sources.items(), 1)
    return TeacherBySource({source: _in_memory(opened, role, wanted, f"scores-{number}") for number, (source, role) in roles})


def _in_memory(opened: Training, role: str, wanted: Wanted, phase: str) -> Teacher:
    """Load the model of a role, or, in phases, what loads it while it scores to the folder `phase` of a step."""
    setup, checkpoint = opened.setup, opened.setup.parents[role]
    if opened.phased:
        form = (wanted.estimator, wanted.k, wanted.temperature)
        return PhasedTeacher(setup, opened.run, checkpoint, *form, baseline=wanted.baseline, name=phase)
    policy = load_frozen(checkpoint, opened.loaded, setup.loading, setup.training, offload=setup.offload)
    sampled = wanted.estimator is Estimator.sampled
    return LiveTeacher(policy=policy, temperature=wanted.temperature, top_k=wanted.k, sampled=sampled, baseline=wanted.baseline)


class Watch:
    """Logs how a distillation goes, and warns of length inflation: completions that grow towards the limit while the divergence falls.

    It warns once for each time that this begins, and knows the steps since the command was started, not those before a resume.
    """

    def __init__(self, run: TrainingRun, distilling: DistillationOptions, objective: Objective, max_tokens: int | None = None) -> None:
        """`max_tokens`: the limit of what is sampled; None where nothing is."""
        self.run, self.objective, self.max_tokens = run, objective, max_tokens
        self.name = "jsd" if distilling.divergence is Divergence.jsd else "kl"
        self.warned = False
        self._waited = 0.0  # for the teacher, up to the last step
        self._steps: deque[tuple[float, float]] = deque(maxlen=2 * INFLATION_STEPS)

    def log(self, step: Step, rows: Sequence[TrainingRow]) -> None:
        """Log a step and its rollouts, as they were sampled.

        `kl` is the KL in the direction of --divergence, `jsd` a Jensen-Shannon divergence, in nats a token, also by thirds of the
        completions; vocab.agreement tells what the masses are. Hard labels have a `cross_entropy` alone. What updates wait for a
        teacher on a server or a disk is a phase `wait` of the step, taken out of `update`.
        """
        divergence = step.per_token("kl")
        if isinstance(self.objective, CrossEntropy):
            step.log(cross_entropy=step.per_token("cross_entropy"), entropy=step.per_token("entropy"))
        else:
            self._log_divergence(step, divergence)
        self.run.log_rollouts(step, rows)
        if self.max_tokens is not None and divergence is not None:
            self._steps.append((step.metrics["mean_tokens"], divergence))
            self._warn_of_inflation(step.number)

    def _log_divergence(self, step: Step, divergence: float | None) -> None:
        step.log(**{self.name: divergence}, entropy=step.per_token("entropy"))
        step.log(**{f"{self.name}_{third}": step.per_token(f"kl_{third}", f"tokens_{third}") for third in THIRDS})
        if isinstance(self.objective, Distillation) or self.objective.baseline:
            step.log(**{figure: step.per_token(figure, "watched") for figure in ("teacher_mass", "student_mass", "top_k_overlap")})
        if self.objective.clamp is not None:
            step.log(clamped=step.per_token("clamped"))
        waited = self.objective.teacher.waited
        if waited is not None:
            step.split("update", "wait", waited - self._waited)
            self._waited = waited

    def _warn_of_inflation(self, number: int) -> None:
        if len(self._steps) < 2 * INFLATION_STEPS:
            return
        before, now = list(self._steps)[:INFLATION_STEPS], list(self._steps)[INFLATION_STEPS:]
        (length, old), (longer, new) = ([stats.mean(values) for values in zip(*part, strict=True)] for part in (before, now))
        grows = longer >= (1 + INFLATION_GROWTH) * length and longer >= INFLATION_LENGTH * self.max_tokens
        found = grows and new <= (1 - INFLATION_FALL) * old
        if found and not self.warned:
            console.warn(
                f"step {number}: length inflation: in {INFLATION_STEPS} steps completions grew from {length:.0f} to {longer:.0f} of "
                f"{self.max_tokens} tokens while the divergence fell from {old:.3g} to {new:.3g}; --keep-rollouts shows them, "
                "--loss-tokens learns from their first part"
            )
        self.warned = found
