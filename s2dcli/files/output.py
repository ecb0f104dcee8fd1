"""Output files that survive being killed: a manifest beside them, whole lines, and a way to go on.

    FILE           rows, in the order of the input
    FILE.s2d.json  what makes it, written before the first row; `complete` after the last one

What a killed command leaves are whole lines in order, but for the last one. `--resume` checks that
the manifest describes the same work, cuts the torn line, and goes on after the rows that are there.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from s2dcli import console
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.atomic import disk_errors, remove_leftovers
from s2dcli.files.lock import locked
from s2dcli.files.manifest import file_sha256, read_manifest, refuse_differences, sidecar, write_json


class Kept(NamedTuple):
    """One whole line of an unfinished output."""

    where: str
    raw: bytes
    record: dict


def is_file(path: str | Path) -> bool:
    """Whether an output is, or will be, an ordinary file: pipes and devices have no manifest."""
    return not jsonl.is_stream(path) and (os.path.isfile(path) or not os.path.lexists(path))


def check_output(path: str | Path, *, overwrite: bool, resume: bool) -> None:
    """Raise UsageError if there is an output that may not be replaced, or none that could be resumed."""
    if overwrite and resume:
        raise UsageError("--overwrite begins anew and --resume goes on", hint="leave one of them out")
    if resume and not is_file(path):
        raise UsageError("--resume goes on with a file", where=jsonl.output_name(path), hint="-o FILE names it")
    if not jsonl.is_stream(path):
        jsonl.refuse_existing(path, overwrite or resume)


def begun(output: Path, manifest_path: Path, new: dict[str, Any], may_change: Collection[str] = ()) -> dict[str, Any] | None:
    """Return the manifest of what `--resume` goes on with; None if nothing has begun.

    Raises UsageError if a file has no manifest, or an output one that describes other work than `new`.
    """
    if not manifest_path.exists():
        if output.is_file():
            raise UsageError(
                f"cannot be resumed: without {manifest_path.name} it is not known what made it",
                where=str(output),
                hint="--overwrite begins anew",
            )
        return None
    old = read_manifest(manifest_path)
    refuse_differences(output, old, new, may_change)
    return old


def is_finished(path: str | Path, old: dict[str, Any] | None) -> bool:
    """Whether a file is all there, as its manifest says; then there is nothing left to do."""
    if old is None or not old["complete"] or not os.path.isfile(path) or file_sha256(path) != old["output_sha256"]:
        return False
    console.info(f"{path} is complete already")
    return True


def kept_lines(path: str | Path, count: int | None = None) -> Iterator[Kept]:
    """Yield the whole lines of an unfinished file up to the first that is none, `count` of them at most."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as stream:
        for number, raw in enumerate(stream, 1):
            if number - 1 == count or not raw.endswith(b"\n"):
                return
            where = f"{path}:{number}"
            try:
                record = jsonl.parse_line(raw, where)
            except DataError:
                return
            yield Kept(where, raw, record)


def cut_after(path: str | Path, count: int) -> None:
    """Cut a file after `count` lines."""
    with open(path, "r+b") as stream:
        for _ in range(count):
            stream.readline()
        stream.truncate(stream.tell())


@contextmanager
def open_recorded(
    path: str | Path, manifest: dict[str, Any], *, overwrite: bool = False, kept: int | None = None
) -> Iterator[jsonl.Writer]:
    """Open an output with its manifest beside it; the body adds `counts` to the manifest before it ends.

    `kept` is None for a new file, or the number of lines after which an old one goes on. No other process
    may write there meanwhile. Raises UsageError if one does, DataError if the file system refuses.
    """
    if not is_file(path):
        with jsonl.open_output(path, overwrite=overwrite) as writer:
            yield writer
        return
    path = Path(path)
    if kept is None:
        jsonl.refuse_existing(path, overwrite)
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        with disk_errors("write", path):
            remove_leftovers(path.parent, f"{sidecar(path).name}.")
            if path.exists():
                cut_after(path, kept or 0)  # before the manifest is new, so that no old rows lie beside it
            if kept is None:
                write_json(sidecar(path), {**manifest, "complete": False})
        with jsonl.open_output(path, append=True) as writer:
            yield writer
            writer.sync()
        with disk_errors("write", sidecar(path)):
            write_json(sidecar(path), {**manifest, "complete": True, "output_sha256": file_sha256(path)})
