"""`s2d prepare`: problems.jsonl from any data set of verifiable problems.

Reads files (JSONL, JSON, parquet, CSV), folders in hub layout and hub data sets, finds problem and
answer in each row (`datasets/columns.py` lists the layouts), removes duplicates and whatever an
evaluation set holds, and splits what is left. In this order, so that no two parts share a problem:

    s2d prepare gsm8k/train.jsonl --exclude gsm8k/test.jsonl -o problems.jsonl
    s2d prepare BytedTsinghua-SIA/DAPO-Math-17k --split 1H=0.5,2H=0.5 -o data

A problem is known by the hash of its bare text, before any template; DAPO's wrapper is taken off
first. Rows that are already problems of ours pass through as they are. `--solutions` writes the
data set's worked solutions as rollouts, for a teacher that is trained on them (route R6).
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from s2dcli import console, options
from s2dcli.datasets import columns, sources
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.manifest import describe
from s2dcli.files.output import check_output, open_recorded
from s2dcli.files.records import Message, Problem, Rollout, problem_sha256, row_seed, sha256_text, text_of

PLACE = "{problem}"
DEFAULT_TEMPLATE = PLACE + "\n\nWork it out step by step, then give the final answer in \\boxed{}."
ID_DIGITS = 16  # hexadecimal digits of a prompt's hash that serve as its id
HASHES_KEPT = 2**16  # texts whose hash is remembered, for data sets that repeat every problem many times
ROWS_PER_UPDATE = 4096  # of the progress display

Sources = Annotated[
    list[str] | None,
    typer.Argument(metavar="SOURCE", help="Files, folders in hub layout or hub ids; - is standard input (JSONL).", show_default=False),
]
Split = Annotated[
    str | None,
    typer.Option(metavar="NAME=SHARE,...", help="Cut into disjoint parts, by share (1H=0.5) or by count (1H=512); -o is then a folder."),
]
Exclude = Annotated[list[str] | None, typer.Option(metavar="SOURCE", help="Drop problems that are in here too; may be repeated.")]
Template = Annotated[
    str, typer.Option(metavar="TEXT|none", help=f"Text with {PLACE} in it; none: the bare problem.", show_default="asks for \\boxed{}")
]
Solutions = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write worked solutions as rollouts too; with --split a folder.", rich_help_panel=options.OUTPUT),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(metavar="CKPT", help="Whose token ids --solutions writes.", rich_help_panel=options.MODEL),
]


def prepare(
    source: Sources = None,
    out: options.OutFile = "-",
    split: Split = None,
    exclude: Exclude = None,
    solutions: Solutions = None,
    template: Template = DEFAULT_TEMPLATE,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help='Take problems without an answer; it is "" then.')] = False,
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
    """Make problems.jsonl from any data set."""
    settings = options.flatten(locals())
    started = time.monotonic()
    names = source or [jsonl.STDIN]
    parts = _parse_split(split) if split else []
    template = _check_template(template)
    inputs = [*names, *(exclude or [])]
    problem_files = _outputs(out, parts, inputs, overwrite)
    solution_files = _outputs(solutions, parts, inputs, overwrite) if solutions else []
    _check_options(names, problem_files, solution_files, tokenizer, subset, source_split)

    encode = _solution_encoder(tokenizer, chat_template, chat_template_kwargs, trust_remote_code, seed) if tokenizer else None
    excluded = _hashes_of(exclude or [])
    found = _collect(
        (row for name in names for row in sources.read(name, subset=subset, split=source_split)),
        excluded=excluded,
        template=template,
        unlabelled=unlabelled,
        keep_solutions=bool(solutions),
        limit=limit,
    )
    found.counts.tell(bool(exclude))
    if not found.problems:
        raise DataError("no problems are left", where=", ".join(map(jsonl.input_name, names)))
    if solutions and not found.solutions:
        raise DataError("no problem has a worked solution", where=", ".join(map(jsonl.input_name, names)), hint="leave out --solutions")
    problems = _with_ids(found.problems)
    divided = _divide(problems, parts, seed) if parts else [problems]

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


# What the options ask for


class Part(NamedTuple):
    """One part of a split: a share of all problems, or a number of them."""

    name: str
    size: Fraction | int


def _parse_split(text: str) -> list[Part]:
    """Parse `--split`. Raises UsageError on what is no list of NAME=SHARE or NAME=COUNT."""
    example = "e.g. --split 1H=0.5,2H=0.5 or --split train=512,test=200"
    parts = []
    for item in text.split(","):
        name, equals, size = (piece.strip() for piece in item.partition("="))
        if not equals or not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(f"--split: {item!r} is not NAME=SHARE or NAME=COUNT", hint=example)
        try:
            value = int(size) if re.fullmatch(r"[0-9]+", size) else Fraction(size)
        except (ValueError, ZeroDivisionError):
            raise UsageError(f"--split: {size!r} is neither a share nor a count", hint=example) from None
        if value <= 0 or (isinstance(value, Fraction) and value > 1):
            raise UsageError(f"--split: {name} = {size} is neither a share between 0 and 1 nor a count", hint=example)
        parts.append(Part(name, value))
    if len({part.name.lower() for part in parts}) < len(parts):
        raise UsageError("--split names a part twice", hint=example)
    shares = [part.size for part in parts if isinstance(part.size, Fraction)]
    if 0 < len(shares) < len(parts):
        raise UsageError("--split mixes shares and counts", hint="a share is of all problems: write 1.0 for all of them, 1 for one")
    if sum(shares) > 1:
        raise UsageError(f"--split: the shares add up to {float(sum(shares)):g}, more than 1", hint=example)
    return parts


def _check_template(template: str) -> str:
    if template.strip().lower() == "none":
        return PLACE
    if PLACE not in template:
        raise UsageError(f"--template has no {PLACE} in it, so every prompt would be the same", hint="--template none is the bare problem")
    return template


def _outputs(out: str, parts: list[Part], inputs: list[str], overwrite: bool) -> list[str]:
    """Return the files to write, one for each part. Raises UsageError if one exists or a folder is needed."""
    if parts and jsonl.is_stream(out):
        raise UsageError("--split writes one file for each part", hint="-o FOLDER says where")
    if parts and Path(out).exists() and not Path(out).is_dir():
        raise UsageError("is a file, but --split needs a folder", where=out)
    files = [str(Path(out) / f"{part.name}.jsonl") for part in parts] or [out]
    for file in files:
        check_output(file, inputs, command="prepare", overwrite=overwrite)
    return files


def _check_options(
    names: list[str],
    problem_files: list[str],
    solution_files: list[str],
    tokenizer: str | None,
    subset: str | None,
    source_split: str | None,
) -> None:
    """Raise UsageError on options that contradict each other or would do nothing."""
    if solution_files and tokenizer is None:
        raise UsageError("--solutions needs --tokenizer CKPT: rollouts are trained on by their token ids")
    if tokenizer is not None and not solution_files:
        raise UsageError("--tokenizer is used for --solutions only; problems hold text")
    if {*map(os.path.abspath, problem_files)} & {*map(os.path.abspath, solution_files)}:
        raise UsageError("problems and --solutions would go to the same place", hint="-o and --solutions need different names")
    if names.count(jsonl.STDIN) > 1:
        raise UsageError("standard input can be read once only")
    kinds = {sources.kind_of(name) for name in names}
    if (subset or source_split) and kinds.isdisjoint({sources.Kind.folder, sources.Kind.hub}):
        raise UsageError(f"{'--subset' if subset else '--source-split'} chooses within a folder or hub data set, and no source is one")


# What the sources hold


class Counts:
    """What happened to the rows; told on standard error."""

    def __init__(self) -> None:
        self.rows = self.kept = self.duplicates = self.excluded = self.unwrapped = self.prepared = self.unlabelled = 0
        self.conflicts: set[str] = set()

    def tell(self, exclude: bool) -> None:
        console.info(f"{self.rows} rows, {self.duplicates} duplicates removed")
        if exclude:
            console.info(f"{self.excluded} problems excluded")
        if self.unwrapped:
            console.info(f"{self.unwrapped} problems taken out of DAPO's wrapper")
        if self.prepared:
            console.info(f"{self.prepared} problems were prepared before and keep their prompts")
        if self.unlabelled:
            console.info(f"{self.unlabelled} problems have no answer")
        if self.conflicts:
            console.warn(f"{len(self.conflicts)} problems come with different answers; the first one is kept")


class Found(NamedTuple):
    """Distinct problems in the order of the sources (id "" where none was given), and solutions by problem_sha256."""

    problems: list[Problem]
    solutions: dict[str, str]
    counts: Counts


def _hash_of_texts() -> Callable[[str], str]:
    """Return `problem_sha256` with a memory, since data sets may repeat their problems a hundred times."""
    return functools.lru_cache(HASHES_KEPT)(problem_sha256)


def _hashes_of(names: list[str]) -> set[str]:
    """Return the problem_sha256 of all that the sources of `--exclude` hold, in every split."""
    hash_of = _hash_of_texts()
    hashes = set()
    for name in names:
        for row in sources.read(name, every_split=True):
            given = row.record.get("problem_sha256")
            hashes.add(given if isinstance(given, str) and given else hash_of(columns.question(row.record, row.where).text))
    return hashes


def _collect(
    rows: Iterable[sources.Row], *, excluded: set[str], template: str, unlabelled: bool, keep_solutions: bool, limit: int | None
) -> Found:
    """Read all rows and keep the first of each problem. Raises DataError on a row without problem or answer."""
    hash_of = _hash_of_texts()
    answers: dict[str, str | None] = {}  # problem_sha256 -> the answer that is kept, None for an excluded problem
    problems: list[Problem] = []
    solutions: dict[str, str] = {}
    counts = Counts()
    for row in _watched(rows):
        counts.rows += 1
        record, where = row.record, row.where
        if "problem_sha256" in record:
            problem, solution, unwrapped = Problem.from_record(record, where), "", False
            digest, answer = problem.problem_sha256, problem.answer
        else:
            if "completion_ids" in record:
                raise DataError("this is a rollout, a problem was expected", where=where)
            problem = None
            text, before, unwrapped = columns.question(record, where)
            answer, solution = columns.gold(record, where, required=not unlabelled)
            digest = hash_of(text)

        if digest in answers:
            counts.duplicates += 1
            if answer and answers[digest] and answer != answers[digest]:
                counts.conflicts.add(digest)
            continue
        if digest in excluded:
            answers[digest] = None
            counts.excluded += 1
            continue
        answers[digest] = answer
        if problem is None:
            given, source = columns.origin(row)
            problem = Problem(given, _prompt(text, before, template), answer, digest, source)
        else:
            counts.prepared += 1
        problems.append(problem)
        counts.unwrapped += unwrapped
        counts.unlabelled += not answer
        if keep_solutions and solution:
            solutions[digest] = solution
        if len(problems) == limit:
            break
    return Found(problems, solutions, counts)


def _watched(rows: Iterable[sources.Row]) -> Iterator[sources.Row]:
    with console.progress("reading", None, "rows") as advance:
        for number, row in enumerate(rows, 1):
            yield row
            if number % ROWS_PER_UPDATE == 0:
                advance(ROWS_PER_UPDATE)


def _prompt(text: str, before: list[Message], template: str) -> list[Message]:
    return [*before, {"role": "user", "content": template.replace(PLACE, text)}]


def _with_ids(problems: list[Problem]) -> list[Problem]:
    """Return the problems with ids that are unique: the given one, else the beginning of the prompt's hash."""
    uses = Counter(problem.id for problem in problems)
    repeated = sum(count for given, count in uses.items() if given and count > 1)
    if repeated:
        console.info(f"{repeated} problems share their id with another one and get one from their prompt")
    return [
        problem if problem.id and uses[problem.id] == 1 else replace(problem, id=sha256_text(text_of(problem.prompt))[:ID_DIGITS])
        for problem in problems
    ]


