"""JSON lines in and out: one object per line, bytes split at `\\n` only, ASCII output."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import select
import shlex
import stat
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from s2dcli import console, world
from s2dcli.errors import DataError, UsageError

STDIN = "-"
# Seconds of output that a crash of the machine may cost; a process that dies costs none that was flushed.
SYNC_SECONDS = 30.0


class Line(NamedTuple):
    """One JSON object of a file: `where` is `file:number`, ready for an error message."""

    where: str
    record: dict


def dumps(record: dict) -> bytes:
    """Return one line of ASCII JSON with its newline. Raises ValueError on NaN or infinity."""
    return json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def sha256(records: Iterable[dict]) -> str:
    """Hash of records, as a file of them would have it."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(dumps(record))
    return digest.hexdigest()


def is_stream(path: str | Path) -> bool:
    """Whether a path is standard input or output; `./-`, or a Path of it, is a file of that name."""
    return path == STDIN or str(path) in ("/dev/stdin", "/dev/stdout")


def output_name(path: str | Path) -> str:
    return "standard output" if is_stream(path) else str(path)


def input_name(path: str | Path) -> str:
    return "standard input" if is_stream(path) else str(path)


_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_UTF16 = ("UTF-16 text", "iconv -f UTF-16 -t UTF-8 {} > utf8.jsonl")
# First bytes of other formats: their names, and the commands that convert them
_FOREIGN = {
    _GZIP: ("gzip-compressed", "gunzip -c {} | s2d ..."),
    _ZSTD: ("zstd-compressed", "zstd -dc {} | s2d ..."),
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"PAR1": ("a parquet file", 'python -c \'import datasets; datasets.Dataset.from_parquet("{}").to_json("rows.jsonl")\' converts it'),
}
# One of these names in a first line that is not JSON shows a table's header.
_COLUMNS = {b"prompt", b"problem", b"question", b"answer", b"solution", b"completion", b"reward", b"ground_truth"}


@contextmanager
def open_input(path: str | Path, expects: str) -> Iterator[BinaryIO]:
    """Open a file, or standard input for `-`; `expects` says what belongs there.

    A file that is compressed with gzip or zstd, whatever its name, is read decompressed.
    """
    if is_stream(path):
        if sys.stdin is None:
            raise UsageError(f"standard input is closed: pipe {expects} into this command or name a file")
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
        # A pipe is not waited for here: what comes through one shows at its first line.
        start = stream.peek(len(_ZSTD)) if stat.S_ISREG(os.fstat(stream.fileno()).st_mode) else b""
        if not start.startswith((_GZIP, _ZSTD)):
            yield stream
            return
        try:
            with gzip.open(stream) if start.startswith(_GZIP) else _open_zstd(stream) as content:
                yield content
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise DataError(f"the compressed file is damaged or cut short ({error})", where=str(path)) from None


def _open_zstd(stream: BinaryIO) -> BinaryIO:
    import pyarrow  # which is there for parquet, and knows zstd

    content = io.BufferedReader(pyarrow.input_stream(stream, compression="zstd"))
    content.fileno = stream.fileno  # pyarrow's has none
    return content


def _refuse_foreign(raw: bytes, name: str, expects: str) -> None:
    """Raise DataError if the first line of a file shows that its format is not JSON lines."""
    head = raw.strip()
    if head.startswith(b"{") and head[1:2] != b"\0":
        return
    cells = {cell.strip(b'" ').lower() for cell in re.split(rb"[,\t]", head)}
    found = next((_FOREIGN[start] for start in _FOREIGN if raw.startswith(start)), None)
    if head == b"[" or head.startswith(b"[{"):
        found = ("a JSON array", "jq -c '.[]' {} > rows.jsonl")
    elif raw[:1] == b"\0" or raw[1:2] == b"\0":
        found = _UTF16
    elif len(cells) > 1 and (cells & _COLUMNS or name.lower().endswith((".csv", ".tsv"))):
        kind, option = ("TSV", ', delimiter="\\t"') if b"\t" in head else ("CSV", "")
        script = f"import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(sys.stdin{option})]"
        found = (kind, f"python -c '{script}' < {{}} > rows.jsonl")
    if found:
        what, command = found
        if expects == "problems" and name.lower().endswith((".csv", ".tsv", ".parquet")):
            command = "s2d prepare {} -o problems.jsonl"
        file = "FILE" if name == input_name(STDIN) else shlex.quote(name)
        raise DataError(f"is {what}, JSON lines were expected", where=name, hint=command.replace("{}", file))


def parse_line(raw: bytes, where: str, **decoding: Any) -> dict:
    """Return the JSON object on one line. Raises DataError that says what is wrong, and where."""
    try:
        record = json.loads(raw, **decoding)
    except RecursionError:
        raise DataError("JSON nested deeper than the parser allows", where=where) from None
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"not a line of JSON ({error})", where=where) from None
    if not isinstance(record, dict):
        kind = {list: "list", str: "text", bool: "boolean", type(None): "null"}.get(type(record), "number")
        raise DataError(f"a JSON object was expected, this is {kind}", where=where)
    return record


def read_raw(path: str | Path, expects: str) -> Iterator[tuple[str, bytes]]:
    """Yield (where, line) of a JSONL file as they come; blank lines are skipped. Raises DataError if it shows another format."""
    name = input_name(path)
    with open_input(path, expects) as stream:
        for number, raw in enumerate(stream, 1):
            if number == 1:
                _refuse_foreign(raw, name, expects)
            if not raw.isspace():
                yield f"{name}:{number}", raw


