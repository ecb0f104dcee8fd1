"""Losses over the vocabulary straight from hidden states and head weights, a chunk of tokens at a time.

The logits of a whole batch never exist, and every logit is computed once. All losses here are sums
over tokens of something that depends on one token's logits and on numbers fixed before the pass.
So the gradient with respect to a chunk's logits is known as soon as the chunk's logits are, and is
pushed into the hidden states' and the head's gradients at once, inside the forward pass; the backward
pass only hands these over (the head's not where `Head.gradient_VD` collects it). One autograd function
serves every loss; a loss is a `Kernel`.

Shapes: N completion tokens, C tokens of a chunk, D hidden width, E the teacher's, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from s2dcli.models import readers
from s2dcli.models.forward import Head
from s2dcli.models.readers import chunks, log_normaliser, require_inside

# Least probability of what lies outside a top k: rounding of a sum of float32 probabilities that should be 1.
TAIL_FLOOR = 2.0**-23

Sums = dict[str, torch.Tensor]
# (logits of the chunk [C, V], slice of the chunk) -> (loss of the chunk, its gradient with respect to the
# logits [C, V], sums over its tokens for the metrics). May overwrite the logits.
Kernel = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor, Sums]]
# (log-probs of the chunk's tokens [C], slice) -> (loss of the chunk, sums for the metrics)
TokenLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, Sums]]


class _FusedLoss(torch.autograd.Function):
    """loss = sum over chunks of kernel(head.logits(hidden)); gradients are formed chunk by chunk in forward."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, head: Head, kernel: Kernel, sums: Sums):
        wanted = any(ctx.needs_input_grad[:3])
        head_wanted = ctx.needs_input_grad[1]  # not where adapters are trained and the head stays as it is
        ctx.collected = head.gradient_VD is not None
        grad_hidden_ND = torch.empty_like(hidden_ND) if wanted else None
        grad_weight_VD = head.gradient_VD
        if head_wanted and not ctx.collected:
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        head = replace(head, weight_VD=weight_VD.to(hidden_ND.dtype))  # cast once, not for every chunk
        for rows in chunks(len(hidden_ND), weight_VD.shape[0]):
            logits_CV = head.logits(hidden_ND[rows])
            slope_CV = head.slope(logits_CV) if wanted else None
            part, grad_CV, metrics = kernel(logits_CV, rows)
            del logits_CV
            loss += part
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value
            if not wanted:
                continue
            if slope_CV is not None:
                grad_CV = grad_CV.mul_(slope_CV)
            grad_CV = grad_CV.to(hidden_ND.dtype)
            torch.mm(grad_CV, head.weight_VD, out=grad_hidden_ND[rows])
            if head_wanted:
                _add_product(grad_weight_VD, grad_CV, hidden_ND[rows])
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0, dtype=torch.float32)
            del grad_CV  # or it would be there beside the next chunk
        ctx.gradients = (grad_hidden_ND, None if ctx.collected else grad_weight_VD, grad_bias_V)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        (hidden_ND, weight_VD, bias_V), ctx.gradients = ctx.gradients, None
        weight_dtype, bias_dtype = ctx.dtypes
        if ctx.collected and upstream != 1:
            raise RuntimeError("the head's gradient has been added up already: scale the loss inside its kernel")
        gradients = [
            None if value is None else value if upstream == 1 else value.mul_(upstream) for value in (hidden_ND, weight_VD, bias_V)
        ]
        hidden_ND, weight_VD, bias_V = gradients
        return (
            hidden_ND,
            None if weight_VD is None else weight_VD.to(weight_dtype),
            None if bias_V is None else bias_V.to(bias_dtype),
            None,
            None,
            None,
        )


