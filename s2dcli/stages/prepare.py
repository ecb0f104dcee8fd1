"""`s2d prepare`: problems.jsonl from any data set of verifiable problems.

Reads files (JSONL, JSON, parquet, CSV, TSV), folders in hub layout and hub data sets, finds problem and
answer in each row (`datasets/columns.py` lists the layouts), removes duplicates and the problems of
evaluation sets, and splits what is left. In this order, so that no two parts share a problem:

    s2d prepare gsm8k/train.jsonl --exclude gsm8k/test.jsonl -o problems.jsonl
    s2d prepare BytedTsinghua-SIA/DAPO-Math-17k --split 1H=0.5,2H=0.5 -o data

The identity of a problem is the hash of its bare text, without template or DAPO's wrapper; white space
makes no difference. `--exclude` also looks for near-duplicates (`datasets/near.py`): it warns of them, and
`--exclude-near` removes them. Problems that s2d prepared before keep their prompts. `--solutions` writes
the worked solutions as rollouts, for the supervised fine-tuning of a teacher (route R6).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from s2dcli import console, options
from s2dcli.datasets import columns, sources
from s2dcli.datasets.problems import DEFAULT_TEMPLATE, PLACE, collect, read_excluded
from s2dcli.datasets.split import Part, divide, parse_split
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.manifest import describe
from s2dcli.files.output import check_output, open_recorded
from s2dcli.files.records import Problem, Rollout, row_seed

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE",
        help="Files (JSONL, JSON, CSV, TSV, parquet), folders in hub layout, hub ids; - is standard input (JSONL).",
        show_default=False,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(metavar="NAME=SHARE,...", help="Disjoint random parts, by share (1H=0.5) or count (1H=512); -o is then a folder."),
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="SOURCE", help="Evaluation set whose problems are removed (all splits); may be repeated.")
]
ExcludeNear = Annotated[
    bool, typer.Option("--exclude-near", help="Remove near-duplicates of --exclude too: problems reworded or reformatted.")
]
Template = Annotated[
    str,
    typer.Option(
        metavar="TEXT|none", help=f"Text of the prompt, with {PLACE} in it; none: the problem alone.", show_default="asks for \\boxed{}"
    ),
]
Solutions = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Also write the worked solutions, as rollouts; with --split a folder.", rich_help_panel=options.OUTPUT
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(metavar="CKPT", help="Model that --solutions is tokenized for.", rich_help_panel=options.MODEL),
]


def prepare(
    source: Sources = None,
    out: options.OutFile = "-",
    split: Split = None,
    exclude: Exclude = None,
    exclude_near: ExcludeNear = False,
    solutions: Solutions = None,
    template: Template = DEFAULT_TEMPLATE,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help='Keep problems without an answer, with "" for it.')] = False,
    subset: Annotated[str | None, typer.Option(metavar="NAME", help="Subset of a folder or hub data set.")] = None,
    source_split: Annotated[str | None, typer.Option(metavar="NAME", help="Split of a folder or hub data set.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after N distinct problems.")] = None,
    seed: options.Seed = 0,
    tokenizer: Tokenizer = None,
    chat_template: options.ChatTemplate = None,
    chat_template_kwargs: options.ChatTemplateKwargs = "{}",
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Make problems.jsonl from any data set: find problems and answers, remove duplicates and evaluation sets, split."""
    settings = options.flatten(locals())
    started = time.monotonic()
    names = source or [jsonl.STDIN]
    parts = parse_split(split) if split else []
    template = _check_template(template)
    inputs = [*names, *(exclude or [])]
    problem_files = _outputs(out, parts, inputs, overwrite)
    solution_files = _outputs(solutions, parts, inputs, overwrite) if solutions else []
    _check_options(names, exclude or [], exclude_near, problem_files, solution_files, tokenizer, subset, source_split)

    encode = _solution_encoder(tokenizer, chat_template, chat_template_kwargs, trust_remote_code, seed) if tokenizer else None
    found = collect(
        (row for name in names for row in sources.read(name, subset=subset, split=source_split)),
        excluded=read_excluded(exclude or [], template),
        exclude_near=exclude_near,
        template=template,
        unlabelled=unlabelled,
        keep_solutions=bool(solutions),
        limit=limit,
    )
    found.counts.tell(bool(exclude), exclude_near)
    if not found.problems:
        raise DataError("no problems are left", where=", ".join(map(jsonl.input_name, names)))
    if solutions and not found.solutions:
        raise DataError("no problem has a worked solution", where=", ".join(map(jsonl.input_name, names)), hint="leave out --solutions")
    divided = divide(found.problems, parts, seed) if parts else [found.problems]

    manifest = describe("prepare", settings, inputs=inputs)
    for path, part in zip(problem_files, divided, strict=True):
        with open_recorded(path, manifest, overwrite=overwrite) as writer:
            for problem in part:
                writer.write(problem.to_record())
            manifest["counts"] = {"problems": len(part), "seconds": time.monotonic() - started}
        console.info(f"{len(part)} problems to {writer.name}")
    for path, part in zip(solution_files, divided, strict=True) if encode else ():
        solved = [problem for problem in part if problem.problem_sha256 in found.solutions]
        with open_recorded(path, manifest, overwrite=overwrite) as writer:
            for problem in solved:
                writer.write(encode(problem, found.solutions[problem.problem_sha256]).to_record())
            manifest["counts"] = {"rollouts": len(solved), "seconds": time.monotonic() - started}
        console.info(f"{len(solved)} worked solutions to {writer.name}")
        if len(solved) < len(part):
            console.warn(f"{len(part) - len(solved)} problems have no worked solution")


