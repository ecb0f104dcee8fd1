"""A way to run the command line that is real but warm: see zygote.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from zygote import TOY, Zygote, wait

# A shell ignores Ctrl-C for what it runs in the background, and so would every command that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads that read weights race to make a forked process's thread pool
os.environ.setdefault("COLUMNS", "100")

ZYGOTE = Zygote("peft", "bitsandbytes", "accelerate")

# Files of a minute and more begin first: a worker that ends with one of them would leave the other idle.
LONG_FILES = (
    "stages/test_resume.py",
    "examples/test_smollm2.py",
    "examples/test_route_scripts.py",
    "stages/test_engines.py",
    "test_processes.py",
    "engines/test_server.py",
    "test_faults.py",
    "test_write_faults.py",
    "assembly/test_plan.py",
    "test_readme.py",
    "engines/test_served_teacher.py",
    "stages/test_grpo.py",
    "stages/test_opd.py",
    "stages/test_fkl_warmup.py",
    "models/test_families.py",
)


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


def start(args: list[str], stdin: int, stdout: int, stderr: int, cwd: Path | None = None) -> int:
    """Start `s2d ARGS` on the given descriptors in a child of this process. Returns its pid."""
    return ZYGOTE.start(args, stdin, stdout, stderr, cwd)


def runner(zygote: Zygote) -> Callable[..., Result]:
    """Return a function that runs `s2d ARGS`, with bytes on standard input, to its end."""

    def run(*args: object, stdin: bytes = b"", cwd: Path | None = None) -> Result:
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin)
            given.seek(0)
            code = wait(zygote.start([str(arg) for arg in args], given.fileno(), out.fileno(), err.fileno(), cwd))
            out.seek(0)
            err.seek(0)
            return Result(code, out.read(), err.read().decode())

    return run


@pytest.fixture(scope="session")
def s2d() -> Callable[..., Result]:
    """Run `s2d ARGS` with bytes on standard input; see `Result`."""
    return runner(ZYGOTE)


def environments_of(number: int, *, sharded: bool = False, **more: str) -> list[dict[str, str]]:
    """Return what accelerate or torchrun tells each of several processes."""
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
            self.pids.append(ZYGOTE.start([str(arg) for arg in args], *(file.fileno() for file in files), more=told))

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


def swap_two_tokens(source: Path, target: Path) -> Path:
    """Copy a toy checkpoint, with `+` and `-` swapped in its tokenizer. Returns the copy."""
    shutil.copytree(source, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["+"], vocabulary["-"] = vocabulary["-"], vocabulary["+"]
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return target


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [str(Path(__file__).parent / name) for name in LONG_FILES]
    items.sort(key=lambda item: names.index(str(item.path)) if str(item.path) in names else len(names))


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
