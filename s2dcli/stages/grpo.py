"""Sparse-reward RL by group-relative policy optimisation: sample, grade, update, repeat.

    s2d grpo --model CKPT problems.jsonl -o runs/teacher
    s2d grpo --model CKPT --rollouts graded.jsonl -o runs/offline

Each step samples n completions for each of some problems, grades them, turns the rewards of a group into
advantages A relative to the group (DeepSeekMath, arXiv 2402.03300), and minimises PPO's clipped objective

    L = - sum_t w_t min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl_coef sum_t w_t k_t

over all completion tokens t, with r_t = policy(y_t | s_t) / policy before the step (y_t | s_t), k_t an estimate of
KL(policy || initial policy), and w_t by --aggregate, e.g. 1 / (rollouts * tokens of the rollout). By default there is
one update per step (paper, stages 1 and 3), so that r_t = 1 and its gradient is exact.

With --advantage reward A is the reward itself (REINFORCE without a baseline), and a group whose rewards are all equal teaches too.

Departures from the paper's settings: the KL term is off unless asked for (paper: --kl-coef 5e-4),
and all rollouts of a step are one mini-batch unless --mini-batch-size says otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2dcli import console, options, stats
from s2dcli.engines.opening import check_engine
from s2dcli.errors import UsageError
from s2dcli.files import jsonl
from s2dcli.files.records import read_problems, require_labels
from s2dcli.files.run_folder import RunFolder
from s2dcli.options import Advantage, Correction
from s2dcli.train.advantages import is_mixed
from s2dcli.train.presets import KlIn, ObjectiveOptions, check_correction

if TYPE_CHECKING:
    from s2dcli.train.loop import Step
    from s2dcli.train.rows import Group, TrainingRow

# Options that only apply to sampling
SAMPLING_ONLY = {
    "num_samples": "-n",
    "max_tokens": "--max-tokens",
    "max_prompt_tokens": "--max-prompt-tokens",
    "async_depth": "--async-depth",
    "dynamic_sampling": "--dynamic-sampling",
    "correction": "--correction",
    "reward": "--reward",
}


def grpo(
    context: typer.Context,
    *,
    model: options.Model,
    problems: options.Problems = "-",
    out: options.RunDir = Path("runs/grpo"),
    rollouts: Annotated[
        str | None, typer.Option("--rollouts", metavar="GRADED", help="Graded rollouts to train on instead of sampling.")
    ] = None,
    sampling: options.RolloutOptions,
    objective: ObjectiveOptions,
    batches: options.BatchOptions,
    training: options.TrainingOptions,
    engine: options.EngineOptions,
    grading: options.GradingOptions,
    loading: options.ModelOptions,
    offload: options.Offload = False,
    running: options.SampledRunOptions,
) -> None:
    """Train a model by sparse-reward RL (GRPO) on labelled problems."""
    given = options.flatten(locals())
    options.refuse_idle(context, training, running)
    _refuse_contradictions(context, given)
    check_engine(engine, training=True)
    RunFolder.check(out, "grpo", [model, rollouts or problems], overwrite=running.overwrite, resume=running.resume)

    from s2dcli.assembly.rollouts import draw, read_on_policy, store

    stored = (
        store(rollouts, read_on_policy(rollouts, sampling.temperature), keep_records=running.keep_rollouts)
        if rollouts is not None
        else None
    )
    if stored:
        sampling = replace(sampling, max_tokens=stored.max_tokens())
    items = [] if stored else require_labels(read_problems(problems))
    eval_problems = read_problems(running.eval_problems) if running.eval_problems else []
    objective = objective.resolved(sampling)
    given |= options.flatten({"objective": objective, "sampling": sampling})

    console.starting()
    from s2dcli.assembly.order import Order
    from s2dcli.assembly.sampling import make_tasks, tasks_of_step
    from s2dcli.assembly.training import TrainingSetup
    from s2dcli.engines.base import SamplingParams
    from s2dcli.models.batching import split
    from s2dcli.models.policy import on_device
    from s2dcli.train.losses import mean_log_ratio
    from s2dcli.train.objectives import PolicyGradient
    from s2dcli.train.rows import set_weights

    setup = TrainingSetup(
        "grpo",
        given,
        out,
        {"model": model},
        inputs=[rollouts or problems],
        eval_problems=eval_problems,
        params=SamplingParams(sampling.temperature, top_p=1.0, top_k=0, max_tokens=sampling.max_tokens),
        engine=engine,
        grading=grading,
        training=training,
        loading=loading,
        running=running,
        offload=offload,
        ahead=sampling.async_depth,
    )
    tasks = make_tasks(items, setup.encoder, sampling.max_prompt_tokens) if items else []
    on_disk = stored.groups() if stored else []
    order = Order(len(tasks) or len(on_disk), batches.problems_per_step, seed=running.seed, steps=batches.steps, epochs=batches.epochs)
    opened = setup.start(
        order,
        len(on_disk[0]) if stored else sampling.num_samples,
        phases=("sample", "grade", "score", "update"),
        frozen=["model"] if objective.kl_coef else [],
        problems=items,
        tasks=tasks,
        stored=stored,
    )
    if opened is None:
        return

    surrogate = PolicyGradient(
        temperature=sampling.temperature,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        surrogate=objective.surrogate,
        kl_coef=objective.kl_coef if objective.kl_in is KlIn.loss else 0.0,
        kl_estimator=objective.kl_estimator,
    )
    with opened as run:
        reference = opened.load_reference() if objective.kl_coef else None

        for step in run:
            chosen, extra, resampled = order.batch(step.number), order.extra(step.number), 0
            groups = draw(on_disk, chosen) if stored else opened.sample_step(step, order, tasks, sampling.num_samples)
            run.labels.update(group[0].problem_sha256 for group in groups)
            for _ in range(objective.dynamic_sampling):
                flat = [slot for slot, group in enumerate(groups) if not _teaches(group, objective)]
                others = list(islice(extra, len(flat)))
                fresh = opened.sample(step, tasks_of_step(tasks, others, step.number), sampling.num_samples) if others else []
                resampled += len(fresh)
                for slot, group in zip(flat, fresh, strict=False):  # fewer when the problems are used up
                    groups[slot] = group if _teaches(group, objective) else groups[slot]

            rows = [row for group in groups for row in group]
            mini_batches = split([row for row in rows if _is_usable(row, objective)], batches.mini_batch_size)
            several = len(mini_batches) > 1
            with step.phase("score"):
                if reference is not None:
                    with on_device(reference, device=run.device, offload=offload):
                        for row, logprobs in run.score(rows, sampling.temperature, reference):
                            row.reference_logprobs = logprobs
                if several or (reference is not None and objective.kl_in is KlIn.reward) or objective.correction is not Correction.none:
                    for row, logprobs in run.score(rows, sampling.temperature):
                        row.trainer_logprobs = logprobs
                for row in rows:  # of a single update on fresh samples the policy is its own old policy: None
                    row.old_logprobs = row.logprobs if stored else row.trainer_logprobs if several else None
            for group in groups:
                _set_advantages(group, objective, sampling.max_tokens)

            for mini_batch in mini_batches:
                set_weights(mini_batch, objective.aggregate, sampling.max_tokens)
                # Advantage 0 gives gradient 0: such rows stay in the denominators but cost no pass.
                active = [row for row in mini_batch if row.advantage != 0.0 or surrogate.kl_coef]
                if objective.importance is options.Importance.sequence:
                    for row in active:
                        row.sequence_log_ratio = 0.0
                    with step.phase("score"):
                        for row, logprobs in run.score([row for row in active if row.old_logprobs is not None], sampling.temperature):
                            row.sequence_log_ratio = mean_log_ratio(logprobs, row.old_logprobs)
                if active:
                    run.update(step, active, surrogate)
            if not step.updates:
                why = "every reward is 0" if objective.advantage is Advantage.reward else "no group has rewards that differ"
                console.warn(f"step {step.number}: {why}, nothing to learn; no update was made")
            _log(step, groups, objective, sampled=not stored)
            step.log(resampled_groups=resampled)
            run.log_rollouts(step, rows)


def _is_usable(row: TrainingRow, objective: ObjectiveOptions) -> bool:
    """Whether a row is learnt from: rows without a verdict, and masked ones, leave baselines and denominators."""
    return row.reward is not None and not (row.truncated and objective.truncated is options.Truncated.mask)


def _teaches(group: Group, objective: ObjectiveOptions) -> bool:
    """Whether the rewards of a group's usable rows differ."""
    return is_mixed([row.reward if _is_usable(row, objective) else None for row in group])


