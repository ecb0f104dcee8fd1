"""Measure a model: avg@k with its standard error over problems, pass@k and the share of truncated answers.

    s2d eval --model CKPT problems.jsonl -k 16 -o results/ckpt
    s2d rollout -m CKPT problems.jsonl -n 16 | s2d verify | s2d eval --rollouts -

avg@k is the mean over problems of the share of right answers among k samples (paper, Evaluation);
± is the standard error over problems, for this one checkpoint. Answers that could not be graded
count as wrong and are reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from s2dcli import console, options, stats
from s2dcli.errors import DataError, S2DError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.checkpoint import create_folder, refuse_folder, refuse_inside
from s2dcli.files.manifest import MANIFEST, describe, write_json
from s2dcli.files.records import read_problems, read_rollouts, take
from s2dcli.grade.pool import MATH, Grader

RESULTS = "results.json"
GRADED = "rollouts.jsonl"
DEFAULT_K = 16  # the paper's avg@16
# What would be ignored when the rollouts are there already
MODEL_ONLY = {
    "k": "-k",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "max_tokens": "--max-tokens",
    "reward": "--reward",
    "seed": "--seed",
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
    if out:
        refuse_folder(out, overwrite)
        refuse_inside(out, [rollouts or problems])

    if rollouts is not None:
        _measure(_read_graded(rollouts), out, name, describe("eval", settings, inputs=[rollouts]))
        return

    todo = read_problems(problems)
    samples = k or (1 if temperature == 0 else DEFAULT_K)
    with Grader(grading.reward or [MATH], grading.workers, grading.timeout, grading.memory_limit) as grader:
        from s2dcli.engines.base import SamplingParams
        from s2dcli.engines.sampling import make_tasks, open_sampler
        from s2dcli.models.checkpoints import load, resolve
        from s2dcli.models.prompts import PromptEncoder, parse_template_kwargs

        template_kwargs = parse_template_kwargs(loading.chat_template_kwargs)
        checkpoint = resolve(model)
        if out:
            refuse_inside(out, [checkpoint.folder])
        loaded = load(checkpoint, **loading.of_load())
        encoder = PromptEncoder(loaded.tokenizer, loading.chat_template, template_kwargs)
        params = SamplingParams(temperature, top_p, top_k, max_tokens)
        sampler = open_sampler(loaded, encoder, params, seed=seed, batch_tokens=sampling.sample_tokens)
        tasks = make_tasks(todo, encoder)

        def graded() -> Iterator[dict]:
            with console.progress("evaluating", len(tasks), "problems") as advance:
                for group in sampler.sample(tasks, samples):
                    rows = [row.to_record() for row in group]
                    yield from grader.graded(rows)
                    advance()

        manifest = describe("eval", settings, inputs=[problems], parents=[checkpoint])
        _measure(graded(), out, name, manifest)


def _read_graded(path: str) -> Iterator[dict]:
    for where, _, record in read_rollouts(path):
        if "reward" not in record:
            raise DataError("no field 'reward'", where=where, hint="grade first: s2d verify ROLLOUTS | s2d eval --rollouts -")
        take(record, "reward", (float, int, type(None)), where)
        yield record


def _measure(graded: Iterable[dict], out: Path | None, name: str | None, manifest: dict[str, Any]) -> None:
    """Sum up graded rollouts as they come, print the result, and with `out` write it and them there."""
    seen: dict[str, Any] = {}
    if out:
        create_folder(out, manifest["options"]["overwrite"])
        write_json(out / MANIFEST, {**manifest, "complete": False})
    with jsonl.open_output(out / GRADED) if out else nullcontext() as writer:

        def noted() -> Iterator[dict]:
            for record in graded:
                _note(seen, record)
                if writer:
                    writer.write(record)
                yield record

        try:
            figures = stats.summarize(noted())
        except ValueError as error:
            if isinstance(error, S2DError):
                raise
            raise DataError(f"cannot be evaluated: {error}", where=jsonl.input_name(manifest["inputs"][0]["path"])) from None
    results = {"name": name or seen["model"], **seen, **figures}
    if figures["ungraded"]:
        console.warn(f"{figures['ungraded']} answers could not be graded and count as wrong")
    if out:
        write_json(out / RESULTS, results)
        write_json(out / MANIFEST, {**manifest, "complete": True, "counts": {"problems": figures["problems"], "k": figures["k"]}})
    k, average, error = figures["k"], figures["avg_at_k"], figures["se"]
    console.info(f"avg@{k} {average:.1%} ± {error:.1%} over {figures['problems']} problems; {figures['truncated']:.1%} truncated")
    jsonl.print_result(results)


def _note(seen: dict[str, Any], record: dict) -> None:
    """Note whose completions these are; one result must not mix models or ways of sampling."""
    sampler, source = record["sampler"], record["source"]
    whose = {
        key: sampler.get(key, "") for key in ("model", "checkpoint", "step", "temperature", "top_p", "top_k", "max_tokens", "template")
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
