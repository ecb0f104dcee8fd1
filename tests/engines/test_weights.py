"""The folder through which an engine gets new weights: private, removed at the end, and found again after a kill."""

import os
import signal
import stat
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch

from s2dcli import world
from s2dcli.engines import weights
from s2dcli.engines.base import Sample, SamplingParams
from s2dcli.engines.weights import ParityGate, WeightSync
from s2dcli.errors import DataError, EngineError

LOCAL = True


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A memory disk of this test's own."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(weights, "MEMORY_DISK", folder)
    return folder


class Source:
    """Weights of `size` bytes, as the folder is told; what is written is one byte."""

    def __init__(self, out, size=1):
        self.out, self.size = out, size
        out.mkdir(exist_ok=True)

    def weights_bytes(self, dtype):
        return self.size

    def write_weights(self, folder, dtype):
        (folder / "model.safetensors").write_bytes(b"w")


class Engine:
    """Keeps the folders that it was given, their permissions, and what was in them."""

    def __init__(self, local=LOCAL, then=lambda folder: None):
        self.local, self.then = local, then
        self.loaded = []

    def load_weights(self, folder):
        self.loaded.append((folder, stat.S_IMODE(folder.stat().st_mode), (folder / "model.safetensors").read_bytes()))
        self.then(folder)


def transfer(engine, source):
    WeightSync(engine, SimpleNamespace(dtype=torch.float32), source).transfer()


def test_a_folder_in_memory_has_a_random_name_is_private_and_is_removed(memory, tmp_path):
    engine = Engine()
    for _ in range(2):
        transfer(engine, Source(tmp_path / "run"))
    (first, mode, content), (second, _, _) = engine.loaded
    assert (first.parent, mode, content) == (memory, 0o700, b"w")
    assert first != second
    assert not list(memory.iterdir())


@pytest.mark.parametrize(("local", "size"), [(False, 1), (True, 1 << 60)], ids=["server", "too-large"])
def test_a_folder_in_the_run_is_for_servers_and_weights_that_are_too_large(memory, tmp_path, local, size):
    engine = Engine(local)
    transfer(engine, Source(tmp_path / "run", size))
    assert engine.loaded[0][0].parent == (tmp_path / "run").resolve()
    assert not list((tmp_path / "run").iterdir())
    assert not list(memory.iterdir())


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("error", [EngineError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_it_is_removed_however_the_transfer_ends(memory, tmp_path, error, local):
    def fail(folder):
        raise error

    with pytest.raises(type(error)):
        transfer(Engine(local, fail), Source(tmp_path / "run"))
    assert not [*memory.iterdir(), *(tmp_path / "run").iterdir()]


def test_weights_that_cannot_be_written_are_one_line(memory, tmp_path):
    source = Source(tmp_path / "run")
    source.write_weights = lambda folder, dtype: (folder / "no" / "such").write_bytes(b"")
    with pytest.raises(DataError, match=f"{memory}/.*: cannot write the weights: No such file or directory"):
        transfer(Engine(), source)
    assert not list(memory.iterdir())


def test_what_a_killed_process_has_left_is_removed_and_what_another_uses_is_not(memory, tmp_path):
    def fork(then):
        pid = os.fork()
        if not pid:
            try:
                transfer(Engine(then=then), Source(tmp_path / "run"))
            finally:
                os._exit(1)
        return pid

    killed = fork(lambda folder: os.kill(os.getpid(), signal.SIGKILL))
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == -signal.SIGKILL
    (left,) = memory.iterdir()

    said, told = os.pipe()
    running = fork(lambda folder: (os.write(told, os.fsencode(folder)), signal.pause()))
    in_use = weights.Path(os.fsdecode(os.read(said, 4096)))  # its transfer has removed what was left
    assert not left.exists()
    transfer(Engine(), Source(tmp_path / "run"))
    assert list(memory.iterdir()) == [in_use]
    os.kill(running, signal.SIGKILL)
    os.waitpid(running, 0)
    transfer(Engine(), Source(tmp_path / "run"))
    assert not list(memory.iterdir())


def test_entries_that_somebody_has_planted_neither_stop_a_transfer_nor_are_followed(memory, tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "notes").write_text("mine")
    (memory / f"{weights.PREFIX}link").symlink_to(precious)
    (memory / f"{weights.PREFIX}file").write_text("x")
    (memory / f"{weights.PREFIX}dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(memory / f"{weights.PREFIX}fifo")
    inner = memory / f"{weights.PREFIX}folder"
    inner.mkdir()
    (inner / "link").symlink_to(precious)
    engine = Engine()
    transfer(engine, Source(tmp_path / "run"))
    assert engine.loaded
    assert (precious / "notes").read_text() == "mine"
    assert sorted(path.name for path in memory.iterdir()) == [f"{weights.PREFIX}{name}" for name in ("dangling", "fifo", "file", "link")]

    (memory / f"{weights.PREFIX}theirs").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: -1)
    weights.remove_abandoned()
    assert (memory / f"{weights.PREFIX}theirs").is_dir()


def hand_over(out):
    """In one of several processes: what its engine was given, and which folder that was."""

    class Sharded(Source):
        def write_weights(self, folder, dtype):
            assert (folder is not None) == world.is_main()
            if folder:
                super().write_weights(folder, dtype)

    engine = Engine()
    transfer(engine, Sharded(out))
    [(folder, _, content)] = engine.loaded
    return folder, content


def test_the_main_process_writes_once_what_the_engines_of_all_processes_read(tmp_path):
    one, other = processes.in_each(2, hand_over, tmp_path / "run")
    assert one == other == (one[0], b"w")
    assert one[0].parent == weights.MEMORY_DISK
    assert not one[0].exists()


def one_rank_is_wrong():
    """The error of a gate in a process whose own engine is right, where another's is not."""
    apart = 0.006 * world.rank()  # on average over both half of this: the tolerance in float32 is 0.001, and 0.005 here

    class Sampler:
        name = "vllm"

        def generate(self, requests, params):
            return ((index, Sample([3], [-1.0 - apart], "stop")) for index, _ in enumerate(requests))

    gate = ParityGate(torch.float32, rows=2, tolerance=0.005)
    score = lambda rows, temperature: ((row, np.array([-1.0])) for row in rows)  # noqa: E731
    try:
        gate.check(Sampler(), score, [[5, 6]], SamplingParams(1.0, 1.0, 0, 4))
    except EngineError as error:
        return str(error)


def test_each_process_is_held_to_the_tolerance():
    for error in processes.in_each(2, one_rank_is_wrong):
        assert "vllm does not sample from the weights that it should: over 2 tokens its log-probs are 0.006 nats off" in error