def _add_product(total_VD: torch.Tensor, left_CV: torch.Tensor, right_CD: torch.Tensor) -> None:
    """total += left.T @ right; products of a narrower type than total's go by blocks of at most CHUNK_BYTES."""
    if left_CV.dtype == total_VD.dtype:
        total_VD.addmm_(left_CV.T, right_CD)
        return
    size = max(1, readers.CHUNK_BYTES // (right_CD.shape[1] * right_CD.element_size()))
    for total_BD, left_CB in zip(total_VD.split(size), left_CV.split(size, dim=1), strict=True):
        total_BD += left_CB.T @ right_CD


def _apply(hidden_ND: torch.Tensor, head: Head, kernel: Kernel) -> tuple[torch.Tensor, Sums]:
    sums: Sums = {}
    # The function decides the dtypes of its products itself.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        loss = _FusedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, head, kernel, sums)
    return loss, sums


def _softmax(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities and log-normalisers [C, 1], float32, with one new tensor of the logits' size."""
    peak_C1 = logits_CV.amax(-1, keepdim=True)
    probs_CV = (logits_CV - peak_C1).exp_()
    total_C1 = probs_CV.sum(-1, keepdim=True)
    return probs_CV.div_(total_C1), peak_C1 + total_C1.log()


def _dot(left_CV: torch.Tensor, right_CV: torch.Tensor) -> torch.Tensor:
    """Return the products of rows, [C], without the tensor of products that torch.linalg.vecdot makes."""
    return torch.bmm(left_CV[:, None], right_CV[:, :, None])[:, 0, 0]


def token_loss(
    hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, loss: TokenLoss, temperature: float = 1.0
) -> tuple[torch.Tensor, Sums]:
    """Sum of a loss that depends on each target's log-prob, and its sums for the metrics.

    The distribution is softmax(logits / temperature) over the head's V ids, in float32, nats. `loss` is
    differentiated with respect to the log-probs; the rest of the gradient is dlogp/dlogits =
    (onehot - p) / temperature. Adds `entropy` to the sums. Raises ValueError for a target beyond V.
    """
    require_inside(targets_N, head)

    def kernel(logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        if temperature != 1.0:
            logits_CV = logits_CV.div_(temperature)
        probs_CV, normaliser_C1 = _softmax(logits_CV)
        targets_C1 = targets_N[rows, None]
        logprobs_C = (logits_CV.gather(1, targets_C1) - normaliser_C1)[:, 0]
        entropy = normaliser_C1.sum() - _dot(probs_CV, logits_CV).sum()
        with torch.enable_grad():
            logprobs_C.requires_grad_()
            part, sums = loss(logprobs_C, rows)
            (slope_C,) = torch.autograd.grad(part, logprobs_C)
        slope_C1 = slope_C[:, None] / temperature
        grad_CV = probs_CV.mul_(-slope_C1).scatter_add_(1, targets_C1, slope_C1)
        return part.detach(), grad_CV, {**sums, "entropy": entropy}

    return _apply(hidden_ND, head, kernel)


def kl_loss(
    student_ND: torch.Tensor,
    student: Head,
    teacher_NE: torch.Tensor,
    teacher: Head,
    weights_N: torch.Tensor,
    *,
    reverse: bool,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, Sums]:
    """Weighted sum over tokens of the exact KL over the vocabulary; the teacher gets no gradient.

    `reverse`: KL(student || teacher) (paper, Eq. 4), else KL(teacher || student) (Eq. 5), in nats, both
    distributions softmax(logits / temperature). With student p, teacher q and z the student's logits:
    d KL(q || p) / dz = (p - q) / temperature;  d KL(p || q) / dz = p * (log p - log q - KL) / temperature.
    Sums for the metrics: `kl` and the student's `entropy`.
    """
    if student.weight_VD.shape[0] != teacher.weight_VD.shape[0]:
        raise ValueError(f"vocabularies of {student.weight_VD.shape[0]} and {teacher.weight_VD.shape[0]} ids cannot be compared")
    teacher_NE = teacher_NE.detach()

    def kernel(logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        weights_C1 = weights_N[rows, None] / temperature
        theirs_CV = teacher.logits(teacher_NE[rows])
        if temperature != 1.0:
            logits_CV, theirs_CV = logits_CV.div_(temperature), theirs_CV.div_(temperature)
        theirs_CV = theirs_CV.sub_(log_normaliser(theirs_CV))  # log q
        probs_CV, normaliser_C1 = _softmax(logits_CV)
        ours_CV = logits_CV.sub_(normaliser_C1)  # log p
        entropy = -_dot(probs_CV, ours_CV).sum()
        gap_CV = ours_CV.sub_(theirs_CV)
        if reverse:
            kl_C = _dot(probs_CV, gap_CV)
            grad_CV = gap_CV.sub_(kl_C[:, None]).mul_(probs_CV).mul_(weights_C1)
        else:
            their_probs_CV = theirs_CV.exp_()
            kl_C = -_dot(their_probs_CV, gap_CV)
            grad_CV = probs_CV.sub_(their_probs_CV).mul_(weights_C1)
        return (weights_N[rows] * kl_C).sum(), grad_CV, {"kl": kl_C.sum(), "entropy": entropy}

    return _apply(student_ND, student, kernel)


def top_k_kl_loss(
    hidden_ND: torch.Tensor,
    head: Head,
    top_ids_NK: torch.Tensor,
    top_logprobs_NK: torch.Tensor,
    weights_N: torch.Tensor,
    *,
    reverse: bool,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, Sums]:
    """Weighted sum over tokens of the KL between a student and the K ids of a teacher, the rest in one bucket.

    `top_logprobs_NK` (nats, float32) are normalised over the whole vocabulary; what they leave of 1 is the
    teacher's probability of the tail, and the student's is the sum over all other ids. So both sides are
    distributions over K + 1 outcomes, their KL is never negative, and 0 where the buckets agree; it is a
    lower bound of `kl_loss`. The teacher's tail is known to the rounding of its sum, about 1e-7.

    With student p, teacher q, r = log p - log q of the outcome that an id belongs to, and z the student's
    logits: d KL(p || q) / dz = p * (r - KL) / temperature, and d KL(q || p) / dz = (p - q) / temperature for
    the K ids, p * (1 - q_tail / p_tail) / temperature for the others.
    Sums for the metrics: `kl` and the student's `entropy`.
    """
    require_inside(top_ids_NK, head)
    top_logprobs_NK = top_logprobs_NK.float()
    tail_logprobs_N = torch.log1p(-top_logprobs_NK.exp().sum(-1).clamp(max=1.0 - TAIL_FLOOR))

    def kernel(logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, Sums]:
        ids_CK, theirs_CK, their_tail_C1 = top_ids_NK[rows], top_logprobs_NK[rows], tail_logprobs_N[rows, None]
        weights_C1 = weights_N[rows, None] / temperature
        if temperature != 1.0:
            logits_CV = logits_CV.div_(temperature)
        probs_CV, normaliser_C1 = _softmax(logits_CV)
        entropy = normaliser_C1.sum() - _dot(probs_CV, logits_CV).sum()
        ours_CK, probs_CK = logits_CV.gather(1, ids_CK) - normaliser_C1, probs_CV.gather(1, ids_CK)
        tail_C1 = probs_CV.scatter_(1, ids_CK, 0.0).sum(-1, keepdim=True).clamp_(min=TAIL_FLOOR)  # not 1 - sum, which cancels
        gap_CK, tail_gap_C1 = ours_CK - theirs_CK, tail_C1.log() - their_tail_C1
        if reverse:
            kl_C1 = (probs_CK * gap_CK).sum(-1, keepdim=True) + tail_C1 * tail_gap_C1
            slope_CK, tail_slope_C1 = probs_CK * (gap_CK - kl_C1), tail_gap_C1 - kl_C1
        else:
            kl_C1 = -(theirs_CK.exp() * gap_CK).sum(-1, keepdim=True) - their_tail_C1.exp() * tail_gap_C1
            slope_CK, tail_slope_C1 = probs_CK - theirs_CK.exp(), 1.0 - their_tail_C1.exp() / tail_C1
        grad_CV = probs_CV.mul_(tail_slope_C1 * weights_C1).scatter_(1, ids_CK, slope_CK * weights_C1)
        return (weights_N[rows] * kl_C1[:, 0]).sum(), grad_CV, {"kl": kl_C1.sum(), "entropy": entropy}

    return _apply(hidden_ND, head, kernel)
