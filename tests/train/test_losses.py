"""Advantages, weights and the clipped objective against values worked out by hand."""

import math
import random

import numpy as np
import pytest
import torch
from tiny import training_row

from s2dcli.options import Advantage, Aggregate, Correction, CorrectionLevel, KlEstimator, Surrogate
from s2dcli.train.advantages import group_advantages, is_mixed, overlong_penalty, token_weights
from s2dcli.train.losses import importance_weights, kl_estimate, kl_estimates, mean_log_ratio, policy_loss
from s2dcli.train.rows import set_weights


def test_group_advantages_by_hand():
    # mean 1/4, sample deviation sqrt((9/16 + 3/16) / 3) = 1/2
    assert group_advantages([1, 0, 0, 0], Advantage.group_std) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert group_advantages([1, 0, 0, 0], Advantage.group_mean) == [0.75, -0.25, -0.25, -0.25]


def test_without_a_baseline_the_advantage_is_the_reward():
    assert group_advantages([-1.0, -1.0, None, 0.25], Advantage.reward) == [-1.0, -1.0, 0.0, 0.25]


@pytest.mark.parametrize("kind", [Advantage.group_std, Advantage.group_mean])
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
    rows = [training_row([3], [4] * length) for length in (2, 9, 6)]
    set_weights(rows[::2], Aggregate.token, 10)
    assert [row.weight for row in rows] == [1 / 8, 1.0, 1 / 8]


OLD = torch.tensor([-1.0, -1.0, -1.0, -1.0])
NEW = OLD + torch.tensor([math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)])
ADVANTAGES, WEIGHTS = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])


def test_ppo_surrogate_by_hand():
    loss, sums = policy_loss(NEW, OLD, ADVANTAGES, WEIGHTS, clip_low=0.2, clip_high=0.3)
    # min(1.5, 1.3) = 1.3; min(-1.5, -1.3) = -1.5; min(0.5, 0.8) = 0.5; min(-0.5, -0.8) = -0.8
    assert loss.item() == pytest.approx(-(0.1 * 1.3 + 0.2 * -1.5 + 0.3 * 0.5 + 0.4 * -0.8), abs=1e-6)
    assert sums["clip_fraction"].sum() == 2
    assert sums["ratio"].sum().item() == pytest.approx(4.0, abs=1e-6)


def test_clipped_tokens_get_no_gradient_from_ppo_and_a_truncated_one_from_cispo():
    new = torch.tensor([math.log(1.5), math.log(1.1)], requires_grad=True)
    inputs = (torch.zeros(2), torch.ones(2), torch.ones(2))
    policy_loss(new, *inputs, clip_low=0.2, clip_high=0.2)[0].backward()
    assert new.grad.tolist() == pytest.approx([0.0, -1.1], abs=1e-6)
    new.grad = None
    loss, sums = policy_loss(new, *inputs, clip_low=1.0, clip_high=0.2, surrogate=Surrogate.cispo)
    loss.backward()
    assert new.grad.tolist() == pytest.approx([-1.2, -1.1], abs=1e-6)
    assert sums["clip_fraction"].sum() == 1


def test_sequence_ratio_has_the_sequences_value_and_each_tokens_gradient():
    new = NEW.clone().requires_grad_()
    log_ratio = torch.tensor(0.05)
    loss, _ = policy_loss(new, OLD, torch.ones(4), WEIGHTS, clip_low=0.2, clip_high=0.2, sequence_log_ratios_N=log_ratio.expand(4))
    loss.backward()
    assert loss.item() == pytest.approx(-math.exp(0.05), abs=1e-6)
    assert new.grad.tolist() == pytest.approx((-math.exp(0.05) * WEIGHTS).tolist(), abs=1e-6)
    # beyond the bounds the whole sequence is clipped
    loss, sums = policy_loss(NEW, OLD, torch.ones(4), WEIGHTS, clip_low=3e-4, clip_high=4e-4, sequence_log_ratios_N=log_ratio.expand(4))
    assert loss.item() == pytest.approx(-1.0004, abs=1e-6)
    assert sums["clip_fraction"].sum() == 4


