"""`s2d` and `python` for scripts under test: commands are forked from a warm process instead of importing torch for seconds each.

with warm_commands(tmp_path / "bin") as environment:
    subprocess.run(["bash", script], env=environment)
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zygote import Zygote, receive_request

ROOT = Path(__file__).parents[1]
# What a script finds as s2d: it hands its arguments and descriptors to a socket and ends with the code that comes back.
CLIENT = """#!{python} -IS
import array, json, os, socket, struct, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({path!r})
    message = json.dumps({{"args": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}).encode()
    descriptors = array.array("i", [0, 1, 2])
    connection.sendmsg([struct.pack("I", len(message))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    connection.sendall(message)
    sys.exit(int(connection.recv(16)))
"""


@contextmanager
def warm_commands(folder: Path, zygote: Zygote) -> Iterator[dict[str, str]]:
    """Make the commands in `folder`; yields the environment in which scripts find them."""
    folder.mkdir(parents=True)
    path = f"/tmp/s2d-{os.getpid()}-{time.monotonic_ns()}"  # a folder of pytest's is too long a name for a socket
    for name, text in (
        ("s2d", CLIENT.format(python=sys.executable, path=path)),
        ("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        threading.Thread(target=_serve, args=(server, zygote, threading.Lock()), daemon=True).start()
        try:
            yield {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        finally:
            os.unlink(path)
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)


def _serve(server: socket.socket, zygote: Zygote, lock: threading.Lock) -> None:
    with suppress(OSError):  # the server is closed
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_run, args=(connection, zygote, lock), daemon=True).start()


def _run(connection: socket.socket, zygote: Zygote, lock: threading.Lock) -> None:
    """Run one command to its end; it is killed when whoever asked for it is gone."""
    with connection:
        if (request := receive_request(connection)) is None:
            return
        told, descriptors = request
        with lock:
            pid = zygote.start(told["args"], *descriptors, cwd=Path(told["cwd"]), more=told["environment"])
        for descriptor in descriptors:
            os.close(descriptor)
        connection.setblocking(False)
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            with suppress(BlockingIOError):
                if not connection.recv(1):
                    with suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGTERM)
                    os.waitpid(pid, 0)
                    return
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(ended[1])
        with suppress(BrokenPipeError):
            connection.send(str(code if code >= 0 else 128 - code).encode())
