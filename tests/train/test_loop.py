"""Schedules and the order of items."""

import pytest

from s2dcli.assembly.order import Order
from s2dcli.options import Schedule, TrainingOptions
from s2dcli.train.loop import learning_rate


def rates(schedule: Schedule, steps: int, warmup: int = 0, floor: float = 0.0) -> list[float]:
    training = TrainingOptions(lr=2.0, warmup_steps=warmup, min_lr_ratio=floor, schedule=schedule)
    return [learning_rate(step, steps, training) for step in range(1, steps + 1)]


def test_schedules_by_hand():
    assert rates(Schedule.constant, 4, warmup=2) == [1.0, 2.0, 2.0, 2.0]
    assert rates(Schedule.linear, 4) == [2.0, 1.5, 1.0, 0.5]
    assert rates(Schedule.linear, 4, floor=0.5) == [2.0, 1.75, 1.5, 1.25]
    assert rates(Schedule.cosine, 3, warmup=1) == pytest.approx([2.0, 2.0, 1.0])


def test_every_pass_holds_every_item_once_across_step_borders():
    order = Order(10, 4, seed=3, steps=None, epochs=3)
    assert order.steps == 8
    drawn = [item for step in range(1, 9) for item in order.batch(step)]
    assert len(drawn) == 30
    passes = [drawn[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1]
    assert len(order.batch(8)) == 2


def test_order_is_a_function_of_seed_and_step():
    order, again, other = (Order(50, 8, seed=seed, steps=20, epochs=1) for seed in (1, 1, 2))
    assert [order.batch(step) for step in (7, 3, 20)] == [again.batch(step) for step in (7, 3, 20)]
    assert order.batch(1) != other.batch(1)
    assert all(len(order.batch(step)) == 8 for step in range(1, 21))


def test_extra_items_are_what_the_step_does_not_hold_each_once():
    order = Order(10, 4, seed=3, steps=5, epochs=1)
    extra = list(order.extra(2))
    assert sorted([*extra, *order.batch(2)]) == list(range(10))
    assert extra == list(order.extra(2)) != list(order.extra(3))
