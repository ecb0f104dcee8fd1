"""What a process makes of how it was launched, and what is dealt out to each of several."""

from collections import Counter
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from tiny import ragged_rows

from s2dcli import world
from s2dcli.engines.base import STOP, Sample, SamplingParams
from s2dcli.engines.weights import ParityGate, WeightSync
from s2dcli.errors import EngineError, UsageError
from s2dcli.models.batching import micro_batches


def test_a_process_alone_is_a_world(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters set it for whatever they start
    monkeypatch.setenv("RANK", "3")
    assert (world.rank(), world.size(), world.is_main(), world.shards()) == (0, 1, True, False)
    assert world.from_main(max, 3, 5) == 5
    assert (world.gather("a"), world.broadcast("b")) == (["a"], "b")
    world.check("rollout", trains=False)


def test_a_launch_that_started_one_process_of_several_is_refused(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` sets no rank and starts one process."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(UsageError, match="has started one"):
        world.check("grpo", trains=True)


@pytest.mark.parametrize("budget", [40, 10_000])
def test_micro_batches_are_dealt_whole(monkeypatch, budget):
    rows = ragged_rows(11)
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    shape = {"share_prompts": False}
    alone = list(micro_batches(rows, budget, 0, torch.device("cpu"), **shape))
    dealt = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        dealt.append(list(micro_batches(rows, budget, 0, torch.device("cpu"), **shape, deal=True, filler=rows[0])))
    assert len({len(batches) for batches in dealt}) == 1
    counted = [batch for batches in dealt for batch in batches if not batch.filler]
    assert Counter(row for batch in counted for row in batch.rows) == Counter(rows)
    assert all(any(not batch.filler for batch in batches) for batches in dealt)
    if budget == 40:  # the same rows together as in one process
        together = {frozenset(batch.rows) for batch in alone}
        assert {frozenset(batch.rows) for batch in counted} == together


class _Engine:
    """A server that both processes sample from: its weights are a number in a file, which is its log-prob."""

    name, local, interruptions = "fake", False, 0

    def __init__(self, file: Path) -> None:
        self.file = file

    def generate(self, requests, params):
        value = float(self.file.read_text())
        return ((index, Sample([7], [value], STOP)) for index, _ in enumerate(requests))

    def load_weights(self, folder: Path) -> None:
        assert world.is_main()
        self.file.write_text((folder / "weights").read_text())

    def wake(self) -> None: ...

    sleep = wake


class _Source:
    updates = 1

    def __init__(self, out: Path, value: float) -> None:
        self.out, self.value, self.scored = out, value, 0

    def weights_bytes(self, dtype):
        return 1

    def adapter_bytes(self):
        return 0

    def write_weights(self, folder, dtype):
        assert (folder is not None) == world.is_main()
        if folder:
            (folder / "weights").write_text(str(-0.5))

    def score(self, rows, temperature):
        self.scored = len(rows)
        yield from ((row, np.array([self.value])) for row in rows)


def _follow(out: Path, value: float) -> int | str:
    source = _Source(out, value)
    sync = WeightSync(_Engine(out / "server"), ParityGate(torch.float32, rows=3), source)
    try:
        sync.begin([[1, 2]], SamplingParams(1.0, 1.0, 0, 4))
    except EngineError as error:
        return str(error)
    return source.scored


def test_one_process_hands_weights_to_a_server_and_all_prove_them(tmp_path):
    (tmp_path / "server").write_text("-9.0")
    assert processes.in_each(2, _follow, tmp_path, -0.5) == [6, 6]
    (tmp_path / "server").write_text("-9.0")
    wrong = processes.in_each(2, _follow, tmp_path, -0.7)
    assert all("does not sample from the weights" in message for message in wrong)
