"""Forward-KL warm-up of a student on stored teacher rollouts; also plain SFT on them.

    s2d fkl-warmup --student CKPT --teacher runs/teacher --rollouts teacher.jsonl -o runs/warmup
    s2d fkl-warmup --student CKPT --cache work/cache --rollouts teacher.jsonl -o runs/warmup
    s2d fkl-warmup --student CKPT --rollouts graded.jsonl --hard-labels --only-correct -o runs/sft

At every token t of the teacher's completions, in state s_t, the loss is (paper, Eq. 5 and stage 2a)

    L = sum_t w_t KL(teacher(. | s_t) || student(. | s_t)),   KL(q || p) = sum_v q_v (log q_v - log p_v)

exact over the vocabulary; its gradient with respect to the student's logits is w_t (p - q) / T. --divergence takes another
(train/vocab.py), of several teachers each scores the rows of its source. --cache takes the
teacher's distributions from disk, as s2d score has kept them: exact from hidden states; from the k most likely ids, or
with --top-k from so many of them, it is the KL over these and one bucket for all others. With --hard-labels it is the
cross-entropy - sum_t w_t log student(y_t | s_t) of the sampled tokens (teacher-sample SFT); --only-correct keeps the
rows that were graded right (rejection sampling), which spends the labels of all graded rows. w_t is 1 / (all tokens of
the batch) unless --aggregate says otherwise. Stored token ids are trained on, never text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from s2dcli import console, options
from s2dcli.assembly.forms import check_warmup, tokens_learnt_from
from s2dcli.engines.opening import check_engine
from s2dcli.files.records import read_problems
from s2dcli.files.run_folder import RunFolder


def fkl_warmup(
    context: typer.Context,
    *,
    student: options.Student,
    rollouts: Annotated[str, typer.Option("--rollouts", metavar="FILE", help="Teacher's rollouts, JSONL; - is standard input.")],
    hard_labels: Annotated[bool, typer.Option("--hard-labels", help="Train on the sampled tokens (SFT) without a teacher.")] = False,
    only_correct: Annotated[bool, typer.Option("--only-correct", help="Keep only rollouts graded right.")] = False,
    out: options.RunDir = Path("runs/fkl-warmup"),
    distilling: options.WarmupOptions,
    steps: options.Steps = None,
    epochs: Annotated[int, options.in_training("Passes over the rollouts, unless --steps is given.", min=1)] = 1,
    mini_batch_size: Annotated[int, options.in_training("Rollouts per step.", min=1)] = 64,
    training: options.TrainingOptions,
    engine: options.EngineOptions,
    max_tokens: options.MaxTokens = 1024,
    loading: options.ModelOptions,
    running: options.RunOptions,
) -> None:
    """Warm up a student on stored teacher rollouts by forward KL, or train it on their tokens (SFT)."""
    given = options.flatten(locals())
    options.refuse_idle(context, training, running)
    teachers = check_warmup(context, given, distilling)
    check_engine(engine, training=True, teacher=teachers.served)
    RunFolder.check(out, "fkl-warmup", [student, *teachers.inputs, rollouts], overwrite=running.overwrite, resume=running.resume)

    from s2dcli.assembly.rollouts import read_targets, store

    labels: set[str] = set()
    stored = store(rollouts, read_targets(rollouts, only_correct, labels))
    eval_problems = read_problems(running.eval_problems) if running.eval_problems else []

    console.starting()
    from s2dcli.assembly.distillation import Watch, warmup_objective
    from s2dcli.assembly.order import Order
    from s2dcli.assembly.training import TrainingSetup
    from s2dcli.engines.base import SamplingParams
    from s2dcli.train.objectives import CrossEntropy
    from s2dcli.train.rows import cut, set_weights

    setup = TrainingSetup(
        "fkl-warmup",
        given,
        out,
        {"student": student},
        inputs=[rollouts],
        eval_problems=eval_problems,
        params=SamplingParams(1.0, top_p=1.0, top_k=0, max_tokens=max_tokens),
        engine=engine,
        training=training,
        loading=loading,
        running=running,
        teachers=teachers,
    )
    order = Order(len(stored.rows), mini_batch_size, seed=running.seed, steps=steps, epochs=epochs)
    longest = tokens_learnt_from(distilling, max(1, *(len(row.completion_ids) for row in stored.rows)))
    opened = setup.start(order, 1, ("update",), stored=stored, learnt=longest)
    if opened is None:
        return

    with opened as run:
        objective = CrossEntropy() if hard_labels else warmup_objective(opened, distilling, stored.rows)
        watch = Watch(run, distilling, objective)
        run.labels |= labels
        for step in run:
            whole = [stored.rows[index] for index in order.batch(step.number)]
            rows = cut(whole, distilling.loss_tokens)
            if not hard_labels:
                objective.teacher.begin(rows)
            set_weights(rows, distilling.aggregate, longest)
            run.update(step, rows, objective)
            watch.log(step, whole)
