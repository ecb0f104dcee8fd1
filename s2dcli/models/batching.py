"""From rows of token ids to micro-batches: length-sorted, filled by a token budget, right-padded.

Shapes: B rows of a micro-batch, P its distinct prompts, T positions, N its completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch

from s2dcli import world
from s2dcli.models.rows import Row

# A micro-batch ends early where its padding would exceed this share of its positions ...
MAX_PADDING = 0.04
# ... unless it has less than this share of its budget: small ones cost their overhead, and pad little of the whole.
MIN_FILL = 1 / 8
# Ending them early makes more of them: worth it from this share of the positions of full ones on.
EARLY_WORTH = 0.97
# Sharing prompts runs the backbone twice, on fewer positions: worth it from a fifth fewer on.
SHARING_WORTH = 0.8


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """The distinct prompts of a micro-batch whose rows share them."""

    ids_PT: torch.Tensor
    lengths_P: torch.Tensor
    of_B: torch.Tensor  # which prompt each row continues
    padded: bool  # whether the prompts differ in length


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model at once, right-padded. Completion tokens stand row after row, in order.

    `input_ids_BT` are prompts with their completions, or, with `prompts`, the completions alone; with
    `position_ids_BT` they stand one behind the other in a single row.
    """

    rows: list[Row]
    input_ids_BT: torch.Tensor
    prompts: SharedPrompts | None
    states_N: torch.Tensor  # flat index into [B * T] of the state that predicts each completion token
    targets_N: torch.Tensor  # the completion tokens
    largest_target: int
    lengths_B: list[int]  # completion tokens of each row
    num_padding: int  # positions that are padding
    position_ids_BT: torch.Tensor | None = None
    filler: bool = False  # there to be computed, since other processes compute one more; nothing in it counts

    @property
    def num_positions(self) -> int:
        """Positions that go through the model, padding included."""
        return self.input_ids_BT.numel() + (self.prompts.ids_PT.numel() if self.prompts else 0)

    def per_token(self, values_B: Sequence[np.ndarray]) -> torch.Tensor:
        """Join the rows' numbers per completion token, in the order of `rows`, to [N] float32. Raises ValueError for another length."""
        for values, length in zip(values_B, self.lengths_B, strict=True):
            if len(values) != length:
                raise ValueError(f"{len(values)} numbers for {length} completion tokens")
        return send(np.concatenate(values_B, dtype=np.float32), self.targets_N.device)

    def per_row(self, values_B: Sequence[float]) -> torch.Tensor:
        """Repeat one number per row over the row's completion tokens, [N] float32."""
        return send(np.repeat(np.array(values_B, dtype=np.float32), self.lengths_B), self.targets_N.device)


