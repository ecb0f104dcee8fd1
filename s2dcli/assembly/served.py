"""A teacher on servers: what it says of a step's rows is asked for ahead, while the student is updated on earlier ones."""

from __future__ import annotations

import math
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2dcli import console, stats
from s2dcli.assembly.scoring import tail_logprobs
from s2dcli.engines.base import Scores
from s2dcli.engines.server import ServerEngine
from s2dcli.engines.weights import TOLERANCE
from s2dcli.errors import EngineError, ModelError, UsageError
from s2dcli.files.atomic import disk_errors
from s2dcli.files.manifest import read_json, write_json
from s2dcli.files.run_folder import TEACHER
from s2dcli.models.batching import MicroBatch
from s2dcli.models.rows import Row
from s2dcli.train.rows import TrainingRow
from s2dcli.train.targets import SampledTargets, TopKTargets
from s2dcli.train.teachers import Waiting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CANARIES = 2  # rows that are scored again with each request, to notice that the model behind a URL is another one
CANARY_TOKENS = 64
COMPARED_IDS = 4096  # in one request for their texts
CANARY_TOLERANCE = TOLERANCE["bfloat16"]  # nats on average: what it computes in is not known


class ServedTeacher(Waiting):
    """A teacher on servers, by its k most likely ids or, without `top_k`, by the log-probs of the sampled tokens.

    `begin` hands rows to a thread that asks for them; `targets` waits for those of its micro-batch, and they are forgotten.
    An error of a server ends the run there.
    """

    others = sources = ()

    def __init__(
        self, engine: ServerEngine, tokenizer: PreTrainedTokenizerBase, top_k: int | None, out: Path, *, baseline: bool = False
    ) -> None:
        """`out` is where what the teacher first said is kept, for a resumed run to be held to it; with `baseline` the log-probs of
        the sampled tokens come with the `top_k` ids around them. Raises ModelError or EngineError.
        """
        self.engine, self.top_k, self.baseline = engine, top_k, baseline
        self._canaries = _Canaries(engine, out, proved=has_same_texts(engine, tokenizer))
        self._found: dict[Row, Scores] = {}
        self._due: Counter[Row] = Counter()  # how often a row's targets will be asked for
        self._failure: Exception | None = None
        self._news = threading.Condition()
        self._todo: queue.SimpleQueue[list[TrainingRow]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, rows: Sequence[TrainingRow]) -> None:
        """Ask for the scores of rows, longest first, as micro-batches take them. Raises UsageError."""
        rows = [row for row in rows if len(row.completion_ids)]
        self._require_room(rows)
        with self._news:
            fresh = [row for row in dict.fromkeys(rows) if not self._due[row]]
            self._due.update(rows)
        self._todo.put(sorted(fresh, key=lambda row: -len(row)))
        if self._thread is None:
            self._thread = threading.Thread(target=self._ask, daemon=True)
            self._thread.start()

    def targets(self, batch: MicroBatch) -> TopKTargets | SampledTargets:
        """Wait for the scores of a micro-batch that was begun. Raises EngineError."""
        with self._news:
            with self.waiting():
                self._news.wait_for(lambda: self._failure or all(row in self._found for row in batch.rows))
            if self._failure:
                raise self._failure
            scores = [self._found[row] for row in batch.rows]
            for row in batch.rows:
                self._due[row] -= 1
                if not self._due[row]:
                    del self._due[row]
                    self._found.pop(row, None)
        device = batch.targets_N.device
        if self.top_k is None:
            return SampledTargets(batch.per_token([found.sampled_T for found in scores]))
        around = self._top_k(scores, device)
        return SampledTargets(batch.per_token([found.sampled_T for found in scores]), around) if self.baseline else around

    def _top_k(self, scores: Sequence[Scores], device: torch.device) -> TopKTargets:
        ids_NK, logprobs_NK = (np.concatenate([getattr(found, name) for found in scores]) for name in ("ids_TK", "logprobs_TK"))
        tails_N = torch.from_numpy(tail_logprobs(logprobs_NK)).to(device)
        return TopKTargets(torch.from_numpy(ids_NK).long().to(device), torch.from_numpy(logprobs_NK).to(device), tails_N)

    def _ask(self) -> None:
        try:
            while True:
                for row, scores in self._canaries.watch(self._todo.get(), self.top_k or 1):
                    with self._news:
                        self._found[row] = scores
                        self._news.notify_all()
        except Exception as error:  # raised where the scores are waited for
            with self._news:
                self._failure = error
                self._news.notify_all()

    def _require_room(self, rows: Sequence[TrainingRow]) -> None:
        longest = max(map(len, rows), default=0)
        if longest >= self.engine.max_length:
            raise UsageError(
                f"a row of {longest} tokens and one that vLLM samples exceed the {self.engine.max_length} tokens that the teacher's server "
                "takes",
                hint="lower --max-tokens, or start it with a larger --max-model-len",
            )


