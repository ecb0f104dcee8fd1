"""Forward-KL warm-up of a student on stored teacher rollouts; also plain SFT on them.

    s2d fkl-warmup --student CKPT --teacher runs/teacher --rollouts teacher.jsonl -o runs/warmup
    s2d fkl-warmup --student CKPT --cache work/cache --rollouts teacher.jsonl -o runs/warmup
    s2d fkl-warmup --student CKPT --rollouts graded.jsonl --hard-labels --only-correct -o runs/sft

At every token t of the teacher's completions, in state s_t, the loss is (paper, Eq. 5 and stage 2a)

    L = sum_t w_t KL(teacher(. | s_t) || student(. | s_t)),   KL(q || p) = sum_v q_v (log q_v - log p_v)

exact over the vocabulary; its gradient with respect to the student's logits is w_t (p - q) / T. --cache takes the
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
from s2dcli.engines.opening import check_engine, check_served_teacher, is_served
from s2dcli.errors import UsageError
from s2dcli.files.records import read_problems
from s2dcli.files.run_folder import RunFolder
from s2dcli.options import Estimator, Keep


def fkl_warmup(
    context: typer.Context,
    *,
    student: options.Student,
    rollouts: Annotated[str, typer.Option("--rollouts", metavar="FILE", help="Teacher's rollouts, JSONL; - is standard input.")],
    teacher: Annotated[str | None, typer.Option("--teacher", metavar="CKPT|URL,...", help="Frozen teacher to match.")] = None,
    cache: Annotated[str | None, typer.Option("--cache", metavar="DIR", help="Teacher cache made by s2d score.")] = None,
    top_k: Annotated[
        int | None, options.in_training("Ids of the teacher in the KL, with a bucket for the rest.", min=1, show_default="all there are")
    ] = None,
    hard_labels: Annotated[bool, typer.Option("--hard-labels", help="Train on the sampled tokens (SFT) without a teacher.")] = False,
    only_correct: Annotated[bool, typer.Option("--only-correct", help="Keep only rollouts graded right.")] = False,
    out: options.RunDir = Path("runs/fkl-warmup"),
    temperature: Annotated[float, options.in_training("Temperature of both distributions in the KL.", min=1e-3)] = 1.0,
    aggregate: Annotated[
        options.Aggregate, options.in_training("Denominator of a token's loss: all tokens, its sequence's, or the longest completion.")
    ] = options.Aggregate.token,
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
    served = is_served(teacher)
    check_engine(engine, training=True, teacher=teacher)
    sources = [student, *([] if served else [teacher]), cache, rollouts]
    RunFolder.check(out, "fkl-warmup", [*filter(None, sources)], overwrite=running.overwrite, resume=running.resume)
    if served:
        check_served_teacher(Estimator.full if top_k is None else Estimator.top_k, temperature)
    if not running.eval_problems:
        options.refuse_given(context, {"engine": "--engine", "max_tokens": "--max-tokens"}, "serves evaluations only; add --eval-problems")
    if [teacher is None, cache is None, not hard_labels].count(False) != 1:
        raise UsageError(
            "choose a target", hint="--teacher CKPT or --cache DIR for its distributions, or --hard-labels for the sampled tokens"
        )
    if hard_labels:
        names = {"temperature": "--temperature", "top_k": "--top-k"}
        options.refuse_given(context, names, "applies to a teacher's distributions; --hard-labels has none")

    from s2dcli.assembly.rollouts import read_targets, store

    labels: set[str] = set()
    stored = store(rollouts, read_targets(rollouts, only_correct, labels))
    eval_problems = read_problems(running.eval_problems) if running.eval_problems else []

    console.starting()
    from s2dcli.assembly.order import Order
    from s2dcli.assembly.training import TrainingSetup
    from s2dcli.engines.base import SamplingParams
    from s2dcli.train.objectives import CrossEntropy, Distillation
    from s2dcli.train.rows import set_weights
    from s2dcli.train.vocab import forward_kl

    checkpoints = {"student": student, **({} if teacher is None or served else {"teacher": teacher})}
    setup = TrainingSetup(
        "fkl-warmup",
        given,
        out,
        checkpoints,
        inputs=[rollouts],
        eval_problems=eval_problems,
        params=SamplingParams(1.0, top_p=1.0, top_k=0, max_tokens=max_tokens),
        engine=engine,
        training=training,
        loading=loading,
        running=running,
        cache=cache,
        served=teacher if served else None,
    )
    order = Order(len(stored.rows), mini_batch_size, seed=running.seed, steps=steps, epochs=epochs)
    opened = setup.start(order, 1, ("update",), frozen=list(checkpoints)[1:], stored=stored)
    if opened is None:
        return

    longest = max(1, *(len(row.completion_ids) for row in stored.rows))
    with opened as run:
        name = "cross_entropy" if hard_labels else "kl"
        whole = top_k is None and not (cache and setup.cache.meta.keep is Keep.top_k)
        estimator = Estimator.full if whole else Estimator.top_k
        source = None if hard_labels else opened.teacher(estimator, top_k, temperature, stored.rows)
        objective = Distillation(teacher=source, divergence=forward_kl, temperature=temperature) if source else CrossEntropy()
        run.labels |= labels
        for step in run:
            rows = [stored.rows[index] for index in order.batch(step.number)]
            if source:
                source.begin(rows)
            set_weights(rows, aggregate, longest)
            run.update(step, rows, objective)
            step.log(**{name: step.per_token(name)}, entropy=step.per_token("entropy"))
            run.log_rollouts(step, rows)
