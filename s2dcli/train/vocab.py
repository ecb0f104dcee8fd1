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

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from s2dcli.models import readers
from s2dcli.models.forward import Head
from s2dcli.models.readers import chunks, parts, require_inside, room
from s2dcli.train.targets import ExactTargets, MixedTargets, TopKTargets

# Least probability of what lies outside a top k, float32's smallest normal number: its logarithm is finite.
TAIL_FLOOR = torch.finfo(torch.float32).tiny
# Ids of which two distributions' most likely ones are compared: what an engine shows, and what most of the mass is in.
COMPARED_IDS = 16

Figures = dict[str, torch.Tensor]  # per token, for the metrics
# (logits of the chunk [C, V], slice of the chunk) -> (loss of the chunk, its gradient with respect to the
# logits [C, V], figures [C]). Overwrites the logits, by their gradient where it can.
Kernel = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor, Figures]]
# (log-probs of the chunk's tokens [C], slice) -> (loss of the chunk, figures [C])
TokenLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, Figures]]
# (student's probabilities p, log p - log q, log q with teacher's probabilities q; all [C, V], may be overwritten) ->
# (divergence [C] in nats, its gradient with respect to the student's log-probs before normalisation [C, V])
Divergence = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class _FusedLoss(torch.autograd.Function):
    """loss = sum over chunks of kernel(head.logits(hidden)); gradients are formed chunk by chunk in forward."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, head: Head, kernel: Kernel, models: int, figures: dict[str, list[torch.Tensor]]):
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
        out = room(hidden_ND, head, models)
        for rows in chunks(hidden_ND, head, models):
            logits_CV = head.logits(hidden_ND[rows], out)
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
        if ctx.collected:  # without asking a GPU for the number, which would wait for it
            torch._assert_async(upstream == 1, "the head's gradient has been added up already: scale the loss inside its kernel")
        hidden_ND, weight_VD, bias_V = (None if value is None else value.mul_(upstream) for value in (hidden_ND, weight_VD, bias_V))
        return (
            hidden_ND,
            None if weight_VD is None else weight_VD.to(weight_dtype),
            None if bias_V is None else bias_V.to(bias_dtype),
            None,
            None,
            None,
            None,
        )


def _add_product(total_VD: torch.Tensor, left_CV: torch.Tensor, right_CD: torch.Tensor) -> None:
    """total += left.T @ right; products of a narrower type than total's go by blocks of at most LOGITS_BYTES / MOST_MODELS."""
    if left_CV.dtype == total_VD.dtype:
        total_VD.addmm_(left_CV.T, right_CD)
        return
    size = max(1, readers.LOGITS_BYTES // readers.MOST_MODELS // (right_CD.shape[1] * right_CD.element_size()))
    for total_BD, left_CB in zip(total_VD.split(size), left_CV.split(size, dim=1), strict=True):
        total_BD += left_CB.T @ right_CD


def _apply(hidden_ND: torch.Tensor, head: Head, kernel: Kernel, models: int = 1) -> tuple[torch.Tensor, Figures]:
    """`models`: whose logits of a chunk the kernel holds, the head's included."""
    figures: dict[str, list[torch.Tensor]] = {}
    # The function decides the dtypes of its products itself.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        loss = _FusedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, head, kernel, models, figures)
    return loss, {name: torch.cat(parts) for name, parts in figures.items()}


def _softmax(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities and log-normalisers [C, 1], float32, with one new tensor of the logits' size."""
    peak_C1 = logits_CV.amax(-1, keepdim=True)
    probs_CV = (logits_CV - peak_C1).exp_()
    total_C1 = probs_CV.sum(-1, keepdim=True)
    return probs_CV.div_(total_C1), peak_C1 + total_C1.log()


def _softmax_(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn logits into probabilities, in place; returns log-normalisers [C, 1] and the logits' expectations [C]."""
    normaliser_C1, expected_C = logits_CV.new_empty(len(logits_CV), 1), logits_CV.new_empty(len(logits_CV))
    for logits_PV, normaliser_P1, expected_P in parts(logits_CV, normaliser_C1, expected_C):
        probs_PV, found_P1 = _softmax(logits_PV)
        normaliser_P1.copy_(found_P1)
        expected_P.copy_(_dot(probs_PV, logits_PV))
        logits_PV.copy_(probs_PV)
    return normaliser_C1, expected_C


def _dot(left_CV: torch.Tensor, right_CV: torch.Tensor) -> torch.Tensor:
    """Return the products of rows, [C], without the tensor of products that torch.linalg.vecdot makes."""
    return torch.bmm(left_CV[:, None], right_CV[:, :, None])[:, 0, 0]


def token_loss(
    hidden_ND: torch.Tensor, head: Head, targets_N: torch.Tensor, loss: TokenLoss, temperature: float = 1.0
) -> tuple[torch.Tensor, Figures]:
    """Sum of a loss that depends on each target's log-prob, and its figures per token, [N] each.

    The distribution is softmax(logits / temperature) over the head's V ids, in float32, nats. `loss` is
    differentiated with respect to the log-probs; the rest of the gradient is dlogp/dlogits =
    (onehot - p) / temperature. Adds `entropy` to the figures. Raises ValueError for a target beyond V, on a CPU.
    """
    require_inside(targets_N, head)

    def kernel(logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, Figures]:
        if temperature != 1.0:
            logits_CV = logits_CV.div_(temperature)
        targets_C1 = targets_N[rows, None]
        chosen_C1 = logits_CV.gather(1, targets_C1)
        normaliser_C1, expected_C = _softmax_(probs_CV := logits_CV)
        logprobs_C, entropy_C = (chosen_C1 - normaliser_C1)[:, 0], normaliser_C1[:, 0] - expected_C
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


def jsd(
    probs_CV: torch.Tensor, log_ratio_CV: torch.Tensor, teacher_logprobs_CV: torch.Tensor, *, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised Jensen-Shannon divergence of teacher q and student p (GKD, arXiv 2306.13649, Eq. 1, as in TRL), 0 < beta < 1:

        JSD = beta KL(q || m) + (1 - beta) KL(p || m),   m = beta q + (1 - beta) p

    A `Divergence` with gradient (1 - beta) p (log p - log m - KL(p || m)). It is at most that of distributions without a
    common outcome, -beta log beta - (1 - beta) log(1 - beta). At both ends of beta it is 0, and JSD / beta tends to KL(q || p) as
    beta tends to 0, JSD / (1 - beta) to KL(p || q) as it tends to 1: whoever asks for 0 or 1 is given these, as in TRL.
    """
    q_over_m_CV = torch.logaddexp(log_ratio_CV + math.log1p(-beta), probs_CV.new_tensor(math.log(beta))).neg_()  # log q - log m
    teacher_C = _dot(teacher_logprobs_CV.exp_(), q_over_m_CV)
    p_over_m_CV = log_ratio_CV.add_(q_over_m_CV)
    student_C = _dot(probs_CV, p_over_m_CV)
    value_C = beta * teacher_C + (1.0 - beta) * student_C
    return value_C, p_over_m_CV.sub_(student_C[:, None]).mul_(probs_CV).mul_(1.0 - beta)


def divergence_loss(
    student_ND: torch.Tensor,
    student: Head,
    teacher: ExactTargets | MixedTargets,
    weights_N: torch.Tensor,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    clamp: float | None = None,
    watched: np.ndarray | None = None,
) -> tuple[torch.Tensor, Figures]:
    """Weighted sum over tokens of a divergence, exact over the vocabulary; the teacher gets no gradient.

    The student's distribution is softmax(logits / temperature); the divergence's gradient with respect to its logits is
    that of `divergence` / temperature. A token whose divergence exceeds `clamp` (nats) counts that much, and has no gradient.
    Figures per token, [N]: `kl` (the divergence, nats, before it is clamped), the student's `entropy`, with `clamp` `clamped`
    (1 or 0); and those of `agreement` at the tokens of the positions `watched`, in ascending order.
    """
    if student.weight_VD.shape[0] != teacher.vocabulary:
        raise ValueError(f"vocabularies of {student.weight_VD.shape[0]} and {teacher.vocabulary} ids cannot be compared")
    within = None if watched is None else _Within(watched, student_ND.device)
    models = 1 + teacher.models
    out = room(student_ND, student, models)

    def kernel(logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, Figures]:
        theirs_CV = teacher.logprobs(rows, out)  # log q
        if temperature != 1.0:
            logits_CV = logits_CV.div_(temperature)
        if within is not None:
            at_W = within.chunk(rows)
            ours_WV, theirs_WV = logits_CV[at_W], theirs_CV[at_W]
        normaliser_C1, entropy_C, value_C = (logits_CV.new_empty(len(logits_CV), 1) for _ in range(3))
        for logits_PV, theirs_PV, normaliser_P1, entropy_P1, value_P1 in parts(logits_CV, theirs_CV, normaliser_C1, entropy_C, value_C):
            probs_PV, found_P1 = _softmax(logits_PV)
            ours_PV = logits_PV.sub_(found_P1)  # log p
            entropy_P = -_dot(probs_PV, ours_PV)
            value_P, grad_PV = divergence(probs_PV, ours_PV.sub_(theirs_PV), theirs_PV)
            if grad_PV is not logits_PV:
                logits_PV.copy_(grad_PV)
            for whole_P1, part in ((normaliser_P1, found_P1), (entropy_P1, entropy_P[:, None]), (value_P1, value_P[:, None])):
                whole_P1.copy_(part)
        figures = {"entropy": entropy_C[:, 0]}
        if within is not None:
            figures |= agreement(ours_WV.sub_(normaliser_C1[at_W]), theirs_WV)
        loss, grad_CV, found = _weigh(value_C[:, 0], logits_CV, weights_N[rows], temperature, clamp)
        return loss, grad_CV, figures | found

    return _apply(student_ND, student, kernel, models)


def _weigh(
    value_C: torch.Tensor, grad_CJ: torch.Tensor, weights_C: torch.Tensor, temperature: float, clamp: float | None
) -> tuple[torch.Tensor, torch.Tensor, Figures]:
    """Return the weighted sum of a divergence, its gradient with respect to logits, and its figures."""
    figures = {"kl": value_C}
    if clamp is None:
        return (weights_C * value_C).sum(), grad_CJ.mul_(weights_C[:, None] / temperature), figures
    within_C = value_C <= clamp
    slope_C1 = (weights_C * within_C)[:, None] / temperature
    return (weights_C * value_C.clamp(max=clamp)).sum(), grad_CJ.mul_(slope_C1), figures | {"clamped": (~within_C).float()}


class _Within:
    """Ascending positions among N tokens, put on the device once."""

    def __init__(self, positions: np.ndarray, device: torch.device) -> None:
        self._positions, self._on_device = positions, torch.from_numpy(positions).to(device, non_blocking=True)

    def chunk(self, rows: slice) -> torch.Tensor:
        """Those that lie in a chunk, counted from its beginning."""
        first, end = np.searchsorted(self._positions, (rows.start, rows.stop))
        return self._on_device[first:end] - rows.start


def agreement(ours_WV: torch.Tensor, theirs_WV: torch.Tensor) -> Figures:
    """How far student and teacher agree on what is likely, from log-probs at W tokens; figures [W] each.

    `teacher_mass`: the teacher's probability of the student's COMPARED_IDS most likely ids; `student_mass`: the student's of the teacher's;
    `top_k_overlap`: the share of ids that both sets have; `watched`: 1, to count by.
    """
    k = min(COMPARED_IDS, ours_WV.shape[1])
    ours_WK, theirs_WK = (logprobs.topk(k, sorted=False).indices for logprobs in (ours_WV, theirs_WV))
    return _masses(theirs_WV.gather(1, ours_WK), ours_WV.gather(1, theirs_WK), ours_WK, theirs_WK)


def _masses(teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor, ours_WK: torch.Tensor, theirs_WK: torch.Tensor) -> Figures:
    common_WK = (ours_WK[:, :, None] == theirs_WK[:, None, :]).any(-1)
    return {
        "teacher_mass": teacher_logprobs.exp().sum(-1),
        "student_mass": student_logprobs.exp().sum(-1),
        "top_k_overlap": common_WK.float().mean(-1),
        "watched": common_WK.new_ones(len(ours_WK), dtype=torch.float32),
    }


def top_k_divergence_loss(
    hidden_ND: torch.Tensor,
    head: Head,
    teacher: TopKTargets,
    weights_N: torch.Tensor,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    clamp: float | None = None,
    watched: np.ndarray | None = None,
) -> tuple[torch.Tensor, Figures]:
    """Weighted sum over tokens of a divergence between a student and K ids of a teacher, all other ids in one bucket.

    The teacher's numbers are normalised over the whole vocabulary; the student's tail is the sum over all other ids. So both
    sides are distributions over K + 1 outcomes, their divergence is never negative, and 0 where the buckets agree; it is a
    lower bound of that of `divergence_loss`.

    With g the divergence's gradient of each of the K + 1 outcomes, the gradient with respect to the student's
    logits is g / temperature for the K ids and g_tail * p / p_tail / temperature for the others.
    `clamp`, `watched` and the figures are those of `divergence_loss`; the teacher's mass on the student's ids is that of the
    ones among the K, a lower bound, and where K is less than COMPARED_IDS so many ids are compared.
    """
    ids_NK, logprobs_NK = teacher.ids_NK, teacher.logprobs_NK
    require_inside(ids_NK, head)
    teacher_NJ = torch.cat([logprobs_NK, teacher.tails_N[:, None]], dim=1).float().clamp_(min=math.log(TAIL_FLOOR))  # J = K + 1
    k = min(COMPARED_IDS, ids_NK.shape[1])
    within = None if watched is None else _Within(watched, hidden_ND.device)

    def compared(at_W: torch.Tensor, ours_Wk: torch.Tensor, ours_CK: torch.Tensor, rows: slice) -> Figures:
        ids_WK = ids_NK[rows][at_W]
        among_WK = (ids_WK[:, :, None] == ours_Wk[:, None, :]).any(-1)
        teacher_WK = logprobs_NK[rows][at_W].float().masked_fill(~among_WK, -torch.inf)
        return _masses(teacher_WK, ours_CK[at_W, :k], ours_Wk, ids_WK[:, :k])

    def kernel(logits_CV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, Figures]:
        ids_CK, theirs_CJ = ids_NK[rows], teacher_NJ[rows].clone()
        if temperature != 1.0:
            logits_CV = logits_CV.div_(temperature)
        if within is not None:
            at_W = within.chunk(rows)
            ours_Wk = logits_CV[at_W].topk(k, sorted=False).indices
        chosen_CK = logits_CV.gather(1, ids_CK)
        normaliser_C1, expected_C = _softmax_(probs_CV := logits_CV)
        figures = {"entropy": normaliser_C1[:, 0] - expected_C}
        ours_CK, probs_CK = chosen_CK - normaliser_C1, probs_CV.gather(1, ids_CK)
        if within is not None:
            figures |= compared(at_W, ours_Wk, ours_CK, rows)
        tail_C1 = probs_CV.scatter_(1, ids_CK, 0.0).sum(-1, keepdim=True).clamp_(min=TAIL_FLOOR)  # not 1 - sum, which cancels
        ours_CJ, probs_CJ = torch.cat([ours_CK, tail_C1.log()], dim=1), torch.cat([probs_CK, tail_C1], dim=1)
        value_C, grad_CJ = divergence(probs_CJ, ours_CJ - theirs_CJ, theirs_CJ)
        loss, grad_CJ, found = _weigh(value_C, grad_CJ, weights_N[rows], temperature, clamp)
        grad_CV = probs_CV.mul_(grad_CJ[:, -1:] / tail_C1).scatter_(1, ids_CK, grad_CJ[:, :-1])
        return loss, grad_CV, figures | found

    return _apply(hidden_ND, head, kernel)
