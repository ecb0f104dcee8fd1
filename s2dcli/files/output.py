"""Outputs that survive being killed: what may be written, resumed or replaced, and files of rows with a manifest.

    FILE           rows, in the order of the input
    FILE.s2d.json  what makes it, written before the first row; `complete` after the last one

What a killed command leaves are complete lines in order, but for the last one. `--resume` checks that
the manifest describes the same work, cuts the torn line, and continues after the rows that are there.
`--overwrite` writes to a temporary name, and replaces the old file when the new one is complete.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from s2dcli import console
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.atomic import disk_errors, remove_leftovers, sync, temporary
from s2dcli.files.lock import locked
from s2dcli.files.manifest import file_sha256, read_manifest, refuse_differences, sidecar, write_json


class CompleteLine(NamedTuple):
    """One complete line of an unfinished output."""

    where: str
    raw: bytes
    record: dict


# What may be written to; files and folders alike


def refuse_both(overwrite: bool, resume: bool) -> None:
    if overwrite and resume:
        raise UsageError("--overwrite restarts and --resume resumes", hint="give one of them")


def refuse_inputs(out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise UsageError if an input is the output itself, by whatever name or link, or one of the two holds the other's content."""
    if jsonl.is_stream(out) or not os.path.exists(out):
        return
    place = Path(out).resolve()
    for name in inputs:
        if jsonl.is_stream(name) or not os.path.exists(name):  # a pipe, or an id of the hub
            continue
        source = Path(name).resolve()
        if place.is_file() and os.path.samefile(out, name):
            raise UsageError("input and output are the same", where=str(out), hint="choose another -o")
        if source.is_relative_to(place):
            problem = f"the output folder holds the input {name}, which --overwrite would delete"
            raise UsageError(problem, where=str(out), hint="choose another -o")
        if place.is_file() and place.is_relative_to(source) and not sidecar(out).is_file():
            raise UsageError(f"is a file of the input {name}", where=str(out), hint="choose another -o")


def inputs_of(manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of files, folders and models that a manifest's work reads from."""
    return [item["path"] for item in manifest["inputs"]] + [parent["name"] for parent in manifest["parents"]]


def refuse_other_kind(out: str | Path, manifest_path: Path, command: str, how: str) -> None:
    """Raise UsageError if another command than `command` has written an output: only its own is replaced or resumed."""
    if manifest_path.is_file() and (made_by := read_manifest(manifest_path)["command"]) != command:
        raise UsageError(f"was written by s2d {made_by}: s2d {command} {how} leaves it alone", where=str(out), hint="choose another -o")


def resumable(output: Path, manifest_path: Path, new: dict[str, Any], may_change: Collection[str] = ()) -> dict[str, Any] | None:
    """Return the manifest of what `--resume` resumes; None if there is nothing yet.

    Raises UsageError if a file has no manifest, was changed after it was finished, or if the manifest describes
    other work than `new`.
    """
    if not manifest_path.exists():
        if output.is_file():
            problem = f"cannot be resumed: without {manifest_path.name} it is not known what made it"
            raise UsageError(problem, where=str(output), hint="--overwrite restarts")
        return None
    old = read_manifest(manifest_path)
    refuse_differences(output, old, new, may_change)
    if old["complete"] and output.is_file() and file_sha256(output) != old.get("output_sha256"):
        raise UsageError("was changed after it was finished (another sha256)", where=str(output), hint="--overwrite restarts")
    return old


# Files


def is_file(path: str | Path) -> bool:
    """Whether an output is, or will be, an ordinary file: pipes and devices have no manifest."""
    return not jsonl.is_stream(path) and (os.path.isfile(path) or not os.path.lexists(path))


def check_output(
    path: str | Path, inputs: Iterable[str | Path] = (), *, command: str = "", overwrite: bool = False, resume: bool = False
) -> None:
    """Raise UsageError if there is an output that may not be replaced, or none that could be resumed."""
    refuse_both(overwrite, resume)
    if resume and not is_file(path):
        raise UsageError("--resume needs a file", where=jsonl.output_name(path), hint="-o FILE names it")
    if not jsonl.is_stream(path):
        jsonl.refuse_existing(path, overwrite or resume)
        refuse_inputs(path, inputs)
        if command and os.path.isfile(path):
            refuse_other_kind(path, sidecar(path), command, "--overwrite" if overwrite else "--resume")


def is_finished(path: str | Path, old: dict[str, Any] | None) -> bool:
    """Whether a file is all there, as its manifest says; then there is nothing left to do."""
    if old is None or not old["complete"] or not os.path.isfile(path):
        return False
    console.info(f"{path} is complete already")
    return True


def complete_lines(path: str | Path, count: int | None = None) -> Iterator[CompleteLine]:
    """Yield the complete lines of an unfinished file up to the first that is none, `count` of them at most."""
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
            yield CompleteLine(where, raw, record)


def truncate_after(path: str | Path, count: int) -> None:
    """Truncate a file after `count` lines."""
    with open(path, "r+b") as stream:
        for _ in range(count):
            stream.readline()
        stream.truncate(stream.tell())


@contextmanager
def open_recorded(
    path: str | Path, manifest: dict[str, Any], *, overwrite: bool = False, kept: int | None = None
) -> Iterator[jsonl.Writer]:
    """Open an output with its manifest beside it; the body adds `counts` to the manifest before it ends.

    `kept` is None for a new file, or the number of lines after which an old one is resumed. A file that is
    overwritten stays as it is until the new one is complete. No other process may write there meanwhile.
    Raises UsageError if one does, DataError if the file system refuses.
    """
    check_output(path, inputs_of(manifest), command=manifest["command"], overwrite=overwrite, resume=kept is not None)
    if not is_file(path):
        with jsonl.open_output(path, overwrite=overwrite) as writer:
            yield writer
        return
    path, described = Path(path), sidecar(path)
    place = Path(os.path.realpath(path))  # where a symbolic link leads to
    with disk_errors("write", path):
        place.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if kept is None:
            jsonl.refuse_existing(path, overwrite)  # as it is now that nobody else writes there
        with disk_errors("write", path):
            remove_leftovers(path.parent, described.name)
            remove_leftovers(place.parent, place.name)
            replacing = kept is None and path.exists()
            if kept is not None and path.exists():
                truncate_after(path, kept)
            if kept is None and not replacing:
                write_json(described, {**manifest, "complete": False})
        target = temporary(place) if replacing else place
        try:
            with jsonl.open_output(target, append=True) as writer:
                writer.name = str(path)
                yield writer
                writer.sync()
            with disk_errors("write", path):
                sha256 = file_sha256(target)
                if replacing:
                    described.unlink(missing_ok=True)  # so that it never lies beside rows of another run
                    os.replace(target, place)
                    sync(place.parent)
                write_json(described, {**manifest, "complete": True, "output_sha256": sha256})
        finally:
            if replacing:
                target.unlink(missing_ok=True)
