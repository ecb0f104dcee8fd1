"""Measure a model: avg@k with its standard error over problems, pass@k, maj@k, and what the score is made up of.

    s2d eval --model CKPT problems.jsonl -k 16 -o results/ckpt
    s2d rollout -m CKPT problems.jsonl -n 16 | s2d verify | s2d eval --rollouts -
    s2d eval -m Qwen/Qwen3-1.7B math500 aime24 aime25 --preset qwen3-thinking --max-tokens 32768 -o results/qwen3
    s2d eval --rollouts graded.jsonl -o results/ckpt --export lm-eval --export hub

avg@k is the mean over problems of the share of right answers among k samples (paper, Evaluation); ± is the standard error over
problems (`se_over`), for this one checkpoint. It has two parts: between problems, which more problems lower, and decoding, which more
samples lower too; the last line says which of them would help. pass@j for j = 1, 2, 4, ..., k is Chen et al.'s unbiased estimate.
maj@k lets a problem's samples vote: right ones count as one answer, however they are written, wrong ones vote together if their
texts are the same after normalising LaTeX and white space; a tie counts in part. Answers that could not be graded count as wrong
and are reported. stats/ has the formulas.

PROBLEMS are files of `s2d prepare`, or benchmarks by name (datasets/benchmarks.py), or NAME=PATH for a local copy of one. Several are
measured with one model load: each gets a folder of its own in -o and a line on standard output.
`--resume` resumes what is not finished.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from s2dcli import console, options
from s2dcli.assembly.evaluation import Evaluation, check_problems, name_targets, read_target
from s2dcli.datasets.benchmarks import BENCHMARKS
from s2dcli.engines.opening import check_engine
from s2dcli.errors import UsageError
from s2dcli.exports import formats
from s2dcli.files import jsonl
from s2dcli.files.eval_folder import EvalFolder
from s2dcli.files.manifest import describe

DEFAULT_K = 16  # the paper's avg@16
# On --resume: cutting batches otherwise changes log-probs in the sixth decimal only; exports can be written later
MAY_CHANGE = {"device", "sample_tokens", "workers", "name", "max_in_flight", "server_timeout", "export"}
# What would be ignored when the rollouts are there already
MODEL_ONLY = {
    "k": "-k",
    "preset": "--preset",
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
    problems: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROBLEMS",
            help=f"Problems, JSONL; - is standard input. Or benchmarks: {', '.join(BENCHMARKS)}; NAME=PATH is a local copy.",
            show_default=False,
        ),
    ] = None,
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
    export: Annotated[
        list[formats.Export] | None,
        typer.Option("--export", help="Also write the results as other tools read them; repeatable.", rich_help_panel=options.OUTPUT),
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="Samples per problem.", show_default="16; 1 if greedy", rich_help_panel=options.SAMPLING)
    ] = None,
    preset: options.PresetOption = None,
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
    if preset:
        drawn, loading = options.with_preset(context, preset, options.Drawing(temperature, top_p, top_k), loading)
        temperature, top_p, top_k = drawn.temperature, drawn.top_p, drawn.top_k
    settings = options.flatten({name: value for name, value in locals().items() if name != "drawn"})
    check_engine(sampling)
    if (model is None) == (rollouts is None):
        raise UsageError("choose what to measure", hint="--model CKPT, or --rollouts GRADED for completions that exist already")
    if rollouts is not None:
        if problems:
            raise UsageError("PROBLEMS go with --model; graded rollouts bring their own")
        options.refuse_given(context, MODEL_ONLY, "goes with --model; graded rollouts are measured as they are")
    if temperature == 0 and (k or 1) > 1:
        raise UsageError(f"-k {k} at --temperature 0: greedy samples are all equal", hint="leave -k out, or sample at --temperature 1")
    for given, flag in ((resume or overwrite, "--resume and --overwrite need"), (export, "--export needs")):
        if given and out is None:
            raise UsageError(f"{flag} a folder", hint="-o DIR names it")
    sources = [rollouts] if rollouts is not None else problems or [jsonl.STDIN]
    targets = name_targets(sources, out)
    for target in targets:
        if target.out:
            path = target.source.partition("=")[2] or target.source
            EvalFolder.check(target.out, "eval", [path, *([model] if model else [])], overwrite=overwrite, resume=resume)
    if model:
        targets = [replace(target, problems=read_target(target.source)) for target in targets]
        check_problems(targets, grading, export or [])

    from s2dcli.models.checkpoints import resolve

    checkpoint = resolve(model) if model else None
    k = k or (1 if temperature == 0 else DEFAULT_K)
    evaluation = Evaluation(checkpoint, k, name, preset.value if preset else "", export or [])
    with ExitStack() as opened:
        for target in targets:
            streamed = [problem.to_record() for problem in target.problems]
            told = {**settings, "problems": target.source, "out": target.out}
            parents = [("model", checkpoint)] if checkpoint else []
            manifest = describe("eval", told, inputs=[target.source, *loading.files], parents=parents, streamed=streamed)
            with ExitStack() as stack:
                folder = EvalFolder(target.out, manifest, may_change=MAY_CHANGE, overwrite=overwrite, resume=resume) if target.out else None
                if folder and stack.enter_context(folder).finished:
                    console.info(f"{target.out} is complete already")
                    results = folder.result()
                else:
                    if checkpoint and evaluation.sampler is None:
                        drawing = (temperature, top_p, top_k, max_tokens)
                        evaluation.open(opened, targets, drawing, sampling, grading, loading, seed)
                    results = evaluation.measure(target, folder, manifest, stack)
                if folder:
                    evaluation.export(target, folder, results)
            jsonl.print_result(results, console.eval_table)