class _Canaries:
    """Scores rows, and with them each time the first rows again: a model that was exchanged is noticed at once."""

    def __init__(self, engine: ServerEngine, out: Path, *, proved: bool) -> None:
        """`proved`: the servers' tokenizer is known to be the student's."""
        self.engine, self.path, self.proved = engine, out / TEACHER, proved
        self._rows: list[Row] = []
        self._logprobs: list[list[float]] = []
        if self.path.is_file():
            for row in read_json(self.path)["rows"]:
                self._rows.append(Row(row["prompt_ids"], row["completion_ids"]))
                self._logprobs.append(row["logprobs"])

    def watch(self, rows: Sequence[TrainingRow], top_k: int) -> Iterator[tuple[TrainingRow, Scores]]:
        """Yield rows with their scores. Raises EngineError if the model is another one, or no model of these rows."""
        known = list(self._rows)
        for index, scores in self.engine.score([*known, *rows], top_k):
            if index < len(known):
                self._compare(index, scores.sampled_T.tolist())
            else:
                if not known:
                    self._remember(rows[index - len(known)], scores)
                yield rows[index - len(known)], scores

    def _compare(self, index: int, logprobs: list[float]) -> None:
        gap = stats.mean(abs(a - b) for a, b in zip(logprobs, self._logprobs[index], strict=True))
        if not gap <= CANARY_TOLERANCE:
            raise EngineError(
                f"the teacher is another model than at the beginning of the run: it now gives log-probs of the same tokens that are "
                f"{gap:.2g} nats off on average",
                where=", ".join(server.url for server in self.engine.servers),
                hint="serve the first one again and --resume",
            )

    def _remember(self, row: TrainingRow, scores: Scores) -> None:
        """Keep the first rows. Raises ModelError where they are less likely than by chance and nothing else speaks for the tokenizer."""
        if len(self._rows) == CANARIES:
            return
        if not self.proved:
            require_likely(self.engine, scores)
        length = min(CANARY_TOKENS, len(row.completion_ids))
        self._rows.append(Row(row.prompt_ids, row.completion_ids[:length]))
        self._logprobs.append(scores.sampled_T[:length].tolist())
        kept: list[dict[str, Any]] = [
            {"prompt_ids": row.prompt_ids.tolist(), "completion_ids": row.completion_ids.tolist(), "logprobs": logprobs}
            for row, logprobs in zip(self._rows, self._logprobs, strict=True)
        ]
        with disk_errors("write", self.path):
            write_json(self.path, {"rows": kept})


def require_likely(engine: ServerEngine, scores: Scores) -> None:
    """Raise ModelError if a row is less likely to a teacher than by chance."""
    mean = float(scores.sampled_T.mean())
    if mean < -math.log(engine.vocabulary):
        raise ModelError(
            f"the teacher finds the rollouts less likely than chance ({mean:.1f} nats a token): its ids mean other tokens",
            where=", ".join(server.url for server in engine.servers),
            hint="teacher and student must share one tokenizer",
        )


def has_same_texts(engine: ServerEngine, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether all servers were seen to decode every id to the same text as `tokenizer`. Raises ModelError, naming the first that differs.

    False where one was started without a tokenizer: its teacher is judged by its log-probs alone.
    """
    ids = sorted(tokenizer.get_vocab().values())
    for start in range(0, len(ids), COMPARED_IDS):
        chunk = ids[start : start + COMPARED_IDS]
        for number, (url, theirs) in enumerate(engine.detokenize(chunk)):
            if theirs is None:
                console.warn(f"{url} has no tokenizer to compare: its teacher is judged by its log-probs alone")
                return False
            if theirs == tokenizer.decode(chunk):
                continue
            for index in chunk:
                mine, (_, other) = tokenizer.decode([index]), engine.detokenize([index])[number]
                if mine != other:
                    raise ModelError(
                        f"teacher and student have different tokenizers: id {index} is {other!r} in the teacher "
                        f"and {mine!r} in the student",
                        where=url,
                        hint="distillation compares probabilities token by token and needs one tokenizer for both",
                    )
    return True
