"""Reading hidden states without gradient, a chunk of tokens at a time: the logits of a whole batch never exist.

Shapes: N completion tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from s2dcli.models.forward import Head

# Bytes of one chunk of float32 logits on a CPU, and the least on a GPU ...
CHUNK_BYTES = 48 * 2**20
# ... of which a pass holds at most so many at once (two models' logits and what is made of them): 151 MB,
# whatever the batch and length.
CHUNK_TENSORS = 3
# The most on a GPU: 1,024 tokens of the largest vocabularies (262,144). A product with the head reads it once a chunk and does
# one operation a token for each byte read, in bfloat16: from some 300 tokens on an H100 waits for its arithmetic, not its memory.
GPU_CHUNK_BYTES = 2**30
# Share of a GPU's free memory that the chunks of a pass may take: gradients may be still to come.
FREE_SHARE = 1 / 4


def chunk_bytes(device: torch.device, free: float | None = None) -> int:
    """Bytes of one chunk of float32 logits. Results depend on it to rounding.

    On a GPU the largest of GPU_CHUNK_BYTES, a half of that, a quarter ... of which CHUNK_TENSORS fit into FREE_SHARE of its `free`
    bytes, by default those that `free_bytes` finds; in halves, so that repeated runs mostly take the same.
    """
    if device.type != "cuda":
        return CHUNK_BYTES
    room, size = FREE_SHARE * (free_bytes(device) if free is None else free) / CHUNK_TENSORS, GPU_CHUNK_BYTES
    while size > max(room, CHUNK_BYTES):
        size //= 2
    return max(size, CHUNK_BYTES)


@functools.cache
def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that are free, or held by torch without use: at the first call, or after `free_bytes.cache_clear()`."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens whose float32 logits fill `chunk_bytes`; at least one."""
    return max(1, chunk_bytes(device) // (4 * vocabulary))


def chunks(hidden_ND: torch.Tensor, head: Head) -> Iterator[slice]:
    num_tokens, size = len(hidden_ND), chunk_tokens(head.weight_VD.shape[0], hidden_ND.device)
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def log_normaliser(logits_CV: torch.Tensor) -> torch.Tensor:
    """Return log-sum-exp [C, 1] with one tensor of the logits' size beside them, where torch.logsumexp takes two."""
    peak_C1 = logits_CV.amax(-1, keepdim=True)
    return peak_C1 + (logits_CV - peak_C1).exp_().sum(-1, keepdim=True).log()


@torch.no_grad()
def top_k_logprobs(
    hidden_ND: torch.Tensor, head: Head, k: int, temperature: float = 1.0, targets_N: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """The `k` most likely ids under softmax(logits / temperature), [N, k], their log-probs, and the tail's: that of all other ids.

    Descending; float32, nats, normalised over the whole vocabulary. The tail's, [N], is a sum over its own ids, exact where
    1 - sum cancels. With `targets_N` their log-probs, [N], come as a fourth, from the same logits.
    """
    ids_NK = torch.empty(len(hidden_ND), k, dtype=torch.long, device=hidden_ND.device)
    logprobs_NK = hidden_ND.new_empty(len(hidden_ND), k, dtype=torch.float32)
    tails_N, found_N = (hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(2))
    for rows in chunks(hidden_ND, head):
        logits_CV = head.logits(hidden_ND[rows]) / temperature
        values_CK, ids_NK[rows] = logits_CV.topk(k, dim=-1)
        normaliser_C1 = log_normaliser(logits_CV)
        logprobs_NK[rows] = values_CK - normaliser_C1
        if targets_N is not None:
            found_N[rows] = (logits_CV.gather(1, targets_N[rows, None]) - normaliser_C1)[:, 0]
        tails_N[rows] = (logits_CV.scatter_(1, ids_NK[rows], -torch.inf).logsumexp(-1, keepdim=True) - normaliser_C1)[:, 0]
    return (ids_NK, logprobs_NK, tails_N) if targets_N is None else (ids_NK, logprobs_NK, tails_N, found_N)


@torch.no_grad()
def token_logprobs(hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-prob of each target under softmax(logits / temperature), [N], float32, nats; without gradient."""
    logprobs_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
    for rows in chunks(hidden_ND, head):
        logits_CV = head.logits(hidden_ND[rows]) / temperature
        logprobs_N[rows] = (logits_CV.gather(1, targets_N[rows, None]) - log_normaliser(logits_CV))[:, 0]
    return logprobs_N
