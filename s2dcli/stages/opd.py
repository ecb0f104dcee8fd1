"""On-policy distillation: the student samples, the frozen teacher scores every token, the student learns.

    s2d opd --teacher runs/teacher --student runs/warmup problems.jsonl -o runs/opd
    s2d opd --teacher runs/teacher --student runs/warmup problems.jsonl --estimator top-k -n 4

At every token that the student wrote, KL(student || teacher) is taken exactly, over the whole
vocabulary (paper, Eq. 4 and stage 2b); --estimator takes it over the teacher's likeliest ids and a bucket
for the rest, or from the sampled token alone. No answer is looked at, so no label is spent. The teacher
never changes; teacher and student must share one tokenizer.

Departures from the paper's settings: the loss is the mean over all tokens of an update (--aggregate),
and all rollouts of a step are one update unless --mini-batch-size says otherwise (paper: 64).

Shapes: R rollouts of a step.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2dcli import options, stats
from s2dcli.files import jsonl
from s2dcli.files.checkpoint import refuse_folder, refuse_inside
from s2dcli.files.records import Rollout, read_problems
from s2dcli.grade.pool import Grader

if TYPE_CHECKING:
    from s2dcli.models.policy import Policy
    from s2dcli.train.loop import Step, TrainingRun


class Estimator(StrEnum):
    """What KL(student || teacher) is computed from."""

    full = "full"
    top_k = "top-k"
    sampled = "sampled"


def opd(
    context: typer.Context,
    *,
    teacher: options.Teacher,
    student: options.Student,
    problems: options.Problems = "-",
    out: options.RunDir = Path("runs/opd"),
    num_samples: options.NumSamples = 8,
    max_tokens: options.MaxTokens = 1024,
    max_prompt_tokens: options.MaxPromptTokens = None,
    temperature: options.TrainTemperature = 1.0,
    sampling: options.EngineOptions,
    estimator: Annotated[
        Estimator, typer.Option(help="Of the KL: exact, the teacher's top k, or the sampled tokens.", rich_help_panel=options.TRAINING)
    ] = Estimator.full,
    top_k: Annotated[
        int, typer.Option(min=1, help="Ids of the teacher that --estimator top-k tells apart.", rich_help_panel=options.TRAINING)
    ] = 128,
    aggregate: options.AggregateOption = options.Aggregate.token,
    steps: options.Steps = None,
    epochs: options.Epochs = 1,
    problems_per_step: options.ProblemsPerStep = 32,
    mini_batch_size: options.MiniBatchSize = None,
    training: options.TrainingOptions,
    offload: options.Offload = False,
    loading: options.ModelOptions,
    keep_rollouts: options.KeepRollouts = False,
    running: options.RunOptions,
) -> None:
    """Distil a frozen teacher into a student on the student's own samples."""
    settings = options.flatten(locals())
    if estimator is not Estimator.top_k:
        options.refuse_given(context, {"top_k": "--top-k"}, "goes with --estimator top-k")
    refuse_folder(out, running.overwrite, running.resume)
    todo = read_problems(problems)
    held_out = read_problems(running.eval_problems) if running.eval_problems else []

    from s2dcli.assembly.loading import load_frozen, load_trained
    from s2dcli.assembly.order import Order
    from s2dcli.assembly.plan import dry_run_plan
    from s2dcli.assembly.sampling import make_tasks, open_sampler, tasks_of_step
    from s2dcli.engines.base import SamplingParams
    from s2dcli.models.checkpoints import resolve
    from s2dcli.models.policy import at_work
    from s2dcli.models.prompts import PromptEncoder, load_tokenizer, parse_template_kwargs, require_same_tokenizer
    from s2dcli.train.loop import TrainingRun, open_run

    parent, guide = resolve(student), resolve(teacher)
    inputs = [path for path in (problems, running.eval_problems, *loading.files) if path]
    refuse_inside(out, [parent.folder, guide.folder, *inputs])
    tokenizer = load_tokenizer(parent.folder, loading.trust_remote_code)
    require_same_tokenizer(load_tokenizer(guide.folder, loading.trust_remote_code), tokenizer)
    encoder = PromptEncoder(tokenizer, loading.chat_template, parse_template_kwargs(loading.chat_template_kwargs))
    tasks = make_tasks(todo, encoder, max_prompt_tokens)
    eval_tasks = make_tasks(held_out, encoder)
    order = Order(len(tasks), problems_per_step, seed=running.seed, steps=steps, epochs=epochs)
    if running.dry_run:
        per_step = min(problems_per_step, order.total) * num_samples
        jsonl.print_result(dry_run_plan(settings, steps=order.steps, rollouts_per_step=per_step, student=parent, frozen=[guide]))
        return

    with (
        open_run("opd", settings, steps=order.steps, inputs=inputs, parents=[parent, guide], problems=todo) as folder,
        Grader() if eval_tasks else nullcontext() as grader,
        ExitStack() as stack,
    ):
        if folder.finished:
            jsonl.print_result(folder.result())
            return
        loaded, policy = load_trained(parent, settings, tokenizer)
        frozen = load_frozen(guide, settings, loaded)
        params = SamplingParams(temperature, top_p=1.0, top_k=0, max_tokens=max_tokens)
        opened = open_sampler(parent, encoder, params, sampling, loading, seed=running.seed, training=loaded)
        sampler = stack.enter_context(opened)

        def evaluate() -> dict[str, Any]:
            rows = [row.to_record() for group in sampler.sample(eval_tasks, running.eval_samples) for row in group]
            return stats.summarize(grader.graded(rows))

        phases = ("sample", "score", "update")
        run = TrainingRun(folder, settings, policy, loaded, phases=phases, evaluate=evaluate if eval_tasks else None)
        sampler.follow(run)
        for step in run:
            with step.phase("sample"):
                sampler.identity = run.identity(step)
                groups = sampler.sample(tasks_of_step(tasks, order.at(step.number), step.number), num_samples)
                rollouts_R = [rollout for group in groups for rollout in group]
            with at_work(frozen, loaded.model.device, offload=offload):
                _learn(run, step, rollouts_R, frozen, settings)
            lengths_R = [len(rollout.completion_ids) for rollout in rollouts_R]
            step.log(
                kl=step.per_token("kl"),
                entropy=step.per_token("entropy"),
                rollouts=len(rollouts_R),
                mean_tokens=stats.mean(lengths_R),
                truncated=stats.mean(float(rollout.truncated) for rollout in rollouts_R),
                sample_tokens_per_second=step.per_second(sum(lengths_R), "sample"),
                update_tokens_per_second=step.per_second(step.tokens, "update"),
            )
            if keep_rollouts:
                folder.write_rollouts(step.number, [rollout.to_record() for rollout in rollouts_R])
        jsonl.print_result(folder.result())


