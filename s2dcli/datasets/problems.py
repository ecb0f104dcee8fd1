"""From raw rows to distinct problems: identity, exclusion, prompts and ids."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from s2dcli import console
from s2dcli.datasets import columns, sources
from s2dcli.datasets.near import NearIndex
from s2dcli.errors import DataError
from s2dcli.files.records import Message, Problem, problem_sha256, sha256_text, take, take_messages, text_of

PLACE = "{problem}"
DEFAULT_TEMPLATE = PLACE + "\n\nWork it out step by step, then give the final answer in \\boxed{}."
ID_DIGITS = 16  # hexadecimal digits of a prompt's hash that serve as its id
HASHES_KEPT = 2**16  # texts whose hash is remembered, for data sets that repeat every problem many times
ROWS_PER_UPDATE = 4096  # of the progress display
NEAR_SHOWN = 5  # near-duplicates that are listed; with -v all are


class Excluded(NamedTuple):
    """What `--exclude` names: the identities of its problems, and what finds near-duplicates of them."""

    hashes: set[str]
    near: NearIndex


class Counts:
    """What happened to the rows; told on standard error."""

    def __init__(self) -> None:
        self.rows = self.kept = self.duplicates = self.excluded = self.unwrapped = self.prepared = self.unlabelled = 0
        self.conflicts: set[str] = set()
        self.near: list[str] = []  # near-duplicates of excluded problems, a line each

    def tell(self, exclude: bool, near_dropped: bool) -> None:
        console.info(f"{self.rows} rows, {self.duplicates} duplicates removed")
        if exclude:
            console.info(f"{self.excluded} problems excluded")
        if self.near and near_dropped:
            console.info(f"{len(self.near)} near-duplicates of excluded problems dropped")
        elif self.near:
            console.warn(f"{len(self.near)} problems are near-duplicates of excluded ones; --exclude-near drops them")
        for number, line in enumerate(self.near):
            (console.info if number < NEAR_SHOWN else console.detail)(f"  {line}")
        if self.unwrapped:
            console.info(f"{self.unwrapped} problems taken out of DAPO's wrapper")
        if self.prepared:
            console.info(f"{self.prepared} problems were prepared before and keep their prompts")
        if self.unlabelled:
            console.info(f"{self.unlabelled} problems have no answer")
        if self.conflicts:
            console.warn(f"{len(self.conflicts)} problems come with different answers; the first one is kept")


class Found(NamedTuple):
    """Distinct problems in the order of the sources, and worked solutions by problem_sha256."""

    problems: list[Problem]
    solutions: dict[str, str]
    counts: Counts


def read_excluded(names: list[str], template: str) -> Excluded:
    """Read all problems of the sources of `--exclude`, in every split."""
    excluded = Excluded(set(), NearIndex())
    for name in names:
        for row in sources.read(name, every_split=True):
            record, where = row.record, row.where
            if "problem_sha256" in record:
                digest = take(record, "problem_sha256", str, where)
                text = _bare_text(take_messages(record, "prompt", where), digest, template)
            else:
                text = columns.question(record, where).text
                digest = problem_sha256(text)
            if digest not in excluded.hashes:
                excluded.hashes.add(digest)
                excluded.near.add(text, _name(columns.origin(row).id, where))
    return excluded


def _bare_text(prompt: list[Message], digest: str, template: str) -> str:
    """Return the problem in a prompt that was made with this template or the default one, else its last message."""
    content = prompt[-1]["content"]
    for prefix, suffix in (known.split(PLACE, 1) for known in (template, DEFAULT_TEMPLATE)):
        text = content.removeprefix(prefix).removesuffix(suffix)
        if problem_sha256(text) == digest:
            return text
    return content


def collect(
    rows: Iterable[columns.Row],
    *,
    excluded: Excluded,
    exclude_near: bool,
    template: str,
    unlabelled: bool,
    keep_solutions: bool,
    limit: int | None,
) -> Found:
    """Read all rows and keep the first of each problem. Raises DataError on a row without problem or answer."""
    hash_of = functools.lru_cache(HASHES_KEPT)(problem_sha256)
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
            text = _bare_text(problem.prompt, digest, template) if excluded.hashes else ""
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
        if digest in excluded.hashes:
            answers[digest] = None
            counts.excluded += 1
            continue
        answers[digest] = answer
        if problem is None:
            given, source = columns.origin(row)
            prompt = [*before, {"role": "user", "content": template.replace(PLACE, text)}]
            problem = Problem(given or _id_of(prompt), prompt, answer, digest, source)
        if near := excluded.near.find(text) if excluded.hashes else None:
            counts.near.append(f"{_name(problem.id, where)} resembles {near.name}: {near.shared:.0%} of the word sequences shared")
            if exclude_near:
                answers[digest] = None
                continue
        problems.append(problem)
        counts.prepared += "problem_sha256" in record
        counts.unwrapped += unwrapped
        counts.unlabelled += not answer
        if keep_solutions and solution:
            solutions[digest] = solution
        if len(problems) == limit:
            break
    return Found(_with_unique_ids(problems), solutions, counts)


def _watched(rows: Iterable[columns.Row]) -> Iterator[columns.Row]:
    with console.progress("reading", None, "rows") as advance:
        for number, row in enumerate(rows, 1):
            yield row
            if number % ROWS_PER_UPDATE == 0:
                advance(ROWS_PER_UPDATE)


def _name(given: str, where: str) -> str:
    return f"{given!r} ({where})" if given else where


def _id_of(prompt: list[Message]) -> str:
    return sha256_text(text_of(prompt))[:ID_DIGITS]


def _with_unique_ids(problems: list[Problem]) -> list[Problem]:
    """Return the problems; where several have one id, each gets the beginning of its prompt's hash instead."""
    uses = Counter(problem.id for problem in problems)
    if repeated := sum(count for count in uses.values() if count > 1):
        console.info(f"{repeated} problems share their id with another one and get one from their prompt")
    return [replace(problem, id=_id_of(problem.prompt)) if uses[problem.id] > 1 else problem for problem in problems]
