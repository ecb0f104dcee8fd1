"""New weights for engines that hold their own, and the proof that they sample from them.

A model in training hands its weights over as a folder of safetensors, in memory if there is room:
that works for every engine and any size. (vLLM's in-memory transfers, ipc and nccl, save the copy, and
tie the trainer to vLLM's processes, their GPUs and a version; the folder costs one write and one read
at memory speed, a small share of a step.)

Then some tokens are sampled and scored by the model in training. The prompts are the last ones that the
engine has seen, so that states of old weights in its prefix cache would be used.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from s2dcli import console
from s2dcli.engines.base import HostedEngine, Request, SamplingParams
from s2dcli.errors import EngineError
from s2dcli.models.rows import Row
from s2dcli.stats import mean

if TYPE_CHECKING:
    import torch

PARITY_ROWS = 8
PARITY_TOKENS = 16  # of each row
# Largest mean difference of log-probs, in nats, by the type that the engine computes in. Engine and trainer round
# differently: in float32 they were seen 1e-6 to 1e-5 apart; bfloat16 has 3 digits, which is some hundredths of a nat.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
MEMORY_DISK = Path("/dev/shm")
ROOM_FACTOR = 1.5  # of the weights' size that must be free there

# (rows, temperature) -> each row with the log-probs [T] of its completion's tokens, in any order
Score = Callable[[Sequence[Row], float], Iterator[tuple[Row, np.ndarray]]]


class Trained(Protocol):
    """A model in training: `updates` counts what was made of it, 0 is what its checkpoint holds."""

    updates: int
    out: Path

    def weights_bytes(self, dtype: torch.dtype) -> int: ...

    def write_weights(self, folder: Path, dtype: torch.dtype) -> None: ...

    def score(self, rows: Sequence[Row], temperature: float) -> Iterator[tuple[Row, np.ndarray]]: ...


@dataclass
class ParityGate:
    """Compares an engine's log-probs with those of the model that it should sample from."""

    dtype: torch.dtype
    rows: int = PARITY_ROWS
    tolerance: float | None = None

    def check(self, engine: HostedEngine, score: Score, prompts: Sequence[list[int]], params: SamplingParams) -> float:
        """Sample some tokens and score them; returns the mean difference in nats. Raises EngineError beyond the tolerance."""
        how = SamplingParams(params.temperature, top_p=1.0, top_k=0, max_tokens=min(PARITY_TOKENS, params.max_tokens))
        requests = [Request(prompts[row % len(prompts)], seed=row) for row in range(self.rows)]
        samples = dict(engine.generate(requests, how))
        theirs = {Row(request.prompt_ids, samples[row].completion_ids): samples[row].logprobs for row, request in enumerate(requests)}
        gaps = [
            abs(a - b)
            for row, ours in score(list(theirs), params.temperature or 1.0)
            for a, b in zip(ours.tolist(), theirs[row], strict=True)
        ]
        gap, tolerance = mean(gaps), self.tolerance or TOLERANCE[str(self.dtype).removeprefix("torch.")]
        console.detail(f"{engine.name}: log-probs differ by {gap:.2g} nats on average, {max(gaps):.2g} at most, from the model's")
        if not gap <= tolerance:  # also if it is not a number
            raise EngineError(
                f"{engine.name} does not sample from the weights that it should: over {len(gaps)} tokens its log-probs are "
                f"{gap:.2g} nats off on average, {max(gaps):.2g} at most; the tolerance is {tolerance:g}",
                hint="usual causes: old weights or a prefix cache of them after a reload (a CPU server needs --worker-extension-cls "
                "s2dcli.engines.vllm_worker.WorkerExtension), another model, a second BOS, another temperature or --dtype; "
                "if it is rounding, raise --parity-tolerance",
            )
        return gap


class Follower:
    """Keeps an engine on the weights of a model in training, and lets it sleep while the model learns."""

    def __init__(self, engine: HostedEngine, gate: ParityGate, source: Trained) -> None:
        self.engine, self.gate, self.source = engine, gate, source
        self.updates: int | None = None  # of the weights that were proved last
        self.interruptions = 0  # of the engine, up to then
        self.prompts: list[list[int]] = []  # that the engine has seen last

    def begin(self, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        """Wake the engine, give it the model's weights if they have changed, and prove them. Raises EngineError."""
        self.engine.wake()
        if self.updates != self.source.updates:
            if self.source.updates or not self.engine.local:
                self._hand_over()
            self.gate.check(self.engine, self.source.score, self.prompts or prompts, params)
            self.updates = self.source.updates
        self.interruptions = self.engine.interruptions
        self.prompts = list(prompts[-self.gate.rows :])

    def end(self, params: SamplingParams) -> None:
        """Let the engine sleep; if it was interrupted, prove first that it had the right weights to the end. Raises EngineError."""
        if self.engine.interruptions != self.interruptions:
            self.gate.check(self.engine, self.source.score, self.prompts, params)
        self.engine.sleep()

    def _hand_over(self) -> None:
        folder = _place(self.source.out, self.source.weights_bytes(self.gate.dtype), self.engine.local)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir()
            self.source.write_weights(folder, self.gate.dtype)
            self.engine.load_weights(folder)
        except OSError as error:
            raise EngineError(f"cannot hand over the weights: {error.strerror or error}", where=str(folder)) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _place(out: Path, size: int, local: bool) -> Path:
    """Where the weights of a run are handed over: always the same folder, so that one left by a kill is not left for long."""
    try:
        room = local and shutil.disk_usage(MEMORY_DISK).free >= ROOM_FACTOR * size
    except OSError:
        room = False
    if room:
        return MEMORY_DISK / f"s2d-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]}"
    return out.resolve() / ".weights"
