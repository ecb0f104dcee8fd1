"""`s2d report`: several eval results as one table, and as one page with curves, lineage and rollouts.

Each RUN is the output folder of `s2d eval`, or its `results.json`; `-` reads results as JSON lines
from standard input. A row is a result's `name`, a column one data set under one way of decoding,
a cell avg@k in per cent ± its standard error over problems:

    s2d report runs/eval-direct runs/eval-bridge > table.md
    s2d report runs/eval-direct runs/eval-bridge --html report.html
    s2d report runs/eval-*/results.json --columns all --latex

Results share a column only if data set, number of problems, k, temperature, top-p, top-k and length
limit are the same, so that nothing unlike is compared by mistake. The table is markdown, or with --csv, --latex or
--json what these say: JSON gives the fractions as they were measured, the others per cent; in CSV the standard error has
a column of its own.

--html FILE also writes one page that needs no network: the table with its intervals, accuracy against labels, the training curves of
every stage in the lineage whose run folder is still where it was, the lineage, the settings, and the graded rollouts, to be
searched and compared between two results. A RUN may be a trainer's folder there. Rollouts fill the page up to --page-size; of more, a
sample of the problems is kept, and the page says how many. --katex typesets their math, with KaTeX from its npm package.

--label-curve FILE draws accuracy against the distinct labels that each lineage has cost, as an SVG, and prints its numbers in place of the
table. Results of one name and as many labels are training runs of one recipe: a point is their mean, its band the 95 % interval over runs.

    s2d report runs/curve/seed-*/eval/* --label-curve curve.svg

--watch follows a run of grpo, opd or fkl-warmup while it trains: curves, rates and the time left on a terminal, a JSON line for each step
elsewhere. It reads the files of the run folder only, so it works from another machine on a shared disk:

    s2d report --watch runs/teacher
    s2d report --watch runs/teacher | jq .reward

Problems that the measured checkpoint's lineage has learnt from are warned of (contamination), and so are
labels that it has learnt from twice (replay); see `s2d lineage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from s2dcli import console, options
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.report import label_curve
from s2dcli.report.collect import Result, pivot, read_results
from s2dcli.report.katex import read_katex
from s2dcli.report.page import build_page, check_page, write_page
from s2dcli.report.sections import Defaults
from s2dcli.report.tables import as_csv, as_json, as_latex, as_markdown, headings
from s2dcli.report.training import is_run_folder, stages_of
from s2dcli.report.watch import follow

Columns = StrEnum("Columns", "main all")
FORMATS = {"csv": as_csv, "latex": as_latex, "markdown": as_markdown}
FORMAT, PAGE = "Format", "Page"  # panels of the help page
LEAST_PAGE = 100_000  # bytes of --page-size: the page's own parts take that


def report(
    context: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="Eval output folders or results.json files, with --html also run folders; - is standard input.",
            show_default=False,
        ),
    ],
    columns: Annotated[
        Columns, typer.Option("--columns", help="all: pass@k, share of truncated samples, mean reward, labels too.")
    ] = Columns.main,
    markdown: Annotated[bool, typer.Option("--markdown", help="A markdown table: the default.", rich_help_panel=FORMAT)] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values.", rich_help_panel=FORMAT)] = False,
    latex: Annotated[bool, typer.Option("--latex", help="A LaTeX tabular (package booktabs).", rich_help_panel=FORMAT)] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.", rich_help_panel=FORMAT)] = False,
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="Also write a page for a browser; - writes it alone.", rich_help_panel=PAGE),
    ] = None,
    page_size: Annotated[
        str, typer.Option("--page-size", metavar="SIZE", help="Size up to which the page holds rollouts.", rich_help_panel=PAGE)
    ] = "2MB",
    katex: Annotated[
        str | None,
        typer.Option("--katex", metavar="PACKAGE", help="Typeset math: KaTeX's npm package, folder or .tgz.", rich_help_panel=PAGE),
    ] = None,
    curve: Annotated[
        str | None,
        typer.Option("--label-curve", metavar="FILE", help="Draw accuracy against labels spent, over training runs, as an SVG."),
    ] = None,
    overwrite: options.Overwrite = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow a training run, from its files alone, until it ends.")] = False,
) -> None:
    """Print the table of several eval results, write a page about them, or follow a training run."""
    if watch:
        names = ("columns", "markdown", "csv", "latex", "json", "html", "page_size", "katex", "overwrite")
        given = {name: "--" + name.replace("_", "-") for name in names} | {"curve": "--label-curve"}
        options.refuse_given(context, given, "applies to results, and --watch shows a run")
        if len(runs) != 1 or jsonl.is_stream(runs[0]):
            raise UsageError("--watch follows one run folder", hint="name it alone")
        follow(Path(runs[0]))
        return
    wanted = [name for name, given in {"csv": csv, "latex": latex, "markdown": markdown, "json": json}.items() if given]
    if len(wanted) > 1:
        raise UsageError(f"{' and '.join(f'--{name}' for name in wanted)} exclude each other")
    if curve:
        others = {name: "--" + name.replace("_", "-") for name in ("html", "columns", "csv", "latex", "page_size", "katex")}
        options.refuse_given(context, others, "does not go with --label-curve, whose numbers are markdown or --json")
        check_page(curve, overwrite, label_curve.MARK)
        if jsonl.is_stream(curve):
            raise UsageError("the picture is a file, its numbers go to standard output", where="--label-curve -", hint="name a file")
        _draw_labels([result for run in runs for result in read_results(run)], curve, json)
        return
    if html:
        size = options.parse_size(page_size, "--page-size")
        if size < LEAST_PAGE:
            raise UsageError(f"{page_size} is too little for a page", where="--page-size", hint="100kB or more")
        if jsonl.is_stream(html) and wanted:
            raise UsageError(f"--html - and --{wanted[0]} both write to standard output", hint="--html FILE names a file")
        check_page(html, overwrite)
    else:
        options.refuse_given(context, {"page_size": "--page-size", "katex": "--katex", "overwrite": "--overwrite"}, "goes with --html FILE")
    trainings = [run for run in runs if is_run_folder(run)]
    if trainings and not html:
        raise DataError("is the folder of a training and has no results", where=trainings[0], hint="--html FILE draws its curves")
    results = [result for run in runs if run not in trainings for result in read_results(run)]
    if not results and not trainings:
        raise DataError("holds no results", where=jsonl.input_name(runs[0]))
    cells = pivot(results)
    if html:
        package = read_katex(katex) if katex else None
        content, held = build_page(results, cells, stages_of(results, trainings), _defaults(context), size, package)
        write_page(html, content)
        if len(content) > size:
            console.warn(f"{jsonl.output_name(html)}: larger than --page-size {page_size}, without any rollouts")
        left_out = f", rollouts of {held.shown:,} of {len(held.seen):,} problems in it" if held.seen else ""
        console.info(f"{jsonl.output_name(html)}: {len(content) / 1e6:.2f} MB{left_out}")
    if not results or (html and jsonl.is_stream(html)):
        return

    labels = headings(list(dict.fromkeys(result.column for result in results)))
    figures = ["avg_at_k", "pass_at_k", "truncated"] if columns is Columns.all else ["avg_at_k"]
    if columns is Columns.all and any(result.mean_reward not in (None, result.avg_at_k) for result in results):
        figures.append("mean_reward")
    if json:
        jsonl.print_result(as_json(cells, labels))
        return
    _print(FORMATS[wanted[0] if wanted else "markdown"](cells, labels, figures))


def _draw_labels(results: Sequence[Result], name: str, json: bool) -> None:
    column, points = label_curve.label_points(results)
    write_page(name, label_curve.draw(column, points))
    if json:
        jsonl.print_result({**column._asdict(), "points": [point._asdict() for point in points]})
    else:
        _print(f"{console.markdown(label_curve.table(points))}\n- {label_curve.note(column, points)}\n")


def _print(text: str) -> None:
    out = console.claim_stdout()
    out.write(text.encode())
    out.flush()


def _defaults(context: typer.Context) -> Defaults:
    """Return the defaults of every command's options, as this program has them."""
    commands = context.find_root().command.commands
    return {name: {option.name: option.default for option in command.params} for name, command in commands.items()}
