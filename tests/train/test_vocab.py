"""Log-probs and KL from hidden states, against dense float64 formulas written out here."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from s2dcli.models import forward, readers
from s2dcli.models.forward import Head
from s2dcli.models.readers import token_logprobs, top_k_logprobs
from s2dcli.train.targets import ExactTargets, MixedTargets, TopKTargets
from s2dcli.train.vocab import COMPARED_IDS, divergence_loss, forward_kl, jsd, reverse_kl, token_loss, top_k_divergence_loss

N, D, E, V = 37, 8, 6, 23
BETA = 0.3
FORMS = {"reverse-kl": reverse_kl, "forward-kl": forward_kl, "jsd": partial(jsd, beta=BETA)}
form = pytest.mark.parametrize("form", FORMS)


def dense_divergence(form: str, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Of a student's probabilities p and a teacher's q, at each token."""
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    m = BETA * q + (1 - BETA) * p
    return {"reverse-kl": kl(p, q), "forward-kl": kl(q, p), "jsd": BETA * kl(q, m) + (1 - BETA) * kl(p, m)}[form]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    # Several ragged chunks and parts of them, as with a real vocabulary.
    monkeypatch.setattr(readers, "LOGITS_BYTES", 10 * V * 4)
    monkeypatch.setattr(readers, "PART_BYTES", 2 * V * 4)
    monkeypatch.setattr(forward, "HEAD_ROWS", 9)


def make(width: int, seed: int, *, bias: bool = True, scale: float = 1.0, cap: float | None = None) -> tuple[torch.Tensor, Head]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, width, generator=generator).requires_grad_()
    weight = torch.randn(V, width, generator=generator).requires_grad_()
    offset = torch.randn(V, generator=generator).requires_grad_() if bias else None
    return hidden, Head(weight, offset, scale, cap)


def dense_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden.double() @ head.weight_VD.double().T
    if head.bias_V is not None:
        logits = logits + head.bias_V.double()
    logits = logits * head.scale
    return head.soft_cap * torch.tanh(logits / head.soft_cap) if head.soft_cap else logits


def gradients(value: torch.Tensor, hidden: torch.Tensor, head: Head) -> list[torch.Tensor]:
    inputs = [hidden, head.weight_VD, *([] if head.bias_V is None else [head.bias_V])]
    return list(torch.autograd.grad(value, inputs))


def check_equal(loss: torch.Tensor, dense: torch.Tensor, hidden: torch.Tensor, head: Head) -> None:
    """Value and gradients of a loss equal those of an independent float64 formula."""
    assert loss.item() == pytest.approx(dense.item(), rel=2e-5, abs=2e-5)
    for got, want in zip(gradients(loss, hidden, head), gradients(dense, hidden, head), strict=True):
        assert (got - want).norm() <= 2e-5 * want.norm()


def weighted(logprobs: torch.Tensor, rows: slice) -> tuple[torch.Tensor, dict]:
    """A token loss that is not linear in the log-prob, with its own weight for each token."""
    weights = WEIGHTS[rows].to(logprobs.dtype)
    return (weights * (logprobs + 0.1 * logprobs**2)).sum(), {"tokens": torch.ones(len(logprobs))}


WEIGHTS = torch.randn(N, generator=torch.Generator().manual_seed(9))
TARGETS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
HEADS = [(True, 1.0, None), (False, 0.25, None), (False, 1.0, 3.0), (True, 2.0, 5.0)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("bias", "scale", "cap"), HEADS)
def test_token_loss_and_gradients_equal_dense_float64(bias, scale, cap, temperature):
    hidden, head = make(D, 0, bias=bias, scale=scale, cap=cap)
    loss, sums = token_loss(hidden, head, TARGETS, weighted, temperature)
    logits = dense_logits(hidden, head) / temperature
    logprobs = logits - logits.exp().sum(-1, keepdim=True).log()
    chosen = logprobs[torch.arange(N), TARGETS]
    check_equal(loss, weighted(chosen, slice(None))[0], hidden, head)
    assert sums["entropy"].sum().item() == pytest.approx(-(logprobs.exp() * logprobs).sum().item(), rel=1e-5)
    assert sums["tokens"].sum() == N
    torch.testing.assert_close(token_logprobs(hidden, head, TARGETS, temperature).double(), chosen.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@form
@pytest.mark.parametrize(("bias", "scale", "cap"), HEADS)
def test_divergences_and_gradients_equal_dense_float64(bias, scale, cap, form, temperature):
    hidden, student = make(D, 0, bias=bias, scale=scale, cap=cap)
    states, teacher = make(E, 5, scale=0.5)
    targets = ExactTargets(states, teacher, temperature)
    loss, sums = divergence_loss(hidden, student, targets, WEIGHTS, FORMS[form], temperature=temperature)
    p = (dense_logits(hidden, student) / temperature).softmax(-1)
    value = dense_divergence(form, p, (dense_logits(states, teacher) / temperature).softmax(-1).detach())
    check_equal(loss, (WEIGHTS.double() * value).sum(), hidden, student)
    assert sums["kl"].sum().item() == pytest.approx(value.sum().item(), rel=1e-5)
    assert sums["entropy"].sum().item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)


