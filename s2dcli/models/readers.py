"""Reading hidden states without gradient, a chunk of tokens at a time: the logits of a whole batch never exist.

Shapes: N completion tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from s2dcli.models.forward import Head

# Bytes of one chunk of float32 logits ...
CHUNK_BYTES = 48 * 2**20
# ... of which a pass holds at most so many at once (two models' logits and what is made of them): 151 MB,
# whatever the batch and length.
CHUNK_TENSORS = 3


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose float32 logits fill CHUNK_BYTES; at least one."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def chunks(num_tokens: int, vocabulary: int) -> Iterator[slice]:
    size = chunk_tokens(vocabulary)
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def log_normaliser(logits_CV: torch.Tensor) -> torch.Tensor:
    """Return log-sum-exp [C, 1] with one tensor of the logits' size beside them, where torch.logsumexp takes two."""
    peak_C1 = logits_CV.amax(-1, keepdim=True)
    return peak_C1 + (logits_CV - peak_C1).exp_().sum(-1, keepdim=True).log()


@torch.no_grad()
def top_k_logprobs(hidden_ND: torch.Tensor, head: Head, k: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` likeliest ids under softmax(logits / temperature), [N, k], and their log-probs over the whole vocabulary.

    Descending; float32, nats.
    """
    ids_NK = torch.empty(len(hidden_ND), k, dtype=torch.long, device=hidden_ND.device)
    logprobs_NK = hidden_ND.new_empty(len(hidden_ND), k, dtype=torch.float32)
    for rows in chunks(len(hidden_ND), head.weight_VD.shape[0]):
        logits_CV = head.logits(hidden_ND[rows]) / temperature
        values_CK, ids_NK[rows] = logits_CV.topk(k, dim=-1)
        logprobs_NK[rows] = values_CK - log_normaliser(logits_CV)
    return ids_NK, logprobs_NK


@torch.no_grad()
def token_logprobs(hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-prob of each target under softmax(logits / temperature), [N], float32, nats; without gradient.

    Raises ValueError for a target that lies beyond V.
    """
    require_inside(targets_N, head)
    logprobs_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
    for rows in chunks(len(hidden_ND), head.weight_VD.shape[0]):
        logits_CV = head.logits(hidden_ND[rows]) / temperature
        logprobs_N[rows] = (logits_CV.gather(1, targets_N[rows, None]) - log_normaliser(logits_CV))[:, 0]
    return logprobs_N


def require_inside(targets_N: torch.Tensor, head: Head) -> None:
    if len(targets_N) and int(targets_N.max()) >= head.weight_VD.shape[0]:
        raise ValueError(f"token id {int(targets_N.max())} lies outside the tokenizer's {head.weight_VD.shape[0]} ids")
