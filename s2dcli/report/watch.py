"""Following a run from its files: s2d.json, metrics.jsonl, evals.jsonl and the lock. The process that trains is never asked.

So it works from any machine that sees the run folder. What the files do not tell is not guessed: whether a process on another host
still lives is not known here, and then it is said for how long there has been no new step. Times are those of this machine's clock,
from the moment at which it has seen a change.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from enum import StrEnum
from itertools import takewhile
from pathlib import Path
from typing import Any

from s2dcli import console
from s2dcli.errors import DataError, S2DError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.lock import Owner, owner_of
from s2dcli.files.manifest import MANIFEST, read_manifest
from s2dcli.files.output_folder import NEW
from s2dcli.files.records import take
from s2dcli.files.run_folder import EVALS, METRICS

POLL_SECONDS = 1.0  # between two looks at the files
RECENT = 20  # steps that rates are means over
OBSERVED = 5  # steps after which the time that they have taken here, evaluations included, tells the time left
SILENT_SECONDS, SILENT_STEPS = 60.0, 5  # without a new step, in seconds and in steps of the recent length, until it is pointed out
GONE_LOOKS = 3  # looks in a row that find no process before a run is said to have stopped: files of another host come late
TRAINERS = ("grpo", "fkl-warmup", "opd")
# Figures that are drawn, where the steps have them: label, field of metrics.jsonl, how it is written
CURVES = (
    ("reward", "reward", ".3f"),
    ("cross-entropy", "cross_entropy", ".3f"),
    ("KL", "kl", ".3g"),
    ("loss", "loss", ".3g"),
    ("entropy", "entropy", ".3f"),
    ("mixed groups", "mixed_groups", ".1%"),
    ("tokens/rollout", "mean_tokens", ",.0f"),
    ("truncated", "truncated", ".1%"),
    ("grad norm", "grad_norm", ".3g"),
    ("lr", "lr", ".3g"),
    ("seconds/step", "seconds", ",.2f"),
)
LABEL, VALUE, NARROWEST = 14, 9, 8  # columns of a curve's label and of its figures; least columns of a curve
CHART_ROWS = 5
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*#@"
# Dots of a braille character from U+2800, from the top down, in its left and right column
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))

Rows = list[dict[str, Any]]


class State(StrEnum):
    """What is known of a run's process."""

    absent = "not begun"
    running = "running"
    unknown = "not known"  # a process on another host, or a file system without locks
    stopped = "stopped"  # it has ended before the run was finished
    finished = "finished"


class Tail:
    """The rows of a file to which another process appends, and which a resumed run cuts. `file` changes when it is another file."""

    def __init__(self) -> None:
        self.rows: Rows = []
        self.file: tuple[int, int] | None = None
        self._read = 0

    def look(self, path: Path) -> None:
        """Read what is new. Raises DataError if a whole line is no row."""
        try:
            with open(path, "rb") as stream:  # opened anew: NFS then shows what was written before
                status = os.fstat(stream.fileno())
                file = status.st_dev, status.st_ino
                if file != self.file or status.st_size < self._read:
                    self._forget(file)
                stream.seek(self._read)
                try:
                    self._take(stream.read(), path)
                except DataError:  # it was cut, and is as long again: this is from the middle of a row
                    if not self._read:
                        raise
                    self._forget(file)
                    stream.seek(0)
                    self._take(stream.read(), path)
        except FileNotFoundError:
            self._forget(None)
        except OSError as error:
            raise DataError(f"cannot read it: {error.strerror}", where=str(path)) from None

    def _forget(self, file: tuple[int, int] | None) -> None:
        self.rows, self.file, self._read = [], file, 0

    def _take(self, data: bytes, path: Path) -> None:
        lines = data.splitlines(keepends=True)
        rows = [jsonl.parse_line(line, f"{path}:{len(self.rows) + number}") for number, line in enumerate(lines, 1) if line.endswith(b"\n")]
        last = self.rows[-1]["step"] if self.rows else -1
        for number, row in enumerate(rows, len(self.rows) + 1):
            if take(row, "step", int, f"{path}:{number}") <= last:
                raise DataError(f"step {row['step']} comes after step {last}", where=f"{path}:{number}")
            last = row["step"]
        self.rows += rows
        self._read += sum(len(line) for line in lines if line.endswith(b"\n"))


