"""What every engine offers: requests of token ids in, samples of token ids out.

    generate(requests, params) -> (index of the request, sample) as samples finish, in any order
    close()

An engine with weights of its own (vLLM, a server) also takes new ones, and frees its memory between uses:

    load_weights(folder); sleep(); wake()

Text never reaches an engine, and an engine never sees a problem: `sampling.py` does that part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

STOP = "stop"  # the model ended its answer
LENGTH = "length"  # the limit ended it


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample: the prompt's ids and the seed of its own noise."""

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Ids (EOS included if generated), log-probs in nats under the sampling distribution, and why it ended.

    Greedy samples carry the log-probs at temperature 1.
    """

    completion_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class Engine(Protocol):
    """`max_length`: tokens of prompt and completion that it can take, None without a limit.

    `whole_batches`: a row's log-probs depend, in the sixth decimal, on the planned batch that it is sampled in.

    Engines without it are given all requests at once, which they take as they have room.
    """

    name: str
    max_length: int | None
    whole_batches: bool

    def generate(self, requests: Iterable[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]: ...

    def close(self) -> None: ...


class HostedEngine(Engine, Protocol):
    """An engine that holds weights of its own.

    `local`: it runs for this process alone, with a
    checkpoint's weights from its start, and sees this machine's memory disk. `interruptions`: how often
    a connection broke, behind which an engine may have started again with other weights.
    """

    max_length: int
    local: bool
    interruptions: int

    def load_weights(self, folder: Path) -> None:
        """Replace the weights by those in a folder of safetensors, and forget what was computed with the old ones."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...
