"""Transferring the weights of a model in training to an engine that holds its own, and checking that it samples from them.

The weights are transferred as a folder of safetensors, in memory if there is room: that works for
every engine and any size. (vLLM's in-memory transfers, ipc and nccl, save the copy, but tie the trainer
to vLLM's processes, their GPUs and a version; the folder costs one write and one read at memory speed, a
small share of a step.)

Of a LoRA adapter an engine that takes adapters is handed the adapter alone, a few MB; others get the weights with the adapter merged.

Then the engine samples some tokens, and the model in training scores them. The prompts are the last
ones that the engine has seen: a prefix cache of the old weights would be used for them, and so be noticed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from s2dcli import console, world
from s2dcli.engines.base import HostedEngine, Request, SamplingParams
from s2dcli.errors import DataError, EngineError
from s2dcli.files.atomic import disk_errors, temporary
from s2dcli.files.checkpoint import ADAPTER
from s2dcli.stats import mean

if TYPE_CHECKING:
    import numpy as np
    import torch

    from s2dcli.models.rows import Row

    # (rows, temperature) -> each row with the log-probs [T] of its completion's tokens, in any order
    Score = Callable[[Sequence[Row], float], Iterator[tuple[Row, np.ndarray]]]

PARITY_ROWS = 8
PARITY_TOKENS = 16  # of each row
# Largest mean difference of log-probs, in nats, by the type that the engine computes in. Engine and trainer round
# differently: in float32 they were seen 1e-6 to 1e-5 apart; bfloat16 has 3 digits, which is some hundredths of a nat.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
MEMORY_DISK = Path("/dev/shm")
PREFIX = "s2d-weights-"  # of folders there
ROOM_FACTOR = 1.5  # of the weights' size that must be free there


class WeightSource(Protocol):
    """A model in training.

    `updates`: optimizer updates since its checkpoint. It must change whenever the weights do, as it alone says that
    a transfer is due; at 0 the weights are the checkpoint's. `out`: the run folder, held by this process.
    """

    updates: int
    out: Path

    def weights_bytes(self, dtype: torch.dtype) -> int:
        """Return the size of the weights in `dtype`."""

    def adapter_bytes(self) -> int:
        """Return the size of the LoRA adapter that is trained in place of the weights, 0 if there is none."""

    def write_adapter(self, folder: Path | None) -> None:
        """Write the current adapter to `adapter/` in a folder, as peft reads it. Without a folder: as below. Raises OSError."""

    def write_weights(self, folder: Path | None, dtype: torch.dtype) -> None:
        """Write the current weights as safetensors with their config.json. Without a folder: help the main process to. Raises OSError."""

    def score(self, rows: Sequence[Row], temperature: float) -> Iterator[tuple[Row, np.ndarray]]:
        """Yield rows with the log-probs (nats) of their completions' tokens under the current weights."""


