"""Standard error for people, standard output for data.

`claim_stdout` must run before a heavy library is imported: it keeps a private copy of descriptor
1 for data and points descriptor 1 itself at standard error, so that whatever a library, C code
or a child process prints can never end up between two JSON lines.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import format_exc

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from s2dcli.errors import UsageError

# Without a live display a training step is printed at most this often, in seconds.
LOG_INTERVAL = 10.0

stderr = Console(stderr=True, highlight=False, soft_wrap=True)

_level = 0  # -1 quiet, 0 normal, 1 verbose
_data: io.BufferedWriter | None = None

# What drives a terminal: C0 and C1 control characters except tab and newline, with which every ANSI and OSC
# sequence begins; what makes text read other than it is: marks, embeddings, overrides and isolates of
# direction, separators that some terminals break lines at, invisible tags; and lone surrogates, which no
# terminal's encoding holds.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")


def configure(*, quiet: bool, verbose: bool) -> None:
    """Set how much is said on standard error: errors and warnings always, the rest by level."""
    global _level
    _level = -1 if quiet else 1 if verbose else 0


def verbose() -> bool:
    """Whether `-v` was given."""
    return _level >= 1


@contextmanager
def muted() -> Iterator[None]:
    """Send to nowhere what this process's libraries and C code print, unless `-v` asks for it."""
    if verbose():
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, copy in enumerate(kept, 1):
            os.dup2(copy, target)
            os.close(copy)


def claim_stdout() -> io.BufferedWriter:
    """Return the binary stream for data; from then on descriptor 1 is standard error."""
    global _data
    if _data is None:
        try:
            _data = os.fdopen(os.dup(1), "wb")
        except OSError:
            raise UsageError("standard output is closed, there is nowhere to write to") from None
        sys.stdout.flush()
        os.dup2(2, 1)
    return _data


def abandon_stdout() -> None:
    """Forget unwritten data after the reader has closed the pipe, so that exit stays silent."""
    if _data is not None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, _data.fileno())
        os.close(null)


def printable(text: str) -> str:
    """Return untrusted text with the characters made visible that drive a terminal or hide what is there."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _say(prefix: str, style: str, message: str) -> None:
    stderr.print(Text.assemble((prefix, style), printable(message)))


def info(message: str) -> None:
    """Say something that a user wants to know; silent with `-q`."""
    if _level >= 0:
        _say("", "", message)


def detail(message: str) -> None:
    """Say something that only `-v` asks for."""
    if _level >= 1:
        _say("", "dim", message)


def warn(message: str) -> None:
    _say("warning: ", "yellow", message)


def error(message: str) -> None:
    _say("error: ", "bold red", message)


def traceback() -> None:
    """Show the traceback of the exception at hand."""
    stderr.print(Text(printable(format_exc())))


def live_display() -> bool:
    """Whether a live display makes sense: a terminal that moves its cursor, and no `-q`."""
    return _level >= 0 and stderr.is_terminal and not stderr.is_dumb_terminal


def show_cursor() -> None:
    """Bring back the cursor that a live display hides, from within a signal handler."""
    if stderr.is_terminal:
        os.write(2, b"\x1b[?25h")


@contextmanager
def progress(description: str, total: int | None, unit: str = "") -> Iterator:
    """Show a bar on a terminal; yields `advance(count=1)`. Elsewhere it says nothing."""
    if not live_display():
        yield lambda count=1: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=stderr, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count=1: bar.advance(task, count)


def _figure(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


@contextmanager
def training(steps: int) -> Iterator[Callable[[dict], None]]:
    """Show the steps of a training run; yields `show(row of metrics.jsonl)`.

    A terminal gets a bar with the last step's figures under it. Elsewhere a line is printed for the
    first step, the last one, and every LOG_INTERVAL seconds.
    """
    if not live_display():
        last = -LOG_INTERVAL

        def show_line(row: dict) -> None:
            nonlocal last
            if row["step"] in (1, steps) or time.monotonic() - last >= LOG_INTERVAL:
                last = time.monotonic()
                figures = " ".join(f"{name} {_figure(value)}" for name, value in row.items() if name != "step")
                info(f"step {row['step']}/{steps} {figures}")

        yield show_line
        return
    bar = Progress(TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=stderr)
    task = bar.add_task("step", total=steps)
    with Live(bar, console=stderr, refresh_per_second=4) as live:

        def show_table(row: dict) -> None:
            bar.update(task, completed=row["step"])
            live.update(Group(bar, _grid([(name, _figure(value)) for name, value in row.items() if name != "step"])))

        yield show_table


def _grid(cells: list[tuple[str, str]], columns: int = 4) -> Table:
    """Lay out name-value pairs in `columns` pairs side by side."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(columns):
        table.add_column(style="dim")
        table.add_column(justify="right")
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        table.add_row(*(text for cell in row for text in cell))
    return table


def markdown(table: list[list[str]]) -> str:
    """Return an aligned table for standard output: the first row is its head, the first column set left, figures right."""
    table = [[" ".join(printable(cell).split()).replace("|", "\\|") for cell in row] for row in table]
    widths = [max(3, *(cell_len(cell) for cell in column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        blanks = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        aligned = [row[0] + blanks[0], *(blank + cell for cell, blank in zip(row[1:], blanks[1:], strict=True))]
        lines.append(f"| {' | '.join(aligned)} |\n")
    lines.insert(1, f"| {'-' * widths[0]} | {' | '.join('-' * (width - 1) + ':' for width in widths[1:])} |\n")
    return "".join(lines)
