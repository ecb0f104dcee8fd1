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
from typing import Annotated

import typer

from s2dcli import console, options
from s2dcli.assembly.forms import check_opd
from s2dcli.engines.opening import check_engine
from s2dcli.files.records import read_problems
from s2dcli.files.run_folder import RunFolder
from s2dcli.options import Estimator


def opd(
    context: typer.Context,
    *,
    student: options.Student,
    problems: options.Problems = "-",
    rollouts: Annotated[str | None, typer.Option("--rollouts", metavar="FILE", help="Rollouts to learn from instead of sampling.")] = None,
    out: options.RunDir = Path("runs/opd"),
    sampling: options.RolloutOptions,
    distilling: options.OnPolicyOptions,
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
    teachers = check_opd(context, given, distilling)
    check_engine(engine, training=True, teacher=teachers.served)
    sources = [student, *teachers.inputs, rollouts or problems]
    RunFolder.check(out, "opd", sources, overwrite=running.overwrite, resume=running.resume)

    from s2dcli.assembly.rollouts import on_policy, store

    stored = None
    if rollouts is not None:
        sampled_at = sampling.temperature if distilling.estimator is Estimator.sampled else None  # an exact KL is one at any prefix
        stored = store(rollouts, on_policy(rollouts, sampled_at), keep_records=running.keep_rollouts)
    items = [] if stored else read_problems(problems)
    eval_problems = read_problems(running.eval_problems) if running.eval_problems else []

    console.starting()
    from s2dcli.assembly.distillation import opd_objective
    from s2dcli.assembly.order import Order
    from s2dcli.assembly.sampling import make_tasks, tasks_of_step
    from s2dcli.assembly.training import TrainingSetup
    from s2dcli.engines.base import SamplingParams
    from s2dcli.models.batching import split
    from s2dcli.models.policy import on_device
    from s2dcli.train.rows import set_weights

    setup = TrainingSetup(
        "opd",
        given,
        out,
        {"student": student},
        inputs=[rollouts or problems],
        eval_problems=eval_problems,
        params=SamplingParams(sampling.temperature, top_p=1.0, top_k=0, max_tokens=sampling.max_tokens),
        engine=engine,
        training=training,
        loading=loading,
        running=running,
        offload=offload,
        teachers=teachers,
    )
    tasks = make_tasks(items, setup.encoder, sampling.max_prompt_tokens) if items else []
    on_disk = stored.groups() if stored else []
    order = Order(len(tasks) or len(on_disk), batches.problems_per_step, seed=running.seed, steps=batches.steps, epochs=batches.epochs)
    per_item = len(on_disk[0]) if stored else sampling.num_samples
    timed = ("sample", "score", "update")
    opened = setup.start(order, per_item, timed, problems=items, tasks=tasks, stored=stored, turns=phases)
    if opened is None:
        return

    longest = max(len(row.completion_ids) for row in stored.rows) if stored else sampling.max_tokens
    with opened as run:
        objective = opd_objective(opened, distilling, sampling.temperature, stored.rows if stored else ())
        for step in run:
            if stored:
                groups = [on_disk[index] for index in order.batch(step.number)]
            else:
                groups = opened.sample(step, tasks_of_step(tasks, order.batch(step.number), step.number), sampling.num_samples)
            rows = [row for group in groups for row in group]
            with step.phase("score"):
                objective.teacher.begin(rows)
            with on_device(*objective.others, device=run.device, offload=offload):
                for mini_batch in split(rows, batches.mini_batch_size):
                    set_weights(mini_batch, distilling.aggregate, longest)
                    run.update(step, mini_batch, objective)
            step.log(kl=step.per_token("kl"), entropy=step.per_token("entropy"))
            run.log_rollouts(step, rows)
