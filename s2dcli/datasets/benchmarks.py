"""Benchmarks that `s2d eval` knows by name: where their problems lie on the hub, and how many there are.

| name | hub data set | split | problems | columns | licence on its card |
|---|---|---|---|---|---|
| gsm8k | openai/gsm8k (main) | test | 1319 | question, answer (####) | MIT |
| math500 | HuggingFaceH4/MATH-500 | test | 500 | problem, answer | none; MATH itself: MIT |
| aime24 | HuggingFaceH4/aime_2024 | train | 30 | problem, answer | none |
| aime25 | math-ai/aime25 | test | 30 | problem, answer | none |
| amc23 | math-ai/amc23 | test | 40 | question, answer | none |
| minerva | math-ai/minervamath | test | 272 | question, answer | none |
| olympiadbench | Hothan/OlympiadBench (OE_TO_maths_en_COMP) | train | 674 | question, final_answer | Apache-2.0 |

The problems themselves are competitions', textbooks' and their authors'. `olympiadbench` is the open-ended mathematics of
competitions in English without pictures. The prompt is that of `s2d prepare`: the problem, step by step, the answer in a box.
`NAME=PATH` reads a local copy instead: a file in any format of `s2d prepare`, or a clone of the data set's folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from s2dcli import console
from s2dcli.datasets import sources
from s2dcli.datasets.columns import Row
from s2dcli.datasets.near import NearIndex
from s2dcli.datasets.problems import DEFAULT_TEMPLATE, Excluded, collect
from s2dcli.errors import DataError
from s2dcli.files.records import Problem


class Benchmark(NamedTuple):
    """One data set of problems, as it lies on the hub."""

    hub_id: str
    subset: str | None
    split: str
    problems: int


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "main", "test", 1319),
    "math500": Benchmark("HuggingFaceH4/MATH-500", None, "test", 500),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", None, "train", 30),
    "aime25": Benchmark("math-ai/aime25", None, "test", 30),
    "amc23": Benchmark("math-ai/amc23", None, "test", 40),
    "minerva": Benchmark("math-ai/minervamath", None, "test", 272),
    "olympiadbench": Benchmark("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", 674),
}


def read_benchmark(name: str, path: str = "") -> list[Problem]:
    """Return the problems of a benchmark, from the hub or from a local copy. Raises DataError; another number of them is warned of."""
    known = BENCHMARKS[name]
    rows = _rows(known, path or known.hub_id)
    found = collect(
        rows,
        excluded=Excluded(set(), NearIndex()),
        exclude_near=False,
        template=DEFAULT_TEMPLATE,
        unlabelled=False,
        keep_solutions=False,
        limit=None,
    )
    if not found.problems:
        raise DataError("holds no problems", where=path or known.hub_id)
    if len(found.problems) != known.problems:
        console.warn(f"{name}: {len(found.problems)} problems, {known.problems} were expected")
    return found.problems


def _rows(known: Benchmark, source: str) -> Iterator[Row]:
    """Yield the rows of a benchmark under its hub id, whatever copy they are read from."""
    subset, split = known.subset, known.split
    if source != known.hub_id:
        kind = sources.kind_of(source)
        if kind not in (sources.Kind.file, sources.Kind.folder):
            raise DataError("no such file or folder", where=source)
        if kind is sources.Kind.folder:
            layout = sources.layout_of(source)
            subset = subset if subset in layout else None
            split = split if split in {name for splits in layout.values() for name in splits} else None
    for row in sources.read(source, subset=subset, split=split):
        answers = row.record.get("final_answer")
        several = isinstance(answers, list) and len(answers) > 1 and all(isinstance(answer, str) for answer in answers)
        record = {**row.record, "final_answer": ", ".join(answers)} if several else row.record
        yield row._replace(record=record, dataset=known.hub_id, split=known.split)
