"""`s2d report`: several eval results as one table on standard output.

Each RUN is the output folder of `s2d eval`, or its `results.json`; `-` reads results as JSON lines
from standard input. A row is a result's `name`, a column one data set under one way of decoding,
a cell avg@k in per cent ± its standard error over problems:

    s2d report runs/eval-direct runs/eval-bridge > table.md
    s2d report runs/eval-*/results.json --columns all --format csv

Results share a column only if data set, number of problems, k, temperature, top-p, top-k and length
limit are the same, so that nothing unlike is compared by mistake. `--format json` gives the fractions
as they were measured; csv gives per cent, the standard error in a column of its own.

--watch follows a run of grpo, opd or fkl-warmup while it trains: curves, rates and the time left on a terminal, a JSON line for each step
elsewhere. It reads the files of the run folder only, so it works from another machine on a shared disk:

    s2d report --watch runs/teacher
    s2d report --watch runs/teacher | jq .reward

Problems that the measured checkpoint's lineage has learnt from are warned of (contamination), and so are
labels that it has learnt from twice (replay); see `s2d lineage`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from s2dcli import console, options
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.report.collect import pivot, read_results
from s2dcli.report.tables import as_csv, as_json, as_markdown, headings
from s2dcli.report.watch import follow

Format = StrEnum("Format", "markdown csv json")
Columns = StrEnum("Columns", "main all")


def report(
    context: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Eval output folders or results.json files; - is standard input.", show_default=False),
    ],
    format: Annotated[Format, typer.Option("--format", help="How the table is written.")] = Format.markdown,
    columns: Annotated[Columns, typer.Option("--columns", help="all: pass@k, share of truncated samples, mean reward too.")] = Columns.main,
    watch: Annotated[bool, typer.Option("--watch", help="Follow a training run, from its files alone, until it ends.")] = False,
) -> None:
    """Print the table of several eval results, or follow a training run."""
    if watch:
        options.refuse_given(context, {"format": "--format", "columns": "--columns"}, "applies to tables, and --watch shows none")
        if len(runs) != 1 or jsonl.is_stream(runs[0]):
            raise UsageError("--watch follows one run folder", hint="name it alone")
        follow(Path(runs[0]))
        return
    results = [result for run in runs for result in read_results(run)]
    if not results:
        raise DataError("holds no results", where=jsonl.input_name(runs[0]))
    cells = pivot(results)
    labels = headings(list(dict.fromkeys(result.column for result in results)))
    figures = ["avg_at_k", "pass_at_k", "truncated"] if columns is Columns.all else ["avg_at_k"]
    if columns is Columns.all and any(result.mean_reward not in (None, result.avg_at_k) for result in results):
        figures.append("mean_reward")

    if format is Format.json:
        jsonl.print_result(as_json(cells, labels))
        return
    text = as_csv(cells, labels, figures) if format is Format.csv else as_markdown(cells, labels, figures)
    out = console.claim_stdout()
    out.write(text.encode())
    out.flush()
