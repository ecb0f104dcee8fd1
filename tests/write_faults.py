"""Lets each call fail that writes to a run folder, one after the other. Run with write_faults.c preloaded; prints what it saw as JSON.

    LD_PRELOAD=write_faults.so python tests/write_faults.py FOLDER EVERY

First every call of one save fails, in this process; if EVERY is 1 with each of ERRORS, else with two. Then
training commands in children of it have every EVERY-th of their calls fail or kill them, and are resumed.
Only calls that go through the C library are seen: of safetensors' own, the writes.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from faults import differing
from zygote import TOY, fork, wait, warm_up

from s2dcli import console
from s2dcli.errors import DataError
from s2dcli.files.atomic import is_temporary
from s2dcli.files.checkpoint import read_training_state, write_checkpoint, write_training_state
from s2dcli.files.manifest import describe
from s2dcli.files.run_folder import RunFolder

SIGNALS = {"SIGKILL": -signal.SIGKILL, "SIGINT": 130, "SIGTERM": 143}  # and what a command ends with
# What a full disk or quota says goes on; an I/O error may hit one call alone.
ERRORS = {"ENOSPC": (errno.ENOSPC, True), "EDQUOT": (errno.EDQUOT, True), "EROFS": (errno.EROFS, True), "EIO": (errno.EIO, False)}
preloaded = ctypes.CDLL(None)


def arm(folder: Path, nth: int, error: int, lasting: bool) -> None:
    preloaded.faults_arm(str(folder).encode(), ctypes.c_long(nth), error, lasting)


def open_folder(out: Path) -> RunFolder:
    return RunFolder(out, describe("grpo", {"steps": 2}), steps=2, resume=True)


def fail_saves(model: torch.nn.Module, folder: Path, name: str) -> int:
    """Let the calls of a save fail one by one; returns their number."""
    error, lasting = ERRORS[name]
    before, out = folder / "before", folder / "out"

    def save(run: RunFolder, step: int) -> None:
        def fill(draft: Path) -> None:
            write_checkpoint(draft, model, TOY / "student", torch.float32)
            write_training_state(draft / "training_state", ((name, value + step) for name, value in model.state_dict().items()))

        run.add_row({"step": step})
        run.save(step, {"steps": step}, {"label"}, fill)

    for path, steps in ((before, 1), (folder / "after", 2)):
        shutil.rmtree(path, ignore_errors=True)
        with open_folder(path) as run:
            for step in range(1, steps + 1):
                save(run, step)
    nth = 0
    while True:
        nth += 1
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(before, out)
        said = ""
        with open_folder(out) as run:
            arm(out, nth, error, lasting)
            try:
                save(run, 2)
            except DataError as failure:
                said = str(failure)
            calls = preloaded.faults_disarm()
        if not said:  # nothing failed, or nothing that matters: to make a folder that is there
            assert differing(folder / "after", out) == ["s2d.json"], f"call {nth} fails unnoticed"
            if calls < nth:
                return calls
            continue
        assert str(out) in said, f"call {nth}: {said!r} does not name the place"
        assert os.strerror(error) in said, f"call {nth}: {said!r} does not say why"
        assert "\n" not in said
        assert [path for path in out.rglob("*") if is_temporary(path)] == [], f"call {nth} left litter"
        # The old step is as it was; the new one is whole or not there.
        assert differing(before / "step-000001", out / "step-000001") == []
        if (out / "step-000002").exists():
            assert differing(folder / "after" / "step-000002", out / "step-000002") == []
        named = (out / "latest").read_text().strip()
        with open_folder(out) as run:
            assert run.step >= int(named[-1])
            assert sum(value.sum() for _, value in read_training_state(run.checkpoint / "training_state")).isfinite()


def run_command(arguments: list[str], folder: Path, nth: int = 0, error: int = 0, lasting: bool = False) -> int:
    """Run a training command in a child, whose `nth` call fails if that is not 0; returns its exit code."""
    if nth:
        arm(folder / "run", nth, error, lasting)
    with open(os.devnull, "rb") as null, open(folder / "log", "wb") as log:
        pid = fork([*arguments, "-o", str(folder / "run"), "--resume"], null.fileno(), log.fileno(), log.fileno())
    preloaded.faults_disarm()
    return wait(pid)


def fail_runs(folder: Path, every: int) -> tuple[int, list[str]]:
    """Let every `every`-th call of a run fail or kill it, and resume it; returns the number of faults, and files that differ."""
    arguments = [
        *["grpo", "--model", str(TOY / "teacher"), str(TOY / "problems" / "validation.jsonl"), "--reward", "exact", "--workers", "1"],
        *["--steps", "2", "--problems-per-step", "2", "-n", "2", "--max-tokens", "8", "--lr", "1e-3", "--save-every", "1"],
        "--keep-rollouts",
    ]
    kinds = {**{name: (-signal.Signals[name], False) for name in SIGNALS}, **ERRORS}
    run, whole = folder / "run", folder / "whole"
    assert run_command(arguments, folder) == 0, (folder / "log").read_text()
    run.rename(whole)
    nth, faults, mismatches = 1, 0, []
    while True:
        name = list(kinds)[faults % len(kinds)]
        error, lasting = kinds[name]
        code = run_command(arguments, folder, nth, error, lasting)
        if code == 0:
            return faults, mismatches
        log = (folder / "log").read_text()
        assert code == SIGNALS.get(name, 1), f"{name} at call {nth}: exit code {code}: {log}"
        if name in ERRORS:
            assert [line for line in log.splitlines() if "error: " in line and os.strerror(error) in line], log
        if name != "SIGKILL":
            assert [path for path in run.rglob("*") if is_temporary(path)] == [], f"{name} at call {nth} left litter"
        assert run_command(arguments, folder) == 0, (folder / "log").read_text()
        mismatches += [f"{name} at call {nth}: {path}" for path in differing(whole, run)]
        shutil.rmtree(run)
        nth, faults = nth + every, faults + 1


def main(folder: Path, every: int) -> None:
    from transformers import AutoModelForCausalLM

    warm_up()
    console.configure(quiet=True, verbose=False)
    model = AutoModelForCausalLM.from_pretrained(TOY / "student")
    saves = {name: fail_saves(model, folder, name) for name in (ERRORS if every == 1 else ("ENOSPC", "EIO"))}
    faults, mismatches = fail_runs(folder, every)
    print(json.dumps({"saves": saves, "faults": faults, "mismatches": mismatches}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
