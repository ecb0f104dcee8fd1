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

Figures = dict[str, torch.Tensor]  # per token, for the metrics
# (logits of the chunk [C, V], slice of the chunk) -> (loss of the chunk, its gradient with respect to the
# logits [C, V], figures [C]). May overwrite the logits.
Kernel = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor, Figures]]
# (log-probs of the chunk's tokens [C], slice) -> (loss of the chunk, figures [C])
TokenLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, Figures]]
# (student's probabilities p, log p - log q, log q with teacher's probabilities q; all [C, V], may be overwritten) ->
# (divergence [C] in nats, its gradient with respect to the student's log-probs before normalisation [C, V])
Divergence = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class _FusedLoss(torch.autograd.Function):
    """loss = sum over chunks of kernel(head.logits(hidden)); gradients are formed chunk by chunk in forward."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, head: Head, kernel: Kernel, figures: dict[str, list[torch.Tensor]]):
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
            part, grad_CV, found = kernel(logits_CV, rows)
            del logits_CV
            loss += part
            for name, values_C in found.items():
                figures.setdefault(name, []).append(values_C)
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


def _apply(hidden_ND: torch.Tensor, head: Head, kernel: Kernel) -> tuple[torch.Tensor, Figures]:
    figures: dict[str, list[torch.Tensor]] = {}
    # The function decides the dtypes of its products itself.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        loss = _FusedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, head, kernel, figures)
    return loss, {name: torch.cat(parts) for name, parts in figures.items()}


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
) -> tuple[torch.Tensor, Figures]:
    """Sum of a loss that depends on each target's log-prob, and its figures per token, [N] each.

    The distribution is softmax(logits / temperature) over the head's V ids, in float32, nats. `loss` is
    differentiated with respect to the log-probs; the rest of the gradient is dlogp/dlogits =
    (onehot - p) / temperature. Adds `entropy` to the figures. Raises ValueError for a target beyond V.
    """
    require_inside(targets_N, head)

    def kernel(logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, Figures]:
        if temperature != 1.0:
            logits_CV = logits_CV.div_(temperature)
        probs_CV, normaliser_C1 = _softmax(logits_CV)
        targets_C1 = targets_N[rows, None]
        logprobs_C = (logits_CV.gather(1, targets_C1) - normaliser_C1)[:, 0]
        entropy_C = normaliser_C1[:, 0] - _dot(probs_CV, logits_CV)
        with torch.enable_grad():
            logprobs_C.requires_grad_()
            part, figures = loss(logprobs_C, rows)
            (slope_C,) = torch.autograd.grad(part, logprobs_C)
        slope_C1 = slope_C[:, None] / temperature
        grad_CV = probs_CV.mul_(-slope_C1).scatter_add_(1, targets_C1, slope_C1)
        return part.detach(), grad_CV, {**figures, "entropy": entropy_C}

    return _apply(hidden_ND, head, kernel)


def reverse_kl(probs_CV: torch.Tensor, log_ratio_CV: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher) (paper, Eq. 4): a `Divergence` with gradient p * (log p - log q - KL)."""
    kl_C = _dot(probs_CV, log_ratio_CV)
    return kl_C, log_ratio_CV.sub_(kl_C[:, None]).mul_(probs_CV)