def test_a_sequences_ratio_is_the_mean_of_logs_and_does_not_grow_with_length():
    draw = random.Random(0)
    gaps = {}
    for length in (10, 1000):
        old = np.array([draw.uniform(-3, 0) for _ in range(length)])
        gaps[length] = mean_log_ratio(np.array([value + 0.01 + draw.gauss(0, 0.05) for value in old]), old)
    assert gaps[10] == pytest.approx(0.01, abs=0.05)
    assert gaps[1000] == pytest.approx(0.01, abs=0.005)
    assert mean_log_ratio(np.zeros(0), np.zeros(0)) == 0.0
    with pytest.raises(ValueError, match="1 and 0 log-probs"):
        mean_log_ratio(np.ones(1), np.zeros(0))


def test_importance_weights_by_hand():
    trainer, sampler = np.log([0.6, 0.1]), np.log([0.2, 0.4])
    for ours, theirs, cut, kept in [(trainer, sampler, [2.0, 0.25], [0.0, 0.0]), (np.zeros(0), np.zeros(0), [], [])]:
        assert importance_weights(ours, theirs, Correction.truncate, CorrectionLevel.token, cap=2.0).tolist() == pytest.approx(cut)
        assert importance_weights(ours, theirs, Correction.mask, CorrectionLevel.token, cap=2.0).tolist() == kept
    mean = importance_weights(trainer, sampler, Correction.mask, CorrectionLevel.sequence_mean, cap=2.0)
    assert mean.tolist() == pytest.approx([math.sqrt(0.75)] * 2)
    total = importance_weights(trainer, sampler, Correction.mask, CorrectionLevel.sequence_sum, cap=2.0)
    assert total.tolist() == pytest.approx([0.75] * 2)
    both = importance_weights(trainer, sampler, Correction.truncate, CorrectionLevel.token, 2.0, 0.5)
    assert both.tolist() == pytest.approx([2.0, 0.5])
    # IcePop's two bounds: 3 and 0.25 against [0.2, 5] and [0.5, 5]
    for floor, kept in ((0.2, [3.0, 0.25]), (0.5, [3.0, 0.0])):
        assert importance_weights(trainer, sampler, Correction.mask, CorrectionLevel.token, 5.0, floor).tolist() == pytest.approx(kept)


def test_a_group_without_mixed_outcomes_has_no_advantages_whatever_noise_its_rewards_carry():
    noisy = [1.0 - 1e-4 * i for i in range(4)]
    assert group_advantages(noisy, Advantage.group_std) != [0.0] * 4
    assert group_advantages(noisy, Advantage.group_std, [1.0] * 4) == [0.0] * 4
    assert group_advantages([0.9, -0.1], Advantage.group_mean, [1.0, 0.0]) == [0.5, -0.5]


def test_kl_estimators_estimate_the_kl():
    policy, reference = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.2, 0.5, 0.3]).log()
    exact = (policy.exp() * (policy - reference)).sum().item()
    values = {kind: kl_estimate(kind, policy, reference) for kind in KlEstimator}
    for kind in (KlEstimator.k1, KlEstimator.k3):  # unbiased, since E_policy[exp(d)] = 1
        assert (policy.exp() * values[kind]).sum().item() == pytest.approx(exact, abs=1e-6)
    assert values[KlEstimator.k2].tolist() == pytest.approx((0.5 * (policy - reference) ** 2).tolist())
    assert (values[KlEstimator.k3] > 0).all()
    for kind in KlEstimator:
        assert kl_estimate(kind, policy, policy).abs().sum() == 0
        assert kl_estimates(kind, policy.numpy(), reference.numpy()).tolist() == pytest.approx(values[kind].tolist(), abs=1e-6)


def test_overlong_penalty_falls_over_the_buffer():
    assert [overlong_penalty(length, 100, 20) for length in (50, 80, 90, 100)] == [0.0, 0.0, -0.5, -1.0]
