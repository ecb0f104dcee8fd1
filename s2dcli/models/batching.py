"""From rows of token ids to micro-batches: length-sorted, filled by a token budget, right-padded.

Shapes: R rows of the whole batch, B rows of a micro-batch, P its distinct prompts, T positions, N its
completion tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

# A micro-batch ends early where its padding would exceed this share of its positions ...
MAX_PADDING = 0.04
# ... unless it has less than this share of its budget: small ones cost their overhead, and pad little of the whole.
MIN_FILL = 1 / 8
# Sharing prompts runs the backbone twice, on fewer positions: worth it from a fifth fewer on.
SHARING_WORTH = 0.8


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence to train on: losses look at the completion only."""

    prompt_ids: list[int]
    completion_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """The distinct prompts of a micro-batch whose rows share them."""

    ids_PT: torch.Tensor
    lengths_P: torch.Tensor
    of_B: torch.Tensor  # which prompt each row continues


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model at once, right-padded. Completion tokens stand row after row, in order.

    `input_ids_BT` are prompts with their completions, or, with `prompts`, the completions alone; with
    `position_ids_BT` they stand one behind the other in a single row.
    """

    rows: list[int]  # which rows of the whole batch, in this order
    input_ids_BT: torch.Tensor
    prompts: SharedPrompts | None
    states_N: torch.Tensor  # flat index into [B * T] of the state that predicts each completion token
    targets_N: torch.Tensor  # the completion tokens
    lengths_B: list[int]  # completion tokens of each row
    num_padding: int  # positions that are padding
    position_ids_BT: torch.Tensor | None = None

    @property
    def num_positions(self) -> int:
        """Positions that go through the model, padding included."""
        return self.input_ids_BT.numel() + (self.prompts.ids_PT.numel() if self.prompts else 0)

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


def micro_batches(
    rows: Sequence[Row],
    chosen: Sequence[int],
    tokens_per_batch: int,
    pad_id: int,
    device: torch.device,
    *,
    share_prompts: bool = True,
    pack: bool = False,
) -> list[MicroBatch]:
    """Cut the `chosen` rows into micro-batches of at most `tokens_per_batch` positions, padding included.

    Two plans are weighed by the positions that they run through the model: rows sorted by length, so
    that neighbours pad each other little, or with `pack` one behind the other and without padding (see
    `models/forward.can_pack`); or rows of one prompt together, the prompt run once for all of them (only
    with `share_prompts`: it needs a model that caches). A row that is longer than the budget is a
    micro-batch of its own. Rows without completion tokens are left out: they have nothing to learn
    from, and their weight in the loss's denominators stays.
    """
    by_length = sorted((index for index in chosen if rows[index].completion_ids), key=lambda index: -len(rows[index]))
    families: dict[tuple[int, ...], list[int]] = {}
    for index in by_length:
        families.setdefault(tuple(rows[index].prompt_ids), []).append(index)
    if pack:
        plain, plain_cost = _fill_packed(by_length, rows, tokens_per_batch), sum(len(rows[index]) for index in by_length)
    else:
        plain, plain_cost = _fill([(rows[index].prompt_ids, [index]) for index in by_length], rows, tokens_per_batch, share=False)
    if share_prompts and len(families) < len(by_length):
        shared, shared_cost = _fill(list(families.items()), rows, tokens_per_batch, share=True)
        if shared_cost <= SHARING_WORTH * plain_cost:
            return [_collate_shared(rows, group, pad_id, device) for group in shared]
    return [_collate_packed(rows, group, device) if pack else _collate(rows, group, pad_id, device) for group in plain]


def _fill_packed(chosen: Sequence[int], rows: Sequence[Row], budget: int) -> list[list[int]]:
    """Cut the chosen rows, in order, into groups of at most `budget` tokens."""
    groups: list[list[int]] = []
    filled = 0
    for index in chosen:
        if groups and filled + len(rows[index]) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
            filled = 0
        filled += len(rows[index])
    return groups


def _fill(
    families: Sequence[tuple[Sequence[int], list[int]]], rows: Sequence[Row], budget: int, *, share: bool
) -> tuple[list[list[int]], int]:
    """Cut the rows of (prompt, rows) families, in order, into groups within the budget and MAX_PADDING.

    Returns the groups and how many positions all of them run through the model, padding included.
    """
    groups: list[list[int]] = []
    total = cost = used = num_prompts = longest_prompt = longest = 0
    for prompt, members in families:
        new_prompt = 1  # the family's prompt is not yet in the group
        for index in members:
            length = len(rows[index].completion_ids) if share else len(rows[index])
            wider, longer = (max(longest_prompt, len(prompt)) if share else 0), max(longest, length)
            needed = (num_prompts + new_prompt) * wider + (len(groups[-1]) + 1 if groups else 1) * longer
            now_used = used + length + (len(prompt) if share and new_prompt else 0)
            padded = needed - now_used > MAX_PADDING * needed and cost >= MIN_FILL * budget
            if groups and needed <= budget and not padded:
                groups[-1].append(index)
                num_prompts, longest_prompt, longest, cost, used = num_prompts + new_prompt, wider, longer, needed, now_used
            else:
                total += cost
                groups.append([index])
                num_prompts, longest_prompt, longest = 1, len(prompt) if share else 0, length
                cost = used = longest_prompt + longest
            new_prompt = 0
    return groups, total + cost


def _padded(lists: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """Right-pad lists of ids to one length."""
    longest = max(map(len, lists))
    return torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in lists])


def _collate(rows: Sequence[Row], group: list[int], pad_id: int, device: torch.device) -> MicroBatch:
    ids_BT = _padded([[*rows[index].prompt_ids, *rows[index].completion_ids] for index in group], pad_id)
    # The state before the first completion token is that of the prompt's last token.
    starts = [b * ids_BT.shape[1] + len(rows[index].prompt_ids) - 1 for b, index in enumerate(group)]
    used = sum(len(rows[index]) for index in group)
    return _micro_batch(rows, group, ids_BT, None, starts, ids_BT.numel() - used, device)


def _collate_packed(rows: Sequence[Row], group: list[int], device: torch.device) -> MicroBatch:
    lengths = [len(rows[index]) for index in group]
    ids_1T = torch.tensor([[token for index in group for token in (*rows[index].prompt_ids, *rows[index].completion_ids)]])
    positions_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    starts = [end - len(rows[index].completion_ids) - 1 for end, index in zip(accumulate(lengths), group, strict=True)]
    batch = _micro_batch(rows, group, ids_1T, None, starts, 0, device)
    return replace(batch, position_ids_BT=positions_1T.to(device))


def _collate_shared(rows: Sequence[Row], group: list[int], pad_id: int, device: torch.device) -> MicroBatch:
    numbers: dict[tuple[int, ...], int] = {}
    of_B = [numbers.setdefault(tuple(rows[index].prompt_ids), len(numbers)) for index in group]
    lengths_P = [len(prompt) for prompt in numbers]
    prompts = SharedPrompts(_padded(list(numbers), pad_id).to(device), torch.tensor(lengths_P).to(device), torch.tensor(of_B).to(device))
    ids_BT = _padded([rows[index].completion_ids for index in group], pad_id)
    starts = [b * ids_BT.shape[1] for b in range(len(group))]
    used = sum(lengths_P) + sum(len(rows[index].completion_ids) for index in group)
    return _micro_batch(rows, group, ids_BT, prompts, starts, ids_BT.numel() + prompts.ids_PT.numel() - used, device)


def _micro_batch(
    rows: Sequence[Row],
    group: list[int],
    ids_BT: torch.Tensor,
    prompts: SharedPrompts | None,
    starts: list[int],
    padding: int,
    device: torch.device,
) -> MicroBatch:
    if not all(rows[index].prompt_ids for index in group):
        raise ValueError("a row without prompt tokens has no state to predict its first token from")
    completions = [rows[index].completion_ids for index in group]
    states = [start + t for start, ids in zip(starts, completions, strict=True) for t in range(len(ids))]
    return MicroBatch(
        rows=list(group),
        input_ids_BT=ids_BT.to(device),
        prompts=prompts,
        states_N=torch.tensor(states).to(device),
        targets_N=torch.tensor([token for ids in completions for token in ids]).to(device),
        lengths_B=[len(ids) for ids in completions],
        num_padding=padding,
    )


def split(items: Sequence[int], size: int | None) -> list[list[int]]:
    """Cut items into mini-batches of `size`; None keeps them together."""
    size = size or max(1, len(items))
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