def _check_template(template: str) -> str:
    if template.strip().lower() == "none":
        return PLACE
    if PLACE not in template:
        raise UsageError(f"--template has no {PLACE} in it, so every prompt would be the same", hint="--template none is the bare problem")
    return template


def _outputs(out: str, parts: list[Part], inputs: list[str], overwrite: bool) -> list[str]:
    """Return the files to write, one for each part. Raises UsageError if one exists or a folder is needed."""
    if parts and jsonl.is_stream(out):
        raise UsageError("--split writes one file for each part, not standard output", hint="-o FOLDER names their folder")
    if parts and Path(out).exists() and not Path(out).is_dir():
        raise UsageError("is a file, but --split needs a folder", where=out)
    files = [str(Path(out) / f"{part.name}.jsonl") for part in parts] or [out]
    for file in files:
        check_output(file, inputs, command="prepare", overwrite=overwrite)
    return files


def _check_options(
    names: list[str],
    exclude: list[str],
    exclude_near: bool,
    problem_files: list[str],
    solution_files: list[str],
    tokenizer: str | None,
    subset: str | None,
    source_split: str | None,
) -> None:
    """Raise UsageError on options that contradict each other or would do nothing."""
    if exclude_near and not exclude:
        raise UsageError("--exclude-near needs --exclude SOURCE, the problems to compare with")
    if solution_files and tokenizer is None:
        raise UsageError("--solutions needs --tokenizer CKPT: rollouts are trained on by their token ids")
    if tokenizer is not None and not solution_files:
        raise UsageError("--tokenizer is used for --solutions only; problems hold text")
    places = [{os.path.abspath(jsonl.output_name(file)) for file in files} for files in (problem_files, solution_files)]
    if places[0] & places[1]:
        raise UsageError("problems and --solutions would go to the same place", hint="-o and --solutions need different names")
    if [*names, *exclude].count(jsonl.STDIN) > 1:
        raise UsageError("standard input can be read once only")
    kinds = {sources.kind_of(name) for name in names}
    for name in exclude:
        sources.kind_of(name)  # that it exists, before anything is read
    if (subset or source_split) and kinds.isdisjoint({sources.Kind.folder, sources.Kind.hub}):
        raise UsageError(f"{'--subset' if subset else '--source-split'} chooses within a folder or hub data set, and no source is one")


# Worked solutions


def _solution_encoder(
    tokenizer: str, chat_template: str | None, chat_template_kwargs: str, trust_remote_code: bool, seed: int
) -> Callable[[Problem, str], Rollout]:
    """Return a function that makes a problem and its worked solution into a rollout.

    No model has sampled these tokens: their log-probs are 0.0 and `sampler` names no checkpoint.
    """
    from s2dcli.models.checkpoints import eos_ids, resolve
    from s2dcli.models.prompts import PromptEncoder, load_tokenizer, parse_template_kwargs

    template_kwargs = parse_template_kwargs(chat_template_kwargs)
    checkpoint = resolve(tokenizer)
    encoder = PromptEncoder(load_tokenizer(checkpoint.folder, trust_remote_code), chat_template, template_kwargs)
    ends = eos_ids(encoder.tokenizer, checkpoint, trust_remote_code)
    sampler = {
        "model": "",
        "revision": "",
        "step": 0,
        "checkpoint": "",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": 0,
        "logprobs_mode": "none",
        "engine": "gold",
        "template": encoder.description,
    }

    def encode(problem: Problem, solution: str) -> Rollout:
        text = _ending_in_box(solution, problem.answer)
        completion_ids = encoder.encode_completion(text, ends)
        return Rollout(
            problem_id=problem.id,
            problem_sha256=problem.problem_sha256,
            group_id=problem.id,
            sample_index=0,
            prompt=problem.prompt,
            completion=[{"role": "assistant", "content": text}],
            answer=problem.answer,
            prompt_ids=encoder.encode(problem.prompt, f"problem {problem.id!r}"),
            completion_ids=completion_ids,
            completion_logprobs=[0.0] * len(completion_ids),
            finish_reason="stop",
            seed=row_seed(seed, problem.id, 0),
            source=problem.source,
            sampler=sampler,
            template_sha256=encoder.template_sha256,
        )

    return encode


def _ending_in_box(solution: str, answer: str) -> str:
    """Return a solution that gives the gold answer in a box: as it is if its last box does, else with one more line."""
    boxed = columns.last_boxed(solution)
    if boxed is not None and boxed.split() == answer.split():
        return solution
    return f"{solution}\n\\boxed{{{answer}}}"
