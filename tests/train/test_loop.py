"""Schedules and the order of items."""

import pytest

from s2dcli.assembly.order import Order
from s2dcli.options import Schedule
from s2dcli.train.loop import learning_rate


def rates(schedule: Schedule, steps: int, warmup: int = 0, floor: float = 0.0) -> list[float]:
    settings = {"lr": 2.0, "warmup_steps": warmup, "min_lr_ratio": floor, "schedule": schedule}
    return [learning_rate(step, steps, settings) for step in range(1, steps + 1)]


def test_schedules_by_hand():
    assert rates(Schedule.constant, 4, warmup=2) == [1.0, 2.0, 2.0, 2.0]
    assert rates(Schedule.linear, 4) == [2.0, 1.5, 1.0, 0.5]
    assert rates(Schedule.linear, 4, floor=0.5) == [2.0, 1.75, 1.5, 1.25]
    assert rates(Schedule.cosine, 3, warmup=1) == pytest.approx([2.0, 2.0, 1.0])


def test_every_pass_holds_every_item_once_across_step_borders():
    order = Order(10, 4, seed=3, steps=None, epochs=3)
    assert order.steps == 8
    drawn = [item for step in range(1, 9) for item in order.at(step)]
    assert len(drawn) == 30
    passes = [drawn[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1]
    assert len(order.at(8)) == 2


def test_order_is_a_function_of_seed_and_step():
    order, again, other = (Order(50, 8, seed=seed, steps=20, epochs=1) for seed in (1, 1, 2))
    assert [order.at(step) for step in (7, 3, 20)] == [again.at(step) for step in (7, 3, 20)]
    assert order.at(1) != other.at(1)
    assert all(len(order.at(step)) == 8 for step in range(1, 21))


def test_spares_are_what_the_step_does_not_hold_each_once():
    order = Order(10, 4, seed=3, steps=5, epochs=1)
    spares = list(order.spares(2))
    assert sorted([*spares, *order.at(2)]) == list(range(10))
    assert spares == list(order.spares(2)) != list(order.spares(3))