def test_what_follows_the_loss_scales_its_gradients():
    hidden, head = make(D, 0)
    once = gradients(token_loss(hidden, head, TARGETS, weighted)[0], hidden, head)
    scaled = gradients(token_loss(hidden, head, TARGETS, weighted)[0] * 2.5, hidden, head)
    for first, second in zip(once, scaled, strict=True):
        torch.testing.assert_close(first * 2.5, second)


def three_tokens(probabilities: list[float]) -> tuple[torch.Tensor, Head]:
    """A head whose distribution at its one state is given."""
    return torch.ones(1, 1), Head(torch.tensor([[math.log(p)] for p in probabilities]), None)


def kl(student: tuple, teacher: tuple, divergence) -> float:
    return divergence_loss(*student, ExactTargets(*teacher), torch.ones(1), divergence)[0].item()


def test_kl_directions_equal_hand_values():
    student, teacher = three_tokens([0.7, 0.2, 0.1]), three_tokens([0.2, 0.3, 0.5])
    student_teacher = 0.7 * math.log(0.7 / 0.2) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.5)
    teacher_student = 0.2 * math.log(0.2 / 0.7) + 0.3 * math.log(0.3 / 0.2) + 0.5 * math.log(0.5 / 0.1)
    assert kl(student, teacher, reverse_kl) == pytest.approx(student_teacher, abs=1e-6)
    assert kl(student, teacher, forward_kl) == pytest.approx(teacher_student, abs=1e-6)


def test_teacher_gets_no_gradient_but_changes_the_students():
    hidden, student = make(D, 0)
    states, teacher = make(E, 5)
    loss = divergence_loss(hidden, student, ExactTargets(states, teacher), WEIGHTS, reverse_kl)[0]
    assert torch.autograd.grad(loss, [states, teacher.weight_VD], allow_unused=True, retain_graph=True) == (None, None)
    first = gradients(loss, hidden, student)
    other = Head(teacher.weight_VD.detach() * 1.5, teacher.bias_V)
    second = gradients(divergence_loss(hidden, student, ExactTargets(states, other), WEIGHTS, reverse_kl)[0], hidden, student)
    assert (first[0] - second[0]).norm() > 0.1 * first[0].norm()


def test_frozen_models_are_scored_without_gradients():
    hidden, head = make(D, 0)
    with torch.no_grad():
        loss, _ = token_loss(hidden, head, TARGETS, weighted)
    assert not loss.requires_grad
    assert not token_logprobs(hidden, head, TARGETS).requires_grad


def test_a_frozen_head_gets_no_gradient_and_the_states_the_same_one():
    hidden, head = make(D, 0)
    expected = gradients(token_loss(hidden, head, TARGETS, weighted)[0], hidden, head)[0]
    frozen = Head(head.weight_VD.detach(), head.bias_V.detach())
    (found,) = torch.autograd.grad(token_loss(hidden, frozen, TARGETS, weighted)[0], [hidden])
    assert torch.equal(found, expected)


def test_ids_beyond_the_tokenizer_are_refused():
    hidden, head = make(D, 0)
    for function in (lambda ids: token_logprobs(hidden, head, ids), lambda ids: token_loss(hidden, head, ids, weighted)):
        with pytest.raises(ValueError, match=f"token id {V} lies outside the tokenizer's {V} ids"):
            function(torch.full((N,), V))


