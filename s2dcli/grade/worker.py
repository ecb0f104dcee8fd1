"""The worker: a forked process that grades one row after the other and may be killed at any time.

It starts with everything imported. Each reward of a row has a soft deadline, a timer that raises
an exception and fires again if that is swallowed on the way; what ignores it (C code) is ended by
the supervisor. What the supervisor has to know about a row whose worker died stands in memory
that both share: whether the gold answer was understood, and what was extracted.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from s2dcli.grade import answer, rewards, wire

FIRST_TICK = 0.02  # seconds after which a row counts as slow: what waits behind it is sent
TICK = 0.1  # seconds between two alarms; the deadline is met to within one, and fires until it is heard
STALL = 0.3  # seconds between two alarms, beyond the time worked, after which the process was stopped or starved in between
GC_THRESHOLD = 50_000  # objects between two collections: parsing makes many and keeps few
TOGETHER = 0.001  # seconds for which verdicts are collected
_PR_SET_PDEATHSIG = 1  # prctl(2)
_NOTE_TEXT = 4000  # bytes of the extracted answer that the shared note holds


class Deadline(BaseException):
    """The soft deadline has passed; a BaseException, so that `except Exception` lets it through."""


class Note:
    """A page shared by worker and supervisor: the row the worker is on, since when, and how far it got."""

    _HEAD = struct.Struct("<QHd?H")  # row, reward, start on the monotonic clock, gold understood, bytes of text

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    def begin(self, id: int, part: int) -> None:
        self._HEAD.pack_into(self._page, 0, id, part, time.monotonic(), False, 0)

    def progress(self, understood: bool, extracted: str) -> None:
        data = extracted.encode("utf-8", "surrogatepass")[:_NOTE_TEXT]
        id, part, started, _, _ = self._HEAD.unpack_from(self._page)
        self._page[self._HEAD.size : self._HEAD.size + len(data)] = data
        self._HEAD.pack_into(self._page, 0, id, part, started, understood, len(data))

    def row(self) -> tuple[int, int, float]:
        """Return the id, the reward and the start of the row that was begun last."""
        return self._HEAD.unpack_from(self._page)[:3]

    def read(self) -> tuple[bool, str]:
        """Return whether the gold answer was understood, and what was extracted."""
        *_, understood, size = self._HEAD.unpack_from(self._page)
        return understood, self._page[self._HEAD.size : self._HEAD.size + size].decode("utf-8", "replace")

    def close(self) -> None:
        self._page.close()


class Outbox:
    """Verdicts on their way to the supervisor: quick ones travel together, none waits for a slow row."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._frames: list[bytes] = []
        self._flushed = 0.0

    def put(self, frame: bytes) -> None:
        self._frames.append(frame)
        if time.monotonic() - self._flushed > TOGETHER:
            self.flush()

    def flush(self) -> None:
        if self._frames:
            data = b"".join(self._frames)
            self._frames.clear()
            self._channel.sendall(data)
        self._flushed = time.monotonic()


class _Timer:
    """The soft deadline of one call, in time that the process was running. Early on it fires once to send the verdicts that wait."""

    def __init__(self, seconds: float, outbox: Outbox) -> None:
        self._seconds = seconds
        self._outbox = outbox
        self._supervisor = os.getppid()
        self._ends = 0.0
        self._last = self._worked = 0.0  # wall-clock and CPU time of the last alarm
        self.armed = False
        self.expired = False
        signal.signal(signal.SIGALRM, self._fire)

    def _fire(self, signum: int, frame: object) -> None:
        if os.getppid() != self._supervisor:
            os._exit(1)
        if not self.armed:
            return
        now, worked = time.monotonic(), time.process_time()
        lost = now - self._last - (worked - self._worked)
        if lost > STALL:
            self._ends += lost
        self._last, self._worked = now, worked
        if now < self._ends:
            self._outbox.flush()
            return
        self.expired = True
        raise Deadline

    def __enter__(self) -> _Timer:
        self.expired = False
        self._last, self._worked = time.monotonic(), time.process_time()
        self._ends = self._last + self._seconds
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, FIRST_TICK, TICK)
        return self

    def __exit__(self, *error: object) -> None:
        self.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)


def confine(memory_limit: int, supervisor: int) -> None:
    """Bound this process: address space, no core file, death with the supervisor, deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(name, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.setpgid(0, 0)  # what a user's function starts is killed with the worker
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_limit if most == resource.RLIM_INFINITY else min(memory_limit, most)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _built_in(name: str, lenient: bool, note: Note) -> Callable[[list], tuple[float | None, str, str]]:
    judge = {rewards.MATH: answer.MATH, rewards.MATH_STRICT: answer.MATH_STRICT, rewards.EXACT: answer.EXACT}[name]

    def grade(row: list) -> tuple[float | None, str, str]:
        verdict = answer.grade(*row[:4], judge=judge, lenient=lenient, progress=note.progress)
        return verdict.score, verdict.extracted, verdict.error

    return grade


def _function(name: str, note: Note) -> Callable[[list], tuple[float | None, str, str]]:
    function = rewards.load(name)

    def grade(row: list) -> tuple[float | None, str, str]:
        note.progress(True, "")
        gold, completion, *_, record = row
        try:
            score = rewards.score_of(function(completion, gold, record))
        except MemoryError:
            raise
        except Exception as error:
            return 0.0, "", f"{answer.FAILED}: {type(error).__name__}: {error}"[:500]
        return score, "", "" if score is not None else answer.NOT_JUDGED

    return grade


def _graders(config: dict[str, Any], note: Note) -> list[Callable[[list], tuple[float | None, str, str]]]:
    lenient = config["extract"] == "lenient"
    return [_built_in(name, lenient, note) if name in rewards.BUILT_IN else _function(name, note) for name in config["rewards"]]


def _grade(grader: Callable, body: bytes, timer: _Timer, note: Note) -> tuple[float | None, str, str]:
    """Run one reward on one row; whatever goes wrong becomes part of the verdict."""
    try:
        with timer:
            verdict = grader(wire.decode(body))
        if not timer.expired:
            return verdict
        problem = answer.TIMEOUT
    except Deadline:
        timer.__exit__()
        problem = answer.TIMEOUT
    except MemoryError:
        problem = answer.MEMORY
    except RecursionError:
        problem = f"{answer.FAILED}: RecursionError"
    except Exception as error:
        problem = f"{answer.FAILED}: {type(error).__name__}: {error}"[:500]
    understood, extracted = note.read()
    return (0.0, extracted, problem) if understood else (None, extracted, f"{answer.GOLD_UNPARSABLE}: {problem}")


def main(channel: socket.socket, note: Note, config: dict[str, Any]) -> None:
    """Grade rows until the supervisor closes the channel or the memory limit was hit."""
    unpacker = wire.Unpacker()
    try:
        graders = _graders(config, note)
    except Exception as error:
        problem = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        channel.sendall(wire.pack(wire.FATAL, wire.encode(f"cannot load a reward: {problem}")))
        return
    channel.sendall(wire.pack(wire.READY))
    gc.set_threshold(GC_THRESHOLD)
    outbox = Outbox(channel)
    timer = _Timer(config["timeout"], outbox)
    while data := channel.recv(wire.CHUNK):
        for frame in unpacker.feed(data):
            note.begin(frame.id, frame.part)
            verdict = _grade(graders[frame.part], frame.body, timer, note)
            outbox.put(wire.pack(wire.VERDICT, wire.encode(verdict), id=frame.id, part=frame.part))
            if verdict[2] == answer.MEMORY:
                outbox.flush()
                return  # the heap is in pieces: a fresh worker takes over
        outbox.flush()
