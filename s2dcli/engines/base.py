"""What every engine offers: requests of token ids in, samples of token ids out.

    generate(requests, params) -> (index of the request, sample) as samples finish, in any order
    close()

An engine with weights of its own (vLLM, a server) also loads new ones, frees its memory between uses, and scores
tokens that it is given:

    wake(); load_weights(folder) or load_adapter(folder); generate(...); score(rows, top_k); sleep()

Engines see neither text nor problems: `assembly/sampling.py` encodes, decodes and builds the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from s2dcli.models.rows import Row

STOP = "stop"  # the last id is an EOS
LENGTH = "length"  # max_tokens ids without an EOS


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample: the prompt's ids and the seed of its random numbers."""

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion: its ids, with the EOS if it was generated, one log-prob for each, and STOP or LENGTH.

    Log-probs are nats under the distribution that the ids were drawn from; of greedy samples under that of temperature 1.
    """

    completion_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model says of the T tokens of a completion: their own log-probs, and at each of them the K most likely ids.

    Log-probs are nats, float32, of temperature 1, normalised over the whole vocabulary; those of the K descend.
    """

    sampled_T: np.ndarray
    ids_TK: np.ndarray
    logprobs_TK: np.ndarray


class Engine(Protocol):
    """Samples completions with one set of weights at a time.

    `max_length`: largest number of tokens of prompt and completion together, None without a limit; the caller checks it.

    `name` is recorded with every sample. `whole_batches`: a row's log-probs depend, in the sixth decimal, on the
    planned batch that it is sampled in, so batches are given one by one and repeated whole. Other engines are given
    all requests at once and take them one by one as they have room.
    """

    name: str
    max_length: int | None
    whole_batches: bool

    def generate(self, requests: Iterable[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        """Yield (index, sample) exactly once for each request, in any order; the index counts the requests from 0.

        What a request gets depends on its prompt, its seed, `params` and the weights only. Ids that no token has are
        never sampled. A caller may stop early by closing the iterator: what is under way is given up. One call
        at a time. Raises EngineError, or UsageError for parameters that the engine would sample otherwise.
        """

    def close(self) -> None:
        """Release what the engine holds. It is not used after that."""


class HostedEngine(Engine, Protocol):
    """An engine that holds weights of its own.

    `local`: it serves
    this process alone, starts with the checkpoint's weights, and sees this machine's memory disk; another may hold any
    weights. `interruptions`: number of broken connections so far; behind each an engine may have
    restarted with other weights, so a caller that sees the number change checks the weights again. `merged_only`: why
    it has no use for `load_adapter`, "" if that can be tried.
    """

    max_length: int
    local: bool
    interruptions: int
    merged_only: str

    def score(self, rows: Iterable[Row], top_k: int) -> Iterator[tuple[int, Scores]]:
        """Yield (index, scores of the completion's tokens) exactly once for each row, in any order.

        No state of an earlier row's prefix is used. Raises EngineError, also where fewer than `top_k` ids are given.
        """

    def load_weights(self, folder: Path) -> None:
        """Replace the weights by those in a folder of safetensors, and drop every cache of the old ones.

        The engine is awake and generates nothing meanwhile; the folder may be removed after the call. Raises EngineError.
        """

    def load_adapter(self, folder: Path) -> None:
        """Sample from the checkpoint's weights with the LoRA adapter in a folder, as peft writes it, and drop what was before.

        As `load_weights` otherwise, which may follow. Raises EngineError, also where a part of it would not be computed with.
        """

    def give_up(self) -> None:
        """End the `generate` that another thread waits for, without what is missing. Nothing but `close` follows."""

    def sleep(self) -> None:
        """Free the GPU for a trainer on it until `wake`. Weights are kept, caches need not be."""

    def wake(self) -> None:
        """Make ready for `load_weights` and `generate`; no effect if awake."""
