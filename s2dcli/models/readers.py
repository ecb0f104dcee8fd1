"""Reading hidden states without gradient, a chunk of tokens at a time: the logits of a whole batch never exist.

Shapes: N completion tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from s2dcli.models.forward import Head

# Bytes of float32 logits that a pass holds at once on a CPU, whatever the batch and length: those of one chunk of tokens, by one, two or
# three models. 250 tokens of the largest vocabularies: products of fewer than 100 reach two thirds of a core's speed, not nine tenths.
LOGITS_BYTES = 144 * 2**20
# Bytes of logits that are worked on in turn on a CPU, with tensors of their own: what stays in a core's cache of its own is read
# a second time for nothing. On a GPU a chunk has so many parts.
PART_BYTES = 2**19
GPU_PARTS = 8
# Most models whose logits a pass holds.
MOST_MODELS = 3
# The most bytes of a chunk on a GPU: 1,024 tokens of the largest vocabularies (262,144). A product with the head reads it once a
# chunk and does one operation a token for each byte read, in bfloat16: from some 300 tokens on an H100 waits for its arithmetic, not
# its memory.
GPU_CHUNK_BYTES = 2**30
# Share of a GPU's free memory that the chunks of a pass may take: gradients may be still to come.
FREE_SHARE = 1 / 4


def chunk_bytes(device: torch.device, models: int = 1, free: float | None = None) -> int:
    """Bytes of one chunk of float32 logits, where a pass holds those of so many `models`. Results depend on it to rounding.

    On a GPU the largest of GPU_CHUNK_BYTES, a half of that, a quarter ... of which MOST_MODELS fit into FREE_SHARE of its `free`
    bytes, by default those that `free_bytes` finds; in halves, so that repeated runs mostly take the same.
    """
    if device.type != "cuda":
        return LOGITS_BYTES // models
    room, size = FREE_SHARE * (free_bytes(device) if free is None else free) / MOST_MODELS, GPU_CHUNK_BYTES
    least = LOGITS_BYTES // MOST_MODELS
    while size > max(room, least):
        size //= 2
    return max(size, least)


@functools.cache
def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that are free, or held by torch without use: at the first call, or after `free_bytes.cache_clear()`."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def chunk_tokens(vocabulary: int, device: torch.device, models: int = 1) -> int:
    """Tokens whose float32 logits fill `chunk_bytes`; at least one."""
    return max(1, chunk_bytes(device, models) // (4 * vocabulary))


def _rows(hidden_ND: torch.Tensor, head: Head, models: int) -> int:
    """Tokens of a chunk; beside the logits of a capped head stands what has their size too, its slope."""
    return chunk_tokens(head.weight_VD.shape[0], hidden_ND.device, models + (head.soft_cap is not None))


def chunks(hidden_ND: torch.Tensor, head: Head, models: int = 1) -> Iterator[slice]:
    num_tokens, size = len(hidden_ND), _rows(hidden_ND, head, models)
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def room(hidden_ND: torch.Tensor, head: Head, models: int = 1) -> torch.Tensor:
    """Return memory for the logits of each chunk in turn: on a CPU fresh memory of that size costs more than what is done in it."""
    rows = min(len(hidden_ND), _rows(hidden_ND, head, models))
    return hidden_ND.new_empty(rows, head.weight_VD.shape[0], dtype=torch.float32, requires_grad=False)


def parts(logits_CV: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut the tokens of a chunk into parts, so that what is made of one is little memory, and near: views of all the tensors."""
    device = logits_CV.device
    size = max(1, (chunk_bytes(device) // GPU_PARTS if device.type == "cuda" else PART_BYTES) // (4 * logits_CV.shape[1]))
    return zip(*(whole.split(size) for whole in (logits_CV, *others)), strict=True)


def log_normaliser(logits_CV: torch.Tensor) -> torch.Tensor:
    """Return log-sum-exp [C, 1]."""
    found_C1 = logits_CV.new_empty(len(logits_CV), 1)
    for logits_PV, found_P1 in parts(logits_CV, found_C1):
        peak_P1 = logits_PV.amax(-1, keepdim=True)
        torch.add(peak_P1, (logits_PV - peak_P1).exp_().sum(-1, keepdim=True).log_(), out=found_P1)
    return found_C1


def require_inside(targets_N: torch.Tensor, head: Head) -> None:
    """Raise ValueError for ids beyond the vocabulary. A GPU's are not read: `Policy` checks a batch's before."""
    if targets_N.device.type == "cpu" and len(targets_N) and (largest := int(targets_N.numpy().max())) >= head.weight_VD.shape[0]:
        raise ValueError(f"token id {largest} lies outside the tokenizer's {head.weight_VD.shape[0]} ids")


@torch.no_grad()
def top_k_logprobs(
    hidden_ND: torch.Tensor, head: Head, k: int, temperature: float = 1.0, targets_N: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The `k` most likely ids under softmax(logits / temperature), [N, k], their log-probs, and the tail's: that of all other ids.

    Descending; float32, nats, normalised over the whole vocabulary. The tail's, [N], is a sum over its own ids, exact where
    1 - sum cancels. With `targets_N` their log-probs, [N], come as a fourth, from the same logits.
    """
    if targets_N is not None:
        require_inside(targets_N, head)
    ids_NK = torch.empty(len(hidden_ND), k, dtype=torch.long, device=hidden_ND.device)
    logprobs_NK = hidden_ND.new_empty(len(hidden_ND), k, dtype=torch.float32)
    tails_N, found_N = (hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(2))
    out = room(hidden_ND, head)
    for rows in chunks(hidden_ND, head):
        logits_CV = head.logits(hidden_ND[rows], out).div_(temperature)
        values_CK, ids_NK[rows] = logits_CV.topk(k, dim=-1)
        normaliser_C1 = log_normaliser(logits_CV)
        logprobs_NK[rows] = values_CK - normaliser_C1
        if targets_N is not None:
            found_N[rows] = (logits_CV.gather(1, targets_N[rows, None]) - normaliser_C1)[:, 0]
        tails_C1 = torch.empty_like(normaliser_C1)
        for logits_PV, tails_P1 in parts(logits_CV.scatter_(1, ids_NK[rows], -torch.inf), tails_C1):
            tails_P1.copy_(logits_PV.logsumexp(-1, keepdim=True))  # -inf where k is all ids
        tails_N[rows] = (tails_C1 - normaliser_C1)[:, 0]
    return (ids_NK, logprobs_NK, tails_N) if targets_N is None else (ids_NK, logprobs_NK, tails_N, found_N)


@torch.no_grad()
def token_logprobs(hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-prob of each target under softmax(logits / temperature), [N], float32, nats; without gradient."""
    require_inside(targets_N, head)
    logprobs_N, out = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32), room(hidden_ND, head)
    for rows in chunks(hidden_ND, head):
        logits_CV = head.logits(hidden_ND[rows], out).div_(temperature)
        logprobs_N[rows] = (logits_CV.gather(1, targets_N[rows, None]) - log_normaliser(logits_CV))[:, 0]
    return logprobs_N