@dataclass
class ParityGate:
    """Compares an engine's log-probs with those of the model that it should sample from, which computes in `dtype`."""

    dtype: torch.dtype
    rows: int = PARITY_ROWS
    tolerance: float | None = None

    def check(self, engine: HostedEngine, score: Score, prompts: Sequence[list[int]], params: SamplingParams) -> float:
        """Sample some tokens and score them; returns the mean difference in nats. Raises EngineError beyond the tolerance."""
        from s2dcli.models.rows import Row

        how = SamplingParams(params.temperature, top_p=1.0, top_k=0, max_tokens=min(PARITY_TOKENS, params.max_tokens))
        requests = [Request(prompts[row % len(prompts)], seed=row) for row in range(self.rows if prompts else 0)]
        samples = dict(engine.generate(requests, how))
        sampled = [(request.prompt_ids, samples[row].completion_ids, samples[row].logprobs) for row, request in enumerate(requests)]
        # Of several processes each has asked the engine that it samples from; all score together, and each one is held to its tolerance.
        parts = [{Row(prompt, completion): logprobs for prompt, completion, logprobs in part} for part in world.gather(sampled)]
        ours = dict(score([row for part in parts for row in part], params.temperature or 1.0))
        return max(self.compare(engine.name, theirs, ours, "sample from") for theirs in parts if theirs)

    def check_scores(self, engine: HostedEngine, score: Score, rows: Sequence[Row]) -> float:
        """Have an engine score some tokens, and score them too; returns what `check` does. Raises EngineError likewise."""
        from s2dcli.models.rows import Row

        rows = [Row(row.prompt_ids, row.completion_ids[:PARITY_TOKENS]) for row in rows[: self.rows]]
        theirs = {rows[index]: scores.sampled_T.tolist() for index, scores in engine.score(rows, 1)}
        return self.compare(engine.name, theirs, dict(score(list(theirs), 1.0)), "score with")

    def compare(self, name: str, theirs: Mapping[Row, Sequence[float]], ours: Mapping[Row, np.ndarray], work: str) -> float:
        """Return the mean difference of an engine's log-probs and the model's, in nats. Raises EngineError beyond the tolerance."""
        gaps = [abs(a - b) for row, logprobs in theirs.items() for a, b in zip(ours[row].tolist(), logprobs, strict=True)]
        gap, tolerance = mean(gaps), self.tolerance or TOLERANCE[str(self.dtype).removeprefix("torch.")]
        console.detail(f"{name}: log-probs differ by {gap:.2g} nats on average, {max(gaps):.2g} at most, from the model's")
        if not gap <= tolerance:  # also if it is not a number
            raise EngineError(
                f"{name} does not {work} the weights that it should: over {len(gaps)} tokens its log-probs are "
                f"{gap:.2g} nats off on average, {max(gaps):.2g} at most; the tolerance is {tolerance:g}",
                hint="usual causes: old weights or a prefix cache of them after a reload (a CPU server needs --worker-extension-cls "
                "s2dcli.engines.vllm_worker.WorkerExtension), another model, a second BOS, another temperature or --dtype; "
                "if it is rounding, raise --parity-tolerance",
            )
        return gap


