"""`s2d report`: several eval results as one table on standard output.

Each RUN is the output folder of `s2d eval`, or its `results.json`; `-` reads results as JSON lines
from standard input. A row is a result's `name`, a column one data set under one way of decoding,
a cell avg@k in per cent ± its standard error over problems:

    s2d report runs/eval-direct runs/eval-bridge > table.md
    s2d report runs/eval-*/results.json --columns all --format csv

Results share a column only if data set, number of problems, k, temperature, top-p, top-k and length
limit are the same, so that nothing unlike is compared by mistake. `--format json` gives the fractions
as they were measured; csv gives per cent, the standard error in a column of its own.

Problems that the measured checkpoint's lineage has learnt from are warned of (contamination), and so are
labels that it has learnt from twice (replay); see `s2d lineage`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, NamedTuple

import typer

from s2dcli import console
from s2dcli.errors import DataError
from s2dcli.files import jsonl
from s2dcli.files.eval_folder import results_path
from s2dcli.files.ledger import warnings
from s2dcli.files.manifest import MANIFEST, read_manifest
from s2dcli.files.records import take

MISSING = "-"
ERROR_NOTE = "± is the standard error over problems, not over retrained checkpoints"


class Format(StrEnum):
    markdown = "markdown"
    csv = "csv"
    json = "json"


class Columns(StrEnum):
    main = "main"
    all = "all"


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
    avg_at_k: float
    se: float
    pass_at_k: float
    truncated: float


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Eval output folders or results.json files; - is standard input.", show_default=False),
    ],
    format: Annotated[Format, typer.Option("--format", help="How the table is written.")] = Format.markdown,
    columns: Annotated[Columns, typer.Option("--columns", help="all: pass@k and the share of truncated samples too.")] = Columns.main,
) -> None:
    """Print the table of several eval results."""
    results = [_result(where, record) for run in runs for where, record in _records(run)]
    if not results:
        raise DataError("holds no results", where=jsonl.input_name(runs[0]))
    cells = _pivot(results)
    labels = _labels(list(dict.fromkeys(result.column for result in results)))
    figures = ["avg_at_k", "pass_at_k", "truncated"] if columns is Columns.all else ["avg_at_k"]

    if format is Format.json:
        jsonl.print_result(_as_json(cells, labels))
        return
    text = _as_csv(cells, labels, figures) if format is Format.csv else _as_markdown(cells, labels, figures)
    out = console.claim_stdout()
    out.write(text.encode())
    out.flush()


def _records(run: str) -> Iterator[tuple[str, dict]]:
    """Yield (where, record) for each result that a RUN argument names."""
    if jsonl.is_stream(run):
        yield from jsonl.read(run, "the results of s2d eval")
        return
    path = results_path(run)
    with jsonl.open_input(path, "eval results") as stream:
        yield str(path), jsonl.parse_line(stream.read(), str(path))
    manifest = path.with_name(MANIFEST)
    if manifest.is_file():
        for caution in warnings(read_manifest(manifest)):
            console.warn(f"{path.parent}: {caution}")


def _result(where: str, record: dict) -> Result:
    """Check one results.json. Raises DataError that names the file and the field."""

    def number(field: str) -> float:
        value = take(record, field, (float, int), where)
        if not math.isfinite(value):
            raise DataError(f"field {field!r} is not a finite number", where=where)
        return float(value)

    temperature = number("temperature")
    column = Column(
        dataset=_one_line(take(record, "dataset", str, where)),
        k=take(record, "k", int, where),
        temperature=temperature,
        top_p=number("top_p") if temperature > 0 else 1.0,  # greedy decoding has no nucleus
        top_k=take({"top_k": 0, **record}, "top_k", int, where) if temperature > 0 else 0,
        max_tokens=take(record, "max_tokens", int, where),
        problems=take(record, "problems", int, where),
    )
    ungraded = take({"ungraded": 0, **record}, "ungraded", int, where)
    if ungraded:
        console.warn(f"{where}: {ungraded} answers could not be graded and count as wrong")
    return Result(
        where=where,
        name=_one_line(take(record, "name", str, where)),
        model=take(record, "model", str, where),
        checkpoint=take(record, "checkpoint", str, where),
        column=column,
        avg_at_k=number("avg_at_k"),
        se=number("se"),
        pass_at_k=number("pass_at_k"),
        truncated=number("truncated"),
    )


def _one_line(text: str) -> str:
    """Return a name fit for a table: control characters made visible, white space folded."""
    return " ".join(console.printable(text).split())


def _pivot(results: list[Result]) -> dict[str, dict[Column, Result]]:
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


def _labels(columns: list[Column]) -> dict[Column, dict[str, str]]:
    """Return the heading of each column's figures, with limits only where these tell columns apart."""
    labels = {}
    for column in columns:
        decoding = ["greedy" if column.temperature == 0 else f"T={column.temperature:g}"]
        if column.top_p < 1:
            decoding.append(f"top-p {column.top_p:g}")
        if column.top_k:
            decoding.append(f"top-k {column.top_k}")
        likes = [other for other in columns if other[:5] == column[:5]]
        if len({other.max_tokens for other in likes}) > 1:
            decoding.append(f"{column.max_tokens} tokens")
        if len({other.problems for other in likes}) > 1:
            decoding.append(f"{column.problems} problems")
        how = ", ".join(decoding)
        labels[column] = {
            "avg_at_k": f"{column.dataset} avg@{column.k} ({how})",
            "pass_at_k": f"{column.dataset} pass@{column.k} ({how})",
            "truncated": f"{column.dataset} truncated ({how})",
        }
    return labels


