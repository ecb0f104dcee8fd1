"""Scoring as a stream: what a reader makes of the hidden states of each row, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from s2dcli import world
from s2dcli.models.batching import MicroBatch, Row, micro_batches
from s2dcli.models.forward import Head
from s2dcli.models.policy import Policy
from s2dcli.models.readers import free_bytes, token_logprobs
from s2dcli.models.selftest import common_fast_paths

# (hidden states [N, D], head, micro-batch) -> one tensor or several, [N, ...] each
Reader = Callable[[torch.Tensor, Head, MicroBatch], tuple[torch.Tensor, ...]]


def read(
    policy: Policy,
    rows: Sequence[Row],
    reader: Reader,
    *,
    tokens_per_batch: int,
    pad_id: int,
    deal: bool = False,
    others: Sequence[Policy] = (),
) -> Iterator[tuple[Row, tuple[np.ndarray, ...]]]:
    """Yield each row with what `reader` returned for its completion tokens, [T, ...], as micro-batches are done, without gradient.

    Rows without completion tokens do not appear. `others`: models that `reader` gives the micro-batches to. With `deal`
    several processes share the work on their common rows.
    """
    found = _read(policy, rows, reader, tokens_per_batch, pad_id, deal, others)
    if deal and world.size() > 1:
        numbers = {row: number for number, row in enumerate(rows)}
        everyones = world.gather([(numbers[row], parts) for row, parts in found])
        yield from ((rows[number], parts) for part in everyones for number, parts in part)
    else:
        yield from found


def _read(
    policy: Policy, rows: Sequence[Row], reader: Reader, tokens_per_batch: int, pad_id: int, deal: bool, others: Sequence[Policy]
) -> Iterator[tuple[Row, tuple[np.ndarray, ...]]]:
    device = next(policy.parameters()).device
    free_bytes.cache_clear()
    paths = common_fast_paths([model.model for model in (policy, *others)])
    # Sharded models are run in step: as many micro-batches in each process, and once for each.
    layout = {"share_prompts": paths.share_prompts and not policy.sharded, "pack": paths.pack, "deal": deal}
    filler = min((row for row in rows if len(row.completion_ids)), key=len, default=None) if policy.sharded else None
    for batch in micro_batches(rows, tokens_per_batch, pad_id, device, **layout, filler=filler):
        with torch.no_grad():
            found = [values.cpu().split(batch.lengths_B) for values in reader(policy.states(batch), policy.head(), batch)]
        if not batch.filler:
            yield from ((row, tuple(part.numpy() for part in parts)) for row, *parts in zip(batch.rows, *found, strict=True))
    if policy.sharded:
        policy.reshard()


def score(
    policy: Policy, rows: Sequence[Row], *, tokens_per_batch: int, pad_id: int, temperature: float = 1.0, deal: bool = False
) -> Iterator[tuple[Row, np.ndarray]]:
    """Yield each row with the log-probs (nats, float32) of its completion tokens under softmax(logits / temperature).

    `deal`: as `read` takes it.
    """

    def reader(hidden_ND: torch.Tensor, head: Head, batch: MicroBatch) -> tuple[torch.Tensor]:
        return (token_logprobs(hidden_ND, head, batch.targets_N, temperature),)

    nothing = np.empty(0, dtype=np.float32)
    yield from ((row, nothing) for row in rows if not len(row.completion_ids))
    for row, (logprobs,) in read(policy, rows, reader, tokens_per_batch=tokens_per_batch, pad_id=pad_id, deal=deal):
        yield row, logprobs