@pytest.mark.parametrize("loss", ["tokens", "exact", "top-k"])
def test_chunk_sizes_change_nothing_but_rounding(monkeypatch, loss):
    states, teacher = make(E, 5)
    exact = ExactTargets(states, teacher)
    found = []
    for tokens in (1, 4, 16, N):
        monkeypatch.setattr(readers, "LOGITS_BYTES", tokens * V * 4)
        hidden, head = make(D, 0)
        if loss == "tokens":
            value, figures = token_loss(hidden, head, TARGETS, weighted)
        elif loss == "exact":
            value, figures = divergence_loss(hidden, head, exact, WEIGHTS, reverse_kl, watched=np.arange(2, N, 3))
        else:
            targets = TopKTargets(*top_k_logprobs(states, teacher, 5))
            value, figures = top_k_divergence_loss(hidden, head, targets, WEIGHTS, reverse_kl, watched=np.arange(2, N, 3))
        found.append([value.detach(), *figures.values(), *gradients(value, hidden, head)])
    for others in zip(*found, strict=True):
        for other in others[1:]:
            torch.testing.assert_close(other, others[0], rtol=1e-5, atol=1e-5)


def test_a_gpus_chunks_are_as_large_as_its_free_memory_allows():
    gpu, cpu, gib = torch.device("cuda"), torch.device("cpu"), 2**30
    assert readers.chunk_bytes(cpu, 3, 80 * gib) == readers.chunk_bytes(cpu, 3) == readers.LOGITS_BYTES // 3
    sizes = {free: readers.chunk_bytes(gpu, 2, free * gib) / gib for free in (80, 12, 11, 6, 3)}
    assert sizes == {80: 1, 12: 1, 11: 1 / 2, 6: 1 / 2, 3: 1 / 4}
    assert readers.chunk_bytes(gpu, 1, 0) == readers.LOGITS_BYTES // 3
    assert readers.chunk_bytes(gpu, 1, 80 * gib) // (4 * 262_144) == 1024


def test_vocabularies_of_different_size_cannot_be_compared():
    hidden, student = make(D, 0)
    with pytest.raises(ValueError, match="cannot be compared"):
        divergence_loss(hidden, student, ExactTargets(hidden, Head(student.weight_VD[:-1], None)), WEIGHTS, reverse_kl)


def test_bfloat16_states_stay_near_float64():
    hidden, head = make(D, 0, bias=False)
    ours = token_logprobs(hidden.bfloat16(), head, TARGETS)
    rounded = Head(head.weight_VD.bfloat16(), None)
    dense = dense_logits(hidden.bfloat16(), rounded).log_softmax(-1)[torch.arange(N), TARGETS]
    # The product's result is rounded to bfloat16 (8 bits) before the float32 log-sum-exp.
    assert (ours.double() - dense).abs().max() < 0.05
    narrow = hidden.detach().bfloat16().requires_grad_()
    loss = token_loss(narrow, head, TARGETS, weighted)[0]
    grad_hidden, grad_weight = torch.autograd.grad(loss, [narrow, head.weight_VD])
    exact = gradients(weighted(dense_logits(hidden, head).log_softmax(-1)[torch.arange(N), TARGETS], slice(None))[0], hidden, head)
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)
    assert (grad_hidden - exact[0]).norm() < 0.02 * exact[0].norm()
    assert (grad_weight - exact[1]).norm() < 0.02 * exact[1].norm()


def test_no_tokens_give_zero_loss_and_zero_gradient():
    hidden, head = make(D, 0)
    loss, _ = token_loss(hidden[:0], head, TARGETS[:0], weighted)
    assert loss == 0
    assert torch.autograd.grad(loss, head.weight_VD)[0].abs().sum() == 0


def test_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(readers, "LOGITS_BYTES", 64 * V * 4)
    sizes = []
    logits = Head.logits

    def watched(head, hidden_ND, out=None):
        sizes.append(len(hidden_ND))
        return logits(head, hidden_ND, out)

    monkeypatch.setattr(Head, "logits", watched)
    hidden, head = torch.randn(2000, D, requires_grad=True), Head(torch.randn(V, D, requires_grad=True), None)
    token_loss(hidden, head, torch.zeros(2000, dtype=torch.long), lambda logprobs, rows: (logprobs.sum(), {}))[0].backward()
    assert max(sizes) == 64
    assert sum(sizes) == 2000  # every logit is computed once, backward pass included