def forward_kl(probs_CV: torch.Tensor, log_ratio_CV: torch.Tensor, teacher_logprobs_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher || student) (paper, Eq. 5): a `Divergence` with gradient p - q."""
    teacher_probs_CV = teacher_logprobs_CV.exp_()
    return -_dot(teacher_probs_CV, log_ratio_CV), probs_CV.sub_(teacher_probs_CV)


def divergence_loss(
    student_ND: torch.Tensor,
    student: Head,
    teacher_NE: torch.Tensor,
    teacher: Head,
    weights_N: torch.Tensor,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> tuple[torch.Tensor, Figures]:
    """Weighted sum over tokens of a divergence, exact over the vocabulary; the teacher gets no gradient.

    Both distributions are softmax(logits / temperature), the teacher's at `teacher_temperature` if given.
    The divergence's gradient with respect to the student's logits is that of `divergence` / temperature.
    Figures per token, [N]: `kl` (the divergence, nats) and the student's `entropy`.
    """
    if student.weight_VD.shape[0] != teacher.weight_VD.shape[0]:
        raise ValueError(f"vocabularies of {student.weight_VD.shape[0]} and {teacher.weight_VD.shape[0]} ids cannot be compared")
    teacher_NE = teacher_NE.detach()
    teacher_temperature = teacher_temperature or temperature

    def kernel(logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, Figures]:
        theirs_CV = teacher.logits(teacher_NE[rows])
        if teacher_temperature != 1.0:
            theirs_CV = theirs_CV.div_(teacher_temperature)
        if temperature != 1.0:
            logits_CV = logits_CV.div_(temperature)
        theirs_CV = theirs_CV.sub_(log_normaliser(theirs_CV))  # log q
        probs_CV, normaliser_C1 = _softmax(logits_CV)
        ours_CV = logits_CV.sub_(normaliser_C1)  # log p
        entropy_C = -_dot(probs_CV, ours_CV)
        value_C, grad_CV = divergence(probs_CV, ours_CV.sub_(theirs_CV), theirs_CV)
        grad_CV = grad_CV.mul_(weights_N[rows, None] / temperature)
        return (weights_N[rows] * value_C).sum(), grad_CV, {"kl": value_C, "entropy": entropy_C}

    return _apply(student_ND, student, kernel)


def top_k_divergence_loss(
    hidden_ND: torch.Tensor,
    head: Head,
    top_ids_NK: torch.Tensor,
    top_logprobs_NK: torch.Tensor,
    weights_N: torch.Tensor,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, Figures]:
    """Weighted sum over tokens of a divergence between a student and K ids of a teacher, all other ids in one bucket.

    `top_logprobs_NK` (nats, float32) are normalised over the whole vocabulary; what they leave of 1 is the
    teacher's probability of the tail, and the student's is the sum over all other ids. So both sides are
    distributions over K + 1 outcomes, their KL is never negative, and 0 where the buckets agree; it is a
    lower bound of that of `divergence_loss`. The teacher's tail is known to the rounding of its sum, about 1e-7.

    With g the divergence's gradient of each of the K + 1 outcomes, the gradient with respect to the student's
    logits is g / temperature for the K ids and g_tail * p / p_tail / temperature for the others.
    Figures per token, [N]: `kl` (the divergence, nats) and the student's `entropy`.
    """
    require_inside(top_ids_NK, head)
    top_logprobs_NK = top_logprobs_NK.float()
    tail_logprobs_N = torch.log1p(-top_logprobs_NK.exp().sum(-1).clamp(max=1.0 - TAIL_FLOOR))

    def kernel(logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, Figures]:
        ids_CK, theirs_CJ = top_ids_NK[rows], torch.cat([top_logprobs_NK[rows], tail_logprobs_N[rows, None]], dim=1)  # J = K + 1
        if temperature != 1.0:
            logits_CV = logits_CV.div_(temperature)
        probs_CV, normaliser_C1 = _softmax(logits_CV)
        entropy_C = normaliser_C1[:, 0] - _dot(probs_CV, logits_CV)
        ours_CK, probs_CK = logits_CV.gather(1, ids_CK) - normaliser_C1, probs_CV.gather(1, ids_CK)
        tail_C1 = probs_CV.scatter_(1, ids_CK, 0.0).sum(-1, keepdim=True).clamp_(min=TAIL_FLOOR)  # not 1 - sum, which cancels
        ours_CJ, probs_CJ = torch.cat([ours_CK, tail_C1.log()], dim=1), torch.cat([probs_CK, tail_C1], dim=1)
        value_C, grad_CJ = divergence(probs_CJ, ours_CJ - theirs_CJ, theirs_CJ)
        grad_CJ = grad_CJ.mul_(weights_N[rows, None] / temperature)
        grad_CV = probs_CV.mul_(grad_CJ[:, -1:] / tail_C1).scatter_(1, ids_CK, grad_CJ[:, :-1])
        return (weights_N[rows] * value_C).sum(), grad_CV, {"kl": value_C, "entropy": entropy_C}

    return _apply(hidden_ND, head, kernel)
