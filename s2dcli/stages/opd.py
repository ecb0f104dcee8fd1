"""On-policy distillation: the student samples, the frozen teacher scores every token, the student learns.

    s2d opd --teacher runs/teacher --student runs/warmup problems.jsonl -o runs/opd
    s2d opd --teacher runs/teacher --student CKPT problems.jsonl --estimator top-k --top-k 64

At every token t of the student's completions, in state s_t, the loss is (paper, Eq. 4 and stage 2b)

    L = sum_t w_t KL(student(. | s_t) || teacher(. | s_t)),   KL(p || q) = sum_v p_v (log p_v - log q_v)

exact over the vocabulary; its gradient with respect to the student's logits is w_t p (log p - log q - KL) / T.
--estimator takes the KL over the teacher's k most likely ids and one bucket for the rest, or from the sampled token
alone. No answer is looked at, so no label is spent. Teacher and student must share one tokenizer.

Departures from the paper's settings: w_t is 1 / (all tokens of the update) unless --aggregate says otherwise, and
all rollouts of a step are one update unless --mini-batch-size says otherwise (paper: 64).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from s2dcli import console, options
from s2dcli.engines.opening import check_engine
from s2dcli.files.records import read_problems
from s2dcli.files.run_folder import RunFolder
from s2dcli.options import Estimator


def opd(
    context: typer.Context,
    *,
    teacher: options.Teacher,
    student: options.Student,
    problems: options.Problems = "-",
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
    running: options.SampledRunOptions,
) -> None:
    """Distil a frozen teacher into a student on the student's own samples."""
    given = options.flatten(locals())
    if estimator is not Estimator.top_k:
        options.refuse_given(context, {"top_k": "--top-k"}, "requires --estimator top-k")
    check_engine(engine, training=True)
    RunFolder.check(out, "opd", [teacher, student, problems], overwrite=running.overwrite, resume=running.resume)
    items = read_problems(problems)
    eval_problems = read_problems(running.eval_problems) if running.eval_problems else []

    console.starting()
    from s2dcli.assembly.order import Order
    from s2dcli.assembly.sampling import make_tasks, tasks_of_step
    from s2dcli.assembly.training import TrainingSetup
    from s2dcli.engines.base import SamplingParams
    from s2dcli.models.batching import split
    from s2dcli.models.policy import on_device
    from s2dcli.train.objectives import Distillation, SampledDistillation
    from s2dcli.train.rows import set_weights
    from s2dcli.train.teachers import LiveTeacher, ScoredRows
    from s2dcli.train.vocab import reverse_kl

    setup = TrainingSetup(
        "opd",
        given,
        out,
        {"student": student, "teacher": teacher},
        inputs=[problems],
        eval_problems=eval_problems,
        params=SamplingParams(sampling.temperature, top_p=1.0, top_k=0, max_tokens=sampling.max_tokens),
        engine=engine,
        training=training,
        loading=loading,
        running=running,
        offload=offload,
    )
    tasks = make_tasks(items, setup.encoder, sampling.max_prompt_tokens)
    order = Order(len(tasks), batches.problems_per_step, seed=running.seed, steps=batches.steps, epochs=batches.epochs)
    opened = setup.start(order, sampling.num_samples, ("sample", "score", "update"), frozen=["teacher"], problems=items, tasks=tasks)
    if opened is None:
        return

    with opened as run:
        frozen = opened.load_teacher("teacher")
        if estimator is Estimator.sampled:
            objective = SampledDistillation(teacher=ScoredRows(), temperature=sampling.temperature)
        else:
            k = top_k if estimator is Estimator.top_k else None
            live = LiveTeacher(policy=frozen, temperature=sampling.temperature, top_k=k)
            objective = Distillation(teacher=live, divergence=reverse_kl, temperature=sampling.temperature)
        for step in run:
            groups = opened.sample(step, tasks_of_step(tasks, order.batch(step.number), step.number), sampling.num_samples)
            rows = [row for group in groups for row in group]
            with on_device(frozen, run.device, offload=offload):
                if estimator is Estimator.sampled:
                    with step.phase("score"):
                        for row, logprobs in run.score(rows, sampling.temperature, frozen):
                            row.teacher_logprobs = logprobs
                for mini_batch in split(rows, batches.mini_batch_size):
                    set_weights(mini_batch, aggregate, sampling.max_tokens)
                    run.update(step, mini_batch, objective)
            step.log(kl=step.per_token("kl"), entropy=step.per_token("entropy"))
            run.log_rollouts(step, rows)