def _divide(problems: list[Problem], parts: list[Part], seed: int) -> list[list[Problem]]:
    """Cut the problems into disjoint random parts, each in the order of the sources.

    Problems are drawn in the order of sha256(seed, problem), so that a part depends on the seed and on
    which problems there are, not on their order or on a library's shuffle. Raises UsageError if
    there are too few.
    """
    drawn = sorted(range(len(problems)), key=lambda i: sha256_text(f"{seed}\n{problems[i].problem_sha256}"))
    if isinstance(parts[0].size, int):
        sizes = [int(part.size) for part in parts]
        if sum(sizes) > len(problems):
            raise UsageError(f"--split asks for {sum(sizes)} problems, there are {len(problems)}")
    else:
        # Rounding the boundaries, not the sizes, gives every problem away when the shares add up to 1.
        bounds = [round(sum(part.size for part in parts[:count]) * len(problems)) for count in range(len(parts) + 1)]
        sizes = [end - start for start, end in itertools.pairwise(bounds)]
    if 0 in sizes:
        raise UsageError(f"--split leaves nothing for {parts[sizes.index(0)].name}: there are {len(problems)} problems")
    divided, start = [], 0
    for size in sizes:
        divided.append([problems[i] for i in sorted(drawn[start : start + size])])
        start += size
    if start < len(problems):
        console.info(f"{len(problems) - start} problems are in no part of the split")
    return divided


# Worked solutions


def _solution_encoder(
    tokenizer: str, chat_template: str | None, chat_template_kwargs: str, trust_remote_code: bool, seed: int
) -> Callable[[Problem, str], Rollout]:
    """Return a function that makes a problem and its worked solution into a rollout.

    No model has sampled these tokens: their log-probs are 0.0 and `sampler` names no checkpoint.
    """
    from s2dcli.models.checkpoints import resolve
    from s2dcli.models.prompts import PromptEncoder, load_tokenizer, parse_template_kwargs

    template_kwargs = parse_template_kwargs(chat_template_kwargs)
    encoder = PromptEncoder(load_tokenizer(resolve(tokenizer).folder, trust_remote_code), chat_template, template_kwargs)
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
        completion_ids = encoder.encode_completion(text)
        return Rollout(
            problem_id=problem.id,
            problem_sha256=problem.problem_sha256,
            group_id=problem.id,
            sample_index=0,
            prompt=problem.prompt,
            completion=[{"role": "assistant", "content": text}],
            answer=problem.answer,
            prompt_ids=encoder.encode(problem.prompt),
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
