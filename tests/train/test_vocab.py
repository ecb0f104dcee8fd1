"""Log-probs and KL from hidden states, against dense float64 formulas written out here."""

import math

import pytest
import torch

from s2dcli.models.forward import Head
from s2dcli.train import vocab
from s2dcli.train.vocab import forward_kl, reverse_kl, token_logprobs

N, D, E, V = 37, 8, 6, 23


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    # Several ragged chunks, as with a real vocabulary.
    monkeypatch.setattr(vocab, "CHUNK_BYTES", 5 * V * 4)


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


def check_equal(ours: torch.Tensor, dense: torch.Tensor, hidden: torch.Tensor, head: Head) -> None:
    upstream = torch.randn(N, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(ours.double(), dense, rtol=2e-5, atol=2e-5)
    mine = gradients((ours * upstream).sum(), hidden, head)
    exact = gradients((dense * upstream.double()).sum(), hidden, head)
    for got, want in zip(mine, exact, strict=True):
        assert (got - want).norm() <= 2e-5 * want.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("bias", "scale", "cap"), [(True, 1.0, None), (False, 0.25, None), (False, 1.0, 3.0), (True, 2.0, 5.0)])
def test_token_logprobs_and_gradients_equal_dense_float64(bias, scale, cap, temperature):
    hidden, head = make(D, 0, bias=bias, scale=scale, cap=cap)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    ours, entropy = token_logprobs(hidden, head, targets, temperature)
    logits = dense_logits(hidden, head) / temperature
    logprobs = logits - logits.exp().sum(-1, keepdim=True).log()
    check_equal(ours, logprobs[torch.arange(N), targets], hidden, head)
    torch.testing.assert_close(entropy.double(), -(logprobs.exp() * logprobs).sum(-1).detach(), rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_and_gradients_equal_dense_float64(direction, temperature):
    hidden, student = make(D, 0)
    states, teacher = make(E, 5, scale=0.5)
    function = forward_kl if direction == "forward" else reverse_kl
    ours, _ = function(hidden, student, states, teacher, temperature)
    q = (dense_logits(hidden, student) / temperature).log_softmax(-1)
    p = (dense_logits(states, teacher) / temperature).log_softmax(-1).detach()
    first, second = (p, q) if direction == "forward" else (q, p)
    check_equal(ours, (first.exp() * (first - second)).sum(-1), hidden, student)


def three_tokens(probabilities: list[float]) -> tuple[torch.Tensor, Head]:
    """A head whose distribution at its one state is given."""
    return torch.ones(1, 1), Head(torch.tensor([[math.log(p)] for p in probabilities]), None)


def test_kl_directions_equal_hand_values():
    student, teacher = three_tokens([0.7, 0.2, 0.1]), three_tokens([0.2, 0.3, 0.5])
    student_teacher = 0.7 * math.log(0.7 / 0.2) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.5)
    teacher_student = 0.2 * math.log(0.2 / 0.7) + 0.3 * math.log(0.3 / 0.2) + 0.5 * math.log(0.5 / 0.1)
    assert reverse_kl(*student, *teacher)[0].item() == pytest.approx(student_teacher, abs=1e-6)
    assert forward_kl(*student, *teacher)[0].item() == pytest.approx(teacher_student, abs=1e-6)


def test_teacher_gets_no_gradient_but_changes_the_students():
    hidden, student = make(D, 0)
    states, teacher = make(E, 5)
    value = reverse_kl(hidden, student, states, teacher)[0].sum()
    first = gradients(value, hidden, student)
    assert states.grad is None
    assert teacher.weight_VD.grad is None
    other = Head(teacher.weight_VD.detach() * 1.5, teacher.bias_V)
    second = gradients(reverse_kl(hidden, student, states, other)[0].sum(), hidden, student)
    assert (first[0] - second[0]).norm() > 0.1 * first[0].norm()


def test_padded_vocabulary_columns_have_probability_zero():
    hidden, head = make(D, 0, bias=False)
    wide = Head(torch.cat([head.weight_VD, torch.full((5, D), 100.0)])[:V], None)
    targets = torch.zeros(N, dtype=torch.long)
    torch.testing.assert_close(token_logprobs(hidden, wide, targets)[0], token_logprobs(hidden, head, targets)[0])
    with pytest.raises(ValueError, match="outside the tokenizer"):
        token_logprobs(hidden, head, targets + V)


def test_bfloat16_states_stay_near_float64():
    hidden, head = make(D, 0, bias=False)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    ours, _ = token_logprobs(hidden.bfloat16(), head, targets)
    rounded = Head(head.weight_VD.bfloat16(), None)
    dense = dense_logits(hidden.bfloat16(), rounded).log_softmax(-1)[torch.arange(N), targets]
    # The product's result is rounded to bfloat16 (8 bits) before the float32 log-sum-exp.
    assert (ours.double() - dense).abs().max() < 0.05
    (gradient,) = torch.autograd.grad(ours.sum(), head.weight_VD)
    assert gradient.dtype == torch.float32


def test_no_tokens_give_an_empty_result_and_zero_gradient():
    hidden, head = make(D, 0)
    logprobs, _ = token_logprobs(hidden[:0], head, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == (0,)
    assert gradients(logprobs.sum(), hidden, head)[1].abs().sum() == 0


def test_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    tokens = 2000
    largest = 0
    monkeypatch.setattr(vocab, "CHUNK_BYTES", 64 * V * 4)
    hidden, weight = torch.randn(tokens, D, requires_grad=True), torch.randn(V, D, requires_grad=True)

    def watch(logits_CV, rows):
        nonlocal largest
        largest = max(largest, logits_CV.numel())
        return logits_CV.logsumexp(-1, keepdim=True)

    vocab._apply(hidden, Head(weight, None), watch, 1).sum().backward()
    assert largest == 64 * V