class WeightSync:
    """Keeps an engine on the weights of a model in training, and asleep while it is not used.

    Everything that the engine samples must be between `begin` and `end`.
    """

    def __init__(self, engine: HostedEngine, gate: ParityGate, source: WeightSource) -> None:
        self.engine, self.gate, self.source = engine, gate, source
        self.alone: bool | None = None  # whether the engine is handed an adapter alone; None until it was offered one
        self.updates: int | None = None  # of the weights that were checked last
        self.interruptions = 0  # of the engine, up to then
        self.prompts: list[list[int]] = []  # the last ones that the engine has seen

    def begin(self, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        """Wake the engine; if the model's weights have changed, transfer and check them. Raises EngineError or DataError."""
        self.engine.wake()
        if self.updates != self.source.updates:
            offered = self.alone is None and self.source.adapter_bytes() > 0
            if not (offered and self._offer()) and (self.source.updates or not self.engine.local):
                self.transfer()
            self.gate.check(self.engine, self.source.score, self.prompts or prompts, params)
            self.updates = self.source.updates
        self.interruptions = self.engine.interruptions
        self.prompts = list(prompts[-self.gate.rows :])

    def interrupted(self) -> bool:
        """Whether an engine, of this or another process, may have lost its weights since `begin`."""
        return any(world.gather(self.engine.interruptions != self.interruptions))

    def end(self, params: SamplingParams) -> None:
        """Let the engine sleep; if it was interrupted, check first that it still has these weights. Raises EngineError."""
        if self.interrupted():
            self.gate.check(self.engine, self.source.score, self.prompts, params)
        self.engine.sleep()

    def _offer(self) -> bool:
        """Hand over the adapter alone for the first time, and say whether all engines took it; they get merged weights otherwise."""
        refused = self.engine.merged_only

        def load(folder: Path) -> None:
            nonlocal refused
            try:
                self.engine.load_adapter(folder)
            except EngineError as error:  # not this adapter, or none at all
                refused = error.message

        if not any(world.gather(refused)):
            self._transfer_adapter(load)
        why = next(filter(None, world.gather(refused)), "")
        self.alone = not why
        if why:
            size = self.source.weights_bytes(self.gate.dtype)
            console.info(f"{self.engine.name} is handed merged weights, {size / 1e6:.3g} MB an update: {why}")
        else:
            console.info(f"{self.engine.name} is handed the adapter alone, {self.source.adapter_bytes() / 1e6:.3g} MB an update")
        return self.alone

    def transfer(self) -> None:
        """Have the engine load the model's current weights, or its adapter where it takes that alone.

        Raises EngineError, or DataError if they cannot be written.
        """
        if self.alone:
            self._transfer_adapter(self.engine.load_adapter)
        else:
            size, write = self.source.weights_bytes(self.gate.dtype), partial(self.source.write_weights, dtype=self.gate.dtype)
            self._hand_over(size, write, self.engine.load_weights)

    def _transfer_adapter(self, load: Callable[[Path], None]) -> None:
        self._hand_over(self.source.adapter_bytes(), self.source.write_adapter, lambda folder: load(folder / ADAPTER))

    def _hand_over(self, size: int, write: Callable[[Path | None], None], load: Callable[[Path], None]) -> None:
        """Have what `write` writes loaded.

        Of several processes the main one writes it, once. Either it tells the servers, which all sample from, or each
        process has an engine of its own read it.
        """
        with disk_errors("transfer the weights", self.source.out), _shared_folder(self.source.out, size, self.engine.local) as folder:
            with disk_errors("write the weights", folder):
                write(folder if world.is_main() else None)
            world.gather(None)  # they are written
            if world.is_main() or self.engine.local:
                load(folder)
            world.gather(None)  # they are read


@contextmanager
def _shared_folder(out: Path, size: int, local: bool) -> Iterator[Path]:
    """Have the main process make a folder (see `_transfer_folder`) that all see where they read it. Raises OSError or DataError."""
    for in_memory in (True, False) if local else (False,):
        with ExitStack() as held:
            mine = held.enter_context(_transfer_folder(out, size, in_memory)) if world.is_main() else None
            folder = world.broadcast(mine)
            if not local or all(world.gather(folder.is_dir())):
                yield folder
                return
    raise DataError("not every process sees this folder, in which weights are handed over", where=str(out), hint="put it on a shared disk")


@contextmanager
def _transfer_folder(out: Path, size: int, local: bool) -> Iterator[Path]:
    """Make an empty folder, in memory if the engine sees it there and it has room, else in the run folder; remove it at the end.

    A kill leaves it behind: the next transfer removes one in memory, the next command in the run folder one there.
    Raises OSError.
    """
    remove_abandoned()
    if local and _free_memory() >= ROOM_FACTOR * size:
        with _private_folder() as folder:
            yield folder
        return
    folder = temporary(out.resolve() / "weights")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_memory() -> int:
    try:
        return shutil.disk_usage(MEMORY_DISK).free
    except OSError:  # no such disk here
        return 0


@contextmanager
def _private_folder() -> Iterator[Path]:
    """Make a folder on the memory disk, with a random name, for this user alone, and locked until it is removed. Raises OSError."""
    lock = None
    while lock is None:  # another process may take a folder that is not locked yet for an abandoned one
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=MEMORY_DISK))
        lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned() -> None:
    """Remove the folders on the memory disk that killed processes of this user have left: those that are locked by nobody.

    Names and contents are not trusted: links and what others own stay.
    """
    for folder in MEMORY_DISK.glob(f"{PREFIX}*"):
        with suppress(OSError):
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor that is returned is closed; None if it is in use, removed, or another user's.

    The kernel gives up the lock of a process however it ends. Raises OSError, also for what is not a folder.
    """
    with ExitStack() as closing:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        closing.callback(os.close, descriptor)
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_uid == os.geteuid() and os.path.samestat(os.fstat(descriptor), os.lstat(folder)):
                closing.pop_all()
                return descriptor
    return None
