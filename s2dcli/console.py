"""Standard error for people, standard output for data.

`claim_stdout` must run before a heavy library is imported: it keeps a private copy of descriptor
1 for data and points descriptor 1 itself at standard error, so that whatever a library, C code
or a child process prints can never end up between two JSON lines.
"""

from __future__ import annotations

import io
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
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
_main = True  # whether this process speaks for all that work on the command; the others tell of their own errors only
_data: io.BufferedWriter | None = None

# What drives a terminal: C0 and C1 control characters except tab and newline, with which every ANSI and OSC
# sequence begins; what makes text read other than it is: marks, embeddings, overrides and isolates of
# direction, separators that some terminals break lines at, invisible tags; and lone surrogates, which no
# terminal's encoding holds.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")


def configure(*, quiet: bool, verbose: bool, main: bool = True) -> None:
    """Set how much is said on standard error: errors and warnings always, the rest by level.

    Unless this is the `main` process of several, errors alone.
    """
    global _level, _main
    _level, _main = -1 if quiet or not main else 1 if verbose else 0, main


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
    if _main:
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


# What is shown of a step, in this order: label, field of metrics.jsonl, how it is written. The line log takes the first BRIEF.
_FIGURES = (
    ("reward", "reward", ".3f"),
    ("cross-entropy", "cross_entropy", ".3f"),
    ("KL", "kl", ".3g"),
    ("JSD", "jsd", ".3g"),
    ("", "evaluation", ""),
    ("entropy", "entropy", ".3f"),
    ("tokens/rollout", "mean_tokens", ",.0f"),
    ("truncated", "truncated", ".1%"),
    ("mixed groups", "mixed_groups", ".1%"),
    ("loss", "loss", ".3g"),
    ("lr", "lr", ".3g"),
    ("grad norm", "grad_norm", ".3g"),
    ("seconds/step", "seconds", ",.1f"),
)
BRIEF = 8
CELL = 24  # columns of a label with its figure
CELL_OF_FIELD = 38  # of the other fields of metrics.jsonl, whose names are longer


def _written(value: object, style: str = "") -> str:
    if isinstance(value, float):
        return format(value, style or (",.0f" if abs(value) >= 1000 else ".4g"))
    return "-" if value is None else str(value)


def _figures(row: dict, evaluation: dict | None, count: int = len(_FIGURES)) -> list[tuple[str, str]]:
    """Return the figures that a trainer's steps have, `-` for one that is missing in this step."""
    if evaluation and evaluation["avg_at_k"] is not None:  # else the rewards have no notion of right
        row = {**row, "evaluation": f"{evaluation['avg_at_k']:.1%} ± {evaluation['se']:.1%}"}
    labels = {"evaluation": f"avg@{evaluation['k']}"} if "evaluation" in row else {}
    return [(labels.get(name, label), _written(row[name], style)) for label, name, style in _FIGURES[:count] if name in row]


def shares(row: dict) -> str:
    """Write the share of a step's time, and of the last save's, that each phase took."""
    seconds = {name.removesuffix("_seconds"): value for name, value in row.items() if name.endswith("_seconds")}
    total = max(row["seconds"], sum(seconds.values())) or 1.0
    return ", ".join(f"{phase} {value / total:.0%}" for phase, value in seconds.items())