def _set_advantages(group: Group, objective: ObjectiveOptions, max_tokens: int) -> None:
    """Give the rows of a group their advantages, from their rewards less what the objective charges, and their importance weights."""
    from s2dcli.train.advantages import group_advantages, overlong_penalty
    from s2dcli.train.losses import importance_weights, kl_estimates

    outcomes: list[float | None] = []  # rewards before the KL
    for row in group:
        outcomes.append(row.reward if _is_usable(row, objective) else None)
        if outcomes[-1] is not None and objective.truncated is options.Truncated.penalty:
            outcomes[-1] += overlong_penalty(len(row.completion_ids), max_tokens, objective.overlong_buffer)
        if objective.correction is not Correction.none:
            how = objective.correction, objective.correction_level, objective.correction_cap, objective.correction_floor
            row.importance_weights = importance_weights(row.trainer_logprobs, row.logprobs, *how)
    shaped = outcomes
    if objective.kl_coef and objective.kl_in is KlIn.reward:
        charges = [kl_estimates(objective.kl_estimator, row.trainer_logprobs, row.reference_logprobs).sum() for row in group]
        charged = zip(outcomes, charges, strict=True)
        shaped = [None if outcome is None else outcome - objective.kl_coef * float(charge) for outcome, charge in charged]
    for row, advantage in zip(group, group_advantages(shaped, objective.advantage, outcomes), strict=True):
        row.advantage = advantage


