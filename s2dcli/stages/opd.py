"""On-policy distillation: the student samples, the frozen teacher scores every token, the student learns.

    s2d opd --teacher runs/teacher --student runs/warmup problems.jsonl -o runs/opd
    s2d opd --teacher http://gpu1:8000,http://gpu2:8000 --student CKPT problems.jsonl --estimator top-k --top-k 20
    s2d opd --cache work/cache --student CKPT --rollouts student.jsonl -o runs/opd

At every token t of the student's completions, in state s_t, the loss is (paper, Eq. 4 and stage 2b)

    L = sum_t w_t KL(student(. | s_t) || teacher(. | s_t)),   KL(p || q) = sum_v p_v (log p_v - log q_v)

exact over the vocabulary; its gradient with respect to the student's logits is w_t p (log p - log q - KL) / T.
--estimator takes the KL over the teacher's k most likely ids and one bucket for the rest, or from the sampled token
alone. No answer is looked at, so no label is spent. Teacher and student must share one tokenizer.

A teacher on servers (vllm serve) scores while the student is updated on rows that are scored already; it gives no whole
distribution. --rollouts learns from stored rollouts of the student, and --cache from what s2d score kept of a teacher
on them: prefixes are then those of the student that sampled.

Departures from the paper's settings: w_t is 1 / (all tokens of the update) unless --aggregate says otherwise, and
all rollouts of a step are one update unless --mini-batch-size says otherwise (paper: 64).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from s2dcli import console, options
from s2dcli.engines.opening import check_engine, check_served_teacher, is_served
from s2dcli.errors import UsageError
from s2dcli.files import jsonl
from s2dcli.files.records import read_problems
from s2dcli.files.run_folder import RunFolder
from s2dcli.options import Estimator


def opd(
    context: typer.Context,
    *,
    teacher: Annotated[str | None, typer.Option("--teacher", metavar="CKPT|URL,...", help="Frozen teacher.", show_default=False)] = None,
    student: options.Student,
    problems: options.Problems = "-",
    rollouts: Annotated[str | None, typer.Option("--rollouts", metavar="FILE", help="Rollouts to learn from instead of sampling.")] = None,
    cache: Annotated[str | None, typer.Option("--cache", metavar="DIR", help="Teacher cache of --rollouts, instead of a teacher.")] = None,
    out: options.RunDir = Path("runs/opd"),
    sampling: options.RolloutOptions,
    estimator: Annotated[
        Estimator, options.in_training("KL estimator: exact, over the teacher's top k, or from the sampled tokens.")
    ] = Estimator.full,
    top_k: Annotated[int, options.in_training("k of --estimator top-k.", min=1)] = 128,
    aggregate: options.AggregateOption = options.Aggregate.token,
    batches: options.BatchOptions,
    training: options.TrainingOptions,
    engine: options.EngineOptions,
    loading: options.ModelOptions,
    offload: options.Offload = False,
    phases: options.PhasesOption = options.Phases.auto,
    running: options.SampledRunOptions,
) -> None:
    """Distil a frozen teacher into a student on the student's own samples."""
    given = options.flatten(locals())
    options.refuse_idle(context, training, running)
    if estimator is not Estimator.top_k:
        options.refuse_given(context, {"top_k": "--top-k"}, "requires --estimator top-k")
    served = is_served(teacher)
    _refuse_contradictions(context, given, served=served)
    check_engine(engine, training=True, teacher=teacher)
    sources = [student, *([] if served else [teacher]), cache, rollouts or problems]
    RunFolder.check(out, "opd", [*filter(None, sources)], overwrite=running.overwrite, resume=running.resume)

    from s2dcli.assembly.rollouts import on_policy, store

    stored = None
    if rollouts is not None:
        sampled_at = sampling.temperature if estimator is Estimator.sampled else None  # an exact KL is one at any prefix
        stored = store(rollouts, on_policy(rollouts, sampled_at), keep_records=running.keep_rollouts)
    items = [] if stored else read_problems(problems)
    eval_problems = read_problems(running.eval_problems) if running.eval_problems else []

    console.starting()
    from s2dcli.assembly.order import Order
    from s2dcli.assembly.sampling import make_tasks
    from s2dcli.assembly.training import TrainingSetup
    from s2dcli.engines.base import SamplingParams
    from s2dcli.models.batching import split
    from s2dcli.models.policy import on_device
    from s2dcli.train.objectives import Distillation, SampledDistillation
    from s2dcli.train.rows import set_weights
    from s2dcli.train.vocab import reverse_kl

    live = teacher is not None and not served
    setup = TrainingSetup(
        "opd",
        given,
        out,
        {"student": student, **({"teacher": teacher} if live else {})},
        inputs=[rollouts or problems],
        eval_problems=eval_problems,
        params=SamplingParams(sampling.temperature, top_p=1.0, top_k=0, max_tokens=sampling.max_tokens),
        engine=engine,
        training=training,
        loading=loading,
        running=running,
        offload=offload,
        ahead=sampling.async_depth,
        cache=cache,
        served=teacher if served else None,
    )
    tasks = make_tasks(items, setup.encoder, sampling.max_prompt_tokens) if items else []
    on_disk = stored.groups() if stored else []
    order = Order(len(tasks) or len(on_disk), batches.problems_per_step, seed=running.seed, steps=batches.steps, epochs=batches.epochs)
    per_item = len(on_disk[0]) if stored else sampling.num_samples
    timed = ("sample", "score", "update")
    frozen = ["teacher"] * live
    opened = setup.start(order, per_item, timed, frozen=frozen, problems=items, tasks=tasks, stored=stored, turns=phases)
    if opened is None:
        return

    longest = max(len(row.completion_ids) for row in stored.rows) if stored else sampling.max_tokens
    with opened as run:
        source = opened.teacher(estimator, top_k, sampling.temperature, stored.rows if stored else ())
        if estimator is Estimator.sampled:
            objective = SampledDistillation(teacher=source, temperature=sampling.temperature)
        else:
            objective = Distillation(teacher=source, divergence=reverse_kl, temperature=sampling.temperature)
        for step in run:
            if stored:
                groups = [on_disk[index] for index in order.batch(step.number)]
            else:
                groups = opened.sample_step(step, order, tasks, sampling.num_samples)
            rows = [row for group in groups for row in group]
            with step.phase("score"):
                source.begin(rows)
            with on_device(*source.others, device=run.device, offload=offload):
                for mini_batch in split(rows, batches.mini_batch_size):
                    set_weights(mini_batch, aggregate, longest)
                    run.update(step, mini_batch, objective)
            step.log(kl=step.per_token("kl"), entropy=step.per_token("entropy"))
            run.log_rollouts(step, rows)


def _refuse_contradictions(context: typer.Context, given: dict[str, Any], *, served: bool) -> None:
    """Raise UsageError if options exclude each other, or one would be ignored."""
    if (given["teacher"] is None) == (given["cache"] is None):
        raise UsageError("choose one teacher", hint="--teacher CKPT or URLs, or --cache DIR with --rollouts FILE")
    if given["cache"] and given["rollouts"] is None:
        raise UsageError("--cache has scores of stored rollouts", hint="name them by --rollouts FILE")
    if given["rollouts"] is not None:
        if given["problems"] != jsonl.STDIN:
            raise UsageError("both PROBLEMS and --rollouts were given", hint="give one of them")
        names = {"num_samples": "-n", "max_prompt_tokens": "--max-prompt-tokens", "async_depth": "--async-depth"}
        if not given["eval_problems"]:
            names |= {"engine": "--engine", "max_tokens": "--max-tokens"}
        options.refuse_given(context, names, "applies to sampling, and --rollouts samples nothing")
    if served or given["cache"]:
        options.refuse_given(context, {"offload": "--offload", "phases": "--phases"}, "applies to a teacher in memory, and there is none")
    if served:
        check_served_teacher(given["estimator"], given["temperature"])
