"""Micro-batches: what is kept, what is padded, and that the split never changes the gradient."""

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, ragged_rows, scores, tiny, training_row

from s2dcli.models import batching, selftest
from s2dcli.models.batching import micro_batches, split
from s2dcli.models.forward import head_of
from s2dcli.models.policy import Policy, freeze
from s2dcli.models.rows import Row
from s2dcli.models.selftest import can_pack, can_share_prompts, self_test
from s2dcli.options import Aggregate, KlEstimator, Surrogate
from s2dcli.train.objectives import CrossEntropy, Distillation, PolicyGradient, SampledDistillation
from s2dcli.train.rows import set_weights
from s2dcli.train.teachers import LiveTeacher, ScoredRows
from s2dcli.train.vocab import forward_kl, jsd, reverse_kl

CPU = torch.device("cpu")
FAMILIES = ["qwen3", "llama", "gpt2", "gemma2", "cohere"]


def gradient(policy: Policy, rows: list[Row], objective, tokens_per_batch: int, **layout) -> torch.Tensor:
    policy.zero_grad()
    for batch in micro_batches(rows, tokens_per_batch, 0, CPU, **layout):
        policy(batch, objective)[0].backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])


def objectives() -> dict:
    """Every loss, with and without each of the numbers it may be given: (objective, names of the numbers)."""
    teacher = freeze(Policy(tiny("llama", seed=7), VOCABULARY))
    clip = {"clip_low": 0.2, "clip_high": 0.3}
    return {
        "grpo": (PolicyGradient(temperature=1.0, **clip), []),
        "grpo off-policy with KL": (
            PolicyGradient(temperature=0.8, **clip, kl_coef=0.05, kl_estimator=KlEstimator.k2),
            ["old_logprobs", "reference_logprobs"],
        ),
        "corrected": (PolicyGradient(temperature=1.0, **clip), ["importance_weights"]),
        "gspo": (PolicyGradient(temperature=1.0, **clip), ["old_logprobs", "sequence_log_ratio"]),
        "cispo": (PolicyGradient(temperature=1.0, **clip, surrogate=Surrogate.cispo), ["old_logprobs"]),
        "forward KL": (Distillation(teacher=LiveTeacher(policy=teacher), divergence=forward_kl, temperature=1.0), []),
        "reverse KL": (Distillation(teacher=LiveTeacher(policy=teacher), divergence=reverse_kl, temperature=1.0), []),
        "clamped JSD": (
            Distillation(teacher=LiveTeacher(policy=teacher), divergence=partial(jsd, beta=0.3), temperature=1.0, clamp=0.4),
            [],
        ),
        "top-k KL": (Distillation(teacher=LiveTeacher(policy=teacher, top_k=5), divergence=reverse_kl, temperature=1.0), []),
        "sampled KL": (SampledDistillation(teacher=ScoredRows(), temperature=1.0), ["teacher_logprobs"]),
        "cross-entropy": (CrossEntropy(), []),
    }


def annotate(rows: list[Row], names: list[str]) -> None:
    """Give rows random numbers, and of what may be missing those that are named."""
    draw = random.Random(1)
    noise = lambda row: np.array([-draw.random() for _ in row.completion_ids], dtype=np.float32)  # noqa: E731
    for row in rows:
        row.advantage, row.logprobs = draw.uniform(-1, 1), noise(row)
        for name in ("old_logprobs", "reference_logprobs", "teacher_logprobs", "importance_weights"):
            setattr(row, name, noise(row) if name in names else None)
        row.sequence_log_ratio = draw.uniform(-0.3, 0.3) if "sequence_log_ratio" in names else None


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("aggregate", list(Aggregate))
@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_the_split_into_micro_batches_never_changes_the_gradient(family, aggregate, group):
    rows = ragged_rows(group=group)
    policy = Policy(tiny(family), VOCABULARY)
    set_weights(rows, aggregate, 32)
    for name, (objective, numbers) in objectives().items():
        annotate(rows, numbers)
        whole = gradient(policy, rows, objective, 10_000)
        for budget in (60, 1):  # several rows at a time; one row at a time
            parts = gradient(policy, rows, objective, budget)
            assert (whole - parts).norm() <= 1e-5 * whole.norm(), name


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_models_own_logits_row_by_row(family, group):
    model = tiny(family)
    self_test(model, VOCABULARY, family)
    rows = ragged_rows(group=group)
    found = scores(Policy(model, VOCABULARY), rows, tokens_per_batch=100, pad_id=0)
    for row, ours in zip(rows, found, strict=True):
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits.double().log_softmax(-1)[0]
        first = len(row.prompt_ids)
        exact = [logprobs[first + t - 1, token].item() for t, token in enumerate(row.completion_ids)]
        assert ours == pytest.approx(exact, abs=1e-5)


