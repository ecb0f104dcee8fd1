"""Advantages, weights and the clipped objective against values worked out by hand."""

import math

import pytest
import torch

from s2dcli.options import Advantage, Aggregate
from s2dcli.train.losses import clipped_policy_loss, group_advantages, is_mixed, k3, token_weights, weights_of


def test_group_advantages_by_hand():
    # mean 1/4, sample deviation sqrt((9/16 + 3/16) / 3) = 1/2
    assert group_advantages([1, 0, 0, 0], Advantage.group_std) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert group_advantages([1, 0, 0, 0], Advantage.group_mean) == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("kind", list(Advantage))
def test_constant_rewards_give_exactly_zero(kind):
    assert group_advantages([1.0] * 8, kind) == [0.0] * 8
    assert group_advantages([0.1 + 0.2, 0.3, 0.3], kind) == [0.0] * 3


def test_ungradable_samples_leave_mean_and_deviation_alone():
    with_null = group_advantages([1, None, 0, 0, 0, None], Advantage.group_std)
    without = group_advantages([1, 0, 0, 0], Advantage.group_std)
    assert [with_null[i] for i in (0, 2, 3, 4)] == without
    assert with_null[1] == with_null[5] == 0.0
    assert group_advantages([None, None], Advantage.group_std) == [0.0, 0.0]


def test_advantages_stay_bounded():
    for size in (2, 8, 64):
        largest = max(abs(value) for value in group_advantages([1.0] + [0.0] * (size - 1), Advantage.group_std))
        assert largest <= math.sqrt(size)


def test_is_mixed():
    assert is_mixed([0, 1, None])
    assert not is_mixed([1, None, 1])
    assert not is_mixed([None])


def test_token_weights_by_hand():
    assert token_weights([2, 6], Aggregate.token, 10) == [1 / 8, 1 / 8]
    assert token_weights([2, 6], Aggregate.sequence, 10) == [1 / 4, 1 / 12]
    assert token_weights([2, 6], Aggregate.constant, 10) == [1 / 20, 1 / 20]


def test_empty_completions_count_as_rows_but_weigh_nothing():
    assert token_weights([0, 4], Aggregate.sequence, 10) == [0.0, 1 / 8]
    assert token_weights([0, 0], Aggregate.token, 10) == [0.0, 0.0]


def test_rows_that_are_left_out_leave_the_denominators():
    assert weights_of([0, 2], [2, 9, 6], Aggregate.token, 10) == {0: 1 / 8, 2: 1 / 8}


def test_clipped_objective_by_hand():
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    new = old + torch.tensor([math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)])
    advantages, weights = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    loss, sums = clipped_policy_loss(new, old, advantages, weights, clip_low=0.2, clip_high=0.3)
    # min(1.5, 1.3) = 1.3; min(-1.5, -1.3) = -1.5; min(0.5, 0.8) = 0.5; min(-0.5, -0.8) = -0.8
    assert loss.item() == pytest.approx(-(0.1 * 1.3 + 0.2 * -1.5 + 0.3 * 0.5 + 0.4 * -0.8), abs=1e-6)
    assert sums["clipped"] == 2
    assert sums["ratio"].item() == pytest.approx(4.0, abs=1e-6)


def test_clipped_tokens_get_no_gradient():
    old = torch.zeros(2)
    new = torch.tensor([math.log(1.5), math.log(1.1)], requires_grad=True)
    clipped_policy_loss(new, old, torch.ones(2), torch.ones(2), 0.2, 0.2)[0].backward()
    assert new.grad[0] == 0
    assert new.grad[1].item() == pytest.approx(-1.1, abs=1e-6)


def test_k3_is_zero_only_at_equality_and_estimates_the_kl():
    policy, reference = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.2, 0.5, 0.3]).log()
    values = k3(policy, reference)
    assert (values > 0).all()
    assert k3(policy, policy).abs().sum() == 0
    exact = (policy.exp() * (policy - reference)).sum()
    # E_policy[exp(d) - d - 1] = KL since E_policy[exp(d)] = 1
    assert (policy.exp() * values).sum().item() == pytest.approx(exact.item(), abs=1e-6)
