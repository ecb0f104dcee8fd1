"""Measure a model: avg@k with its standard error over problems, pass@k and the share of truncated answers.

    s2d eval --model CKPT problems.jsonl -k 16 -o results/ckpt
    s2d rollout -m CKPT problems.jsonl -n 16 | s2d verify | s2d eval --rollouts -

avg@k is the mean over problems of the share of right answers among k samples (paper, Evaluation);
± is the standard error over problems, for this one checkpoint. Answers that could not be graded
count as wrong and are reported. `--resume` goes on with a folder that was not finished.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from s2dcli import console, options, stats
from s2dcli.errors import DataError, S2DError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.atomic import disk_errors, remove_leftovers
from s2dcli.files.checkpoint import empty_folder, refuse_folder, refuse_inside
from s2dcli.files.ledger import warnings
from s2dcli.files.lock import locked
from s2dcli.files.manifest import MANIFEST, describe, name_samplers, read_json, write_json
from s2dcli.files.output import begun, cut_after, kept_lines
from s2dcli.files.records import read_graded, read_problems
from s2dcli.grade.pool import MATH, Grader

RESULTS = "results.json"
GRADED = "rollouts.jsonl"
DEFAULT_K = 16  # the paper's avg@16
# On --resume: cutting batches otherwise changes log-probs in the sixth decimal only
MAY_CHANGE = {"device", "sample_tokens", "workers", "name"}
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
    if (model is None) == (rollouts is None):
        raise UsageError("choose what to measure", hint="--model CKPT, or --rollouts GRADED for completions that exist already")
    if rollouts is not None and problems != jsonl.STDIN:
        raise UsageError("PROBLEMS go with --model; graded rollouts bring their own")
    if rollouts is not None:
        options.refuse_given(context, MODEL_ONLY, "goes with --model; graded rollouts are measured as they are")
    if temperature == 0 and (k or 1) > 1:
        raise UsageError(f"-k {k} at --temperature 0: greedy samples are all equal", hint="leave -k out, or sample at --temperature 1")
    if resume and out is None:
        raise UsageError("--resume goes on with a folder", hint="-o DIR names it")
    if out:
        refuse_folder(out, overwrite, resume)
        refuse_inside(out, [rollouts or problems])

    from s2dcli.models.checkpoints import resolve

    todo = read_problems(problems) if model else []
    checkpoint = resolve(model) if model else None
    if out and checkpoint:
        refuse_inside(out, [checkpoint.folder])
    parents = [checkpoint] if checkpoint else []
    manifest = describe("eval", settings, inputs=[rollouts or problems, *loading.files], parents=parents)
    if model and jsonl.is_stream(problems):  # so that a resume is given the same
        manifest["inputs"][0]["sha256"] = jsonl.sha256(problem.to_record() for problem in todo)
    old = begun(out, out / MANIFEST, manifest, MAY_CHANGE) if resume else None
    if old and old["complete"]:
        console.info(f"{out} is complete already")
        jsonl.print_result(read_json(out / RESULTS), console.eval_table)
        return
    if rollouts is not None:  # read anew from the start: that takes seconds
        _measure((row.to_record() for _, row in read_graded(rollouts)), out, name, manifest)
        return

    samples = k or (1 if temperature == 0 else DEFAULT_K)
    with Grader(grading.reward or [MATH], grading.workers, grading.timeout, grading.memory_limit) as grader:
        from s2dcli.assembly.loading import load_scorer
        from s2dcli.assembly.sampling import count_done, make_tasks, open_sampler, plan
        from s2dcli.engines.base import SamplingParams
        from s2dcli.models.prompts import PromptEncoder, load_tokenizer, parse_template_kwargs

        template_kwargs = parse_template_kwargs(loading.chat_template_kwargs)
        encoder = PromptEncoder(load_tokenizer(checkpoint.folder, loading.trust_remote_code), loading.chat_template, template_kwargs)
        params = SamplingParams(temperature, top_p, top_k, max_tokens)
        tasks = make_tasks(todo, encoder)
        batches = plan(tasks, samples, max_tokens, sampling.sample_tokens)
        with (
            open_sampler(checkpoint, encoder, params, sampling, loading, seed=seed) as sampler,
            console.progress("evaluating", len(tasks) * samples, "rollouts") as advance,
        ):
            done = count_done(kept_lines(out / GRADED), batches, samples, whole_batches=sampler.engine.whole_batches) if old else 0
            if sampling.parity_rows:
                sampler.prove(tasks, load_scorer(checkpoint, loading))

            def graded() -> Iterator[dict]:
                advance(done)
                for group in sampler.sample_batches(batches, samples, done):
                    yield from grader.graded([row.to_record() for row in group])
                    advance(len(group))

            _measure(graded(), out, name, manifest, done)


def _measure(graded: Iterable[dict], out: Path | None, name: str | None, manifest: dict[str, Any], done: int = 0) -> None:
    """Sum up graded rollouts as they come, print the result, and with `out` write it and them there.

    The first `done` of them are in `out` already.
    """
    started = time.monotonic()
    seen: dict[str, Any] = {}
    measured: set[str] = set()
    with ExitStack() as stack:
        writer = stack.enter_context(_open_folder(out, manifest, done)) if out else None
        if writer and done:
            graded = chain((line.record for line in kept_lines(out / GRADED, done)), graded)

        def noted() -> Iterator[dict]:
            for number, record in enumerate(graded):
                _note(seen, record)
                measured.add(record["problem_sha256"])
                if writer and number >= done:
                    writer.write(record)
                    writer.flush()
                yield record

        try:
            figures = stats.summarize(noted())
        except ValueError as error:
            if isinstance(error, S2DError):
                raise
            raise DataError(f"cannot be evaluated: {error}", where=jsonl.input_name(manifest["inputs"][0]["path"])) from None
        results = {"name": name or seen["model"], **seen, **figures}
        if not manifest["parents"]:
            name_samplers(manifest, [{"sampler": seen}])
        if out:
            rollouts = figures["problems"] * figures["k"]
            tokens = round(figures["mean_tokens"] * rollouts)
            counts = {"problems": figures["problems"], "rollouts": rollouts, "tokens": tokens, "seconds": time.monotonic() - started}
            with disk_errors("write the results", out):
                writer.sync()
                write_json(out / RESULTS, results)
                write_json(out / MANIFEST, {**manifest, "complete": True, "counts": counts, "measured": sorted(measured)})
    if figures["ungraded"]:
        console.warn(f"{figures['ungraded']} answers could not be graded and count as wrong")
    for caution in warnings(manifest, measured):
        console.warn(caution)
    k, average, error = figures["k"], figures["avg_at_k"], figures["se"]
    console.info(f"avg@{k} {average:.1%} ± {error:.1%} over {figures['problems']} problems; {figures['truncated']:.1%} truncated")
    jsonl.print_result(results, console.eval_table)


@contextmanager
def _open_folder(out: Path, manifest: dict[str, Any], done: int) -> Iterator[jsonl.Writer]:
    """Open the graded rollouts of an output folder, which is new or emptied unless `done` of them are there already."""
    with disk_errors("make the folder", out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        with disk_errors("write", out):
            remove_leftovers(out)
            if done:
                cut_after(out / GRADED, done)
            else:
                empty_folder(out)  # what may not be replaced was refused before
                write_json(out / MANIFEST, {**manifest, "complete": False})
        with jsonl.open_output(out / GRADED, append=True) as writer:
            yield writer


def _note(seen: dict[str, Any], record: dict) -> None:
    """Note whose completions these are; one result must not mix models or ways of sampling."""
    sampler, source = record["sampler"], record["source"]
    whose = {
        key: sampler.get(key, "")
        for key in ("model", "revision", "checkpoint", "step", "temperature", "top_p", "top_k", "max_tokens", "template")
    }
    dataset = "/".join(str(part) for part in (source.get("dataset"), source.get("split")) if part)
    if not seen:
        seen.update(whose, dataset=dataset)
    for key, value in whose.items():
        if seen[key] != value:
            raise DataError(
                f"rollouts of different samplers in one evaluation: {key} {seen[key]!r} and {value!r}", hint="evaluate them one by one"
            )
    if dataset != seen["dataset"]:
        seen["dataset"] = "mixed"