def test_a_later_token_leaves_earlier_scores_alone():
    policy = Policy(tiny("qwen3"), VOCABULARY)
    row = Row([5, 6, 7], [8, 9, 10, 11])
    changed = Row([5, 6, 7], [8, 9, 30, 11])
    first, second = scores(policy, [row, changed], tokens_per_batch=100, pad_id=0)
    assert first[:2] == pytest.approx(second[:2], abs=1e-6)
    assert abs(first[2] - second[2]) > 1e-3


def test_padding_tokens_do_not_matter_even_when_pad_is_eos():
    policy = Policy(tiny("qwen3"), VOCABULARY)
    rows = [training_row([5, 6], [7, 2]), training_row([5], [6, 7, 8, 9, 2])]
    found = [scores(policy, rows, tokens_per_batch=100, pad_id=pad) for pad in (0, 2)]
    for first, second in zip(*found, strict=True):
        assert first == pytest.approx(second, abs=1e-6)
    (batch,) = micro_batches(rows, 100, 2, CPU)
    states = policy.states(batch).detach().requires_grad_()
    CrossEntropy().loss(batch, states, policy.head())[0].backward()
    assert (states.grad.norm(dim=1) > 0).all()  # the EOS positions learn too


def test_empty_completions_are_left_out_but_keep_their_place():
    policy = Policy(tiny("qwen3"), VOCABULARY)
    rows = [Row([5, 6], []), Row([5], [6, 7])]
    assert scores(policy, rows, tokens_per_batch=100, pad_id=0)[0] == []
    assert list(micro_batches([Row([5], [])], 100, 0, CPU)) == []


def test_unequal_lists_are_refused():
    (batch,) = micro_batches([Row([5], [6, 7])], 100, 0, CPU)
    with pytest.raises(ValueError, match="1 numbers for 2 completion tokens"):
        batch.per_token([np.array([0.5])])
    with pytest.raises(ValueError, match="without prompt tokens"):
        list(micro_batches([Row([], [6])], 100, 0, CPU))


def test_a_row_that_is_not_learnt_from_leaves_the_gradient_unchanged():
    policy = Policy(tiny("qwen3"), VOCABULARY)
    rows = ragged_rows(4)
    extra = [*rows, training_row([9], [10, 11, 12])]
    set_weights(rows, Aggregate.token, 32)
    expected = gradient(policy, rows, CrossEntropy(), 100)
    found = gradient(policy, extra[:4], CrossEntropy(), 100)
    assert torch.equal(expected, found)


def test_gradient_of_the_policy_loss_equals_a_dense_float64_one():
    rows = ragged_rows(3)
    advantages = [1.0, -0.5, 0.25]
    set_weights(rows, Aggregate.sequence, 32)
    for row, advantage in zip(rows, advantages, strict=True):
        row.advantage = advantage
    model = tiny("llama")
    ours = gradient(Policy(model, VOCABULARY), rows, PolicyGradient(temperature=1.0, clip_low=0.2, clip_high=0.2), 50)
    exact = tiny("llama").double()
    total = 0.0
    for row, advantage in zip(rows, advantages, strict=True):
        logprobs = exact(input_ids=torch.tensor([[*row.prompt_ids, *row.completion_ids]])).logits[0].log_softmax(-1)
        chosen = logprobs[len(row.prompt_ids) - 1 : -1].gather(1, torch.tensor(row.completion_ids).long()[:, None])
        total = total - advantage * chosen.mean() / 3
    total.backward()
    dense = torch.cat([parameter.grad.flatten() for parameter in exact.parameters()])
    assert (ours.double() - dense).norm() <= 1e-5 * dense.norm()


def test_head_hides_columns_beyond_the_tokenizer():
    model = tiny("qwen3")
    logits = head_of(model, 30).logits(torch.randn(4, 32))
    assert logits.shape == (4, 30)
    rows = [Row([5], [35])]
    with pytest.raises(ValueError, match="outside the tokenizer's 30 ids"):
        scores(Policy(model, 30), rows, tokens_per_batch=10, pad_id=0)


def test_budget_and_padding_of_a_skewed_batch():
    draw = random.Random(3)
    rows = [Row([5] * 10, [6] * int(math.exp(draw.gauss(4, 1)) + 1)) for _ in range(200)]
    batches = list(micro_batches(rows, 2048, 0, CPU))
    assert {*rows} == {row for batch in batches for row in batch.rows}
    assert sum(len(batch.rows) for batch in batches) == 200
    assert all(batch.input_ids_BT.numel() <= 2048 for batch in batches if len(batch.rows) > 1)
    unsorted = sum(max(map(len, rows[i : i + 8])) * 8 for i in range(0, 200, 8))
    assert padding_share(batches) < 0.3 * (1 - sum(map(len, rows)) / unsorted)


def padding_share(batches) -> float:
    return sum(batch.num_padding for batch in batches) / sum(batch.num_positions for batch in batches)


def shared(batches) -> list[bool]:
    return [batch.prompts is not None for batch in batches]


