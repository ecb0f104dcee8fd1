"""Measure a model: avg@k with its standard error over problems, pass@k and the share of truncated answers.

    s2d eval --model CKPT problems.jsonl -k 16 -o results/ckpt
    s2d rollout -m CKPT problems.jsonl -n 16 | s2d verify | s2d eval --rollouts -

avg@k is the mean over problems of the share of right answers among k samples (paper, Evaluation);
± is the standard error over problems, for this one checkpoint. Answers that could not be graded
count as wrong and are reported. `--resume` resumes an unfinished folder.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from s2dcli import console, options, stats
from s2dcli.engines.opening import check_engine
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.eval_folder import EvalFolder
from s2dcli.files.ledger import warnings
from s2dcli.files.manifest import describe, name_samplers
from s2dcli.files.records import read_graded, read_problems, require_labels
from s2dcli.grade.pool import MATH, Grader
from s2dcli.grade.rewards import parse_all

DEFAULT_K = 16  # the paper's avg@16
# On --resume: cutting batches otherwise changes log-probs in the sixth decimal only
MAY_CHANGE = {"device", "sample_tokens", "workers", "name", "max_in_flight", "server_timeout"}
# What tells samplers apart
SAMPLER_KEYS = ("model", "revision", "checkpoint", "step", "temperature", "top_p", "top_k", "max_tokens", "template")
# What would be ignored when the rollouts are there already
MODEL_ONLY = {
    "k": "-k",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "max_tokens": "--max-tokens",
    "reward": "--reward",
    "seed": "--seed",
    "engine": "--engine",
}


def evaluate(
    context: typer.Context,
    *,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="CKPT", help="Hub id, checkpoint folder or run folder.")] = None,
    problems: options.Problems = "-",
    rollouts: Annotated[
        str | None, typer.Option("--rollouts", metavar="GRADED", help="Graded rollouts instead of a model; - is standard input.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Folder for results.json and the graded rollouts.", rich_help_panel=options.OUTPUT),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Row of this result in s2d report.", show_default="the model's", rich_help_panel=options.OUTPUT),
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="Samples per problem.", show_default="16; 1 if greedy", rich_help_panel=options.SAMPLING)
    ] = None,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    max_tokens: options.MaxTokens = 1024,
    sampling: options.EngineOptions,
    grading: options.GradingOptions,
    loading: options.ModelOptions,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    seed: options.Seed = 0,
) -> None:
    """Measure avg@k of a model, or of graded rollouts."""
    settings = options.flatten(locals())
    check_engine(sampling)
    if (model is None) == (rollouts is None):
        raise UsageError("choose what to measure", hint="--model CKPT, or --rollouts GRADED for completions that exist already")
    if rollouts is not None:
        if problems != jsonl.STDIN:
            raise UsageError("PROBLEMS go with --model; graded rollouts bring their own")
        options.refuse_given(context, MODEL_ONLY, "goes with --model; graded rollouts are measured as they are")
    if temperature == 0 and (k or 1) > 1:
        raise UsageError(f"-k {k} at --temperature 0: greedy samples are all equal", hint="leave -k out, or sample at --temperature 1")
    if (resume or overwrite) and out is None:
        raise UsageError("--resume and --overwrite need a folder", hint="-o DIR names it")
    source = rollouts or problems
    if out:
        EvalFolder.check(out, "eval", [source, *([model] if model else [])], overwrite=overwrite, resume=resume)

    from s2dcli.models.checkpoints import resolve

    problems = read_problems(problems) if model else []
    if any(reward.built_in for reward in parse_all(grading.reward or [MATH])):
        require_labels(problems, "measure on labelled problems, or use a reward that needs no answer: --reward python:MODULE:FUNCTION")
    checkpoint = resolve(model) if model else None
    parents, streamed = [("model", checkpoint)] if checkpoint else [], [problem.to_record() for problem in problems]
    manifest = describe("eval", settings, inputs=[source, *loading.files], parents=parents, streamed=streamed)
    summary, seen, measured, done, started = stats.Summary(), {}, set(), 0, time.monotonic()
    with ExitStack() as stack:
        folder = EvalFolder(out, manifest, may_change=MAY_CHANGE, overwrite=overwrite, resume=resume) if out else None
        if folder and stack.enter_context(folder).finished:
            console.info(f"{out} is complete already")
            jsonl.print_result(folder.result(), console.eval_table)
            return
        if checkpoint:
            console.starting()
            from s2dcli.assembly.loading import load_scorer
            from s2dcli.assembly.sampling import count_done, make_tasks, open_sampler, plan
            from s2dcli.engines.base import SamplingParams
            from s2dcli.models.prompts import PromptEncoder, load_tokenizer, parse_template_kwargs

            k = k or (1 if temperature == 0 else DEFAULT_K)
            grader = stack.enter_context(Grader(grading.reward or [MATH], grading.workers, grading.timeout, grading.memory_limit))
            template_kwargs = parse_template_kwargs(loading.chat_template_kwargs)
            encoder = PromptEncoder(load_tokenizer(checkpoint.folder, loading.trust_remote_code), loading.chat_template, template_kwargs)
            params = SamplingParams(temperature, top_p, top_k, max_tokens)
            tasks = make_tasks(problems, encoder)
            batches = plan(tasks, k, max_tokens, sampling.sample_tokens)
            sampler = stack.enter_context(open_sampler(checkpoint, encoder, params, sampling, loading, seed=seed))
            if folder:
                done = count_done(folder.lines(), batches, k, whole_batches=sampler.engine.whole_batches)
            if sampling.parity_rows:
                sampler.prove(tasks, load_scorer(checkpoint, loading))
            groups = ([row.to_record() for row in group] for group in sampler.sample_batches(batches, k, done))
            graded = (record for group in groups for record in grader.graded(group))
        else:
            graded = (row.to_record() for _, row in read_graded(rollouts))
        writer = stack.enter_context(folder.open_rollouts(done)) if folder else None
        advance = stack.enter_context(console.progress("evaluating", len(problems) * k if checkpoint else None, "rollouts"))

        def count(record: dict[str, Any]) -> None:
            _note_sampler(seen, record)
            measured.add(record["problem_sha256"])
            summary.add(record)
            advance()

        for line in folder.lines(done) if folder else ():
            count(line.record)
        for record in graded:
            count(record)
            if writer:
                writer.write(record)
                writer.flush()
                folder.keep = bool(checkpoint)  # graded rollouts that are there already are read from the start
        try:
            figures = summary.figures()
        except ValueError as error:
            raise DataError(f"cannot be evaluated: {error}", where=jsonl.input_name(source)) from None
        results = {"name": name or seen["model"], **seen, **figures}
        if not checkpoint:
            name_samplers(manifest, [{"sampler": seen}])
        if folder:
            writer.sync()
            rows = figures["problems"] * figures["k"]
            seconds = time.monotonic() - started
            counts = {"problems": figures["problems"], "rollouts": rows, "tokens": round(figures["mean_tokens"] * rows), "seconds": seconds}
            folder.finish(results, counts=counts, measured=sorted(measured))
    for caution in (*stats.cautions(figures), *warnings(manifest, measured)):
        console.warn(caution)
    console.info(stats.in_words(figures))
    jsonl.print_result(results, console.eval_table)


def _note_sampler(seen: dict[str, Any], record: dict[str, Any]) -> None:
    """Note who sampled these completions, and how; one result must not mix models or ways of sampling."""
    sampler, source = record["sampler"], record["source"]
    for key in SAMPLER_KEYS:
        value = sampler.get(key, "")
        if seen.setdefault(key, value) != value:
            mixed = f"rollouts of different samplers in one evaluation: {key} {seen[key]!r} and {value!r}"
            raise DataError(mixed, hint="evaluate them one by one")
    dataset = "/".join(str(part) for part in (source.get("dataset"), source.get("split")) if part)
    if seen.setdefault("dataset", dataset) != dataset:
        seen["dataset"] = "mixed"