class Watched:
    """A run as its files show it; `look` reads them."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.state = State.absent
        self.manifest: dict[str, Any] = {}
        self.owner: Owner | None = None
        self.metrics, self.evals = Tail(), Tail()
        self._seen: tuple[Any, int] = (None, -1)  # file and number of rows
        self._changed = 0.0  # when that was so first
        self._first: tuple[float, int] | None = None  # time and step of the first new row that was seen to come
        self._gone = 0

    def look(self) -> None:
        """Read what is new in the files. Raises UsageError for a folder that is no trainer's, and DataError."""
        if self.out.exists() and not self.out.is_dir():
            raise UsageError("is not a folder", where=str(self.out), hint="--watch follows the run folder of grpo, opd or fkl-warmup")
        folder = self.out / NEW if (self.out / NEW / MANIFEST).is_file() else self.out  # what --overwrite is about to replace it by
        manifest = self._manifest(folder)
        if manifest is None:
            self.state = State.absent
            return
        self.manifest, self.owner = manifest, owner_of(self.out)
        self.metrics.look(folder / METRICS)
        self.evals.look(folder / EVALS)
        for number, row in enumerate(self.rows, 1):
            take(row, "seconds", (int, float), f"{folder / METRICS}:{number}")
        self._note_progress(folder / METRICS)
        self.state = self._state()

    def _manifest(self, folder: Path) -> dict[str, Any] | None:
        path = folder / MANIFEST
        try:
            manifest = read_manifest(path)
        except DataError:
            if path.exists():
                raise
            if self.out.is_dir() and any(name.name[0] != "." for name in self.out.iterdir()):
                problem = f"was not made by s2d (no {MANIFEST})"
                raise UsageError(problem, where=str(self.out), hint="name the run folder of a trainer") from None
            return None
        if manifest["command"] not in TRAINERS:
            problem = f"was written by s2d {manifest['command']}; --watch follows {', '.join(TRAINERS)}"
            raise UsageError(problem, where=str(self.out))
        return manifest

    def _note_progress(self, path: Path) -> None:
        seen, now = (self.metrics.file, len(self.rows)), time.monotonic()
        if seen == self._seen:
            return
        if self._seen[1] < 0:  # what was there already is as old as the file says, if the clocks agree
            age = max(0.0, time.time() - path.stat().st_mtime) if self.rows and path.exists() else 0.0
            self._changed = now - age
        else:
            grown = seen[0] == self._seen[0] and seen[1] > self._seen[1]
            if not grown or self._first is None:
                self._first = (now, self.step)
            self._changed = now
        self._seen = seen

    def _state(self) -> State:
        if self.manifest["complete"]:
            return State.finished
        runs = False if self.owner is None else self.owner.runs
        self._gone = self._gone + 1 if runs is False else 0
        if runs is False:
            return State.stopped if self._gone >= GONE_LOOKS else self.state if self.state is not State.absent else State.unknown
        return State.running if runs else State.unknown

    @property
    def rows(self) -> Rows:
        return self.metrics.rows

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None where a version of s2d has made it that did not note them."""
        planned = self.manifest.get("planned_steps", self.manifest["options"].get("steps"))
        return planned if isinstance(planned, int) else None

    @property
    def silence(self) -> float:
        """Seconds since the last step."""
        return time.monotonic() - self._changed

    def step_seconds(self) -> float:
        """Mean time of the recent steps, saving included; 0 if there are none."""
        recent = self.rows[-RECENT:]
        return sum(row["seconds"] + _number(row.get("save_seconds")) for row in recent) / len(recent) if recent else 0.0

    def seconds_left(self) -> float | None:
        """Estimate how long the run still takes; None if that is not known."""
        if self.steps is None or not self.rows or self.state is State.stopped:
            return None
        each = self.step_seconds()
        if self._first and self.step - self._first[1] >= OBSERVED:
            each = (self._changed - self._first[0]) / (self.step - self._first[1])
        return max(0, self.steps - self.step) * each

    def is_silent(self) -> bool:
        """Whether the next step is long overdue."""
        return self.silence > max(SILENT_SECONDS, SILENT_STEPS * self.step_seconds())

    def process(self) -> str:
        return f"process {self.owner.pid} on {self.owner.host}" if self.owner and self.owner.host else "its process"

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """Return the last evaluation up to a step."""
        rows = [*takewhile(lambda row: row["step"] <= step, self.evals.rows)]
        return rows[-1] if rows else None


def follow(out: Path) -> None:
    """Show a run until it ends: on a terminal as a picture, elsewhere a line for each step (JSON, if standard output is no terminal).

    A terminal waits for a run that has stopped to be resumed. Raises S2DError elsewhere, UsageError for what is no run, and DataError.
    """
    stream = console.claim_stdout()
    live = stream.isatty() and console.live_display()
    run, told, file, warned = Watched(out), 0, None, 0.0
    with console.screen() if live else nullcontext() as show:
        while True:
            run.look()
            if live:
                show(picture(run, console.stderr.width, plain=not console.stderr.encoding.lower().startswith("utf")))
            else:
                told = 0 if run.metrics.file != file else min(told, len(run.rows))
                file = run.metrics.file
                for row in run.rows[told:]:
                    stream.write(_line(run, row, json=not stream.isatty()))
                stream.flush()
                told = len(run.rows)
                warned = _warn(run, warned)
            if run.state is State.finished:
                if not live and not stream.isatty():
                    stream.write(jsonl.dumps({"state": run.state, "step": run.step, "steps": run.steps}))
                    stream.flush()
                return
            if run.state is State.stopped and not live:
                hint = f"the same s2d {run.manifest['command']} command with --resume continues it"
                raise S2DError(f"stopped after step {run.step}{_of(run)}, before it was finished", where=str(out), hint=hint)
            time.sleep(POLL_SECONDS)


def _of(run: Watched) -> str:
    return "" if run.steps is None else f" of {run.steps}"


def _line(run: Watched, row: dict[str, Any], *, json: bool) -> bytes:
    seconds = run.seconds_left() if row is run.rows[-1] else None
    if json:
        return jsonl.dumps({**row, "steps": run.steps, "seconds_left": seconds})
    left = "" if seconds is None else f"about {_duration(seconds)} left"
    return console.printable(console.step_line(row, run.evaluation(row["step"]), run.steps or "?", left)).encode() + b"\n"


def _warn(run: Watched, warned: float) -> float:
    """Say at ever longer intervals, of SILENT_SECONDS at first, that nothing happens. Returns the silence that was told of last."""
    if run.state is State.absent or not run.is_silent():
        return 0.0
    if run.silence < max(2 * warned, SILENT_SECONDS):
        return warned
    console.warn(f"{run.out}: {_standing(run)}")
    return run.silence


# What is shown


def picture(run: Watched, width: int, *, plain: bool) -> str:
    """Return a run as text of so many columns; `plain` in ASCII."""
    if run.state is State.absent:
        return f"{run.out}: no run yet; waiting for one to begin"
    lines = [_headline(run), _standing(run), ""]
    if run.rows:
        curves = [curve for curve in CURVES if any(isinstance(row.get(curve[1]), int | float) for row in run.rows)]
        room = width - LABEL - 3 * (VALUE + 1) - 1
        wide = max(NARROWEST, room)
        if not plain and curves:
            lines += _chart(curves[0], run.rows, width)
        lines.append(f"{'':{LABEL}}{'last':>{VALUE}} {'lowest':>{VALUE}} {'highest':>{VALUE}}  steps {run.rows[0]['step']} to {run.step}")
        lines += [_curve(curve, run.rows, wide, ASCII_BARS if plain else BARS) for curve in curves]
        lines += ["", _rates(run)]
    if run.evals.rows:
        lines += ["", *_evaluations(run.evals.rows, max(NARROWEST, room) if run.rows else NARROWEST, ASCII_BARS if plain else BARS)]
    return "\n".join(lines)


def _headline(run: Watched) -> str:
    share = f" ({run.step / run.steps:.0%})" if run.steps else ""
    seconds = run.seconds_left()
    left = "" if seconds is None or run.state is State.finished else f", about {_duration(seconds)} left"
    return f"{run.out}: {run.manifest['command']}, step {run.step}{_of(run)}{share}{left}"


def _standing(run: Watched) -> str:
    ago = f"the last step came {_duration(run.silence)} ago" if run.rows else f"no step yet after {_duration(run.silence)}"
    if run.state is State.finished:
        return "finished"
    if run.state is State.stopped:
        return f"stopped: {run.process()} has ended; waiting for --resume (Ctrl-C ends)"
    usual = f"; steps take {run.step_seconds():.3g} s" if run.rows else ""
    silent = f"no new step for {_duration(run.silence)}{usual}" if run.is_silent() else ago
    if run.state is State.running:
        return f"{silent}; {run.process()} is running"
    return f"{silent}; whether {run.process()} is still running cannot be seen from here" if run.is_silent() else silent


def _rates(run: Watched) -> str:
    recent = run.rows[-RECENT:]
    seconds, tokens = (sum(_number(row.get(name)) for row in recent) for name in ("seconds", "tokens"))
    rates = [f"{run.step_seconds():.3g} s/step", f"{tokens / seconds:,.0f} tokens/s trained" if seconds else ""]
    for name in ("sample", "update"):
        values = [row[f"{name}_tokens_per_second"] for row in recent if row.get(f"{name}_tokens_per_second")]
        if values:
            rates.append(f"{name} {sum(values) / len(values):,.0f} tokens/s")
    return f"{', '.join(filter(None, rates))} ({console.shares(run.rows[-1])})"


def _evaluations(rows: Rows, width: int, bars: str) -> Iterator[str]:
    """Yield the lines of avg@k, or of the mean reward where the rewards have no notion of right."""
    for label, name, error in ((f"avg@{rows[0].get('k')}", "avg_at_k", "se"), ("mean reward", "mean_reward", "mean_reward_se")):
        known = [row for row in rows if isinstance(row.get(name), float)]
        if known:
            ends = known if len(known) == 1 else (known[0], known[-1])
            values = ", ".join(f"{row[name]:.1%} ± {_number(row.get(error)):.1%} at step {row['step']}" for row in ends)
            yield f"{label:{LABEL}}{values}  {sparkline([row[name] for row in known], width, bars)}"
            return


def _curve(curve: tuple[str, str, str], rows: Rows, width: int, bars: str) -> str:
    label, name, style = curve
    values = _values(rows, name)
    known = [value for value in values if value is not None]
    last = "-" if values[-1] is None else format(values[-1], style)
    return f"{label:{LABEL}}{last:>{VALUE}} {min(known):>{VALUE}{style}} {max(known):>{VALUE}{style}}  {sparkline(values, width, bars)}"


def _chart(curve: tuple[str, str, str], rows: Rows, width: int) -> Iterator[str]:
    """Yield the lines of a chart in braille, two values to a character and four dots high, with its bounds at the left."""
    label, name, style = curve
    wide = width - LABEL
    values = shortened(_values(rows, name), 2 * wide)
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    values = stretched(values, 2 * wide)
    dots = 4 * CHART_ROWS
    cells = [[0] * wide for _ in range(CHART_ROWS)]
    for column, value in enumerate(values):
        if value is not None:
            height = round((value - low) / (high - low) * (dots - 1)) if high > low else 0
            row, dot = divmod(dots - 1 - height, 4)
            cells[row][column // 2] |= DOTS[column % 2][dot]
    marks = {0: format(high, style), CHART_ROWS - 1: format(low, style), CHART_ROWS // 2: label}
    for number, row in enumerate(cells):
        yield f"{marks.get(number, ''):>{LABEL - 1}} {''.join(chr(0x2800 + cell) for cell in row).rstrip(chr(0x2800))}"
    yield ""


def _values(rows: Rows, name: str) -> list[float | None]:
    return [float(row[name]) if isinstance(row.get(name), int | float) else None for row in rows]


def sparkline(values: Sequence[float | None], width: int, bars: str = BARS) -> str:
    """Return values as bars between the lowest and the highest, means of neighbours where there are more than `width`."""
    values = shortened(values, width)
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    level = len(bars) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else bars[min(len(bars) - 1, int((value - low) * level))] for value in values)


def shortened(values: Sequence[float | None], width: int) -> list[float | None]:
    """Return values as they are, or if they are more than `width` the means of as many parts of them."""
    if len(values) <= width:
        return list(values)
    found: list[float | None] = []
    for number in range(width):
        part = [value for value in values[len(values) * number // width : len(values) * (number + 1) // width] if value is not None]
        found.append(sum(part) / len(part) if part else None)
    return found


def stretched(values: Sequence[float | None], width: int) -> list[float | None]:
    """Return values with others on straight lines between them, `width` in all; gaps stay gaps."""
    if len(values) < 2:
        return list(values)
    found: list[float | None] = []
    for number in range(width):
        index, rest = divmod(number * (len(values) - 1), width - 1)
        one, other = values[index], values[min(index + 1, len(values) - 1)]
        found.append(one if not rest else None if one is None or other is None else one + (other - one) * rest / (width - 1))
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