def test_prompts_are_shared_where_that_saves_positions():
    long, short = [Row([5] * 20, [6] * 10)] * 8, [Row([5] * 2, [6] * 10)] * 8
    assert shared(micro_batches(long, 1000, 0, CPU)) == [True]
    assert shared(micro_batches(short, 1000, 0, CPU)) == [False]
    assert not any(shared(micro_batches(ragged_rows(8), 1000, 0, CPU)))
    batches = list(micro_batches(long, 60, 0, CPU))  # 20 + 4 x 10 positions each
    assert [(len(batch.rows), batch.num_positions) for batch in batches] == [(4, 60), (4, 60)]
    assert padding_share(batches) == 0.0


def test_gradients_through_a_shared_prompt_equal_those_through_its_copies(monkeypatch):
    rows = ragged_rows(12, group=4)
    set_weights(rows, Aggregate.sequence, 32)
    for family in FAMILIES:
        policy = Policy(tiny(family), VOCABULARY)
        found = {}
        for worth in (0.0, 10.0):  # never, always
            monkeypatch.setattr(batching, "SHARING_WORTH", worth)
            assert set(shared(micro_batches(rows, 120, 0, CPU))) == {worth > 0}
            found[worth] = gradient(policy, rows, CrossEntropy(), 120)
        assert (found[0.0] - found[10.0]).norm() <= 1e-5 * found[0.0].norm(), family


def test_a_sample_leaves_the_others_alone():
    policy = Policy(tiny("qwen3"), VOCABULARY)
    rows = [Row([5] * 20, [6, 7, 8]), Row([5] * 20, [9, 10, 11]), Row([12] * 20, [9, 10, 11])]
    changed = [rows[0], Row([5] * 20, [30, 31, 32]), Row([33] * 20, [9, 10, 11])]
    first, second = (scores(policy, batch, tokens_per_batch=1000, pad_id=0) for batch in (rows, changed))
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_split():
    assert split([4, 5, 6], 2) == [[4, 5], [6]]
    assert split([4, 5, 6], None) == [[4, 5, 6]]
    assert split([], None) == []


def test_models_with_a_sliding_window_do_not_share_prompts():
    # The window is counted in cache positions, which padding between prompt and completion would use up.
    assert {family: can_share_prompts(tiny(family)) for family in FAMILIES} == {
        "qwen3": True,
        "llama": True,
        "gpt2": True,
        "gemma2": False,
        "cohere": True,
    }


@pytest.mark.parametrize("budget", [2048, 8192, 16384])
def test_padding_stays_under_five_percent_on_skewed_lengths(budget):
    """Log-normal completions, a few of them at the limit, as reasoning models write them."""
    draw = random.Random(0)
    rows = []
    for _ in range(32):
        prompt = [3] * draw.randint(40, 200)
        rows += [Row([*prompt, index], [7] * min(1024, max(1, int(draw.lognormvariate(5.0, 0.9))))) for index in range(8)]
    batches = list(micro_batches(rows, budget, 0, CPU))
    assert sum(batch.num_padding for batch in batches) < 0.05 * sum(batch.num_positions for batch in batches)
    assert all(batch.num_positions <= budget for batch in batches)
    assert {*rows} == {row for batch in batches for row in batch.rows}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_packed_rows_equal_those_of_padded_ones(attention):
    rows = ragged_rows(12)
    set_weights(rows, Aggregate.sequence, 32)
    for family in FAMILIES:
        policy = Policy(tiny(family), VOCABULARY)
        policy.model.set_attn_implementation(attention)
        padded = gradient(policy, rows, CrossEntropy(), 120)
        layout = {"share_prompts": False, "pack": True}
        batches = list(micro_batches(rows, 120, 0, CPU, **layout))
        assert len(batches) < 12
        assert not any(batch.num_padding for batch in batches)
        packed = gradient(policy, rows, CrossEntropy(), 120, **layout)
        assert (packed - padded).norm() <= 1e-5 * padded.norm(), family


def test_only_kernels_of_variable_length_pack(monkeypatch):
    """Of what the self-test finds right, which here is everything: flex would have to be compiled."""

    class Right:
        packing = sharing = decoding = None

        def __init__(self, *_):
            pass

        def require_right(self):
            pass

        def passes(self, *_):
            return True

    monkeypatch.setattr(selftest, "_Test", Right)
    model = tiny("qwen3")
    for attention, packs in [("sdpa", False), ("eager", False), ("flex_attention", True)]:
        model.set_attn_implementation(attention)
        assert can_pack(model) is packs


def test_micro_batches_end_early_only_where_that_saves_positions():
    """Groups whose rows differ in length pad wherever they are cut; groups of two lengths do not."""
    short, long = [1] * 4, [1] * 16
    mixed = [Row([prompt] * 40, completion) for prompt in range(16) for completion in (short, long) * 4]
    apart = [Row([prompt] * 40, (short, long)[prompt % 2]) for prompt in range(16) for _ in range(8)]
    for rows, number in ((mixed, 1), (apart, 2)):
        assert len(list(micro_batches(rows, 4096, 0, torch.device("cpu")))) == number
