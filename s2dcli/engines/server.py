"""Sampling from running `vllm serve` processes, and scoring by them, over their OpenAI-compatible completions endpoint.

Prompts are sent and completions received as token ids. Every sampling field is sent: a server
would take a missing one from the model's generation_config. A request that meets a broken connection
or a status of 5xx is sent again to the same server until --server-timeout has passed, so a server may be
restarted during a rollout; the other servers are used meanwhile. If no server completes a request for
that long, sampling fails. So it does at the first answer that is not what was asked for.

New weights are loaded through the development endpoints (VLLM_SERVER_DEV_MODE=1), from a folder that
the servers can read.

Credentials in a URL are sent as Basic authentication and are part of no message; an API key is read
from the environment.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

import httpx2

from s2dcli import console
from s2dcli.engines.base import LENGTH, STOP, Request, Sample, SamplingParams, Scores
from s2dcli.engines.vllm import require_known, require_supported
from s2dcli.errors import EngineError, UsageError
from s2dcli.files.manifest import without_credentials

if TYPE_CHECKING:
    from s2dcli.models.rows import Row

Item, Result = TypeVar("Item"), TypeVar("Result")
API_KEY = "VLLM_API_KEY"  # environment variable from which `vllm serve` takes its key too
IN_FLIGHT = 256  # requests at one server: what vLLM runs at once by default
CONNECT_SECONDS = 10.0
READ_SECONDS = 3600.0  # for one completion, which may have to wait in the queue of a busy server
TIMEOUT_SECONDS = 900  # without an answer from any server: one that restarts with a large model takes minutes
FIRST_DELAY, LONGEST_DELAY = 0.5, 15.0  # seconds between attempts: doubled each time
MASKED = -100.0  # the smallest logit_bias that the protocol allows: e^-100 is 0 beside any float32 probability
PROBE_TOKENS = 5  # as many log-probs of one position as any server gives
LARGEST_LOGPROB = 1e-4  # what is above is no log-prob: 0 and some rounding
NOT_FOUND = 404
LIMIT = re.compile(r"max allowed: (\d+)")  # as vLLM words its --max-logprobs
SHOWN = 80  # characters of an answer in an error


@dataclass
class Server:
    """One URL, without credentials: the name of the model there, and how many requests it is busy with."""

    url: str
    auth: tuple[str, str] | None = None  # user name and password
    model: str = ""
    busy: int = 0
    sent: int = 0
    trouble: str = ""  # why the last attempt failed, "" if it was answered


class ServerEngine:
    """One or several servers of the same model; requests go where fewest are in flight."""

    name = "server"
    whole_batches = False
    local = False
    merged_only = "servers get whole weights"

    def __init__(
        self,
        urls: Sequence[str],
        *,
        names: Sequence[str],
        eos_ids: Sequence[int],
        vocabulary: int,
        unused: Sequence[int] = (),
        model_vocabulary: int,
        in_flight: int = IN_FLIGHT,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        """Ask the servers what they serve.

        `names`: what the model may be called there; none if whatever is served is right.
        Ids that no token has, which are those from `vocabulary`
        up to `model_vocabulary` and the `unused` ones below, are never sampled. `timeout`: seconds without an
        answer after which a call fails. Raises EngineError, or UsageError for an API key that cannot be sent.
        """
        key = os.environ.get(API_KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UsageError(f"the environment variable {API_KEY} holds characters that cannot be sent in a header")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.eos_ids = sorted(set(eos_ids))
        self.vocabulary = vocabulary
        self.unused = frozenset(unused)
        self.logit_bias = {str(index): MASKED for index in (*unused, *range(vocabulary, model_vocabulary))} or None
        self.timeout = timeout
        self.servers = [Server(without_credentials(url).rstrip("/").removesuffix("/v1"), _credentials(url)) for url in urls]
        self.capacity = in_flight * len(self.servers)
        self.max_length = min(self._look_up(server, names) for server in self.servers)
        self.processed: bool | None = None  # whether log-probs are known to be those of the sampling distribution
        self.interruptions = 0

    def _look_up(self, server: Server, names: Sequence[str]) -> int:
        """Note what the model is called at a server; returns how many tokens a sequence may have there."""
        answer = self._json(server, "GET", "/v1/models")
        try:
            served = answer["data"]
            fitting = [entry for entry in served if {entry["id"], entry["root"]} & set(names)]
            chosen = (fitting or served)[0]
            server.model, length = str(chosen["id"]), int(chosen["max_model_len"])
        except (ValueError, LookupError, TypeError):
            raise EngineError("does not answer /v1/models as vLLM does", where=server.url) from None
        if names and not fitting:
            console.warn(f"{server.url} serves {server.model!r}, which is taken to be {names[0]!r}")
        return length

    def _call(self, server: Server, method: str, path: str, *, body: Any = None, accept: Sequence[int] = ()) -> httpx2.Response:
        """Make one call outside of sampling. Raises EngineError unless the status is 2xx or in `accept`."""
        try:
            timeout = httpx2.Timeout(self.timeout, connect=min(CONNECT_SECONDS, self.timeout))
            response = httpx2.request(method, server.url + path, json=body, headers=self.headers, auth=server.auth, timeout=timeout)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise EngineError(
                f"no server answers ({str(error) or type(error).__name__})", where=server.url, hint="vllm serve CKPT"
            ) from None
        if not response.is_success and response.status_code not in accept:
            raise EngineError(f"{method} {path} gave {_said(response)}", where=server.url)
        return response

    def _json(self, server: Server, method: str, path: str, *, body: Any = None) -> Any:
        """Make one call outside of sampling and return the JSON of its answer. Raises EngineError."""
        return _parsed(server, self._call(server, method, path, body=body))

    def generate(self, requests: Iterable[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        """Yield (index, sample) as samples arrive; requests are taken one by one as others are done. Raises EngineError."""
        require_supported(params)
        requests = iter(requests)
        first = next(requests, None)
        if first is None:
            return
        if params.temperature not in (0.0, 1.0) or params.top_p < 1.0 or params.top_k:
            self._require_processed(first.prompt_ids)
        yield from self._answers(chain([first], requests), lambda client, request: self._complete(client, request, params))

    def score(self, rows: Iterable[Row], top_k: int) -> Iterator[tuple[int, Scores]]:
        """Yield (index, scores) as answers arrive; rows are taken one by one as others are done. Raises EngineError."""
        yield from self._answers(rows, lambda client, row: self._score(client, row, top_k))

    def _answers(self, items: Iterable[Item], ask: Callable[[httpx2.AsyncClient, Item], Awaitable[Result]]) -> Iterator[tuple[int, Result]]:
        """Yield (index, what `ask` returns of an item) as answers arrive, `capacity` items under way at most. Raises EngineError."""
        todo = enumerate(items)
        flying: set[asyncio.Task] = set()
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            arrived: asyncio.Queue[tuple[int, Result | EngineError]] = asyncio.Queue()
            limits = httpx2.Limits(max_connections=self.capacity, max_keepalive_connections=self.capacity)
            timeout = httpx2.Timeout(max(READ_SECONDS, self.timeout), connect=CONNECT_SECONDS, pool=None)
            client = httpx2.AsyncClient(headers=self.headers, limits=limits, timeout=timeout)

            async def answer(index: int, item: Item) -> None:
                try:
                    result = await ask(client, item)
                except EngineError as error:  # raised below: in its task nobody would see it
                    result = error
                arrived.put_nowait((index, result))

            try:
                while True:
                    for index, item in islice(todo, self.capacity - len(flying)):
                        task = loop.create_task(answer(index, item))
                        flying.add(task)
                        task.add_done_callback(flying.discard)
                    if not flying and arrived.empty():
                        return
                    try:
                        index, result = loop.run_until_complete(asyncio.wait_for(arrived.get(), self.timeout))
                    except TimeoutError:
                        raise self._no_answer([server for server in self.servers if server.busy]) from None
                    if isinstance(result, EngineError):
                        raise result
                    yield index, result
            finally:
                loop.run_until_complete(_stop(flying, client))

    def _no_answer(self, servers: Sequence[Server]) -> EngineError:
        """Return the error for servers that have completed no request for too long."""
        trouble = next((f"; the last attempt failed: {server.trouble}" for server in servers if server.trouble), "")
        return EngineError(
            f"no completion in {self.timeout:g} s{trouble}",
            where=", ".join(server.url for server in servers),
            hint="read the server's log; --server-timeout SECONDS allows more time",
        )

    async def _complete(self, client: httpx2.AsyncClient, request: Request, params: SamplingParams) -> Sample:
        """Have one of the servers complete a request. Raises EngineError."""
        with self._chosen() as server:
            response = await self._post(client, server, self._body(server, request, params))
            return self._sample(server, request, params, _parsed(server, response))

    async def _score(self, client: httpx2.AsyncClient, row: Row, top_k: int) -> Scores:
        """Have one of the servers score a row. Raises EngineError."""
        ids = [*row.prompt_ids.tolist(), *row.completion_ids.tolist()]
        with self._chosen() as server:
            body = {
                **self._body(server, Request(ids, seed=0), SamplingParams(0.0, top_p=1.0, top_k=0, max_tokens=1)),
                "prompt_logprobs": top_k,
                "cache_salt": secrets.token_hex(8),  # no server gives log-probs of tokens from its prefix cache
            }
            try:
                response = await self._post(client, server, body)
            except EngineError as error:
                limit = LIMIT.search(error.message)
                if limit is None:
                    raise
                raise EngineError(
                    f"gives at most {limit[1]} log-probs a token, {top_k} are needed",
                    where=server.url,
                    hint=f"start it with --max-logprobs {top_k}, or --top-k {limit[1]}",
                ) from None
            return self._scores(server, ids, len(row.completion_ids), top_k, _parsed(server, response))

    @contextmanager
    def _chosen(self) -> Iterator[Server]:
        """Choose the server for a request, and count it there until it is done. Whatever goes wrong is an EngineError."""
        server = min(self.servers, key=lambda server: (server.busy, server.sent))
        server.busy += 1
        server.sent += 1
        try:
            yield server
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"a request failed ({type(error).__name__}: {error})", where=server.url) from error
        finally:
            server.busy -= 1

    def _body(self, server: Server, request: Request, params: SamplingParams) -> dict[str, Any]:
        return {
            "model": server.model,
            "prompt": request.prompt_ids,
            "add_special_tokens": False,
            "max_tokens": params.max_tokens,
            "min_tokens": 0,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": self.logit_bias,
            "watermarking": False,
            "seed": request.seed,
            "n": 1,
            "echo": False,
            "stream": False,
            "stop": [],
            "stop_token_ids": self.eos_ids,
            "ignore_eos": True,  # the ids that end a completion are ours, not those of generation_config
            "logprobs": 0,  # the sampled token's
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # needs no tokenizer there
        }

    async def _post(self, client: httpx2.AsyncClient, server: Server, body: dict[str, Any]) -> httpx2.Response:
        """Post a completion request until it is answered, with growing pauses. Raises EngineError."""
        delay, end = FIRST_DELAY, time.monotonic() + self.timeout
        while True:
            try:
                response = await client.post(server.url + "/v1/completions", json=body, auth=server.auth)
                if response.is_success:
                    server.trouble = ""
                    return response
                server.trouble = _said(response)
                if not response.is_server_error:
                    raise EngineError(f"refused a request: {server.trouble}", where=server.url)
            except httpx2.TransportError as error:
                server.trouble = f"{type(error).__name__} {error}".strip()
            if time.monotonic() + delay > end:
                raise self._no_answer([server])
            if not self.interruptions:
                console.warn(f"{server.url}: {server.trouble}; trying again for {self.timeout:g} s")
            self.interruptions += 1
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY)

    def _sample(self, server: Server, request: Request, params: SamplingParams, answer: Any) -> Sample:
        """Return the sample that an answer holds. Raises EngineError unless it is one of the request's prompt and parameters."""
        try:
            choice = answer["choices"][0]
            ids, prompt_ids, reason = choice.get("token_ids"), choice.get("prompt_token_ids"), choice["finish_reason"]
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        except (LookupError, TypeError, AttributeError):
            raise EngineError(f"gave an answer without a completion: {_start(answer)}", where=server.url) from None
        if ids is None or prompt_ids is None or logprobs is None:
            raise EngineError("answers without token ids or log-probs", where=server.url, hint="it must be a vLLM server, 0.20 or newer")
        if prompt_ids != request.prompt_ids:
            raise EngineError("changed the prompt's token ids, e.g. by a second BOS", where=server.url)
        if not isinstance(ids, list) or not all(type(index) is int for index in ids):
            raise EngineError(f"gave token ids that are not a list of integers: {_start(ids)}", where=server.url)
        unknown = next((index for index in ids if not 0 <= index < self.vocabulary or index in self.unused), None)
        if unknown is not None:
            raise EngineError(f"sampled id {unknown}, which the tokenizer does not know", where=server.url)
        if reason not in (STOP, LENGTH):
            raise EngineError(f"ended a request with {_start(reason)}", where=server.url)
        if len(ids) > params.max_tokens:
            raise EngineError(f"sampled {len(ids)} tokens; --max-tokens is {params.max_tokens}", where=server.url)
        ended = bool(ids) and ids[-1] in self.eos_ids
        if ended != (reason == STOP):
            raise EngineError(f"ended a request with {reason!r}, but {'with' if ended else 'without'} an EOS at the end", where=server.url)
        if reason == LENGTH and len(ids) < params.max_tokens:
            raise EngineError(f"ended a request with 'length' after {len(ids)} of {params.max_tokens} tokens", where=server.url)
        if not isinstance(logprobs, list) or len(logprobs) != len(ids):
            raise EngineError(f"gave other than {len(ids)} log-probs for {len(ids)} tokens: {_start(logprobs)}", where=server.url)
        for value in logprobs:
            if type(value) not in (int, float) or not math.isfinite(value):
                raise EngineError(f"gave {_start(value)} as a log-prob", where=server.url)
            if value > LARGEST_LOGPROB:
                raise EngineError(f"gave {value} as a log-prob", where=server.url, hint="start it with another --logprobs-mode")
        return Sample(ids, logprobs, reason)

    def _scores(self, server: Server, ids: list[int], length: int, top_k: int, answer: Any) -> Scores:
        """Return the scores of the last `length` of a row's ids. Raises EngineError unless the answer is about this row."""
        import numpy as np

        try:
            choice = answer["choices"][0]
            echoed, positions = choice.get("prompt_token_ids"), choice.get("prompt_logprobs")
        except (LookupError, TypeError, AttributeError):
            raise EngineError(f"gave an answer without a choice: {_start(answer)}", where=server.url) from None
        if echoed is None or positions is None:
            raise EngineError(
                "answers without prompt token ids or log-probs", where=server.url, hint="it must be a vLLM server, 0.20 or newer"
            )
        if echoed != ids:
            raise EngineError("changed the token ids, e.g. by a second BOS", where=server.url)
        if not isinstance(positions, list) or len(positions) != len(ids):
            raise EngineError(f"gave log-probs of other than {len(ids)} tokens: {_start(positions)}", where=server.url)
        sampled_T, ids_TK = np.empty(length, np.float32), np.empty((length, top_k), np.int32)
        logprobs_TK = np.empty((length, top_k), np.float32)
        first = len(ids) - length
        for position, (token, found) in enumerate(zip(ids[first:], positions[first:], strict=True)):
            try:
                pairs = {int(index): float(entry["logprob"]) for index, entry in found.items()}
                sampled_T[position] = pairs[token]
                if len(pairs) > top_k:
                    del pairs[token]  # told beside the top k, as it is none of them
                best = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
                ids_TK[position], logprobs_TK[position] = [index for index, _ in best], [value for _, value in best]
            except (AttributeError, LookupError, TypeError, ValueError):
                raise EngineError(
                    f"gave other than {top_k} log-probs for token {first + position}: {_start(found)}", where=server.url
                ) from None
        if not np.isfinite(sampled_T).all() or not np.isfinite(logprobs_TK).all() or logprobs_TK.max(initial=-1) > LARGEST_LOGPROB:
            raise EngineError("gave numbers that are no log-probs", where=server.url, hint="start it with another --logprobs-mode")
        require_known(ids_TK, self.vocabulary, self.unused, server.url)
        return Scores(sampled_T, ids_TK, logprobs_TK)

    def detokenize(self, ids: Sequence[int]) -> list[tuple[str, str | None]]:
        """Return each server's URL with the text that ids have there; None where it was started without a tokenizer. Raises EngineError."""
        found = []
        for server in self.servers:
            body = {"model": server.model, "tokens": list(ids)}
            response = self._call(server, "POST", "/detokenize", body=body, accept=(NOT_FOUND, *range(400, 600)))
            text = _parsed(server, response).get("prompt") if response.is_success else None
            found.append((server.url, text))
        return found

    def _require_processed(self, prompt_ids: list[int]) -> None:
        """Raise EngineError unless every server returns log-probs of the distribution that it draws from.

        From temperature 1 to 2 these come closer to each other by half; those of the model itself, which a
        server returns by default, stay as they are.
        """
        if self.processed:
            return
        for server in self.servers:
            once, twice = (self._spread(server, prompt_ids, temperature) for temperature in (1.0, 2.0))
            if not twice < 0.75 * once:
                raise EngineError(
                    "returns the log-probs of temperature 1, top-p 1, top-k 0, not those of the distribution that it draws from",
                    where=server.url,
                    hint="start it with --logprobs-mode processed_logprobs, or sample with --temperature 1 --top-p 1 --top-k 0",
                )
        self.processed = True

    def _spread(self, server: Server, prompt_ids: list[int], temperature: float) -> float:
        """Return how far apart the likeliest first tokens are, in nats."""
        body = self._body(server, Request(prompt_ids, seed=0), SamplingParams(temperature, top_p=1.0, top_k=0, max_tokens=1))
        answer = self._json(server, "POST", "/v1/completions", body={**body, "logprobs": PROBE_TOKENS})
        try:
            likeliest = sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)[:PROBE_TOKENS]
            return float(likeliest[0] - likeliest[-1])
        except (LookupError, TypeError, AttributeError):
            raise EngineError(f"gave an answer without the likeliest tokens' log-probs: {_start(answer)}", where=server.url) from None

    def load_weights(self, folder: Path) -> None:
        """Have every server load the weights in a folder of safetensors, and drop its prefix cache. Raises EngineError."""
        for server in self.servers:
            body = {"method": "s2d_load_weights", "args": [str(folder)]}
            response = self._call(server, "POST", "/collective_rpc", body=body, accept=(NOT_FOUND, *range(500, 600)))
            if response.status_code == NOT_FOUND:
                hint = "start it with VLLM_SERVER_DEV_MODE=1 in its environment, on a network that you trust"
                raise EngineError("takes no new weights", where=server.url, hint=hint)
            if not response.is_success:  # started without our extension, which a GPU server does not need
                body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                self._call(server, "POST", "/collective_rpc", body=body)
            answer = self._json(server, "POST", "/reset_prefix_cache")
            if not isinstance(answer, dict) or answer.get("success") is not True:
                raise EngineError("did not drop its prefix cache, which holds states of the old weights", where=server.url)

    def give_up(self) -> None:
        """Nothing to end: servers drop requests when this process is gone."""

    def sleep(self) -> None:
        """Nothing to free: a server's GPUs are its own."""

    def wake(self) -> None:
        """See `sleep`."""

    def close(self) -> None:
        """Nothing to release: servers belong to whoever has started them."""


def _credentials(url: str) -> tuple[str, str] | None:
    """Return the user name and password of a URL, None if it has none."""
    parts = urlsplit(url)
    return (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None


def _parsed(server: Server, response: httpx2.Response) -> Any:
    """Return the JSON of an answer. Raises EngineError if it is none."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        raise EngineError(f"gave an answer that is not JSON: {_start(response.text)}", where=server.url) from None


def _start(content: Any) -> str:
    """Return the beginning of an answer, or of a part of one, in one line."""
    text = repr(content)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


async def _stop(tasks: Iterable[asyncio.Task], client: httpx2.AsyncClient) -> None:
    """Give up what is under way; the servers drop requests whose connection ends."""
    for task in (running := list(tasks)):
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await client.aclose()


def _said(response: httpx2.Response) -> str:
    """Return the status and the message of an answer that is no success, in one line."""
    try:
        body = response.json()
        text = body["error"]["message"] if "error" in body else body["detail"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = response.text
    return f"{response.status_code} {' '.join(str(text).split())[:300]}".strip()