def read(path: str | Path, expects: str) -> Iterator[Line]:
    """Yield the objects of a JSONL file as they come; blank lines are skipped.

    Raises DataError at the first line that is not a JSON object.
    """
    for where, raw in read_raw(path, expects):
        yield Line(where, parse_line(raw, where))


def parse_strict(raw: bytes, where: str) -> dict:
    """Like `parse_line`, and NaN and Infinity, which are no JSON, are refused too."""

    def refuse(constant: str) -> None:
        raise DataError(f"not a line of JSON ({constant} is no JSON number)", where=where)

    return parse_line(raw, where, parse_constant=refuse)


_CHUNK = 1 << 18  # bytes read at a time
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def _escape(match: re.Match[str]) -> str:
    point = ord(match[0])
    if point < 0x10000:
        return f"\\u{point:04x}"
    return f"\\u{0xD800 + (point - 0x10000 >> 10):04x}\\u{0xDC00 + (point - 0x10000 & 0x3FF):04x}"


def with_fields(raw: bytes, record: dict, fields: dict) -> bytes:
    """Return the line `raw`, which parses to `record`, with `fields` added, as ASCII JSON.

    What the line held stays as it was written, to the digit, unless it already has one of the
    fields: then the record is written again without it.
    """
    added = dumps(fields)[1:]
    if not record.keys().isdisjoint(fields):
        try:
            kept = dumps({name: value for name, value in record.items() if name not in fields}).rstrip()
        except (ValueError, RecursionError):  # 1e999; of a name given twice, readers take the last
            kept = b""
    else:
        kept = b""
    if not kept:
        text = raw.decode(json.detect_encoding(raw), "surrogatepass").strip().lstrip("\ufeff")
        kept = _NOT_ASCII.sub(_escape, text).encode("ascii")
    body = kept[:-1].rstrip()
    return body + (added if body == b"{" else b", " + added)


class RawLines:
    """The lines of a file or pipe as (where, bytes), blank ones skipped.

    `ready` tells whether the next one is there without waiting, `fileno` what to wait for.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._poll = select.poll()
        self._poll.register(stream, select.POLLIN)
        self._name = name
        self._lines: deque[bytes] = deque()
        self._partial: list[bytes] = []
        self._ended = False
        self._number = 0

    def fileno(self) -> int:
        return self._stream.fileno()

    def _fill(self) -> None:
        chunk = self._stream.read1(_CHUNK)  # what is there, without waiting for more
        head, newline, rest = chunk.partition(b"\n")
        self._partial.append(head)
        if newline or not chunk:
            lines = [b"".join(self._partial), *rest.split(b"\n")] if newline else [b"".join(self._partial), b""]
            self._partial = [lines.pop()]
            self._lines.extend(lines)
        self._ended = not chunk

    def ready(self) -> bool:
        """Whether a line, or the end, can be had at once."""
        while not self._lines and not self._ended:
            if not self._poll.poll(0):
                return False
            self._fill()
        return True

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        return self

    def __next__(self) -> tuple[str, bytes]:
        while True:
            while not self._lines and not self._ended:
                self._fill()
            if not self._lines:
                raise StopIteration
            raw = self._lines.popleft()
            self._number += 1
            if self._number == 1:
                _refuse_foreign(raw, self._name, "rollouts")
            if raw.strip():
                return f"{self._name}:{self._number}", raw


class Writer:
    """Writes records to a file or to standard output, a line each; `flush` hands them on.

    Raises DataError when the disk is full or fails; what was written before is there still.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._synced = time.monotonic()
        self.name = name
        self.count = 0

    def write(self, record: dict) -> None:
        self.write_line(dumps(record))

    def write_line(self, line: bytes) -> None:
        """Write one line that is already JSON, with its newline."""
        with self._failing():
            self._stream.write(line)
        self.count += 1

    def flush(self) -> None:
        """Hand on what was written, and every SYNC_SECONDS see that a file is on the disk."""
        with self._failing():
            self._stream.flush()
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """See that all of a file is on the disk, so that it survives a crash of the machine."""
        with self._failing():
            self._stream.flush()
            if stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode):
                os.fsync(self._stream.fileno())
        self._synced = time.monotonic()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # the reader has left: no failure
            raise
        except OSError as error:
            raise DataError(f"cannot write: {error.strerror}", where=self.name) from None


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Raise UsageError if the output exists and `--overwrite` was not given; devices and FIFOs are written to."""
    is_special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    if not overwrite and os.path.lexists(path) and not is_special:
        raise UsageError("output exists", where=str(path), hint="--overwrite replaces it, or choose another -o")


@contextmanager
def open_output(path: str | Path, *, overwrite: bool = False, append: bool = False) -> Iterator[Writer]:
    """Open a file for records, or standard output for `-`; flushed and closed at the end.

    An existing file is refused unless `overwrite` or `append` is given.
    """
    if is_stream(path):
        writer = Writer(console.claim_stdout(), output_name(path))
        yield writer
        writer.flush()
        return
    refuse_existing(path, overwrite or append)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "ab" if append else "wb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise DataError(f"cannot write: {error.strerror}", where=str(path)) from None
    writer = Writer(stream, output_name(path))
    try:
        yield writer
        writer.flush()
    finally:
        with suppress(OSError):  # `flush` has told of it, or something worse is under way
            stream.close()


def print_result(result: dict, table: Callable[[dict], list[tuple[str, str]]] | None = None) -> None:
    """Print one JSON object on standard output: a command's closing line for scripts. A terminal is shown its `table`."""
    if not world.is_main():
        return
    out = console.claim_stdout()
    out.write(console.aligned(table(result)).encode() if table and out.isatty() else dumps(result))
    out.flush()
