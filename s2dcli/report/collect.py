"""Collect results of `s2d eval` and pivot them: row name -> column -> result."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from s2dcli import console, stats
from s2dcli.errors import DataError
from s2dcli.files import jsonl
from s2dcli.files.eval_folder import GRADED, results_path
from s2dcli.files.ledger import distinct_labels, unknown_parents, warnings
from s2dcli.files.manifest import MANIFEST, read_manifest
from s2dcli.files.records import take

RIGHT = ("avg_at_k", "se", "pass_at_k")  # None where the rewards have no notion of right
REWARD = ("mean_reward", "mean_reward_se")  # None where no sample has a reward


class Column(NamedTuple):
    """What two results must have in common to be set one below the other."""

    dataset: str
    k: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    problems: int


class Result(NamedTuple):
    """One evaluation; rates are fractions between 0 and 1."""

    where: str
    name: str
    model: str
    checkpoint: str
    column: Column
    avg_at_k: float | None
    se: float | None
    pass_at_k: float | None
    truncated: float
    mean_reward: float | None
    mean_reward_se: float | None
    figures: dict[str, Any]  # all that results.json says
    manifest: dict[str, Any] | None = None  # of the evaluation; None for results without one
    graded: str = ""  # the graded rollouts that it sums up, "" where there are none
    cautions: tuple[str, ...] = ()  # what its reader has to know

    @property
    def labels(self) -> int | None:
        """Number of distinct labels that the measured checkpoint's lineage has cost; None where that is not known."""
        if self.manifest is None or unknown_parents(self.manifest):
            return None
        return len(distinct_labels(self.manifest))


def read_results(run: str) -> Iterator[Result]:
    """Yield the results that a RUN argument names, and warn of contamination and replay in its lineage."""
    if jsonl.is_stream(run):
        yield from (_result(where, record) for where, record in jsonl.read(run, "the results of s2d eval"))
        return
    path = results_path(run)
    with jsonl.open_input(path, "eval results") as stream:
        result = _result(str(path), jsonl.parse_line(stream.read(), str(path)))
    described, graded = path.with_name(MANIFEST), path.with_name(GRADED)
    manifest = read_manifest(described) if described.is_file() else None
    found = tuple(warnings(manifest)) if manifest else ()
    for caution in found:
        console.warn(f"{path.parent}: {caution}")
    graded_path = str(graded) if graded.is_file() else ""
    yield result._replace(manifest=manifest, graded=graded_path, cautions=(*result.cautions, *found))


def _result(where: str, record: dict) -> Result:
    """Check one results.json. Raises DataError that names the file and the field."""
    record = {"top_k": 0, "ungraded": 0, **dict.fromkeys(REWARD), **record}

    def number(field: str) -> float:
        value = take(record, field, (float, int), where)
        if not abs(value) <= sys.float_info.max:  # nor an integer beyond it
            raise DataError(f"field {field!r} is not a finite number", where=where)
        return float(value)

    def whole(field: str, least: int) -> int:
        value = take(record, field, int, where)
        if value < least:
            raise DataError(f"field {field!r} is {value}, at least {least} was expected", where=where)
        return value

    temperature = number("temperature")
    column = Column(
        dataset=_one_line(take(record, "dataset", str, where)),
        k=whole("k", 1),
        temperature=temperature,
        top_p=number("top_p") if temperature > 0 else 1.0,  # greedy decoding has no nucleus
        top_k=whole("top_k", 0) if temperature > 0 else 0,
        max_tokens=whole("max_tokens", 1),
        problems=whole("problems", 1),
    )
    unknown = [field for fields in (RIGHT, REWARD) if record.get(fields[0], 0) is None for field in fields]
    figures = {field: None if field in unknown else number(field) for field in (*RIGHT, "truncated", *REWARD)}
    cautions = tuple(stats.cautions({**figures, "ungraded": whole("ungraded", 0)}))
    for caution in cautions:
        console.warn(f"{where}: {caution}")
    name, model, checkpoint = (take(record, field, str, where) for field in ("name", "model", "checkpoint"))
    return Result(where, _one_line(name), model, checkpoint, column, **figures, figures=record, cautions=cautions)


def _one_line(text: str) -> str:
    """Return a name fit for a table: control characters made visible, white space folded."""
    return " ".join(console.printable(text).split())


def pivot(results: Iterable[Result]) -> dict[str, dict[Column, Result]]:
    """Return row name -> column -> result. Raises DataError if two results claim one cell."""
    cells: dict[str, dict[Column, Result]] = {}
    for result in results:
        row = cells.setdefault(result.name, {})
        if result.column in row:
            raise DataError(
                f"{row[result.column].where} and {result.where} claim one cell: "
                f"{result.name!r} on {result.column.dataset!r} with the same decoding",
                hint="report one of them, or give them different names",
            )
        row[result.column] = result
        if len({other.checkpoint for other in row.values() if other.checkpoint}) > 1:
            console.warn(f"row {result.name!r} mixes checkpoints: {', '.join(other.where for other in row.values())}")
    return cells