@contextmanager
def training(steps: int) -> Iterator[Callable[..., None]]:
    """Show the steps of a training run; yields `show(row of metrics.jsonl, last row of evals.jsonl or None)`.

    A terminal gets a bar with the last step's figures under it, each in its place. Elsewhere a line is
    printed for the first step, the last one, and every LOG_INTERVAL seconds. `-v` adds all other fields.
    """
    started = logged = -LOG_INTERVAL
    before = None  # the step before the first one that is shown
    columns = (TextColumn("step"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    bar = Progress(*columns, console=stderr, expand=True)
    task = bar.add_task("step", total=steps, left="")
    with Live(bar, console=stderr, refresh_per_second=4) if live_display() else nullcontext() as live:

        def show(row: dict, evaluation: dict | None = None) -> None:
            nonlocal started, logged, before
            step, now = row["step"], time.monotonic()
            if before is None:
                before, started = step - 1, now - row["seconds"]
            left = f"{timedelta(seconds=round((steps - step) * (now - started) / (step - before)))} left"
            if live:
                bar.update(task, completed=step, left=left)
                others = _grid(_others(row), CELL_OF_FIELD)
                live.update(Group(bar, _grid(_figures(row, evaluation), CELL), Text(shares(row), "dim"), others))
            elif step in (1, steps) or now - logged >= LOG_INTERVAL:
                logged = now
                info(step_line(row, evaluation, steps, left))

        yield show


def _others(row: dict) -> list[tuple[str, str]]:
    """Return the fields of a step that are not among its figures, if `-v` asks for them."""
    known = {"step", *(name for _, name, _ in _FIGURES)}
    return [(name, _written(value)) for name, value in row.items() if name not in known] if verbose() else []


def step_line(row: dict, evaluation: dict | None, steps: int | str, left: str) -> str:
    """Return a step of a training run, and how long the run has left, as one line."""
    figures = [*_figures(row, evaluation, None if verbose() else BRIEF), *_others(row)]
    return f"step {row['step']}/{steps}: {', '.join(filter(None, (*map(' '.join, figures), left)))} ({shares(row)})"


@contextmanager
def screen() -> Iterator[Callable[[str], None]]:
    """Show a text on a terminal in place of the one before; yields what shows it. Its last text stays."""
    with Live(console=stderr, auto_refresh=False) as live:
        yield lambda text: live.update(Text(printable(text), no_wrap=True, overflow="crop"), refresh=True)


def _grid(cells: list[tuple[str, str]], width: int) -> Table:
    """Lay out labels and figures in as many columns of a fixed width as the terminal holds."""
    columns = max(1, (stderr.width + 2) // (width + 2))
    table = Table.grid(padding=(0, 2, 0, 0))
    for start in range(0, len(cells), columns):
        table.add_row(*(Text.assemble((label, "dim"), value.rjust(width - len(label))) for label, value in cells[start : start + columns]))
    return table


BYTES = (" B", " kB", " MB", " GB")


def starting() -> None:
    """Say on a terminal, before torch is imported, why nothing else happens for some seconds."""
    if live_display():
        info("importing torch and transformers")


def loading(model: str, parameters: int, dtype: str, device: str) -> None:
    """Say before some slow seconds what is loaded."""
    info(f"loading {model} ({_short(parameters)} parameters, {dtype}, {device})")


def _short(number: float, units: tuple[str, ...] = ("", "k", "M", "B")) -> str:
    """Write a number with three digits and a unit of thousands: 1.72B."""
    power = min(len(units) - 1, max(0, int(math.log10(max(1, number)) / 3)))
    return f"{number / 1000**power:.3g}{units[power]}"


# Results in words: what a terminal is shown of the objects that a pipe is given


def run_table(result: dict) -> list[tuple[str, str]]:
    """A trainer's result: the checkpoint, the figures of the last step, the last evaluation."""
    evaluation = {name.removeprefix("eval_"): value for name, value in result.items() if name.startswith("eval_")}
    figures = _figures(result, evaluation or None)
    return [("checkpoint", result["checkpoint"]), ("step", f"{result['step']:,}"), *figures, ("labels", f"{result.get('labels', 0):,}")]


def eval_table(result: dict) -> list[tuple[str, str]]:
    """An evaluation's results; those of earlier versions have fewer."""
    k, right = result["k"], []
    if result["avg_at_k"] is not None:  # else the rewards have no notion of right
        low, high = result.get("ci95") or (None, None)
        interval = "" if low is None else f", 95 % interval {low:.1%} to {high:.1%}"
        right.append((f"avg@{k}", f"{result['avg_at_k']:.1%} ± {result['se']:.1%} over problems{interval}"))
        chances = result.get("pass") or {str(k): {"value": result["pass_at_k"], "se": None}}
        right += [(f"pass@{j}", _with_error(**chance)) for j, chance in chances.items() if j != "1"]
        if result.get("maj_at_k") is not None and k > 1:
            right.append((f"maj@{k}", _with_error(result["maj_at_k"], result["maj_at_k_se"])))
    whole = result.get("untruncated") or {"avg_at_k": None}
    known = whole["avg_at_k"] is not None and result["truncated"]
    without = f"; without them avg@k {_with_error(whole['avg_at_k'], whole['se'])}" if known else ""
    return [
        ("name", result["name"]),
        ("data set", result["dataset"] or "-"),
        ("problems", f"{result['problems']:,}"),
        *right,
        ("truncated", f"{result['truncated']:.1%}{without}"),
        ("no answer", f"{result.get('no_answer_rate', 0.0):.1%}"),
        ("not graded", f"{result['ungraded']:,}"),
        ("tokens/rollout", f"{result['mean_tokens']:,.0f}{_lengths(result)}"),
    ]


def probe_table(result: dict) -> list[tuple[str, str]]:
    """A probe's result: either model, the conditions C1 and C2, and the verdict with its reasons."""
    k, c1, c2, verdict = result["k"], result["c1"], result["c2"], result["verdict"]

    def answers(role: str) -> str:
        found, mixed = result[role], result[role]["mixed_groups"]
        shown = f"avg@{k} {_with_error(found['avg_at_k'], found['se'])}, pass@{k} {found['pass_at_k']:.1%}"
        return f"{result['models'][role]}: {shown}, mixed groups {_with_error(mixed['value'], mixed['se'])}"

    def number(found: dict | None, style: str = ".3g") -> str:
        if found is None or found["value"] is None:
            return f"- ({found['reason']})" if found else "-"
        return format(found["value"], style) + ("" if found["se"] is None else f" ± {found['se']:.2g}")

    separated = []
    if c1:
        base, whole, within = result["models"]["base teacher"], c1["auc"], c1["within_groups"]
        separated = [
            ("C1 AUC", f"{number(whole)}; within groups {number(within)} over {within['groups']} groups; log-ratio to {base}"),
        ]
    quantiles = ", ".join(f"{float(part):.0%} {value:.3g}" for part, value in c2["kl_quantiles"].items() if part in ("0.5", "0.95", "1"))
    thirds = ", ".join(f"{name} {number(found)}" for name, found in c2["kl_by_position"].items())
    support = "exact" if c2["estimator"] == "full" else f"over the teacher's top {c2['top_k']} and one bucket"
    mass = ", ".join(f"{_with_error(found['value'], found['se'])} of the {role}'s" for role, found in c2["shared_mass"].items())
    return [
        ("problems", f"{result['problems']:,}, {k} samples of each; ± over problems"),
        ("student", answers("student")),
        ("teacher", answers("teacher")),
        *separated,
        ("C2 KL", f"{number(c2['kl'])} nats a token, {support}"),
        ("  quantiles", quantiles),
        ("  thirds", thirds),
        (f"  top {c2['top_k']}", f"{_with_error(c2['overlap']['value'], c2['overlap']['se'])} of the ids shared; mass on these: {mass}"),
        ("labels", f"{result['labels']['measured']:,} measured with, none spent"),
        ("verdict", f"{verdict['route']}. {verdict['text']}"),
        *(("  because" if number == 0 else "  and", reason) for number, reason in enumerate(verdict["why"])),
        *(("  open", reason) for reason in verdict["not_resolved"]),
        *([("  surer", verdict["surer"])] if verdict["surer"] else []),
    ]


def _with_error(value: float, se: float | None) -> str:
    return f"{value:.1%}" if se is None else f"{value:.1%} ± {se:.1%}"


def _lengths(result: dict) -> str:
    length = result.get("length")
    return f"; median {length['0.5']:,}, 95 % at most {length['0.95']:,}" if length else ""


def plan_table(plan: dict) -> list[tuple[str, str]]:
    """The plan of --dry-run; whether it fits is said where it tells the `available_bytes`."""
    parts = {name: value for name, value in plan.items() if name.endswith("_bytes") and value}
    total, available = parts.pop("total_bytes"), parts.pop("available_bytes", None)
    memory = _short(total, BYTES)
    if available:
        memory = f"{'fits' if total <= available else 'does not fit'}: {total / 1e9:.3g} of {available / 1e9:.3g} GB"
    each, number = [], plan["processes"]
    if number > 1:
        each = [("processes", f"{number:,}, each with {'a part of all weights (FSDP2)' if plan['sharded'] else 'all weights (DDP)'}")]
        memory = f"{memory} in each process"
    return [
        ("steps", f"{plan['steps']:,} of {plan['rollouts_per_step']:,} rollouts, {plan['rollouts']:,} in all"),
        ("tokens", f"at most {_short(plan['completion_tokens_at_most'])} of completions"),
        *each,
        ("  a step", f"at most {_short(plan['step_tokens_at_most'])} with prompts, {plan['row_tokens_at_most']:,} in a row"),
        ("parameters", f"{_short(plan['parameters'])}, of which {_short(plan['trained_parameters'])} are trained"),
        ("memory", memory),
        *((f"  {name.removesuffix('_bytes')}", _short(value, BYTES)) for name, value in parts.items()),
        ("output", plan["out"]),
    ]


def aligned(pairs: list[tuple[str, str]]) -> str:
    """Return names and values in two columns."""
    width = max(len(name) for name, _ in pairs)
    return "".join(f"{name:{width}}  {printable(value)}\n" for name, value in pairs)


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