def _log(step: Step, groups: list[Group], objective: ObjectiveOptions, *, sampled: bool) -> None:
    """Log what a step has learnt from; what was not measured is None.

    `entropy` is that of all tokens, estimated by -log p of the sampled ones; `trained_entropy` the exact one of those trained on.
    """
    from s2dcli.train.losses import kl_estimates

    rows = [row for group in groups for row in group]
    tokens = [value for row in rows for value in row.logprobs.tolist()]
    rewards = [row.reward for row in rows if row.reward is not None]
    kl = step.per_token("kl") if objective.kl_coef else None
    if objective.kl_coef and objective.kl_in is KlIn.reward:
        usable = [row for row in rows if _is_usable(row, objective)]
        estimates = [kl_estimates(objective.kl_estimator, row.trainer_logprobs, row.reference_logprobs) for row in usable]
        values = [value for row_values in estimates for value in row_values.tolist()]
        kl = stats.mean(values) if values else None
    step.log(
        reward=stats.mean(rewards) if rewards else None,
        mixed_groups=stats.mean(float(_teaches(group, objective)) for group in groups),
        kl=kl,
        entropy=-stats.mean(tokens) if sampled and tokens else None,
        trained_entropy=step.per_token("entropy"),
        **{name: step.per_token(name) for name in ("clip_fraction", "ratio")},
        logprob_mismatch=step.per_token("logprob_mismatch") if sampled or step.updates == 1 else None,
        ungraded=len(rows) - len(rewards),
    )


def _refuse_contradictions(context: typer.Context, given: dict[str, Any]) -> None:
    """Raise UsageError if options exclude each other, or one would be ignored."""
    rollouts, problems, num_samples, eval_problems, offload, kl_coef = (
        given[name] for name in ("rollouts", "problems", "num_samples", "eval_problems", "offload", "kl_coef")
    )
    if rollouts is not None and problems != jsonl.STDIN:
        raise UsageError("both PROBLEMS and --rollouts were given", hint="give one of them")
    if rollouts is not None:
        options.refuse_given(context, SAMPLING_ONLY, "applies to sampling, and --rollouts samples nothing")
    elif num_samples == 1 and given["advantage"] is not Advantage.reward:
        raise UsageError("-n 1 makes groups of one, whose advantage is always 0", hint="-n 2 or more, or --advantage reward")
    corrected = check_correction(given["correction"], given["async_depth"], given["dynamic_sampling"])
    if kl_coef and given["kl_in"] is KlIn.loss and given["kl_estimator"] is options.KlEstimator.k1:
        raise UsageError("--kl-estimator k1 in the loss has an expected gradient of zero", hint="k2 or k3, or --kl-in reward")
    for needed, missing, names in (
        ("--eval-problems", rollouts is not None and not eval_problems, ["engine", "workers", "timeout", "memory_limit"]),
        ("--kl-coef", not kl_coef, ["kl_in", "kl_estimator"]),
        ("--correction", not corrected, ["correction_level", "correction_cap", "correction_floor"]),
        ("--advantage group-std or group-mean", given["advantage"] is Advantage.reward, ["dynamic_sampling"]),
        ("--truncated penalty", given["truncated"] is not options.Truncated.penalty, ["overlong_buffer"]),
    ):
        if missing:
            options.refuse_given(context, {name: "--" + name.replace("_", "-") for name in names}, f"requires {needed}")
    if offload and not kl_coef:
        raise UsageError("--offload moves the reference model, and without --kl-coef there is none", hint="leave it out")
