"""Forward-KL warm-up of a student on cached teacher rollouts; also plain SFT on them.

    s2d fkl-warmup --student CKPT --teacher runs/teacher --rollouts teacher.jsonl -o runs/warmup
    s2d fkl-warmup --student CKPT --rollouts graded.jsonl --hard-labels --only-correct -o runs/sft

With --teacher the loss is KL(teacher || student) at every token of the teacher's completions, exact
over the whole vocabulary (paper, Eq. 5 and stage 2a). With --hard-labels it is the cross-entropy of
the sampled tokens themselves (teacher-sample SFT); --only-correct keeps the rows whose reward is 1
(rejection sampling), which spends the labels of all rows that were graded.

The rows' stored token ids are trained on; text is never tokenised again.

Shapes: R rollouts of a step.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from s2dcli import console, options, stats
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.records import read_graded, read_problems, read_rollouts
from s2dcli.files.run_folder import RunFolder
from s2dcli.grade.pool import Grader

GOLD_ENGINE = "gold"  # `sampler.engine` of worked solutions written by `s2d prepare --solutions`


def fkl_warmup(
    context: typer.Context,
    *,
    student: options.Student,
    rollouts: Annotated[
        str, typer.Option("--rollouts", metavar="FILE", help="The teacher's rollouts, JSONL; - is standard input.", show_default=False)
    ],
    teacher: Annotated[str | None, typer.Option("--teacher", metavar="CKPT", help="Frozen teacher whose distributions are learnt.")] = None,
    hard_labels: Annotated[
        bool, typer.Option("--hard-labels", help="Learn the sampled tokens themselves (SFT); needs no teacher.")
    ] = False,
    only_correct: Annotated[bool, typer.Option("--only-correct", help="Keep only graded rollouts whose reward is 1.")] = False,
    out: options.RunDir = Path("runs/fkl-warmup"),
    temperature: Annotated[
        float, typer.Option("--temperature", min=1e-3, help="Of both distributions in the KL.", rich_help_panel=options.TRAINING)
    ] = 1.0,
    aggregate: options.AggregateOption = options.Aggregate.token,
    steps: options.Steps = None,
    epochs: Annotated[
        int, typer.Option("--epochs", min=1, help="Passes over the rollouts, if --steps is not given.", rich_help_panel=options.TRAINING)
    ] = 1,
    mini_batch_size: Annotated[
        int, typer.Option("--mini-batch-size", min=1, help="Rollouts per step.", rich_help_panel=options.TRAINING)
    ] = 64,
    training: options.TrainingOptions,
    loading: options.ModelOptions,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Longest completion in evaluations, in tokens.", rich_help_panel=options.OUTPUT)
    ] = 1024,
    sampling: options.EngineOptions,
    running: options.RunOptions,
) -> None:
    """Warm a student up on cached teacher rollouts by forward KL, or train it on their tokens (SFT)."""
    settings = options.flatten(locals())
    inputs = [student, *([teacher] if teacher else []), rollouts]
    RunFolder.check(out, "fkl-warmup", inputs, overwrite=running.overwrite, resume=running.resume)
    if not running.eval_problems:
        options.refuse_given(context, {"engine": "--engine"}, "says who samples, and without --eval-problems nothing is sampled")
    if (teacher is None) != hard_labels:
        raise UsageError("choose what to learn from", hint="--teacher CKPT for its distributions, or --hard-labels for the sampled tokens")
    if hard_labels and temperature != 1.0:
        raise UsageError("--temperature shapes the distributions of a teacher; with --hard-labels there are none")
    records, labels = _read_rows(rollouts, only_correct)
    held_out = read_problems(running.eval_problems) if running.eval_problems else []

    from s2dcli.assembly.loading import load_frozen, load_trained
    from s2dcli.assembly.order import Order
    from s2dcli.assembly.plan import dry_run_plan
    from s2dcli.assembly.sampling import make_tasks, open_sampler
    from s2dcli.engines.base import SamplingParams
    from s2dcli.models.batching import Row
    from s2dcli.models.checkpoints import resolve
    from s2dcli.models.prompts import PromptEncoder, load_tokenizer, parse_template_kwargs, require_made_with, require_same_tokenizer
    from s2dcli.train.loop import TrainingRun, open_run
    from s2dcli.train.losses import weights_of
    from s2dcli.train.objectives import CrossEntropy, Distillation

    parent = resolve(student)
    tokenizer = load_tokenizer(parent.folder, loading.trust_remote_code)
    guide = resolve(teacher) if teacher else None
    inputs = [path for path in (rollouts, running.eval_problems, *loading.files) if path]
    if guide:
        require_same_tokenizer(load_tokenizer(guide.folder, loading.trust_remote_code), tokenizer)
    require_made_with(tokenizer, records)
    eval_tasks = []
    if held_out:
        encoder = PromptEncoder(tokenizer, loading.chat_template, parse_template_kwargs(loading.chat_template_kwargs))
        eval_tasks = make_tasks(held_out, encoder)
    order = Order(len(records), mini_batch_size, seed=running.seed, steps=steps, epochs=epochs)
    if running.dry_run:
        frozen = [guide] if guide else []
        jsonl.print_result(
            dry_run_plan(settings, steps=order.steps, rollouts_per_step=min(mini_batch_size, order.total), student=parent, frozen=frozen)
        )
        return

    parents = [("student", parent), *([("teacher", guide)] if guide else [])]
    with (
        open_run("fkl-warmup", settings, steps=order.steps, inputs=inputs, parents=parents, rollouts=records) as folder,
        Grader() if eval_tasks else nullcontext() as grader,
        ExitStack() as stack,
    ):
        if folder.finished:
            jsonl.print_result(folder.result())
            return
        loaded, policy = load_trained(parent, settings, tokenizer)
        frozen = load_frozen(guide, settings, loaded) if guide else None
        rows_R = [Row(record["prompt_ids"], record["completion_ids"]) for record in records]
        lengths_R = [len(row.completion_ids) for row in rows_R]
        longest = max(1, *lengths_R)
        if eval_tasks:
            params = SamplingParams(1.0, top_p=1.0, top_k=0, max_tokens=max_tokens)
            opened = open_sampler(parent, encoder, params, sampling, loading, seed=running.seed, training=loaded)
            sampler = stack.enter_context(opened)

        def evaluate() -> dict[str, Any]:
            rows = [row.to_record() for group in sampler.sample(eval_tasks, running.eval_samples) for row in group]
            return stats.summarize(grader.graded(rows))

        run = TrainingRun(folder, settings, policy, loaded, phases=("update",), evaluate=evaluate if eval_tasks else None)
        if eval_tasks:
            sampler.follow(run)
        run.labels |= labels
        for step in run:
            chosen = order.at(step.number)
            weights_R = weights_of(chosen, lengths_R, aggregate, longest)
            objective = Distillation(frozen, weights_R, reverse=False, temperature=temperature) if frozen else CrossEntropy(weights_R)
            run.update(step, rows_R, chosen, objective)
            name = "kl" if frozen else "cross_entropy"
            step.log(
                **{name: step.per_token(name)},
                entropy=step.per_token("entropy"),
                rollouts=len(chosen),
                mean_tokens=stats.mean(lengths_R[r] for r in chosen),
                truncated=stats.mean(float(records[r]["finish_reason"] == "length") for r in chosen),
                update_tokens_per_second=step.per_second(step.tokens, "update"),
            )
        jsonl.print_result(folder.result())


def _read_rows(path: str, only_correct: bool) -> tuple[list[dict], set[str]]:
    """Return the rows to train on, and the problems whose labels that spends (also those of dropped rows)."""
    records: list[dict] = []
    labels: set[str] = set()
    dropped = 0
    for _, row in read_graded(path) if only_correct else read_rollouts(path):
        if only_correct or row.sampler.get("engine") == GOLD_ENGINE:
            labels.add(row.problem_sha256)
        if only_correct and (row.reward is None or row.reward < stats.SOLVED):
            dropped += 1
        else:
            records.append(row.to_record())
    if only_correct:
        console.info(f"--only-correct keeps {len(records)} of {len(records) + dropped} rollouts")
    if not records:
        raise DataError("holds no rollouts to train on", where=jsonl.input_name(path))
    return records, labels
