"""Commands forked from a process that has their imports and nothing else.

Importing torch and transformers takes seconds, so a command runs in a child forked from a process that has them
already: with its own descriptors, exit code and signals. That process is not pytest's: whatever tests have computed,
compiled or started there (thread pools, process groups) would be inherited half, and fail at random.

    zygote = Zygote()                    # python tests/zygote.py, waiting
    pid = zygote.start(["eval", ...], stdin, stdout, stderr)
    code = wait(pid)                     # a child of the caller's, as os.fork's would be
"""

from __future__ import annotations

import array
import ctypes
import importlib
import io
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

TOY = Path(__file__).parents[1] / "examples" / "toy"
DEADLINE_SECONDS = 300.0  # for one command; only a hang gets there
PR_SET_CHILD_SUBREAPER = 36  # prctl.h
_LENGTH = struct.Struct("I")  # of a message, in bytes, before it


class Zygote:
    """A process that imports what commands need, and `modules`, and forks them; started when it is first asked."""

    def __init__(self, *modules: str, environment: Mapping[str, str] | None = None) -> None:
        self.modules, self.environment = modules, dict(environment or {})
        self._socket: socket.socket | None = None

    def start(
        self, args: Sequence[str], stdin: int, stdout: int, stderr: int, cwd: Path | None = None, more: Mapping[str, str] | None = None
    ) -> int:
        """Run `s2d ARGS` on the given descriptors in a child of this process, with `more` in its environment. Returns its pid."""
        if self._socket is None:
            self._socket, theirs = socket.socketpair()
            command = [sys.executable, __file__, str(theirs.fileno()), *self.modules]
            subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, **self.environment}, start_new_session=True)
            theirs.close()
        environment = {**os.environ, **self.environment, **(more or {})}
        where = {"cwd": str(cwd or Path.cwd()), "environment": environment, "file_limit": resource.getrlimit(resource.RLIMIT_FSIZE)}
        message = json.dumps({"args": list(args), **where}).encode()
        prctl = ctypes.CDLL(None).prctl
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # the command's parent ends at once; it then becomes a child of ours
        try:
            descriptors = array.array("i", [stdin, stdout, stderr])
            self._socket.sendmsg([_LENGTH.pack(len(message))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
            self._socket.sendall(message)
            return _LENGTH.unpack(_receive(self._socket, _LENGTH.size))[0]
        finally:
            prctl(PR_SET_CHILD_SUBREAPER, 0)


def wait(pid: int, deadline: float = DEADLINE_SECONDS) -> int:
    """Return the exit code of a child (negative: the signal that ended it); kill it past the deadline."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"no end after {deadline} s")


def fork(args: Sequence[str], stdin: int, stdout: int, stderr: int, cwd: Path | str | None = None) -> int:
    """Run `s2d ARGS` in a child forked from this process, which must hold no threads. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        for target, source in enumerate((stdin, stdout, stderr)):
            os.dup2(source, target)
        os.closerange(3, 256)
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w", closefd=False)), line_buffering=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if cwd:
            os.chdir(cwd)
        import torch

        torch.set_num_threads(1)  # makes the thread pool anew before threads of a library race to do so
        from s2dcli.cli import main

        sys.argv = ["s2d", *args]
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def warm_up() -> None:
    """Import what commands import, and do once what sampling does first: a child then starts in a tenth of a second instead of two."""
    import torch
    from pydantic import TypeAdapter  # noqa: F401 - which typer imports to read the first value that it is given

    from s2dcli import cli  # noqa: F401
    from s2dcli.assembly import distillation, evaluation, probing, scoring, training  # noqa: F401
    from s2dcli.engines import transformers  # noqa: F401
    from s2dcli.models.checkpoints import load, resolve

    torch.set_num_threads(1)  # which keeps forking safe
    load(resolve(str(TOY / "student")), announce=False)


def _receive(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise EOFError("the process that forks commands has ended")
        found += part
    return found


def receive_request(connection: socket.socket) -> tuple[dict, array.array] | None:
    """Return what a client asks for and the descriptors that it hands over; None if it has gone."""
    head, ancillary, _, _ = connection.recvmsg(_LENGTH.size, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    if not head:
        return None
    return json.loads(_receive(connection, _LENGTH.unpack(head)[0])), array.array("i", ancillary[0][2])


def _fork_child(message: dict, descriptors: Sequence[int]) -> int:
    """Fork a command whose parent ends at once. Returns its pid when it has."""
    reader, writer = os.pipe()
    between = os.fork()
    if not between:
        os.environ.clear()
        os.environ.update(message["environment"])
        sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # as an interpreter that starts would
        resource.setrlimit(resource.RLIMIT_FSIZE, message["file_limit"])
        os.write(writer, _LENGTH.pack(fork(message["args"], *descriptors, cwd=message["cwd"])))
        os._exit(0)
    os.close(writer)
    os.waitpid(between, 0)
    with os.fdopen(reader, "rb") as pipe:
        return _LENGTH.unpack(pipe.read())[0]


def main(connection: socket.socket, modules: Sequence[str]) -> None:
    """Answer requests until the other end is closed."""
    warm_up()
    for module in modules:
        importlib.import_module(module)
    while request := receive_request(connection):
        message, descriptors = request
        connection.sendall(_LENGTH.pack(_fork_child(message, descriptors)))
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
