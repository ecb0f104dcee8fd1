"""Sparse-reward RL by group-relative policy optimisation: sample, grade, update, repeat.

    s2d grpo --model CKPT problems.jsonl -o runs/teacher
    s2d grpo --model CKPT --rollouts graded.jsonl -o runs/offline

Each step samples n completions for each of some problems, grades them, turns the rewards of a
group into advantages relative to the group (DeepSeekMath, arXiv 2402.03300), and maximises PPO's
clipped objective, by default with one update per step (paper, stages 1 and 3).

Departures from the paper's settings: the KL term is off unless asked for (paper: --kl-coef 5e-4),
and all rollouts of a step are one mini-batch unless --mini-batch-size says otherwise.

Shapes: R rollouts of a step, G groups among them.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2dcli import console, options, stats
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.records import Problem, read_graded, read_problems
from s2dcli.files.run_folder import RunFolder
from s2dcli.grade.pool import MATH, Grader

if TYPE_CHECKING:
    from s2dcli.models.policy import Policy
    from s2dcli.train.loop import Step, TrainingRun

# What would be ignored when the rollouts are there already
SAMPLING_ONLY = {
    "num_samples": "-n",
    "max_prompt_tokens": "--max-prompt-tokens",
    "resample_flat": "--resample-flat",
    "correction": "--correction",
    "reward": "--reward",
}


class Preset(StrEnum):
    """Named settings of the objective's knobs; see PRESETS."""

    grpo = "grpo"
    dr_grpo = "dr-grpo"
    dapo = "dapo"
    gspo = "gspo"
    cispo = "cispo"


class KlIn(StrEnum):
    """Where the KL to the initial policy is charged."""

    loss = "loss"
    reward = "reward"


def _preset(aggregate: str, advantage: str, importance: str, surrogate: str, clip_low: float, clip_high: float) -> dict[str, Any]:
    return {
        "aggregate": options.Aggregate(aggregate),
        "advantage": options.Advantage(advantage),
        "importance": options.Importance(importance),
        "surrogate": options.Surrogate(surrogate),
        "clip_low": clip_low,
        "clip_high": clip_high,
    }


PRESETS = {
    # DeepSeekMath, arXiv 2402.03300, Eq. 3; clip 0.2 as in the paper that s2d follows
    Preset.grpo: _preset("sequence", "group-std", "token", "ppo", 0.2, 0.2),
    # "Understanding R1-Zero-like training", arXiv 2503.20783: no deviation, no length in a denominator
    Preset.dr_grpo: _preset("constant", "group-mean", "token", "ppo", 0.2, 0.2),
    # DAPO, arXiv 2503.14476, §3 and §4.1; its dynamic sampling is --resample-flat, its overlong penalty --truncated
    Preset.dapo: _preset("token", "group-std", "token", "ppo", 0.2, 0.28),
    # GSPO, arXiv 2507.18071, §5.1
    Preset.gspo: _preset("sequence", "group-std", "sequence", "ppo", 3e-4, 4e-4),
    # CISPO, MiniMax-M1, arXiv 2506.13585, Eq. 4; weights up to 5 as in ScaleRL, arXiv 2510.13786
    Preset.cispo: _preset("token", "group-std", "token", "cispo", 1.0, 4.0),
}


