"""What objectives promise beyond the losses that they are made of."""

import torch
from tiny import VOCABULARY, tiny

from s2dcli.models.batching import Row, micro_batches
from s2dcli.models.policy import Policy, freeze, score
from s2dcli.train.objectives import Distillation, SampledDistillation

CPU = torch.device("cpu")
TEMPERATURE = 0.8


def gradient(policy: Policy, rows: list[Row], objective) -> torch.Tensor:
    policy.zero_grad()
    for batch in micro_batches(rows, range(len(rows)), 10_000, 0, CPU, share_prompts=False):
        policy(batch, objective(batch))[0].backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])


def test_the_mean_gradient_of_sampled_distillation_is_that_of_the_exact_kl():
    """Every possible next token once, weighted by the probability with which the sampler, another policy, draws it."""
    policy, sampler = Policy(tiny("qwen3"), VOCABULARY), freeze(Policy(tiny("qwen3", seed=3), VOCABULARY))
    teacher = freeze(Policy(tiny("llama", seed=7), VOCABULARY))
    rows = [Row([3, 4, 5], [token]) for token in range(VOCABULARY)]
    scoring = {"tokens_per_batch": 10_000, "pad_id": 0, "temperature": TEMPERATURE}
    teacher_R, sampler_R = score(teacher, rows, **scoring), score(sampler, rows, **scoring)
    drawn = {row: float(torch.tensor(logprobs[0]).exp()) for row, logprobs in enumerate(sampler_R)}
    assert abs(sum(drawn.values()) - 1.0) < 1e-5

    mean = gradient(policy, rows, SampledDistillation(teacher_R, sampler_R, drawn, TEMPERATURE))
    exact = gradient(policy, rows[:1], Distillation(teacher, {0: 1.0}, reverse=True, temperature=TEMPERATURE))
    assert (mean - exact).norm() <= 1e-4 * exact.norm()
