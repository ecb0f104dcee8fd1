"""The supervisor: a process of its own, without torch, that forks workers and ends those that hang.

`main`, with the arguments FD CLIENT_PID, started by `pool.Grader` with exec: the caller's threads and
CUDA context forbid forking, and its address space would count against the limit of the workers. The
interpreter is isolated: neither PYTHONPATH nor the current folder is searched, except for a reward
that the user names. It imports math-verify once and forks; a row goes to a worker over that worker's
own socket, a verdict comes back for each reward. A worker that gives none until the hard deadline is
killed and replaced, its row is answered in its place and the rows behind it go to another worker.
A row on which a worker died is tried once more. When the client goes away, so does everything.

Time in which grading was stopped (SIGSTOP, a suspended container) counts against no row: deadlines move
by as much as the supervisor finds that it was stopped, and the row of a worker that was stopped alone
is tried once more.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from s2dcli.grade import answer, rewards, wire
from s2dcli.grade import worker as worker_process

HARD_GRACE = 1.0  # seconds between a worker's soft deadline and SIGKILL
START_DEADLINE = 120.0  # seconds that a worker may take to import the user's functions
RECYCLE_AFTER = 5000  # rewards that one worker grades before a fresh one takes over
BATCH = 16  # rows that wait in one worker: two groups of eight share its cache
REFILL = 4  # a worker with this many rows left gets more, so that it never idles
START_PAUSE = 0.2  # seconds before the next try after a worker could not be started
START_FAILURES = 5  # workers that may die in a row before any is ready
SLICE = 0.25  # seconds that the event loop waits at a time while deadlines run
STALL = 0.3  # seconds beyond a slice after which the event loop concludes that it was stopped
STALLS = 100  # stops that are remembered
ATTEMPTS = 2  # times that a row may be tried before its worker's death is put down to the row


@dataclass(slots=True)
class Task:
    """One reward of one row."""

    id: int
    part: int
    body: bytes
    attempts: int = 0


@dataclass(slots=True, eq=False)
class Worker:
    """One forked process: the rows it has been given, oldest first, and since when it is at work on them."""

    pid: int
    channel: socket.socket
    note: worker_process.Note
    started: float
    tasks: deque[Task] = field(default_factory=deque)
    unpacker: wire.Unpacker = field(default_factory=wire.Unpacker)
    unsent: bytearray = field(default_factory=bytearray)
    ready: bool = False
    retiring: bool = False
    served: int = 0
    ended_by_us: str = ""


class Supervisor:
    """The event loop: client and workers on one selector, deadlines in between."""

    def __init__(self, client: socket.socket, client_pid: int) -> None:
        self.client = client
        self.unpacker = wire.Unpacker()
        self.unsent = bytearray()
        self.config: dict[str, Any] = {}
        self.queue: deque[Task] = deque()
        self.workers: dict[int, Worker] = {}
        self.failed_starts = 0
        self.next_start = 0.0
        self.stalls: deque[tuple[float, float]] = deque(maxlen=STALLS)  # of the supervisor: until when, and for how many seconds
        self.selector = selectors.DefaultSelector()
        client.setblocking(False)
        self.selector.register(client, selectors.EVENT_READ, self._read_client)
        self._watch_children()
        self._watch_client(client_pid)

    def _watch_children(self) -> None:
        self.alarm, wake = socket.socketpair()
        self.alarm.setblocking(False)
        wake.setblocking(False)
        self._wake = wake
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(self.alarm, selectors.EVENT_READ, self._drain_alarm)

    def _watch_client(self, pid: int) -> None:
        """Notice the client's death even while a forked child of it holds our socket open."""
        self.client_pid = pid
        self.client_fd = -1
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self.client_fd = os.pidfd_open(pid)
                self.selector.register(self.client_fd, selectors.EVENT_READ, lambda _: self._leave())
        if os.getppid() != pid:
            self._leave()

    # The client

    def _read_client(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush_client()
        if not mask & selectors.EVENT_READ:
            return
        try:
            data = self.client.recv(wire.CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._leave()
        for frame in self.unpacker.feed(data):
            if frame.kind == wire.ROW:
                for part in range(len(self.config["rewards"])):
                    self.queue.append(Task(frame.id, part, frame.body))
            elif frame.kind == wire.CONFIG:
                self.config = wire.decode(frame.body)
                if importlib.util.find_spec("math_verify") is None:
                    sys.path += self.config["libraries"]  # the user's site-packages, or another folder outside the interpreter's own
                if {rewards.MATH, rewards.MATH_STRICT} & {*self.config["rewards"]}:
                    answer.warm_up()
                sys.path += [entry for entry in self.config["path"] if entry not in sys.path]
                gc.collect()
                gc.freeze()
            elif frame.kind == wire.CANCEL:
                self.queue.clear()

    def _flush_client(self) -> None:
        _send(self.client, self.unsent, self.selector, self._read_client)

    def _tell(self, frame: bytes) -> None:
        self.unsent += frame

    def _answer(self, task: Task, score: float | None, extracted: str, error: str) -> None:
        body = wire.encode((score, extracted, error))
        self._tell(wire.pack(wire.VERDICT, body, id=task.id, part=task.part))

    def _leave(self) -> None:
        for worker in self.workers.values():
            _kill(worker.pid)
        os._exit(0)

    # The workers

    def _start_worker(self) -> None:
        near, far = socket.socketpair()
        note = worker_process.Note()
        supervisor = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            near.close()
            far.close()
            note.close()
            self._start_failed("no process could be started")
            return
        if pid == 0:
            status = 1
            try:
                worker_process.confine(self.config["memory_limit"], supervisor)
                near.close()
                self._close_in_child()
                worker_process.main(far, note, self.config)
                status = 0
            except (BrokenPipeError, ConnectionError):
                status = 0
            finally:
                os._exit(status)
        far.close()
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        near.setblocking(False)
        worker = Worker(pid, near, note, time.monotonic())
        self.workers[pid] = worker
        self.selector.register(near, selectors.EVENT_READ, lambda mask: self._read_worker(worker, mask))

    def _close_in_child(self) -> None:
        for worker in self.workers.values():
            worker.channel.close()
        for end in (self.client, self.alarm, self._wake):
            end.close()
        if self.client_fd >= 0:
            os.close(self.client_fd)
        self.selector.close()

    def _read_worker(self, worker: Worker, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._flush_worker(worker)
        if not mask & selectors.EVENT_READ:
            return
        try:
            data = worker.channel.recv(wire.CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if not worker.ended_by_us and not worker.retiring:
                self._stop_listening(worker)  # it has died or is about to: SIGCHLD brings the rest
            return
        for frame in worker.unpacker.feed(data):
            if frame.kind == wire.VERDICT:
                worker.tasks.popleft()
                worker.served += 1
                self._tell(wire.pack(wire.VERDICT, frame.body, id=frame.id, part=frame.part))
            elif frame.kind == wire.READY:
                worker.ready = True
                worker.started = time.monotonic()
                self.failed_starts = 0
            elif frame.kind == wire.FATAL:
                self._fail(wire.decode(frame.body))

    def _stop_listening(self, worker: Worker) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(worker.channel)

    def _flush_worker(self, worker: Worker) -> None:
        _send(worker.channel, worker.unsent, self.selector, lambda mask: self._read_worker(worker, mask))

    def _drain_alarm(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.alarm.recv(4096):
                pass
        for pid in list(self.workers):
            with contextlib.suppress(ChildProcessError):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._reap(self.workers[pid], status)

    def _reap(self, worker: Worker, status: int) -> None:
        """Take a dead worker's last verdicts, answer or retry its row, requeue the rows behind it."""
        if not worker.ended_by_us:
            with contextlib.suppress(OSError):
                while data := worker.channel.recv(wire.CHUNK):
                    for frame in worker.unpacker.feed(data):
                        if frame.kind == wire.VERDICT:
                            worker.tasks.popleft()
                            self._tell(wire.pack(wire.VERDICT, frame.body, id=frame.id, part=frame.part))
                        elif frame.kind == wire.FATAL:
                            self._fail(wire.decode(frame.body))
        self._stop_listening(worker)
        del self.workers[worker.pid]
        _kill(worker.pid)  # what a user's function may have left in the worker's process group
        if not worker.ready:
            self._start_failed(f"a worker died while starting ({_cause(status)})")
        elif worker.tasks and status != 0:
            self._retry_or_fail(worker, status)
        self.queue.extendleft(reversed(worker.tasks))
        worker.channel.close()
        worker.note.close()

    def _retry_or_fail(self, worker: Worker, status: int) -> None:
        """Answer the row on which a worker died, or leave it for one more try."""
        id, part, _ = worker.note.row()
        task = next((task for task in worker.tasks if (task.id, task.part) == (id, part)), worker.tasks[0])
        task.attempts += 1
        understood, extracted = worker.note.read()
        if worker.ended_by_us:
            error = worker.ended_by_us if understood else f"{answer.GOLD_UNPARSABLE}: {worker.ended_by_us}"
        elif task.attempts >= ATTEMPTS:
            error = f"{answer.CRASHED if understood else answer.WORKER_FAILURE}: {_cause(status)}"
        else:
            return
        worker.tasks.remove(task)
        self._answer(task, 0.0 if understood else None, extracted, error)

    def _start_failed(self, problem: str) -> None:
        self.failed_starts += 1
        if self.failed_starts >= START_FAILURES and not any(worker.ready for worker in self.workers.values()):
            self._fail(problem)
        self.next_start = time.monotonic() + START_PAUSE

    def _fail(self, problem: str) -> None:
        self.client.setblocking(True)
        with contextlib.suppress(OSError):
            self.client.sendall(bytes(self.unsent) + wire.pack(wire.FATAL, wire.encode(problem)))
        self._leave()

    def _time_left(self, worker: Worker) -> float | None:
        """Return the seconds until a worker's hard deadline, None if it has none."""
        if worker.ended_by_us or (worker.ready and not worker.tasks):
            return None
        started, seconds = worker.started, START_DEADLINE
        if worker.ready:
            started, seconds = max(started, worker.note.row()[2]), self.config["timeout"] + HARD_GRACE
        stopped = sum(lost for ended, lost in self.stalls if ended > started)
        return started + seconds + stopped - time.monotonic()

    def _enforce_deadlines(self) -> float | None:
        """Kill what is late; return the seconds until the next deadline, None if there is none."""
        nearest = START_PAUSE if self.queue and not self.workers else None
        for worker in list(self.workers.values()):
            left = self._time_left(worker)
            if left is not None and left <= 0:
                self._read_worker(worker, selectors.EVENT_READ)  # its verdict may be waiting here
                left = self._time_left(worker)
            if left is None:
                continue
            if left <= 0:
                if not _is_stopped(worker.pid):  # else its death is put down to whoever stopped it, and the row tried again
                    worker.ended_by_us = answer.KILLED
                self._stop_listening(worker)
                _kill(worker.pid)
            else:
                nearest = left if nearest is None else min(nearest, left)
        return nearest

    def _dispatch(self) -> None:
        """Hand out what waits, a run of neighbours to each worker; start a worker if all are busy."""
        busy = all(worker.tasks or not worker.ready for worker in self.workers.values())
        if self.queue and busy and len(self.workers) < self.config["workers"] and time.monotonic() >= self.next_start:
            self._start_worker()
        share = max(1, -(-len(self.queue) // self.config["workers"])) if self.queue else 0
        for worker in list(self.workers.values()):
            if not worker.ready or worker.ended_by_us or worker.retiring:
                continue
            if worker.served + len(worker.tasks) >= RECYCLE_AFTER:
                if not worker.tasks:
                    worker.retiring = True
                    worker.channel.shutdown(socket.SHUT_WR)
                continue
            if self.queue and len(worker.tasks) <= REFILL:
                if not worker.tasks:
                    worker.started = time.monotonic()
                for _ in range(min(share, BATCH, len(self.queue))):
                    task = self.queue.popleft()
                    worker.tasks.append(task)
                    worker.unsent += wire.pack(wire.ROW, task.body, id=task.id, part=task.part)
                self._flush_worker(worker)

    def run(self) -> None:
        """Serve until the client goes away."""
        while True:
            if self.config:
                self._dispatch()
            if self.unsent:
                self._flush_client()
            timeout = self._enforce_deadlines() if self.config else None
            timeout = timeout and min(timeout, SLICE)
            before = time.monotonic()
            events = self.selector.select(timeout)
            lost = 0.0 if timeout is None else time.monotonic() - before - timeout
            if lost > STALL:
                self.stalls.append((time.monotonic(), lost))
            for key, mask in events:
                if key.fileobj is None or key.fd not in self.selector.get_map():
                    continue
                key.data(mask)


def _send(channel: socket.socket, unsent: bytearray, selector: selectors.BaseSelector, handler: Any) -> None:
    """Write what the channel takes now, and ask to be called again if something is left."""
    with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionError):
        while unsent:
            with memoryview(unsent) as view:
                sent = channel.send(view[: wire.CHUNK])
            del unsent[:sent]
    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0)
    with contextlib.suppress(KeyError, ValueError):
        if selector.get_key(channel).events != events:
            selector.modify(channel, events, handler)


def _kill(pid: int) -> None:
    """End a worker and its process group."""
    for end in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            end(pid, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal (SIGSTOP), as far as /proc tells."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"T"
    except OSError:
        return False


def _cause(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fd, client_pid = (int(argument) for argument in sys.argv[2:4])
    Supervisor(socket.socket(fileno=fd), client_pid).run()