def in_buckets(probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Probabilities of the K ids and of all others together, [N, K + 1]."""
    inside = torch.zeros(N, V, dtype=torch.bool).scatter_(1, ids, True)
    return torch.cat([probs.gather(1, ids), probs.masked_fill(inside, 0.0).sum(-1, keepdim=True)], 1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@form
@pytest.mark.parametrize("k", [1, 5, V // 2])
@pytest.mark.parametrize(("bias", "scale", "cap"), HEADS)
def test_top_k_divergences_and_gradients_equal_dense_float64(bias, scale, cap, k, form, temperature):
    """Against the divergence of two distributions over k + 1 outcomes, gathered from dense ones."""
    hidden, student = make(D, 0, bias=bias, scale=scale, cap=cap)
    states, teacher = make(E, 5, scale=0.5)
    ids, logprobs, tails = top_k_logprobs(states, teacher, k, temperature)
    q = (dense_logits(states, teacher) / temperature).log_softmax(-1).detach()
    torch.testing.assert_close(logprobs.double(), q.sort(-1, descending=True).values[:, :k], rtol=1e-5, atol=1e-5)

    p = (dense_logits(hidden, student) / temperature).softmax(-1)
    value = dense_divergence(form, in_buckets(p, ids), in_buckets(q.exp(), ids))
    targets = TopKTargets(ids, logprobs, tails)
    loss, sums = top_k_divergence_loss(hidden, student, targets, WEIGHTS, FORMS[form], temperature=temperature)
    check_equal(loss, (WEIGHTS.double() * value).sum(), hidden, student)
    assert sums["kl"].sum().item() == pytest.approx(value.sum().item(), rel=1e-5)
    assert sums["entropy"].sum().item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)


@form
def test_a_top_k_divergence_is_a_lower_bound_that_all_ids_reach(form):
    hidden, student = make(D, 0)
    states, teacher = make(E, 5)
    how = (torch.ones(N), FORMS[form])
    exact = divergence_loss(hidden, student, ExactTargets(states, teacher), *how)[0].item()
    of = lambda k: top_k_divergence_loss(hidden, student, TopKTargets(*top_k_logprobs(states, teacher, k)), *how)[0].item()  # noqa: E731
    assert 0 <= of(1) <= of(5) <= of(V) + 1e-3
    assert of(V) == pytest.approx(exact, rel=1e-4)


@form
@pytest.mark.parametrize("sharpness", [6.0, 18.0])
def test_a_small_tail_of_the_teacher_is_exact(sharpness, form):
    """Tails of 4e-3 and 3e-7, which 1 minus a float32 sum knows to a few digits or to none."""
    hidden, student = make(D, 0)
    states, teacher = make(E, 5)
    teacher = Head(torch.zeros(V, E), torch.linspace(sharpness, -sharpness / 4, V), 1.0, None)
    ids, logprobs, tails = top_k_logprobs(states, teacher, V // 2)
    ours = in_buckets(dense_logits(hidden, student).softmax(-1), ids)
    theirs = in_buckets(dense_logits(states, teacher).softmax(-1).detach(), ids)
    assert tails.double().exp().tolist() == pytest.approx(theirs[:, -1].tolist(), rel=1e-5)
    loss = top_k_divergence_loss(hidden, student, TopKTargets(ids, logprobs, tails), WEIGHTS, FORMS[form])[0]
    check_equal(loss, (WEIGHTS.double() * dense_divergence(form, ours, theirs)).sum(), hidden, student)


@form
def test_a_teachers_own_temperature_equals_dense_float64(form):
    hidden, student = make(D, 0)
    states, teacher = make(E, 5)
    p = (dense_logits(hidden, student) / 0.7).softmax(-1)
    q = (dense_logits(states, teacher) / 2.0).softmax(-1).detach()
    loss = divergence_loss(hidden, student, ExactTargets(states, teacher, 2.0), WEIGHTS, FORMS[form], temperature=0.7)[0]
    check_equal(loss, (WEIGHTS.double() * dense_divergence(form, p, q)).sum(), hidden, student)


@pytest.mark.parametrize("k", [None, 5])
@form
def test_a_clamped_token_counts_its_clamp_and_has_no_gradient(form, k):
    hidden, student = make(D, 0)
    states, teacher = make(E, 5)
    p, q = dense_logits(hidden, student).softmax(-1), dense_logits(states, teacher).softmax(-1).detach()
    if k is None:
        how = (divergence_loss, hidden, student, ExactTargets(states, teacher))
    else:
        targets = TopKTargets(*top_k_logprobs(states, teacher, k))
        how, p, q = (top_k_divergence_loss, hidden, student, targets), in_buckets(p, targets.ids_NK), in_buckets(q, targets.ids_NK)
    value = dense_divergence(form, p, q)
    clamp = value.median().item() + 1e-3  # of no token to the digit
    loss, figures = how[0](*how[1:], WEIGHTS, FORMS[form], clamp=clamp)
    check_equal(loss, (WEIGHTS.double() * torch.where(value > clamp, clamp, value)).sum(), hidden, student)
    assert figures["clamped"].tolist() == (value > clamp).float().tolist()
    assert 10 < figures["clamped"].sum() < 27
    torch.testing.assert_close(figures["kl"].double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [1e-3, 1 - 1e-3])
def test_jsd_tends_to_a_kl_at_both_ends_and_never_exceeds_its_bound(beta):
    """JSD / beta to the forward KL, JSD / (1 - beta) to the reverse one: the divergences that 0 and 1 stand for."""
    hidden, student = make(D, 0, scale=0.2)
    states, teacher = make(E, 5, scale=0.2)
    of = lambda divergence: divergence_loss(hidden, student, ExactTargets(states, teacher), torch.ones(N), divergence)  # noqa: E731
    found, expected = of(partial(jsd, beta=beta))[1]["kl"] / min(beta, 1 - beta), of(forward_kl if beta < 0.5 else reverse_kl)[1]["kl"]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-4)
    apart = three_tokens([1.0, 1e-30, 1e-30]), three_tokens([1e-30, 1.0, 1e-30])
    assert kl(*apart, partial(jsd, beta=BETA)) == pytest.approx(-BETA * math.log(BETA) - (1 - BETA) * math.log(1 - BETA), rel=1e-5)


@pytest.mark.parametrize("weight", [0.5, 1.0, 1.7])
@form
def test_mixed_targets_equal_dense_float64(form, weight):
    hidden, student = make(D, 0)
    (states, teacher), (others, reference) = make(E, 5), make(E + 1, 6)
    log_q, log_r = ((dense_logits(*model) / 0.8).log_softmax(-1).detach() for model in ((states, teacher), (others, reference)))
    target = (log_r + weight * (log_q - log_r)).softmax(-1)
    mixed = MixedTargets(ExactTargets(states, teacher, 0.8), ExactTargets(others, reference, 0.8), weight)
    loss = divergence_loss(hidden, student, mixed, WEIGHTS, FORMS[form])[0]
    check_equal(loss, (WEIGHTS.double() * dense_divergence(form, dense_logits(hidden, student).softmax(-1), target)).sum(), hidden, student)
    if weight == 1.0:
        alone = divergence_loss(hidden, student, ExactTargets(states, teacher, 0.8), WEIGHTS, FORMS[form])[0]
        assert loss.item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("k", [None, 3, V])
def test_watching_compares_the_most_likely_ids_and_changes_no_gradient(k):
    hidden, student = make(D, 0)
    states, teacher = make(E, 5)
    watched = np.array([2, 3, 11, 30, 36])
    how = (divergence_loss, hidden, student, ExactTargets(states, teacher))
    if k:
        how = (top_k_divergence_loss, hidden, student, TopKTargets(*top_k_logprobs(states, teacher, k)))
    (loss, figures), (plain, _) = (how[0](*how[1:], WEIGHTS, reverse_kl, watched=at) for at in (watched, None))
    for found, expected in zip(gradients(loss, hidden, student), gradients(plain, hidden, student), strict=True):
        assert torch.equal(found, expected)
    p, q = dense_logits(hidden, student).softmax(-1), dense_logits(states, teacher).softmax(-1)
    compared = min(COMPARED_IDS, k or V)
    for number, at in enumerate(watched):
        ours, theirs = (set(probs[at].topk(compared).indices.tolist()) for probs in (p, q))
        known = set(q[at].topk(k).indices.tolist()) if k else set(range(V))  # else a lower bound
        assert figures["teacher_mass"][number].item() == pytest.approx(sum(q[at, i].item() for i in ours & known), rel=1e-4)
        assert figures["student_mass"][number].item() == pytest.approx(sum(p[at, i].item() for i in theirs), rel=1e-4)
        assert figures["top_k_overlap"][number].item() == pytest.approx(len(ours & theirs) / compared)
    assert figures["watched"].tolist() == [1.0] * 5