def _as_markdown(cells: dict[str, dict[Column, Result]], labels: dict[Column, dict[str, str]], figures: list[str]) -> str:
    """Return an aligned markdown table in per cent, and below it one line for each column."""

    def cell(result: Result | None, figure: str) -> str:
        if result is None:
            return MISSING
        spread = f" ± {100 * result.se:.1f}" if figure == "avg_at_k" else ""
        return f"{100 * getattr(result, figure):.1f}{spread}"

    table = [["", *(heads[figure] for heads in labels.values() for figure in figures)]]
    for name, row in cells.items():
        table.append([name, *(cell(row.get(column), figure) for column in labels for figure in figures)])
    notes = [
        f"- {heads['avg_at_k']}: per cent; {column.problems} problems, k = {column.k}; {ERROR_NOTE}." for column, heads in labels.items()
    ]
    return "\n".join([console.markdown(table), *notes]) + "\n"


def _as_csv(cells: dict[str, dict[Column, Result]], labels: dict[Column, dict[str, str]], figures: list[str]) -> str:
    """Return comma-separated values in per cent; what is missing is empty, as CSV readers expect."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ["avg_at_k", "se", *figures[1:]]
    heads = [head["avg_at_k"] + " se" if field == "se" else head[field] for head in labels.values() for field in fields]
    writer.writerow(["name", *heads])
    for name, row in cells.items():
        values = [f"{100 * getattr(row[column], field):.4f}" if column in row else "" for column in labels for field in fields]
        writer.writerow([name, *values])
    return text.getvalue()


def _as_json(cells: dict[str, dict[Column, Result]], labels: dict[Column, dict[str, str]]) -> dict:
    """Return columns and rows as one object, rates as fractions; a cell is null where there is no result."""

    def cell(result: Result | None) -> dict | None:
        if result is None:
            return None
        figures = {field: getattr(result, field) for field in ("avg_at_k", "se", "pass_at_k", "truncated")}
        return {**figures, "model": result.model, "checkpoint": result.checkpoint, "file": result.where}

    names = {column: heads["avg_at_k"] for column, heads in labels.items()}
    return {
        "columns": [{"label": label, **column._asdict()} for column, label in names.items()],
        "rows": [{"name": name, "cells": {label: cell(row.get(column)) for column, label in names.items()}} for name, row in cells.items()],
    }
