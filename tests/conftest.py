"""A way to run the command line that is real but warm.

Importing torch and transformers takes seconds, so each command runs in a child forked from this
process, which has them already: own descriptors, own exit code, own signals. One thread per process
keeps that fork safe.
"""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# A shell ignores Ctrl-C for what it runs in the background, and so would every command that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("COLUMNS", "100")

TOY = Path(__file__).parents[1] / "examples" / "toy"
DEADLINE_SECONDS = 300.0  # for one command; only a hang gets there


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: bytes
    err: str

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def result(self) -> dict:
        """The closing JSON object of a trainer or of eval."""
        assert self.code == 0, self.err
        return self.rows[-1]


@functools.cache
def _warm_up() -> None:
    """Import what sampling imports, by doing it: a child then starts in a third of a second instead of two."""
    import torch

    from s2dcli.engines import transformers  # noqa: F401
    from s2dcli.models.checkpoints import load, resolve

    torch.set_num_threads(1)
    load(resolve(str(TOY / "student")))


def start(
    args: list[str], stdin: int, stdout: int, stderr: int, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> int:
    """Fork a child that runs `s2d ARGS` on the given descriptors, with `environment` beside its own. Returns its pid."""
    _warm_up()
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

        os.environ.update(environment or {})
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


@pytest.fixture(scope="session")
def s2d() -> Callable[..., Result]:
    """Run `s2d ARGS` with bytes on standard input; see `Result`."""

    def run(*args: object, stdin: bytes = b"", cwd: Path | None = None) -> Result:
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin)
            given.seek(0)
            code = wait(start([str(arg) for arg in args], given.fileno(), out.fileno(), err.fileno(), cwd))
            out.seek(0)
            err.seek(0)
            return Result(code, out.read(), err.read().decode())

    return run


def environments_of(number: int, *, sharded: bool = False, **more: str) -> list[dict[str, str]]:
    """Return what accelerate or torchrun tells each of several processes, whose own imports are done here."""
    import accelerate  # noqa: F401
    from torch.distributed import fsdp  # noqa: F401

    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), **more}
    if sharded:
        common = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **common}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


class Launched:
    """Processes that work on one command, as `accelerate launch` or torchrun starts them."""

    def __init__(self, number: int, args: list[object], *, sharded: bool = False, stdin: bytes = b"", **environment: str) -> None:
        self._files = [[tempfile.TemporaryFile() for _ in range(3)] for _ in range(number)]  # noqa: SIM115 - closed with this
        self._files[0][0].write(stdin)
        self._files[0][0].seek(0)
        self.pids = []
        for files, told in zip(self._files, environments_of(number, sharded=sharded, **environment), strict=True):
            self.pids.append(start([str(arg) for arg in args], *(file.fileno() for file in files), environment=told))

    def wait(self) -> list[Result]:
        """Return what each process left behind."""
        codes = [wait(pid) for pid in self.pids]
        for files in self._files:
            for file in files[1:]:
                file.seek(0)
        return [Result(code, out.read(), err.read().decode()) for code, (_, out, err) in zip(codes, self._files, strict=True)]


@pytest.fixture(scope="session")
def launch() -> Callable[..., Launched]:
    """Start `s2d ARGS` as several processes; see `Launched`."""
    return lambda number, *args, **how: Launched(number, list(args), **how)


@pytest.fixture(scope="session")
def toy() -> Path:
    """The shipped toy family: teacher/, student/ and problems/."""
    return TOY


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight toy problems."""
    path = tmp_path_factory.mktemp("few") / "problems.jsonl"
    path.write_bytes(b"".join((TOY / "problems" / "validation.jsonl").read_bytes().splitlines(keepends=True)[:8]))
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of the fault-injection tests: what was killed how often, and what came out differently."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports if isinstance(report, pytest.TestReport)]
    rows = [value for report in reports if report.when == "call" for name, value in report.user_properties if name == "faults"]
    if rows:
        terminalreporter.section("fault injection")
        for row in [("stage", "kills", "runs", "mismatches"), *sorted(rows)]:
            terminalreporter.write_line("{:24} {:>6} {:>6} {:>11}".format(*row))