def send(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Make an array a tensor on a device, without waiting for what a GPU was asked before."""
    return torch.from_numpy(values).to(device, non_blocking=True)


def micro_batches(
    rows: Sequence[Row],
    tokens_per_batch: int,
    pad_id: int,
    device: torch.device,
    *,
    share_prompts: bool = True,
    pack: bool = False,
    deal: bool = False,
    filler: Row | None = None,
) -> Iterator[MicroBatch]:
    """Cut rows into micro-batches of at most `tokens_per_batch` positions, padding included, and yield them one at a time.

    Two plans are weighed by the positions that they run through the model: rows sorted by length, so
    that neighbours pad each other little, or with `pack` one behind the other and without padding (see
    `models/selftest.FastPaths`); or rows of one prompt together, the prompt run once for all of them (only
    with `share_prompts`: it needs a model that caches). A row that is longer than the budget is a
    micro-batch of its own. Rows without completion tokens are left out: they have nothing to learn
    from, and their weight in the loss's denominators stays.

    With `deal` each of several processes, which all have the same rows, gets every n-th of the micro-batches that
    one process would get, so what is computed together does not depend on their number; only where that would leave some
    without any is the budget less. With a `filler` each then gets equally many: micro-batches of that row alone.
    """
    if deal and world.size() > 1:
        tokens_per_batch = min(tokens_per_batch, -(-sum(map(len, rows)) // world.size()))
    groups, collate = _plan(rows, tokens_per_batch, pad_id, device, share_prompts, pack)
    mine = groups[world.rank() :: world.size()] if deal else groups
    yield from map(collate, mine)
    if deal and filler is not None and len(mine) < -(-len(groups) // world.size()):
        yield replace(collate([filler]), filler=True)


def _plan(
    rows: Sequence[Row], tokens_per_batch: int, pad_id: int, device: torch.device, share_prompts: bool, pack: bool
) -> tuple[list[list[Row]], Callable[[list[Row]], MicroBatch]]:
    """Return what rows each micro-batch holds, and what makes it of them."""
    by_length = sorted((row for row in rows if len(row.completion_ids)), key=lambda row: -len(row))
    families: dict[bytes, list[Row]] = {}
    for row in by_length:
        families.setdefault(row.prompt_ids.tobytes(), []).append(row)
    if pack:
        plain, plain_cost = _fill_packed(by_length, tokens_per_batch), sum(map(len, by_length))
    else:
        plain, plain_cost = _fill([[row] for row in by_length], tokens_per_batch, share=False)
    if share_prompts and len(families) < len(by_length):
        shared, shared_cost = _fill(list(families.values()), tokens_per_batch, share=True)
        if shared_cost <= SHARING_WORTH * plain_cost:
            return shared, lambda group: _collate_shared(group, pad_id, device)
    return plain, (lambda group: _collate_packed(group, device)) if pack else (lambda group: _collate(group, pad_id, device))


def _fill_packed(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Cut rows, in order, into groups of at most `budget` tokens."""
    groups: list[list[Row]] = []
    filled = 0
    for row in rows:
        if groups and filled + len(row) <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
            filled = 0
        filled += len(row)
    return groups


def _fill(families: Sequence[list[Row]], budget: int, *, share: bool) -> tuple[list[list[Row]], int]:
    """Cut families of rows with one prompt, in order, into groups within the budget, and within MAX_PADDING where that is worth it.

    Returns the groups and how many positions all of them run through the model, padding included.
    """
    full, early = (_fill_within(families, budget, max_padding, share) for max_padding in (1.0, MAX_PADDING))
    return early if early[1] <= EARLY_WORTH * full[1] else full


def _fill_within(families: Sequence[list[Row]], budget: int, max_padding: float, share: bool) -> tuple[list[list[Row]], int]:
    groups: list[list[Row]] = []
    total = cost = used = num_prompts = longest_prompt = longest = 0
    for members in families:
        new_prompt = 1  # the family's prompt is not yet in the group
        for row in members:
            prompt = len(row.prompt_ids) if share else 0
            length = len(row) - prompt
            wider, longer = max(longest_prompt, prompt), max(longest, length)
            needed = (num_prompts + new_prompt) * wider + (len(groups[-1]) + 1 if groups else 1) * longer
            now_used = used + length + new_prompt * prompt
            padded = needed - now_used > max_padding * needed and cost >= MIN_FILL * budget
            if groups and needed <= budget and not padded:
                groups[-1].append(row)
                num_prompts, longest_prompt, longest, cost, used = num_prompts + new_prompt, wider, longer, needed, now_used
            else:
                total += cost
                groups.append([row])
                num_prompts, longest_prompt, longest = 1, prompt, length
                cost = used = longest_prompt + longest
            new_prompt = 0
    return groups, total + cost


def _padded(arrays: Sequence[np.ndarray], pad_id: int) -> np.ndarray:
    """Right-pad arrays of ids to one length."""
    padded = np.full((len(arrays), max(map(len, arrays))), pad_id, dtype=np.int64)
    for line, ids in zip(padded, arrays, strict=True):
        line[: len(ids)] = ids
    return padded


def _collate(rows: list[Row], pad_id: int, device: torch.device) -> MicroBatch:
    ids_BT = _padded([np.concatenate([row.prompt_ids, row.completion_ids]) for row in rows], pad_id)
    # The state before the first completion token is that of the prompt's last token.
    starts = [b * ids_BT.shape[1] + len(row.prompt_ids) - 1 for b, row in enumerate(rows)]
    return _micro_batch(rows, ids_BT, None, starts, ids_BT.size - sum(map(len, rows)), device)


def _collate_packed(rows: list[Row], device: torch.device) -> MicroBatch:
    lengths = list(map(len, rows))
    ids_1T = np.concatenate([ids for row in rows for ids in (row.prompt_ids, row.completion_ids)], dtype=np.int64)[None]
    positions_1T = np.concatenate([np.arange(length) for length in lengths])[None]
    starts = [end - len(row.completion_ids) - 1 for end, row in zip(accumulate(lengths), rows, strict=True)]
    return replace(_micro_batch(rows, ids_1T, None, starts, 0, device), position_ids_BT=send(positions_1T, device))


def _collate_shared(rows: list[Row], pad_id: int, device: torch.device) -> MicroBatch:
    distinct: dict[bytes, np.ndarray] = {row.prompt_ids.tobytes(): row.prompt_ids for row in rows}
    numbers = {key: number for number, key in enumerate(distinct)}
    of_B = [numbers[row.prompt_ids.tobytes()] for row in rows]
    lengths_P = list(map(len, distinct.values()))
    ids_PT = _padded(list(distinct.values()), pad_id)
    padded = min(lengths_P) < ids_PT.shape[1]
    prompts = SharedPrompts(send(ids_PT, device), send(np.array(lengths_P), device), send(np.array(of_B), device), padded)
    ids_BT = _padded([row.completion_ids for row in rows], pad_id)
    starts = [b * ids_BT.shape[1] for b in range(len(rows))]
    used = sum(lengths_P) + sum(len(row.completion_ids) for row in rows)
    return _micro_batch(rows, ids_BT, prompts, starts, ids_BT.size + ids_PT.size - used, device)


def _micro_batch(
    rows: list[Row], ids_BT: np.ndarray, prompts: SharedPrompts | None, starts: list[int], padding: int, device: torch.device
) -> MicroBatch:
    if not all(len(row.prompt_ids) for row in rows):
        raise ValueError("a row without prompt tokens has no state to predict its first token from")
    lengths = [len(row.completion_ids) for row in rows]
    states_N = np.concatenate([start + np.arange(length) for start, length in zip(starts, lengths, strict=True)])
    targets_N = np.concatenate([row.completion_ids for row in rows], dtype=np.int64)
    return MicroBatch(
        rows=rows,
        input_ids_BT=send(ids_BT, device),
        prompts=prompts,
        states_N=send(states_N, device),
        targets_N=send(targets_N, device),
        largest_target=int(targets_N.max()),
        lengths_B=lengths,
        num_padding=padding,
    )


def split(rows: Sequence[Row], size: int | None) -> list[list[Row]]:
    """Cut rows into mini-batches of `size`; None keeps them together."""
    size = size or max(1, len(rows))
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
