"""Scoring rollouts with a teacher, for a cache: the numbers of each row, how far rounding moves them, and what they take on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from s2dcli import stats
from s2dcli.assembly.loading import load_scorer
from s2dcli.engines.base import HostedEngine
from s2dcli.engines.opening import SERVER, TRANSFORMERS, VLLM, engine_kind, open_engine
from s2dcli.errors import ModelError, UsageError
from s2dcli.files.teacher_cache import HEAD, SHARD_BYTES, CacheFolder, Columns, Meta, bytes_per_token, layout, portions
from s2dcli.models.batching import MicroBatch
from s2dcli.models.checkpoints import Checkpoint, eos_ids, load, model_config, pick_device, pick_dtype
from s2dcli.models.forward import Head
from s2dcli.models.policy import Policy, freeze
from s2dcli.models.prompts import tokenizer_sha256, unused_ids, vocabulary_size
from s2dcli.models.readers import token_logprobs, top_k_logprobs
from s2dcli.models.scoring import read
from s2dcli.options import Keep, ModelOptions, ScoringOptions, ValueType
from s2dcli.train.rows import TrainingRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is less likely is told apart from impossible in no float32 sum: log-probs are kept at this, the log of its
# smallest normal number, where they are lower.
LEAST_LOGPROB = math.log(torch.finfo(torch.float32).tiny)
MASS_AT = (16, 64, 128, 256)  # values of k that a dry run tells the mass of
MEASURED_TOKENS = 4096  # completion tokens of the first rollouts that a dry run scores


@dataclass(frozen=True)
class CacheForm:
    """What is kept of each distribution, and in which numbers."""

    keep: Keep
    k: int  # ids; 0 unless of Keep.top_k
    dtype: ValueType
    temperature: float = 1.0


class Scorer(Protocol):
    """A teacher that scores rows."""

    name: str  # of its engine

    def most_ids(self, vocabulary: int) -> int:
        """Return how many ids of each token it can give."""

    def score(self, rows: Sequence[TrainingRow], form: CacheForm) -> Iterator[tuple[TrainingRow, Columns]]:
        """Yield each row that has completion tokens, in any order, with the columns of its form (teacher_cache.layout).

        One more column, `rounding`, is the largest change of a log-prob at each token by the type of the values.
        """


@contextmanager
def open_scorer(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    scoring: ScoringOptions,
    loading: ModelOptions,
    form: CacheForm,
    rows: Sequence[TrainingRow],
    tokens_per_batch: int,
) -> Iterator[LiveScorer | HostedScorer]:
    """Open the engine that `--engine` names, to score `rows`; a hosted one is proved on the first of them where that is asked for.

    Raises EngineError, ModelError or UsageError.
    """
    if engine_kind(scoring, loading.device) == TRANSFORMERS:
        yield LiveScorer(checkpoint, tokenizer, loading.of_load(), tokens_per_batch)
        return
    engine, gate = open_engine(checkpoint, tokenizer, scoring, loading, top_k=max(1, form.k))
    try:
        longest = max(map(len, rows), default=0)
        if longest >= engine.max_length:
            raise UsageError(
                f"a row of {longest} tokens and one that vLLM samples exceed the {engine.max_length} tokens that {engine.name} takes",
                hint="raise vLLM's --max-model-len, or score with --engine transformers",
            )
        if scoring.parity_rows:
            gate.check_scores(engine, load_scorer(checkpoint, loading), [row for row in rows if len(row.completion_ids)])
        yield HostedScorer(engine, max(1, form.k))
    finally:
        engine.close()


def check_form(form: CacheForm, scoring: ScoringOptions, device: str) -> None:
    """Raise UsageError for what an engine does not give."""
    kind = engine_kind(scoring, device)
    if kind in (VLLM, SERVER):
        which, hint = {VLLM: "vLLM", SERVER: "a server"}[kind], "score with --engine transformers"
        if form.keep is Keep.hidden:
            raise UsageError(f"--keep hidden: {which} gives log-probs only, no hidden states", hint=hint)
        if form.temperature != 1.0:
            raise UsageError(f"--temperature {form.temperature:g}: {which} scores at temperature 1", hint=hint)


class LiveScorer:
    """The teacher in this process, by transformers."""

    name = TRANSFORMERS

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerBase,
        how: Mapping[str, Any],
        tokens_per_batch: int,
        *,
        announce: bool = True,
    ) -> None:
        """`how` is what models/checkpoints.load takes of the options."""
        loaded = load(checkpoint, **how, tokenizer=tokenizer, announce=announce)
        self.dtype = loaded.compute_dtype
        self.policy = freeze(Policy(loaded.model, loaded.vocabulary))
        self.layout = {"tokens_per_batch": tokens_per_batch, "pad_id": loaded.pad_id}

    def head(self) -> Head:
        return self.policy.head()

    def most_ids(self, vocabulary: int) -> int:
        return vocabulary

    def score(self, rows: Sequence[TrainingRow], form: CacheForm) -> Iterator[tuple[TrainingRow, Columns]]:
        """See `Scorer`. Raises ModelError for hidden states beyond the range of their type."""
        temperature = form.temperature

        def top_k(hidden_ND: torch.Tensor, head: Head, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
            return top_k_logprobs(hidden_ND, head, form.k, temperature, batch.targets_N)

        def sampled(hidden_ND: torch.Tensor, head: Head, batch: MicroBatch) -> tuple[torch.Tensor]:
            return (token_logprobs(hidden_ND, head, batch.targets_N, temperature),)

        def hidden(hidden_ND: torch.Tensor, head: Head, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
            kept_ND = hidden_ND.to(getattr(torch, form.dtype))
            if not kept_ND.isfinite().all():
                raise ModelError(f"hidden states exceed the range of {form.dtype}", hint="--cache-dtype float32")
            before_N, after_N = (token_logprobs(states, head, batch.targets_N) for states in (hidden_ND, kept_ND.to(hidden_ND.dtype)))
            return kept_ND, (after_N - before_N).abs()

        reader = {Keep.top_k: top_k, Keep.sampled: sampled, Keep.hidden: hidden}[form.keep]
        for row, found in read(self.policy, rows, reader, **self.layout):
            if form.keep is Keep.hidden:
                yield row, dict(zip(("hidden", "rounding"), found, strict=True))
            else:
                yield row, _rounded(form, *found)


class HostedScorer:
    """A teacher in vLLM or on servers."""

    def __init__(self, engine: HostedEngine, k: int) -> None:
        """`k`: ids of each token that it was opened to give."""
        self.engine, self.name, self.k = engine, engine.name, k

    def most_ids(self, vocabulary: int) -> int:
        return self.k

    def score(self, rows: Sequence[TrainingRow], form: CacheForm) -> Iterator[tuple[TrainingRow, Columns]]:
        """See `Scorer`. The mass of the tail is what is missing from 1: below float32's rounding it is taken for 0. Raises EngineError."""
        rows = [row for row in rows if len(row.completion_ids)]
        for index, scores in self.engine.score(rows, max(1, form.k)):
            if form.keep is Keep.sampled:
                yield rows[index], _rounded(form, scores.sampled_T)
            else:
                yield rows[index], _rounded(form, scores.ids_TK, scores.logprobs_TK, tail_logprobs(scores.logprobs_TK), scores.sampled_T)


