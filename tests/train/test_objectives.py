"""What objectives promise beyond the losses that they are made of."""

from dataclasses import replace

import pytest
import torch
from test_teachers import cached as make_cache
from tiny import VOCABULARY, ragged_rows, tiny, training_row

from s2dcli.assembly.scoring import CacheForm
from s2dcli.models.batching import micro_batches
from s2dcli.models.policy import Policy, freeze
from s2dcli.models.rows import Row
from s2dcli.models.scoring import score
from s2dcli.options import Estimator, Keep, ValueType
from s2dcli.train.loop import Part
from s2dcli.train.objectives import WATCH_EVERY, Distillation, SampledDistillation
from s2dcli.train.rows import THIRDS, TrainingRow
from s2dcli.train.teachers import CachedTeacher, LiveTeacher
from s2dcli.train.vocab import reverse_kl

CPU = torch.device("cpu")
TEMPERATURE = 0.8


def gradient(policy: Policy, rows: list[Row], objective) -> torch.Tensor:
    policy.zero_grad()
    for batch in micro_batches(rows, 10_000, 0, CPU, share_prompts=False):
        policy(batch, objective)[0].backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])


def one_of_each(sampler: Policy) -> list[TrainingRow]:
    """Every possible next token once, weighted by the probability with which the sampler draws it."""
    rows = [training_row([3, 4, 5], [token]) for token in range(VOCABULARY)]
    for row, logprobs in score(sampler, rows, tokens_per_batch=10_000, pad_id=0, temperature=TEMPERATURE):
        row.logprobs, row.weight = logprobs, float(torch.tensor(logprobs[0]).exp())
    assert abs(sum(row.weight for row in rows) - 1.0) < 1e-5
    return rows


def exact_gradient(policy: Policy, teacher: Policy) -> torch.Tensor:
    live = LiveTeacher(policy=teacher, temperature=TEMPERATURE)
    objective = Distillation(teacher=live, divergence=reverse_kl, temperature=TEMPERATURE)
    return gradient(policy, [training_row([3, 4, 5], [6])], objective)


@pytest.mark.parametrize("baseline", [None, "exact", "top-k"])
def test_the_mean_gradient_of_sampled_distillation_is_that_of_the_exact_kl(tmp_path, baseline):
    """Over all tokens that the sampler, another policy, may draw."""
    policy, sampler = Policy(tiny("qwen3"), VOCABULARY), freeze(Policy(tiny("qwen3", seed=3), VOCABULARY))
    teacher = freeze(Policy(tiny("llama", seed=7), VOCABULARY))
    rows = one_of_each(sampler)
    if baseline == "top-k":
        for index, row in enumerate(rows):
            row.sample_index = index
        cache = make_cache(tmp_path / "cache", teacher, rows, CacheForm(Keep.top_k, 5, ValueType.float32, TEMPERATURE))
        source = CachedTeacher(cache, rows, CPU, Estimator.sampled, None, TEMPERATURE, baseline=True)
    else:
        source = LiveTeacher(policy=teacher, temperature=TEMPERATURE, sampled=True, baseline=baseline is not None)
    mean = gradient(policy, rows, SampledDistillation(teacher=source, temperature=TEMPERATURE, baseline=baseline is not None))
    exact = exact_gradient(policy, teacher)
    assert (mean - exact).norm() <= 1e-4 * exact.norm()


def variance(policy: Policy, teacher: Policy, *, baseline: bool) -> float:
    """Of the gradient of one drawn token, relative to the squared norm of its mean, the gradient of the exact KL."""
    source = LiveTeacher(policy=teacher, temperature=TEMPERATURE, sampled=True, baseline=baseline)
    objective = SampledDistillation(teacher=source, temperature=TEMPERATURE, baseline=baseline)
    exact, total = exact_gradient(policy, teacher).square().sum(), 0.0
    for row in one_of_each(freeze(Policy(tiny("qwen3"), VOCABULARY))):  # the policy itself samples
        share, row.weight = row.weight, 1.0
        total += share * gradient(policy, [row], objective).square().sum()
    return float(total / exact) - 1.0


def test_a_baseline_lowers_the_variance_far_from_the_teacher(record_property):
    """Next to it the log-ratios are small and of both signs, and the KL has little to take away."""
    policy, far, near = (Policy(tiny(family, seed=seed), VOCABULARY) for family, seed in (("qwen3", 0), ("llama", 7), ("qwen3", 0)))
    with torch.no_grad():
        for number, weight in enumerate(near.parameters()):
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    found = {
        (name, baseline): variance(policy, freeze(teacher), baseline=baseline)
        for name, teacher in (("far", far), ("near", near))
        for baseline in (False, True)
    }
    record_property("variances", found)
    assert found["far", True] < 0.8 * found["far", False]
    assert found["near", True] < 1.5 * found["near", False]


def test_the_log_ratio_of_a_sampled_token_is_clamped_on_both_sides():
    policy, teacher = Policy(tiny("qwen3"), VOCABULARY), freeze(Policy(tiny("llama", seed=7), VOCABULARY))
    rows = [training_row([3, 4, 5], [token]) for token in (6, 7, 8, 9)]
    for row, logprobs in score(policy, rows, tokens_per_batch=10_000, pad_id=0):
        row.logprobs = logprobs
    ratios = {}
    for row, logprobs in score(teacher, rows, tokens_per_batch=10_000, pad_id=0):
        ratios[row] = float(row.logprobs[0] - logprobs[0])
    clamp = sorted(map(abs, ratios.values()))[1] + 1e-3
    source = LiveTeacher(policy=teacher, sampled=True)
    (batch,) = micro_batches(rows, 10_000, 0, CPU, share_prompts=False)
    loss, figures = policy(batch, SampledDistillation(teacher=source, temperature=1.0, clamp=clamp))
    assert loss.item() == pytest.approx(sum(max(-clamp, min(clamp, ratio)) for ratio in ratios.values()), rel=1e-4)
    assert figures["clamped"].sum() == 2
    assert figures["kl"].sum().item() == pytest.approx(sum(ratios.values()), rel=1e-4)


def test_figures_do_not_depend_on_the_micro_batches():
    policy, teacher = Policy(tiny("qwen3"), VOCABULARY), freeze(Policy(tiny("llama", seed=7), VOCABULARY))
    rows = [replace(row, sample_index=index) for index, row in enumerate(ragged_rows())]
    objective = Distillation(teacher=LiveTeacher(policy=teacher), divergence=reverse_kl, temperature=1.0)

    def sums(budget: int) -> dict[str, float]:
        part = Part()
        for batch in micro_batches(rows, budget, 0, CPU, share_prompts=False):
            part.add(batch, *policy(batch, objective))
        return part.measured().sums

    whole = sums(10_000)
    assert sums(1) == pytest.approx(whole, rel=1e-4)
    lengths = [len(row.completion_ids) for row in rows]
    assert [whole[f"tokens_{third}"] for third in THIRDS] == [
        sum(3 * t // length == number for length in lengths for t in range(length)) for number in range(3)
    ]
    assert sum(whole[f"kl_{third}"] for third in THIRDS) == pytest.approx(whole["kl"], rel=1e-5)
    assert sum(lengths) / WATCH_EVERY - len(rows) < whole["watched"] < sum(lengths) / WATCH_EVERY + len(rows)
