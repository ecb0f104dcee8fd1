"""What objectives promise beyond the losses that they are made of."""

import torch
from tiny import VOCABULARY, tiny, training_row

from s2dcli.models.batching import micro_batches
from s2dcli.models.policy import Policy, freeze
from s2dcli.models.rows import Row
from s2dcli.models.scoring import score
from s2dcli.train.objectives import Distillation, SampledDistillation
from s2dcli.train.teachers import LiveTeacher, ScoredRows
from s2dcli.train.vocab import reverse_kl

CPU = torch.device("cpu")
TEMPERATURE = 0.8


def gradient(policy: Policy, rows: list[Row], objective) -> torch.Tensor:
    policy.zero_grad()
    for batch in micro_batches(rows, 10_000, 0, CPU, share_prompts=False):
        policy(batch, objective)[0].backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])


def test_the_mean_gradient_of_sampled_distillation_is_that_of_the_exact_kl():
    """Every possible next token once, weighted by the probability with which the sampler, another policy, draws it."""
    policy, sampler = Policy(tiny("qwen3"), VOCABULARY), freeze(Policy(tiny("qwen3", seed=3), VOCABULARY))
    teacher = freeze(Policy(tiny("llama", seed=7), VOCABULARY))
    rows = [training_row([3, 4, 5], [token]) for token in range(VOCABULARY)]
    scoring = {"tokens_per_batch": 10_000, "pad_id": 0, "temperature": TEMPERATURE}
    for row, logprobs in score(teacher, rows, **scoring):
        row.teacher_logprobs = logprobs
    for row, logprobs in score(sampler, rows, **scoring):
        row.logprobs, row.weight = logprobs, float(torch.tensor(logprobs[0]).exp())
    assert abs(sum(row.weight for row in rows) - 1.0) < 1e-5

    mean = gradient(policy, rows, SampledDistillation(teacher=ScoredRows(), temperature=TEMPERATURE))
    rows[0].weight = 1.0
    live = LiveTeacher(policy=teacher, temperature=TEMPERATURE)
    exact = gradient(policy, rows[:1], Distillation(teacher=live, divergence=reverse_kl, temperature=TEMPERATURE))
    assert (mean - exact).norm() <= 1e-4 * exact.norm()
