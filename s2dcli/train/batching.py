"""From rows of token ids to micro-batches: length-sorted, filled by a token budget, right-padded.

Shapes: R rows of the whole batch, B rows of a micro-batch, T positions, N its completion tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence to train on: losses look at the completion only."""

    prompt_ids: list[int]
    completion_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model at once. Completion tokens stand row after row, in order."""

    rows: list[int]  # which rows of the whole batch, in this order
    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor | None  # None where no position is padding
    states_N: torch.Tensor  # flat index into [B * T] of the state that predicts each completion token
    targets_N: torch.Tensor  # the completion tokens
    lengths_B: list[int]  # completion tokens of each row

    def tokens(self, per_row: Sequence[Sequence[float]]) -> torch.Tensor:
        """Flatten numbers per completion token, given for all rows of the batch, to [N] float32."""
        flat = [value for row, length in zip(self.rows, self.lengths_B, strict=True) for value in _exactly(per_row[row], length)]
        return torch.tensor(flat, dtype=torch.float32, device=self.targets_N.device)

    def spread(self, per_row: Sequence[float] | Mapping[int, float]) -> torch.Tensor:
        """Repeat one number per row over the row's completion tokens, [N] float32."""
        values_B = torch.tensor([per_row[row] for row in self.rows], dtype=torch.float32)
        return values_B.repeat_interleave(torch.tensor(self.lengths_B)).to(self.targets_N.device)


def _exactly(values: Sequence[float], length: int) -> Sequence[float]:
    if len(values) != length:
        raise ValueError(f"{len(values)} numbers for {length} completion tokens")
    return values


def micro_batches(rows: Sequence[Row], chosen: Sequence[int], tokens_per_batch: int, pad_id: int, device: torch.device) -> list[MicroBatch]:
    """Cut the `chosen` rows into micro-batches of at most `tokens_per_batch` positions, padding included.

    Rows are sorted by length first, so that neighbours pad each other little. A row that is longer
    than the budget is a micro-batch of its own. Rows without completion tokens are left out: they
    have nothing to learn from, and their weight in the loss's denominators stays.
    """
    order = sorted((index for index in chosen if rows[index].completion_ids), key=lambda index: -len(rows[index]))
    groups: list[list[int]] = []
    for index in order:
        if groups and len(rows[groups[-1][0]]) * (len(groups[-1]) + 1) <= tokens_per_batch:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [_collate(rows, group, pad_id, device) for group in groups]


def _collate(rows: Sequence[Row], group: list[int], pad_id: int, device: torch.device) -> MicroBatch:
    longest = max(len(rows[index]) for index in group)
    ids_BT = torch.full((len(group), longest), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(group), longest), dtype=torch.long)
    states, targets, lengths = [], [], []
    for b, index in enumerate(group):
        row = rows[index]
        if not row.prompt_ids:
            raise ValueError("a row without prompt tokens has no state to predict its first token from")
        ids = [*row.prompt_ids, *row.completion_ids]
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        mask_BT[b, : len(ids)] = 1
        first = b * longest + len(row.prompt_ids) - 1  # the state before the first completion token
        states.extend(range(first, first + len(row.completion_ids)))
        targets.extend(row.completion_ids)
        lengths.append(len(row.completion_ids))
    padded = bool((mask_BT == 0).any())
    return MicroBatch(
        rows=list(group),
        input_ids_BT=ids_BT.to(device),
        attention_mask_BT=mask_BT.to(device) if padded else None,
        states_N=torch.tensor(states, device=device),
        targets_N=torch.tensor(targets, device=device),
        lengths_B=lengths,
    )


def consecutive(names: Sequence[str]) -> list[slice]:
    """Return the runs of equal names as slices: the groups of a batch that stands group by group."""
    starts = [index for index, name in enumerate(names) if index == 0 or name != names[index - 1]]
    return [slice(start, end) for start, end in pairwise([*starts, len(names)])]


def split(items: Sequence[int], size: int | None) -> list[list[int]]:
    """Cut items into mini-batches of `size`; None keeps them together."""
    size = size or max(1, len(items))
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def padding_share(batches: Sequence[MicroBatch]) -> float:
    """Share of processed positions that are padding, 0 to 1."""
    positions = sum(batch.input_ids_BT.numel() for batch in batches)
    padded = sum(int((batch.attention_mask_BT == 0).sum()) for batch in batches if batch.attention_mask_BT is not None)
    return padded / positions if positions else 0.0
