"""JSON lines in and out: one object per line, bytes split at `\\n` only, ASCII output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from s2dcli import console
from s2dcli.errors import DataError, UsageError

STDIN = "-"


class Line(NamedTuple):
    """One JSON object of a file: `where` is `file:number`, ready for an error message."""

    where: str
    record: dict


def dumps(record: dict) -> bytes:
    """Return one line of ASCII JSON with its newline. Raises ValueError on NaN or infinity."""
    return json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def is_stream(path: str | Path) -> bool:
    return str(path) == STDIN


def input_name(path: str | Path) -> str:
    return "standard input" if is_stream(path) else str(path)


@contextmanager
def open_input(path: str | Path, expects: str) -> Iterator[BinaryIO]:
    """Open a file, or standard input for `-`; `expects` says what belongs there."""
    if is_stream(path):
        if sys.stdin.isatty():
            raise UsageError(f"nothing to read: pipe {expects} into this command or name a file")
        yield sys.stdin.buffer
        return
    try:
        stream = open(path, "rb")  # noqa: SIM115 - closed below
    except IsADirectoryError:
        raise DataError(f"is a folder, not a file of {expects}", where=str(path)) from None
    except OSError as error:
        raise DataError(f"cannot read {expects}: {error.strerror}", where=str(path)) from None
    with stream:
        yield stream


def parse_line(raw: bytes, where: str) -> dict:
    """Return the JSON object on one line. Raises DataError that says what is wrong, and where."""
    try:
        record = json.loads(raw)
    except RecursionError:
        raise DataError("JSON nested deeper than the parser allows", where=where) from None
    except ValueError as error:
        raise DataError(f"not a line of JSON ({error})", where=where) from None
    if not isinstance(record, dict):
        raise DataError(f"a JSON object was expected, this is a {type(record).__name__}", where=where)
    return record


def read(path: str | Path, expects: str) -> Iterator[Line]:
    """Yield the objects of a JSONL file as they come; blank lines are passed over.

    Raises DataError at the first line that is no JSON object.
    """
    name = input_name(path)
    with open_input(path, expects) as stream:
        for number, raw in enumerate(stream, 1):
            if raw.strip():
                where = f"{name}:{number}"
                yield Line(where, parse_line(raw, where))


class Writer:
    """Writes records to a file or to standard output, each line flushed as a whole."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self.name = name
        self.count = 0

    def write(self, record: dict) -> None:
        self._stream.write(dumps(record))
        self.count += 1

    def flush(self) -> None:
        self._stream.flush()


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raise UsageError if the output exists and `--overwrite` was not given."""
    if not overwrite and os.path.lexists(path):
        raise UsageError("output exists", where=str(path), hint="--overwrite replaces it, or choose another -o")


@contextmanager
def open_output(path: str | Path, *, overwrite: bool = False) -> Iterator[Writer]:
    """Open a file for records, or standard output for `-`; flushed and closed at the end."""
    if is_stream(path):
        writer = Writer(console.claim_stdout(), "standard output")
        yield writer
        writer.flush()
        return
    refuse_existing(path, overwrite)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "wb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DataError(f"cannot write: {error.strerror}", where=str(path)) from None
    with stream:
        yield Writer(stream, str(path))


def print_result(result: dict) -> None:
    """Print one JSON object on standard output: a command's closing line for scripts."""
    out = console.claim_stdout()
    out.write(dumps(result))
    out.flush()
