"""Frames between the grader's client, its supervisor and the workers.

A frame is a header (kind, part, id, length) and a body of bytes that only its end points decode:
the supervisor routes rows and verdicts without looking into them. Bodies are JSON, which carries
lone surrogates and NUL and, unlike pickle, executes nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

CONFIG = 1  # client -> supervisor: settings, once, first
ROW = 2  # client -> supervisor -> worker: one row to grade
VERDICT = 3  # worker -> supervisor -> client: one reward of one row
CANCEL = 4  # client -> supervisor: forget the rows that wait
READY = 5  # worker -> supervisor -> client: imports are done
FATAL = 6  # worker or supervisor -> client: grading cannot continue

_HEADER = struct.Struct("<BHQI")

CHUNK = 1 << 18  # bytes read from a socket at a time


class Frame(NamedTuple):
    kind: int
    part: int  # index of the reward
    id: int  # number of the row
    body: bytes


def pack(kind: int, body: bytes = b"", *, id: int = 0, part: int = 0) -> bytes:
    return _HEADER.pack(kind, part, id, len(body)) + body


_ENCODER = json.JSONEncoder(separators=(",", ":"))


def encode(value: Any) -> bytes:
    return _ENCODER.encode(value).encode()


def decode(body: bytes) -> Any:
    return json.loads(body)


class Unpacker:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that are complete once `data` has arrived."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _HEADER.size:
                kind, part, id, length = _HEADER.unpack_from(buffer, start)
                end = start + _HEADER.size + length
                if len(buffer) < end:
                    break
                body = bytes(buffer[start + _HEADER.size : end])
                start = end
                yield Frame(kind, part, id, body)
        finally:
            del buffer[:start]
