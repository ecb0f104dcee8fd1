"""Log-probs, entropy and KL straight from hidden states and head weights, a chunk of tokens at a time.

The logits of a whole batch never exist. One autograd function serves every loss: the forward pass
keeps only one number per token; the backward pass makes the chunk's logits again, differentiates
the same few lines with respect to them, and adds the head's gradient into one buffer.

Shapes: N completion tokens, C tokens of a chunk, D hidden width, V vocabulary, K numbers per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from s2dcli.models.forward import Head

# Bytes of one chunk of float32 logits. A loss holds about five tensors of this size at its peak,
# so the bound of 200 MB beyond weights, gradients and activations is kept with room to spare.
CHUNK_BYTES = 24 * 2**20

# (float32 logits of the chunk [C, V], slice of the chunk) -> numbers per token [C, K], float32
PerToken = Callable[[torch.Tensor, slice], torch.Tensor]


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose float32 logits fill CHUNK_BYTES; at least one."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


class _FromHead(torch.autograd.Function):
    """values[N, K] = per_token(head.logits(hidden)), chunk by chunk, with gradients for hidden, weight and bias."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, head: Head, per_token: PerToken, width: int):
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
        ctx.head, ctx.per_token = head, per_token
        values_NK = hidden_ND.new_empty(len(hidden_ND), width, dtype=torch.float32)
        for rows in _chunks(len(hidden_ND), weight_VD.shape[0]):
            values_NK[rows] = per_token(head.logits(hidden_ND[rows]), rows)
        return values_NK

    @staticmethod
    def backward(ctx, grad_NK):
        hidden_ND, weight_VD, bias_V = ctx.saved_tensors
        head, per_token = ctx.head, ctx.per_token
        product_weight_VD = weight_VD.to(hidden_ND.dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for rows in _chunks(len(hidden_ND), weight_VD.shape[0]):
            hidden_CD = hidden_ND[rows]
            bias = None if bias_V is None else bias_V.to(hidden_ND.dtype)
            raw_CV = torch.nn.functional.linear(hidden_CD, product_weight_VD, bias).detach().requires_grad_()
            with torch.enable_grad():
                values_CK = per_token(head.shape_logits(raw_CV), rows)
            (grad_raw_CV,) = torch.autograd.grad(values_CK, raw_CV, grad_NK[rows])
            grad_hidden_ND[rows] = grad_raw_CV @ product_weight_VD
            if grad_raw_CV.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_raw_CV.T, hidden_CD)
            else:
                grad_weight_VD += grad_raw_CV.T @ hidden_CD
            if grad_bias_V is not None:
                grad_bias_V += grad_raw_CV.sum(0, dtype=torch.float32)
        return (
            grad_hidden_ND,
            grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None,
            None,
            None,
        )


def _chunks(num_tokens: int, vocabulary: int) -> list[slice]:
    size = chunk_tokens(vocabulary)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _apply(hidden_ND: torch.Tensor, head: Head, per_token: PerToken, width: int) -> torch.Tensor:
    # The custom function decides the dtypes of its products itself.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return _FromHead.apply(hidden_ND, head.weight_VD, head.bias_V, head, per_token, width)


def _entropy(logprobs_CV: torch.Tensor) -> torch.Tensor:
    return -(logprobs_CV.exp() * logprobs_CV).sum(-1)


def token_logprobs(
    hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target and entropy of its distribution, both [N], float32, nats.

    The distribution is softmax(logits / temperature) over the head's V ids. The entropy is detached:
    it is a metric. Raises ValueError for a target that lies beyond V.
    """
    _require_inside(targets_N, head)

    def per_token(logits_CV: torch.Tensor, rows: slice) -> torch.Tensor:
        logprobs_CV = (logits_CV / temperature if temperature != 1.0 else logits_CV).log_softmax(-1)
        chosen_C = logprobs_CV.gather(1, targets_N[rows, None])[:, 0]
        entropy_C = _entropy(logprobs_CV.detach())
        return torch.stack([chosen_C, entropy_C], dim=1)

    values_N2 = _apply(hidden_ND, head, per_token, 2)
    return values_N2[:, 0], values_N2[:, 1].detach()


def forward_kl(
    student_ND: torch.Tensor, student: Head, teacher_NE: torch.Tensor, teacher: Head, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || student) per token over the whole vocabulary (paper, Eq. 5), and the student's entropy, [N] nats."""
    return _kl(student_ND, student, teacher_NE, teacher, temperature, reverse=False)


def reverse_kl(
    student_ND: torch.Tensor, student: Head, teacher_NE: torch.Tensor, teacher: Head, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher) per token over the whole vocabulary (paper, Eq. 4), and the student's entropy, [N] nats."""
    return _kl(student_ND, student, teacher_NE, teacher, temperature, reverse=True)


def _kl(student_ND, student: Head, teacher_NE, teacher: Head, temperature: float, *, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if student.weight_VD.shape[0] != teacher.weight_VD.shape[0]:
        raise ValueError(f"vocabularies of {student.weight_VD.shape[0]} and {teacher.weight_VD.shape[0]} ids cannot be compared")
    teacher_NE = teacher_NE.detach()

    def per_token(logits_CV: torch.Tensor, rows: slice) -> torch.Tensor:
        ours_CV = (logits_CV / temperature).log_softmax(-1)
        with torch.no_grad():
            theirs_CV = (teacher.logits(teacher_NE[rows]) / temperature).log_softmax(-1)
        sampled_CV, other_CV = (ours_CV, theirs_CV) if reverse else (theirs_CV, ours_CV)
        kl_C = (sampled_CV.exp() * (sampled_CV - other_CV)).sum(-1)
        return torch.stack([kl_C, _entropy(ours_CV.detach())], dim=1)

    values_N2 = _apply(student_ND, student, per_token, 2)
    return values_N2[:, 0], values_N2[:, 1].detach()


def _require_inside(targets_N: torch.Tensor, head: Head) -> None:
    if len(targets_N) and int(targets_N.max()) >= head.weight_VD.shape[0]:
        raise ValueError(f"token id {int(targets_N.max())} lies outside the tokenizer's {head.weight_VD.shape[0]} ids")