def tail_logprobs(logprobs_TK: np.ndarray) -> np.ndarray:
    """Log of the mass of all ids but K, [T]: 1 less theirs, and at least float32's smallest number."""
    missing_T = 1.0 - np.exp(logprobs_TK.astype(np.float64)).sum(-1)
    return np.log(np.maximum(missing_T, np.finfo(np.float32).tiny)).astype(np.float32)


def _rounded(form: CacheForm, *found: np.ndarray) -> Columns:
    """Name the columns, bring them to the types of the form's layout, and add how far that moved each token's log-probs."""
    types = layout(form.keep, form.k, 0, form.dtype)
    columns: Columns = {}
    rounding_T = np.zeros(len(found[0]), np.float32)
    for (name, (kind, _)), values in zip(types.items(), found, strict=True):
        exact = values if name == "ids" else np.maximum(values, LEAST_LOGPROB)
        columns[name] = exact.astype(kind)
        change = np.abs(columns[name].astype(np.float32) - exact) if name != "ids" else np.zeros(0)
        rounding_T = np.maximum(rounding_T, change.reshape(len(exact), -1).max(-1)) if change.size else rounding_T
    return {**columns, "rounding": rounding_T}


def score_portion(scorer: Scorer, rows: Sequence[TrainingRow], form: CacheForm, width: int) -> tuple[Columns, dict[str, float]]:
    """Score rows; returns their columns, one row's tokens after the other's, and sums of figures over the tokens."""
    starts, total = {}, 0
    for row in rows:
        starts[row] = total
        total += len(row.completion_ids)
    columns = {name: np.empty((total, *shape), kind) for name, (kind, shape) in layout(form.keep, form.k, width, form.dtype).items()}
    mass = rounding = worst = 0.0
    for row, found in scorer.score(rows, form):
        at = slice(starts[row], starts[row] + len(row.completion_ids))
        for name, values in columns.items():
            values[at] = found[name]
        mass += float(_mass(form.keep, found).sum(dtype=np.float64))
        rounding += float(found["rounding"].sum(dtype=np.float64))
        worst = max(worst, float(found["rounding"].max()))
    return columns, {"rows": len(rows), "tokens": total, "mass_sum": mass, "rounding_sum": rounding, "rounding_max": worst}


