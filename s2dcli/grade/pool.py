"""The client side of the grader: rows in, verdicts out, in order, whatever the rows hold.

    with Grader(rewards=["math"], timeout=5.0) as grader:
        for verdict in grader.grade(records):
            ...

A `Grader` starts its supervisor (`supervisor.py`) at once and does not wait for it, so that the
supervisor's imports overlap with what the caller does next. It may be used from a process with
threads and CUDA, serves any number of `grade` calls, and takes everything with it when it ends.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import select
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from s2dcli import console
from s2dcli.errors import GradingError, UsageError
from s2dcli.files.records import Rollout
from s2dcli.grade import answer, wire
from s2dcli.grade.extract import asks_for_order, opens_thinking, text_of_answer, text_of_completion
from s2dcli.grade.rewards import MATH, Reward, parse_all
from s2dcli.options import parse_size
from s2dcli.stats import verdict

WINDOW_ROWS = 2048  # rows that may be under way at a time
WINDOW_BYTES = 32 << 20  # ... and their bytes; one row may always be under way
SEND_BYTES = 16 << 10  # of rows that are sent together: the workers begin while further ones are encoded
LEAST_MEMORY = 256 << 20  # bytes; below this a worker cannot even import sympy
MOST_MEMORY = 1 << 50  # bytes; more than any machine has
MOST_SECONDS = 86_400.0  # of a timeout
RESTARTS = 3  # supervisors that may die in a row without a verdict in between
END_GRACE = 2.0  # seconds that the supervisor has for leaving by itself
EXTRACT_MODES = ("strict", "lenient")
VERDICT = ("reward", "rewards", "label", "extracted", "verifier", "verify_error")  # the fields that grading adds to a row

# Runs the supervisor from where this package lies, whatever else is called s2dcli in the isolated interpreter.
_BOOTSTRAP = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("s2dcli", sys.argv[4])
sys.modules["s2dcli"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
importlib.import_module(sys.argv[1]).main()
"""
_LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")
_PACKAGE = Path(__file__).resolve().parents[1] / "__init__.py"


def parse_memory(text: str | int) -> int:
    """Return the bytes of `--memory-limit`. Raises UsageError."""
    size = parse_size(str(text), "--memory-limit")
    if not LEAST_MEMORY <= size <= MOST_MEMORY:
        raise UsageError(f"{text} is out of range for the memory of a grading process", where="--memory-limit", hint="256MiB to 1024TiB")
    return size


def check_settings(
    rewards: Sequence[str] = (MATH,), timeout: float = 5.0, memory_limit: str | int = "2GiB", extract: str = "strict"
) -> list[Reward]:
    """Return the rewards that are named. Raises UsageError on settings of a `Grader` that are invalid; starts nothing."""
    parsed = parse_all(list(rewards))
    if not 0 < timeout <= MOST_SECONDS:
        raise UsageError(f"a timeout of {timeout:g} s is out of range", where="--timeout", hint=f"at most {MOST_SECONDS:g} seconds")
    parse_memory(memory_limit)
    if extract not in EXTRACT_MODES:
        raise UsageError(f"extract is strict or lenient, not {extract!r}")
    return parsed


def check_reward(reward: str, timeout: float = 5.0, memory_limit: str | int = "2GiB") -> None:
    """Load a reward and grade one made-up rollout with it. Raises UsageError if that fails."""
    messages = [{"role": "assistant", "content": r"2 + 2 = \boxed{4}"}]
    row = Rollout(
        problem_id="check", problem_sha256="", group_id="check", sample_index=0, prompt=[{"role": "user", "content": "What is 2 + 2?"}],
        completion=messages, answer="4", prompt_ids=[0], completion_ids=[0], completion_logprobs=[0.0], finish_reason="stop", seed=0,
        source={}, sampler={}, template_sha256="",
    )  # fmt: skip
    with Grader([reward], workers=1, timeout=timeout, memory_limit=memory_limit) as grader:
        list(grader.grade([row.to_record()]))
        errors = grader.take_errors()
    if errors.counts:
        raise UsageError(f"the reward fails on a made-up rollout: {errors.first}", where=f"--reward {reward}")


class Errors(NamedTuple):
    """Failures of rewards: how many of each kind (`failed`, `timeout`, `killed`, `memory`, `crashed`, ...), and the first in words."""

    counts: Counter[str]
    first: str
    rows: int  # whose rewards failed


