"""Killing commands at random moments, resuming them, and comparing what they leave with an undisturbed run.

    outcome = kill_and_resume(["rollout", "-m", student, problems, "-n", 2], tmp_path, kills=20, seed=0)
    assert outcome.mismatches == []

Each run is killed with SIGKILL up to KILLS_IN_A_ROW times, each time at a moment drawn from the time
that an undisturbed run takes, and then resumed to its end. Commands are started by
`conftest.start`, which is fast, or with `cold` as a user would.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import start
from zygote import DEADLINE_SECONDS, wait

KILLS_IN_A_ROW = 3
LONG = int(os.environ.get("S2D_TEST_KILLS", "0"))  # kills per stage in the long form: S2D_TEST_KILLS=200 pytest ...
WARM_KILLS = LONG or 4 * KILLS_IN_A_ROW  # commands begin within a tenth of a second, so nearly every one falls into work
COLD_KILLS = 3
# What differs between two undisturbed runs: times, and how the run was started.
_TIME = re.compile(r"(.*_)?(seconds|per_second|share)")
_HOW = ("resume", "overwrite", "out", "commit")


@dataclass
class Outcome:
    """What became of the kills: `mismatches` names files that differ from the undisturbed run's."""

    kills: int = 0  # that hit a running command
    runs: int = 0  # that were brought to their end
    mismatches: list[str] = field(default_factory=list)


def kill_and_resume(arguments: Sequence[object], folder: Path, *, kills: int, seed: int, cold: bool = False) -> Outcome:
    """Run `s2d ARGUMENTS --resume -o OUT` with `kills` kills and compare each result with that of an undisturbed run.

    OUT lies in `folder` and is a file or a folder, as the command makes it. Raises AssertionError if a
    run that nobody kills fails.
    """
    draw = random.Random(seed)
    arguments = [str(argument) for argument in arguments]
    out, expected = folder / "out", folder / "undisturbed"
    begin = time.monotonic()
    _finish(arguments, out, folder, cold)
    duration = time.monotonic() - begin
    for path in folder.glob(f"{out.name}*"):  # runs name themselves in what they write, so all are made in one place
        path.rename(folder / path.name.replace(out.name, expected.name, 1))
    outcome = Outcome()
    while outcome.kills < kills:
        for _ in range(min(KILLS_IN_A_ROW, kills - outcome.kills)):
            killed = _kill(arguments, out, folder, draw.uniform(0, duration), cold)
            outcome.kills += killed
            if not killed:  # it had ended before: the first run, whose time was taken, had more to import
                duration *= 0.9
                break
        _finish(arguments, out, folder, cold)
        outcome.runs += 1
        outcome.mismatches += differing(expected, out)
        remove(out)
    return outcome


def _start(arguments: Sequence[str], out: Path, log: Path, cold: bool) -> int:
    """Start a command in a process group of its own. Returns its pid."""
    command = [*arguments, "--resume", "-o", str(out)]
    with open(os.devnull, "rb") as null, open(log, "wb") as err:
        if cold:
            return subprocess.Popen([sys.executable, "-m", "s2dcli", *command], stdin=null, stdout=err, stderr=err, process_group=0).pid
        return start(command, null.fileno(), err.fileno(), err.fileno())


def _kill(arguments: Sequence[str], out: Path, folder: Path, seconds: float, cold: bool) -> bool:
    """Start a command and kill it after some seconds. Returns whether it was still running."""
    pid = _start(arguments, out, folder / "log", cold)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)  # if it has ended it waits to be collected
    return wait(pid) == -signal.SIGKILL


def _finish(arguments: Sequence[str], out: Path, folder: Path, cold: bool) -> None:
    code = wait(_start(arguments, out, folder / "log", cold), DEADLINE_SECONDS)
    assert code == 0, (folder / "log").read_text()


def remove(out: Path) -> None:
    """Delete an output with what belongs to it."""
    for path in out.parent.glob(f"{out.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def differing(one: Path, other: Path) -> list[str]:
    """Return the names of files that two outputs do not share, or whose contents differ other than in times."""
    ours, theirs = contents(one), contents(other)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def contents(out: Path) -> dict[str, Any]:
    """Return what an output consists of: bytes of files, and JSON without its times where there are any."""
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [*out.parent.glob(f"{out.name}*")]
    names = {path: str(path.relative_to(out)) if out.is_dir() else path.name.removeprefix(out.name) for path in files}
    return {names[path]: _content(path) for path in files}


def _content(path: Path) -> Any:
    if path.name.endswith("s2d.json") or path.name == "results.json":
        return without_times(json.loads(path.read_bytes()))
    if path.name == "metrics.jsonl":
        return [without_times(json.loads(line)) for line in path.read_bytes().splitlines()]
    return path.read_bytes()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if not _TIME.fullmatch(name) and name not in _HOW}
    return [without_times(item) for item in value] if isinstance(value, list) else value