def _learn(run: TrainingRun, step: Step, rollouts_R: list[Rollout], teacher: Policy, settings: dict[str, Any]) -> None:
    """Make the updates of one step from the student's rollouts."""
    from s2dcli.models.batching import Row, split
    from s2dcli.models.policy import score
    from s2dcli.train.losses import weights_of
    from s2dcli.train.objectives import Distillation, SampledDistillation

    estimator, temperature = settings["estimator"], settings["temperature"]
    rows_R = [Row(rollout.prompt_ids, rollout.completion_ids) for rollout in rollouts_R]
    lengths_R = [len(row.completion_ids) for row in rows_R]
    if estimator is Estimator.sampled:
        with step.phase("score"):
            tokens, pad_id = settings["tokens_per_batch"], run.loaded.pad_id
            teacher_R = score(teacher, rows_R, tokens_per_batch=tokens, pad_id=pad_id, temperature=temperature)
        sampler_R = [rollout.completion_logprobs for rollout in rollouts_R]
    for mini_batch in split(range(len(rows_R)), settings["mini_batch_size"]):
        weights_R = weights_of(mini_batch, lengths_R, settings["aggregate"], settings["max_tokens"])
        if estimator is Estimator.sampled:
            objective = SampledDistillation(teacher_R, sampler_R, weights_R, temperature)
        else:
            top_k = settings["top_k"] if estimator is Estimator.top_k else None
            objective = Distillation(teacher, weights_R, reverse=True, temperature=temperature, top_k=top_k)
        run.update(step, rows_R, mini_batch, objective)