def failures(rewards: Sequence[Reward], verify_error: str) -> list[tuple[str, str]]:
    """Return the kind of each failure that a row's `verify_error` names, and the failure in words.

    `failed` and `python:my:reward raised KeyError: 'x'`, or `timeout` and `math: timeout`. Answers that are
    missing or wrong are not failures.
    """
    found = []
    for reward in rewards:
        name = f"{reward.name}: " if len(rewards) > 1 else ""
        start = verify_error.find(name)
        error = verify_error[start + len(name) :].partition("; ")[0] if len(rewards) > 1 else verify_error
        kind, _, detail = error.partition(": ")
        if start >= 0 and kind in answer.FAILURES:
            found.append((kind, f"{reward.name} raised {detail}" if kind == answer.FAILED else f"{reward.name}: {error}"))
    return found


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(slots=True)
class _Row:
    """A row under way: what was sent, and the verdict of each reward that has come back."""

    id: int
    body: bytes
    num_missing: int
    parts: dict[int, tuple[float | None, str, str]] = field(default_factory=dict)


class Grader:
    """Grades rows in supervised processes. Raises UsageError on settings that make no sense."""

    def __init__(
        self,
        rewards: list[str] | tuple[str, ...] = (MATH,),
        workers: int | None = None,
        timeout: float = 5.0,
        memory_limit: str | int = "2GiB",
        extract: str = "strict",
    ) -> None:
        self.rewards = check_settings(rewards, timeout, memory_limit, extract)
        self._config = {
            "rewards": [reward.name for reward in self.rewards],
            "workers": workers or available_cpus(),
            "timeout": float(timeout),
            "memory_limit": parse_memory(memory_limit),
            "extract": extract,
            "libraries": sorted({str(importlib.metadata.distribution(name).locate_file("")) for name in _LIBRARIES}),
            # Where the user's own functions lie. Nothing else is ever imported from there.
            "path": [] if all(r.built_in for r in self.rewards) else [*(os.path.abspath(entry) for entry in sys.path), os.getcwd()],
        }
        self.verifier = self._describe(memory_limit)
        self._judge = next((number for number, reward in enumerate(self.rewards) if reward.built_in), 0)  # whose verdict `label` is
        self._whole_records = not all(reward.built_in for reward in self.rewards)
        self._ids = count(1)
        self._errors = Errors(Counter(), "", 0)
        self._start()

    def _describe(self, memory_limit: str | int) -> str:
        """Return who grades, in which version, with which settings: it stands on every row."""
        versions = [f"{name}-{importlib.metadata.version(name)}" for name in _LIBRARIES]
        named = ",".join(r.name if r.weight == 1 else f"{r.name}={r.weight:g}" for r in self.rewards)
        settings = f"rewards={named} extract={self._config['extract']} timeout={self._config['timeout']:g} memory={memory_limit}"
        return f"{answer.POLICY} {' '.join(versions)} {settings}"

    # The supervisor's life

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-c", _BOOTSTRAP, "s2dcli.grade.supervisor", str(theirs.fileno()), str(os.getpid()), str(_PACKAGE)]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output carries data only
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is the caller's to handle
            )
        ours.setblocking(False)
        self._socket = ours
        self._unpacker = wire.Unpacker()
        self._unsent = bytearray(wire.pack(wire.CONFIG, wire.encode(self._config)))
        self._heard = False

    def close(self) -> None:
        """End the supervisor and its workers."""
        self._socket.close()
        if self._heard:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_GRACE)
        if self._process.poll() is None:
            self._process.kill()  # its workers follow it
        self._process.wait()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _revive(self, pending: deque[_Row]) -> None:
        """Replace a supervisor that died and send the new one the rows without a verdict."""
        self.close()
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise GradingError(
                f"the grading supervisor died {self._restarts} times in a row (exit code {self._process.returncode})",
                hint="is the machine out of memory?",
            )
        console.warn(f"the grading supervisor died (exit code {self._process.returncode}); a new one takes over")
        self._start()
        for row in pending:
            if row.num_missing:
                row.num_missing = len(self.rewards)
                row.parts.clear()
                self._unsent += wire.pack(wire.ROW, row.body, id=row.id)

    @property
    def supervisor_pid(self) -> int:
        return self._process.pid

    # Rows and verdicts

    def graded(self, records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the records themselves, in order, with the fields of their verdicts added."""
        return ({**record, **fields} for record, fields in zip(records, self.grade(records), strict=True))

    def grade(self, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield one verdict per record, in order, as soon as it and its predecessors are there.

        A verdict has the keys VERDICT.
        Records are taken only as the window has room for them. If `records` has the methods
        `ready()` (would next() return at once?) and `fileno()`, verdicts also come out while
        there is nothing to take. Raises GradingError if the machinery fails for good, UsageError
        if a user's function cannot be loaded.
        """
        source = iter(records)
        ready = getattr(records, "ready", None)
        pending: deque[_Row] = deque()
        rows: dict[int, _Row] = {}
        size = 0
        exhausted = False
        self._restarts = 0
        try:
            while not exhausted or pending:
                starved = False
                while not exhausted and len(pending) < WINDOW_ROWS and (size < WINDOW_BYTES or not pending):
                    if ready is not None and not ready():
                        starved = True
                        break
                    try:
                        record = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    row = _Row(next(self._ids), self._request(record), len(self.rewards))
                    size += len(row.body)
                    pending.append(row)
                    rows[row.id] = row
                    self._unsent += wire.pack(wire.ROW, row.body, id=row.id)
                    if len(self._unsent) >= SEND_BYTES:
                        self._exchange(rows, pending, wait=False)
                self._exchange(rows, pending, wait=not pending or pending[0].num_missing > 0, also=records if starved else None)
                while pending and not pending[0].num_missing:
                    row = pending.popleft()
                    del rows[row.id]
                    size -= len(row.body)
                    yield self._verdict(row)
        finally:
            if pending:
                self._unsent += wire.pack(wire.CANCEL)

    def _request(self, record: dict[str, Any]) -> bytes:
        """Return what a worker needs to know of a record, as JSON."""
        gold = text_of_answer(record.get("answer"))
        completion = text_of_completion(record.get("completion"))
        prompt = record.get("prompt")
        thinking = record.get("reasoning_open") is True or opens_thinking(prompt)
        request = [gold, completion, thinking, asks_for_order(prompt)]
        return wire.encode([*request, record] if self._whole_records else request)

    def _exchange(self, rows: dict[int, _Row], pending: deque[_Row], *, wait: bool, also: Any = None) -> None:
        """Send what can be sent, take the verdicts that are there; `wait` for one (or for `also`)."""
        if not rows and also is None and not self._unsent:
            return
        poll = select.poll()  # select() knows no descriptors above 1023
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if also is not None:
            poll.register(also, select.POLLIN)
        events = dict(poll.poll(None if wait else 0)).get(self._socket.fileno(), 0)
        try:
            if events & select.POLLOUT:
                with memoryview(self._unsent) as view:
                    sent = self._socket.send(view)
                del self._unsent[:sent]
            data = self._socket.recv(wire.CHUNK) if events & ~select.POLLOUT else None
        except (BrokenPipeError, ConnectionError):
            data = b""
        if data == b"":
            self._revive(pending)
        for frame in self._unpacker.feed(data or b""):
            self._heard = True
            if frame.kind == wire.FATAL:
                raise UsageError(wire.decode(frame.body), hint="see --reward")
            if frame.kind == wire.VERDICT and frame.id in rows:
                row = rows[frame.id]
                if frame.part not in row.parts:
                    row.parts[frame.part] = wire.decode(frame.body)
                    row.num_missing -= 1
                self._restarts = 0

    def take_errors(self) -> Errors:
        """Return the failures of rewards since the last call; wrong or missing answers are not counted."""
        errors, self._errors = self._errors, Errors(Counter(), "", 0)
        return errors

    def _verdict(self, row: _Row) -> dict[str, Any]:
        """Put the rewards of one row together; one null makes the total null."""
        parts = [row.parts[number] for number in range(len(self.rewards))]
        scores = {reward.name: part[0] for reward, part in zip(self.rewards, parts, strict=True)}
        if len(parts) == 1:
            error = parts[0][2]
        else:
            error = "; ".join(f"{name}: {part[2]}" for name, part in zip(scores, parts, strict=True) if part[2])
        if found := failures(self.rewards, error):
            counts, first, rows = self._errors
            counts.update(kind for kind, _ in found)
            self._errors = Errors(counts, first or found[0][1], rows + 1)
        total = None
        if None not in scores.values():
            total = sum(reward.weight * scores[reward.name] for reward in self.rewards)
        judged, _, failure = parts[self._judge]
        return {
            "reward": total,
            "rewards": scores,
            "label": None if failure and not self.rewards[self._judge].built_in else verdict(judged),
            "extracted": next((part[1] for part in parts if part[1]), ""),
            "verifier": self.verifier,
            "verify_error": error,
        }
