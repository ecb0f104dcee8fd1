"""On-policy distillation: the student samples, the frozen teacher scores every token, the student learns.

    s2d opd --teacher runs/teacher --student runs/warmup problems.jsonl -o runs/opd
    s2d opd --teacher http://gpu1:8000,http://gpu2:8000 --student CKPT problems.jsonl --estimator top-k --top-k 20
    s2d opd --cache work/cache --student CKPT --rollouts student.jsonl -o runs/opd

At every token t of the student's completions, in state s_t, the loss is (paper, Eq. 4 and stage 2b)

    L = sum_t w_t KL(student(. | s_t) || teacher(. | s_t)),   KL(p || q) = sum_v p_v (log p_v - log q_v)

exact over the vocabulary; its gradient with respect to the student's logits is w_t p (log p - log q - KL) / T. Other forms:
--divergence (train/vocab.py); --estimator, over the teacher's k most likely ids and a bucket for the rest, or from the sampled
token alone (train/objectives.py); --task-reward-weight, a target between or beyond the ends of Eq. 3 (train/targets.py).
No answer is looked at, so no label is spent. Teacher and student must share one tokenizer.

A teacher on servers (vllm serve) scores while the student is updated on rows that are scored already; of several teachers
each scores the rows of its source. --rollouts learns from stored rollouts of the student, and --cache from what s2d score
kept of a teacher on them: prefixes are then those of the student that sampled. Departures from the paper's settings: w_t is
1 / (all tokens of the update) unless --aggregate says otherwise, and a step is one update unless --mini-batch-size is given (paper: 64).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from s2dcli import console, options
from s2dcli.assembly.forms import check_opd, tokens_learnt_from
from s2dcli.engines.opening import check_engine
from s2dcli.files.records import read_problems
from s2dcli.files.run_folder import RunFolder


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
    RunFolder.check(out, "opd", [student, *teachers.inputs, rollouts or problems], overwrite=running.overwrite, resume=running.resume)

    from s2dcli.assembly.rollouts import on_policy, store

    stored = None
    if rollouts is not None:
        sampled_at = sampling.temperature if distilling.estimator is options.Estimator.sampled else None  # an exact KL is one at any prefix
        stored = store(rollouts, on_policy(rollouts, sampled_at), keep_records=running.keep_rollouts)
    items = [] if stored else read_problems(problems)
    eval_problems = read_problems(running.eval_problems) if running.eval_problems else []

    console.starting()
    from s2dcli.assembly.distillation import Watch, opd_objective
    from s2dcli.assembly.order import Order
    from s2dcli.assembly.sampling import make_tasks
    from s2dcli.assembly.training import TrainingSetup
    from s2dcli.engines.base import SamplingParams
    from s2dcli.models.batching import split
    from s2dcli.models.policy import on_device
    from s2dcli.train.rows import cut, set_weights

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
        ahead=sampling.async_depth,
        teachers=teachers,
    )
    tasks = make_tasks(items, setup.encoder, sampling.max_prompt_tokens) if items else []
    on_disk = stored.groups() if stored else []
    order = Order(len(tasks) or len(on_disk), batches.problems_per_step, seed=running.seed, steps=batches.steps, epochs=batches.epochs)
    longest = max(len(row.completion_ids) for row in stored.rows) if stored else sampling.max_tokens
    learnt = tokens_learnt_from(distilling, longest)
    per_item = len(on_disk[0]) if stored else sampling.num_samples
    opened = setup.start(
        order, per_item, ("sample", "score", "update"), problems=items, tasks=tasks, stored=stored, learnt=learnt, turns=phases
    )
    if opened is None:
        return

    with opened as run:
        objective = opd_objective(opened, distilling, sampling.temperature, stored.rows if stored else ())
        watch = Watch(run, distilling, objective, None if stored else longest)
        for step in run:
            chosen = order.batch(step.number)
            groups = [on_disk[index] for index in chosen] if stored else opened.sample_step(step, order, tasks, sampling.num_samples)
            whole = [row for group in groups for row in group]
            rows = cut(whole, distilling.loss_tokens)
            with step.phase("score"):
                objective.teacher.begin(rows)
            with on_device(*objective.others, device=run.device, offload=offload):
                for mini_batch in split(rows, batches.mini_batch_size):
                    set_weights(mini_batch, distilling.aggregate, learnt)
                    run.update(step, mini_batch, objective)
            watch.log(step, whole)
