"""The worker: a forked process that grades one row after the other and may be killed at any time.

It starts with everything imported. Each reward of a row has a soft deadline, a timer that raises
an exception and fires again if that is swallowed on the way; what ignores it (C code) is ended by
the supervisor. What the supervisor has to know about a row whose worker died stands in memory
that both share: whether the gold answer was understood, and what was extracted.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from s2dcli.grade import answer, rewards, wire

REFIRE = 0.2  # seconds between two alarms, once the deadline has passed
_PR_SET_PDEATHSIG = 1  # prctl(2)
_NOTE_TEXT = 4000  # bytes of the extracted answer that the shared note holds


class Deadline(BaseException):
    """The soft deadline has passed; a BaseException, so that `except Exception` lets it through."""


class Note:
    """A page shared by worker and supervisor: how far the row got on which the worker is."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    def reset(self) -> None:
        self._page[0:3] = b"\0\0\0"

    def write(self, understood: bool, extracted: str) -> None:
        data = extracted.encode("utf-8", "surrogatepass")[:_NOTE_TEXT]
        self._page[3 : 3 + len(data)] = data
        self._page[1:3] = len(data).to_bytes(2, "little")
        self._page[0] = understood

    def read(self) -> tuple[bool, str]:
        size = int.from_bytes(self._page[1:3], "little")
        return bool(self._page[0]), self._page[3 : 3 + size].decode("utf-8", "replace")

    def close(self) -> None:
        self._page.close()


class _Timer:
    """The soft deadline of one call."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.armed = False
        self.expired = False
        self._supervisor = os.getppid()
        signal.signal(signal.SIGALRM, self._fire)

    def _fire(self, signum: int, frame: object) -> None:
        if os.getppid() != self._supervisor:
            os._exit(1)
        if self.armed:
            self.expired = True
            raise Deadline

    def __enter__(self) -> _Timer:
        self.expired = False
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, self.seconds, REFIRE)
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
    judge = answer.is_right if name == rewards.MATH else answer.is_same

    def grade(row: list) -> tuple[float | None, str, str]:
        verdict = answer.grade(row[0], row[1], row[2], judge=judge, lenient=lenient, progress=note.write)
        return verdict.score, verdict.extracted, verdict.error

    return grade


def _function(name: str, note: Note) -> Callable[[list], tuple[float | None, str, str]]:
    function = rewards.load(name)

    def grade(row: list) -> tuple[float | None, str, str]:
        note.write(True, "")
        gold, completion, _, record = row
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


def _grade(grader: Callable, row: list, timer: _Timer, note: Note) -> tuple[float | None, str, str]:
    """Run one reward on one row; whatever goes wrong becomes part of the verdict."""
    try:
        with timer:
            verdict = grader(row)
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
    timer = _Timer(config["timeout"])
    while data := channel.recv(wire.CHUNK):
        for frame in unpacker.feed(data):
            note.reset()
            verdict = _grade(graders[frame.part], wire.decode(frame.body), timer, note)
            body = wire.encode(verdict)
            channel.sendall(wire.pack(wire.VERDICT, body, id=frame.id, part=frame.part))
            if verdict[2] == answer.MEMORY:
                return  # the heap is in pieces: a fresh worker takes over