def fill_cache(
    folder: CacheFolder,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    loading: ModelOptions,
    form: CacheForm,
    width: int,
    rows: Sequence[TrainingRow],
    shard_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Meta:
    """Write the shards of a cache that are not there yet; returns what its meta.json is to say. `advance` is told of tokens."""
    lengths = [len(row.completion_ids) for row in rows]
    most = min(shard_tokens, SHARD_BYTES // bytes_per_token(form.keep, form.k, width, form.dtype))
    for number, part in enumerate(portions(lengths, most)):
        if not folder.shard(number).is_file():
            folder.write_shard(number, rows[part], *score_portion(scorer, rows[part], form, width))
        advance(sum(lengths[part]))
    return describe(folder, checkpoint, tokenizer, scorer, loading, form, width)


def _mass(keep: Keep, columns: Columns) -> np.ndarray:
    """Probability of what is kept at each token."""
    if keep is Keep.top_k:
        return -np.expm1(np.minimum(columns["tails"], 0.0))
    return np.exp(columns["sampled"].astype(np.float32)) if keep is Keep.sampled else np.ones(len(columns["hidden"]))


def sizes(checkpoint: Checkpoint, loading: ModelOptions, vocabulary: int, form: CacheForm, tokens: int) -> dict[str, Any]:
    """Return the bytes a token, and in all, of each encoding; those of hidden states come with their head."""
    width = hidden_width(checkpoint, loading)
    k = form.k or min(MASS_AT[2], vocabulary)
    per_token = {keep.value: bytes_per_token(keep, k, width, form.dtype) for keep in Keep}
    head = vocabulary * width * pick_dtype(loading.dtype, pick_device(loading.device)).itemsize
    return {
        "tokens": tokens,
        "bytes_per_token": per_token,
        "bytes": {name: size * tokens + (head if name == Keep.hidden else 0) for name, size in per_token.items()},
    }


def measure_mass(scorer: Scorer, rows: Sequence[TrainingRow], most: int) -> dict[str, Any]:
    """Return the teacher's mean mass inside its k most likely ids, for each k of MASS_AT that is less than `most`, and for `most`.

    Of the first rows, up to MEASURED_TOKENS tokens; the standard error is over their problems.
    """
    chosen, tokens = [], 0
    for row in rows:
        if tokens >= MEASURED_TOKENS:
            break
        chosen.append(row)
        tokens += len(row.completion_ids)
    values = sorted({k for k in MASS_AT if k < most} | {min(most, MASS_AT[-1])})
    form = CacheForm(Keep.top_k, values[-1], ValueType.float32)
    by_problem: dict[int, dict[str, list[float]]] = {k: {} for k in values}
    for row, columns in scorer.score(chosen, form):
        reached_TK = np.minimum(np.exp(columns["logprobs"].astype(np.float64)).cumsum(-1), 1.0)
        for k in values:
            by_problem[k].setdefault(row.problem_sha256, []).extend(reached_TK[:, k - 1].tolist())
    means = {k: [stats.mean(masses) for masses in problems.values()] for k, problems in by_problem.items()}
    return {
        "measured_tokens": tokens,
        "measured_problems": len(means[values[0]]),
        "mass": {str(k): stats.mean(found) for k, found in means.items()},
        "mass_se": {str(k): stats.standard_error(found) if len(found) > 1 else None for k, found in means.items()},
    }


def hidden_width(checkpoint: Checkpoint, loading: ModelOptions) -> int:
    return int(model_config(checkpoint, loading.trust_remote_code).get_text_config().hidden_size)


def describe(
    folder: CacheFolder,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    loading: ModelOptions,
    form: CacheForm,
    width: int,
) -> Meta:
    """Write what stands beside the shards, the head and the tokens, and return what meta.json says of a cache, but for its files."""
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    vocabulary = vocabulary_size(tokenizer)
    folder.write_tokens([names.get(index) for index in range(vocabulary)])
    told: dict[str, Any] = {}
    if form.keep is Keep.hidden:
        head = scorer.head()
        tensors = {"weight": head.weight_VD} | ({} if head.bias_V is None else {"bias": head.bias_V})
        folder.write_tensors(folder.folder / HEAD, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        told = {"scale": head.scale, "soft_cap": head.soft_cap, "unused": list(unused_ids(tokenizer))}
    figures = [shard.figures for shard in folder.shards()]
    tokens = int(sum(shard["tokens"] for shard in figures))
    return Meta(
        teacher={
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "step": checkpoint.step,
            "weights_sha256": checkpoint.weights_sha256,
            "engine": scorer.name,
        },
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocabulary=vocabulary,
        eos_ids=list(eos_ids(tokenizer, checkpoint, loading.trust_remote_code)),
        keep=form.keep,
        k=form.k,
        width=width,
        dtype=form.dtype,
        compute_dtype=str(pick_dtype(loading.dtype, pick_device(loading.device))).removeprefix("torch."),
        temperature=form.temperature,
        rows=int(sum(shard["rows"] for shard in figures)),
        tokens=tokens,
        mass=sum(shard["mass_sum"] for shard in figures) / max(1, tokens),
        rounding={
            "mean": sum(shard["rounding_sum"] for shard in figures) / max(1, tokens),
            "max": max((shard["rounding_max"] for shard in figures), default=0.0),
        },
        head=told,
    )
