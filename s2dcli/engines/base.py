"""What every engine offers: requests of token ids in, samples of token ids out.

    generate(requests, params) -> (index of the request, sample) as samples finish, in any order
    close()

Text never reaches an engine, and an engine never sees a problem: `sampling.py` does that part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    name: str
    whole_batches: bool  # whether a row's log-probs depend on the planned batch that it is sampled in

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]: ...

    def close(self) -> None: ...