def _knob(text: str, **settings: Any) -> Any:
    return typer.Option(help=text, rich_help_panel="Objective", **settings)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is maximised."""

    loss: Annotated[Preset, _knob("Sets the knobs of this panel that are not given.")] = Preset.grpo
    aggregate: Annotated[
        options.Aggregate | None,
        _knob("What a token's loss is divided by: all tokens, its sequence's, or --max-tokens."),
    ] = None
    advantage: Annotated[options.Advantage | None, _knob("Divide by the group's standard deviation, or not.")] = None
    importance: Annotated[options.Importance | None, _knob("Whose ratio is clipped: the token's or its sequence's.")] = None
    surrogate: Annotated[options.Surrogate | None, _knob("PPO's minimum, or CISPO's truncated weight.")] = None
    clip_low: Annotated[float | None, _knob("The ratio is clipped at 1 - this.", min=0.0)] = None
    clip_high: Annotated[float | None, _knob("The ratio is clipped at 1 + this.", min=0.0)] = None
    kl_coef: Annotated[float, _knob("Weight of the KL to the initial policy.", min=0.0)] = 0.0
    kl_estimator: Annotated[options.KlEstimator, _knob("How that KL is estimated.")] = options.KlEstimator.k3
    kl_in: Annotated[KlIn, _knob("Add it to the loss, or take its sum from each reward.")] = KlIn.loss
    truncated: Annotated[
        options.Truncated,
        _knob("Completions that hit --max-tokens: keep, mask (learn nothing from), penalty (soft)."),
    ] = options.Truncated.keep
    overlong_buffer: Annotated[
        int | None,
        _knob("Tokens before the limit over which the penalty falls to -1.", min=1, show_default="a fifth"),
    ] = None
    correction: Annotated[options.Correction, _knob("Weigh tokens by trainer/sampler probability.")] = options.Correction.none
    correction_level: Annotated[options.Importance, _knob("Ratio of each token, or of its sequence.")] = options.Importance.token
    correction_cap: Annotated[float, _knob("Where that ratio is cut or masked.", min=1.0)] = 2.0
    resample_flat: Annotated[
        int,
        _knob("Rounds of further problems for groups whose rewards are all equal.", min=0),
    ] = 0


def grpo(
    context: typer.Context,
    *,
    model: options.Model,
    problems: options.Problems = "-",
    out: options.RunDir = Path("runs/grpo"),
    rollouts: Annotated[
        str | None, typer.Option("--rollouts", metavar="GRADED", help="Train one pass on graded rollouts instead of sampling.")
    ] = None,
    num_samples: options.NumSamples = 8,
    max_tokens: options.MaxTokens = 1024,
    max_prompt_tokens: options.MaxPromptTokens = None,
    temperature: options.TrainTemperature = 1.0,
    sampling: options.EngineOptions,
    objective: Objective,
    steps: options.Steps = None,
    epochs: options.Epochs = 1,
    problems_per_step: options.ProblemsPerStep = 32,
    mini_batch_size: options.MiniBatchSize = None,
    training: options.TrainingOptions,
    offload: options.Offload = False,
    grading: options.GradingOptions,
    loading: options.ModelOptions,
    keep_rollouts: options.KeepRollouts = False,
    running: options.RunOptions,
) -> None:
    """Train a model by sparse-reward RL (GRPO) on labelled problems."""
    settings = options.flatten(locals())
    settings |= {name: value for name, value in PRESETS[objective.loss].items() if settings[name] is None}
    RunFolder.check(out, "grpo", [model, rollouts or problems], overwrite=running.overwrite, resume=running.resume)
    _refuse_contradictions(context, settings)
    stored = [] if rollouts is None else _read_groups(rollouts, temperature)
    if stored:  # the limit that the rollouts were sampled under
        settings["max_tokens"] = stored[0][0]["sampler"]["max_tokens"]
    settings["overlong_buffer"] = objective.overlong_buffer or max(1, settings["max_tokens"] // 5)
    todo = _require_labels(read_problems(problems)) if rollouts is None else []
    held_out = read_problems(running.eval_problems) if running.eval_problems else []

    from s2dcli.assembly.loading import load_reference, load_trained
    from s2dcli.assembly.order import Order
    from s2dcli.assembly.plan import dry_run_plan
    from s2dcli.assembly.sampling import make_tasks, open_sampler, tasks_of_step
    from s2dcli.engines.base import SamplingParams
    from s2dcli.models.checkpoints import resolve
    from s2dcli.models.prompts import PromptEncoder, load_tokenizer, parse_template_kwargs, require_made_with
    from s2dcli.train.loop import TrainingRun, open_run

    parent = resolve(model)
    inputs = [path for path in (rollouts or problems, running.eval_problems, *loading.files) if path]
    tokenizer = load_tokenizer(parent.folder, loading.trust_remote_code)
    encoder = PromptEncoder(tokenizer, loading.chat_template, parse_template_kwargs(loading.chat_template_kwargs))
    rows = [record for group in stored for record in group]
    require_made_with(tokenizer, rows)
    tasks = make_tasks(todo, encoder, max_prompt_tokens) if todo else []
    eval_tasks = make_tasks(held_out, encoder)
    order = Order(len(tasks) or len(stored), problems_per_step, seed=running.seed, steps=steps, epochs=epochs)
    if running.dry_run:
        per_step = min(problems_per_step, order.total) * (len(stored[0]) if stored else num_samples)
        frozen = [parent] if objective.kl_coef else []
        jsonl.print_result(dry_run_plan(settings, steps=order.steps, rollouts_per_step=per_step, student=parent, frozen=frozen))
        return

    with (
        open_run("grpo", settings, steps=order.steps, inputs=inputs, parents=[("model", parent)], problems=todo, rollouts=rows) as folder,
        Grader(grading.reward or [MATH], grading.workers, grading.timeout, grading.memory_limit) as grader,
        ExitStack() as stack,
    ):
        if folder.finished:
            jsonl.print_result(folder.result())
            return
        loaded, policy = load_trained(parent, settings, tokenizer)
        reference = load_reference(policy, loaded, settings) if objective.kl_coef else None
        if tasks or eval_tasks:
            params = SamplingParams(temperature, top_p=1.0, top_k=0, max_tokens=max_tokens)
            opened = open_sampler(parent, encoder, params, sampling, loading, seed=running.seed, training=loaded)
            sampler = stack.enter_context(opened)

        def evaluate() -> dict[str, Any]:
            rows = [row.to_record() for group in sampler.sample(eval_tasks, running.eval_samples) for row in group]
            return stats.summarize(grader.graded(rows))

        phases = ("sample", "grade", "score", "update")
        run = TrainingRun(folder, settings, policy, loaded, phases=phases, evaluate=evaluate if eval_tasks else None)
        if tasks or eval_tasks:
            sampler.follow(run)
        num_sampled = 0  # tokens, in the step

        def sample(step: Step, chosen: list[int]) -> list[list[dict]]:
            nonlocal num_sampled
            with step.phase("sample"):
                sampler.identity = run.identity(step)
                groups = list(sampler.sample(tasks_of_step(tasks, chosen, step.number), num_samples))
            num_sampled += sum(len(row.completion_ids) for group in groups for row in group)
            run.labels.update(group[0].problem_sha256 for group in groups)
            with step.phase("grade"):
                graded = grader.graded([row.to_record() for group in groups for row in group])
                return [[next(graded) for _ in group] for group in groups]

        for step in run:
            num_sampled, drawn_again, spares = 0, 0, order.spares(step.number)
            chosen = order.at(step.number)
            groups = _draw(stored, chosen) if stored else sample(step, chosen)
            run.labels.update(group[0]["problem_sha256"] for group in groups)
            for _ in range(objective.resample_flat):
                flat = [slot for slot, group in enumerate(groups) if not _is_mixed(group)]
                fresh = sample(step, list(islice(spares, len(flat)))) if flat else []
                drawn_again += len(fresh)
                for slot, group in zip(flat, fresh, strict=False):  # fewer when the problems are used up
                    groups[slot] = group if _is_mixed(group) else groups[slot]
            _learn(run, step, groups, policy, reference, settings)
            step.log(
                drawn_again=drawn_again,
                sample_tokens_per_second=step.per_second(num_sampled, "sample"),
                update_tokens_per_second=step.per_second(step.tokens, "update"),
            )
            if keep_rollouts:
                folder.write_rollouts(step.number, [record for group in groups for record in group])
        jsonl.print_result(folder.result())


def _refuse_contradictions(context: typer.Context, settings: dict[str, Any]) -> None:
    """Raise UsageError if options exclude each other, or one would be ignored."""
    if settings["rollouts"] is not None and settings["problems"] != jsonl.STDIN:
        raise UsageError("both PROBLEMS and --rollouts were given", hint="name one source to learn from")
    if settings["rollouts"] is not None:
        options.refuse_given(context, SAMPLING_ONLY, "goes with sampling, --rollouts learns from what there is")
        if not settings["eval_problems"]:
            options.refuse_given(context, {"engine": "--engine"}, "says who samples, and without --eval-problems nothing is sampled")
    elif settings["num_samples"] == 1:
        raise UsageError("-n 1 makes groups of one, which have nothing to be compared with", hint="-n 2 or more")
    if settings["offload"] and not settings["kl_coef"]:
        raise UsageError("--offload moves the reference, and there is none without --kl-coef", hint="leave it out")


def _draw(stored: list[list[dict]], chosen: list[int]) -> list[list[dict]]:
    """Return the chosen groups; one that is drawn again in the step gets a name of its own."""
    draws: Counter[int] = Counter()
    groups = []
    for index in chosen:
        again = f".{draws[index]}" if draws[index] else ""
        groups.append([{**record, "group_id": record["group_id"] + again} for record in stored[index]])
        draws[index] += 1
    return groups


def _learn(
    run: TrainingRun, step: Step, groups: list[list[dict]], policy: Policy, reference: Policy | None, settings: dict[str, Any]
) -> None:
    """Make the updates of one step from its graded rollouts, and log what they were."""
    from s2dcli.models.batching import Row, split
    from s2dcli.models.policy import at_work, score
    from s2dcli.train.losses import corrections, group_advantages, is_mixed, kl_estimates, mean_gap, overlong_penalty, weights_of
    from s2dcli.train.objectives import PolicyGradient

    records = [record for group in groups for record in group]
    groups_G = [slice(end - len(group), end) for group, end in zip(groups, accumulate(map(len, groups)), strict=True)]
    rows_R = [Row(record["prompt_ids"], record["completion_ids"]) for record in records]
    lengths_R = [len(row.completion_ids) for row in rows_R]
    rewards_R = [record["reward"] for record in records]
    truncated_R = [record["finish_reason"] == "length" for record in records]
    sampler_R = [record["completion_logprobs"] for record in records]
    scoring = {"tokens_per_batch": settings["tokens_per_batch"], "pad_id": run.loaded.pad_id, "temperature": settings["temperature"]}
    masked = settings["truncated"] is options.Truncated.mask
    # Rows without a verdict, and masked ones, teach nothing: they leave baselines and denominators.
    usable = [r for r, reward in enumerate(rewards_R) if reward is not None and not (masked and truncated_R[r])]
    mini_batches = split(usable, settings["mini_batch_size"])
    sequence_level = settings["importance"] is options.Importance.sequence
    with step.phase("score"):
        reference_R = None
        if reference is not None:
            with at_work(reference, run.loaded.model.device, offload=settings["offload"]):
                reference_R = score(reference, rows_R, **scoring)
        if settings["rollouts"] is not None:
            old_R = sampler_R
        elif len(mini_batches) > 1 or settings["correction"] is not options.Correction.none:
            old_R = score(policy, rows_R, **scoring)
        else:
            old_R = None  # one update: the policy is its own old policy
    corrections_R = None
    if settings["correction"] is not options.Correction.none:
        corrections_R = corrections(old_R, sampler_R, settings["correction"], settings["correction_level"], settings["correction_cap"])

    shaped_R: list[float | None] = [None] * len(records)
    kl_in_reward = reference_R is not None and settings["kl_in"] is KlIn.reward
    for r in usable:
        shaped_R[r] = rewards_R[r]
        if kl_in_reward:
            shaped_R[r] -= settings["kl_coef"] * sum(kl_estimates(settings["kl_estimator"], sampler_R[r], reference_R[r]))
        if settings["truncated"] is options.Truncated.penalty:
            shaped_R[r] += overlong_penalty(lengths_R[r], settings["max_tokens"], settings["overlong_buffer"])
    advantages_R = [value for group in groups_G for value in group_advantages(shaped_R[group], settings["advantage"])]

    kl_in_loss = reference_R is not None and not kl_in_reward
    for mini_batch in mini_batches:
        # Advantage 0 gives gradient 0: such rows stay in the denominators but cost no pass.
        taught = [r for r in mini_batch if advantages_R[r] != 0.0 or kl_in_loss]
        if not taught:
            continue
        log_ratios_R = None
        if sequence_level and old_R is None:
            log_ratios_R = [0.0] * len(records)
        elif sequence_level:
            with step.phase("score"):
                now_R = score(policy, [rows_R[r] for r in taught], **scoring)
            log_ratios_R = {r: mean_gap(now, old_R[r]) for r, now in zip(taught, now_R, strict=True)}
        objective = PolicyGradient(
            weights_R=weights_of(mini_batch, lengths_R, settings["aggregate"], settings["max_tokens"]),
            advantages_R=advantages_R,
            sampler_R=sampler_R,
            old_R=old_R,
            temperature=settings["temperature"],
            clip_low=settings["clip_low"],
            clip_high=settings["clip_high"],
            surrogate=settings["surrogate"],
            sequence_log_ratios_R=log_ratios_R,
            corrections_R=corrections_R,
            reference_R=reference_R if kl_in_loss else None,
            kl_coef=settings["kl_coef"],
            kl_estimator=settings["kl_estimator"],
        )
        run.update(step, rows_R, taught, objective)
    if not step.updates:
        console.warn(f"step {step.number}: no group has rewards that differ, nothing to learn; no update was made")

    known = [reward for reward in rewards_R if reward is not None]
    kl = None
    if reference_R is not None:
        estimates = [value for r in usable for value in kl_estimates(settings["kl_estimator"], sampler_R[r], reference_R[r])]
        kl = step.per_token("kl") if kl_in_loss else stats.mean(estimates or [0.0])
    step.log(
        reward=stats.mean(known) if known else 0.0,
        mixed_groups=stats.mean(float(is_mixed(rewards_R[group])) for group in groups_G),
        kl=kl,
        entropy=step.per_token("entropy"),
        clip_fraction=step.per_token("clipped"),
        ratio=step.per_token("ratio"),
        sampler_gap=step.per_token("sampler_gap"),
        rollouts=len(records),
        ungraded=len(records) - len(known),
        mean_tokens=stats.mean(lengths_R),
        truncated=stats.mean(map(float, truncated_R)),
    )


def _is_mixed(group: list[dict]) -> bool:
    from s2dcli.train.losses import is_mixed

    return is_mixed([record["reward"] for record in group])


def _require_labels(problems: list[Problem]) -> list[Problem]:
    unlabelled = [problem.id for problem in problems if not problem.answer]
    if unlabelled:
        raise DataError(
            f"{len(unlabelled)} of {len(problems)} problems have no answer to grade against, the first is {unlabelled[0]!r}",
            hint="RL needs labels; for unlabelled problems use s2d opd",
        )
    return problems


def _read_groups(path: str, temperature: float) -> list[list[dict]]:
    """Read graded rollouts as groups. Refuses rows whose log-probs are not those they were sampled with."""
    groups: dict[str, list[dict]] = {}
    for where, row in read_graded(path):
        drawn = (row.sampler.get("temperature"), row.sampler.get("top_p"), row.sampler.get("top_k"))
        if drawn != (temperature, 1.0, 0):
            raise DataError(
                "sampled at temperature {}, top-p {}, top-k {}: the log-probs do not belong to the policy at --temperature {}".format(
                    *drawn, temperature
                ),
                where=where,
                hint="sample with --top-p 1 --top-k 0 and train with the same --temperature",
            )
        groups.setdefault(row.group_id, []).append(row.to_record())
    if not groups:
        raise DataError("holds no rollouts", where=jsonl.input_name(path))
    return list(groups.values())
