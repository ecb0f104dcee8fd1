"""Which items a step sees: a pure function of (seed, step), so that any step can be found again."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

EXTRA_STREAM = 1  # keeps the random numbers of extra items apart from those of the passes


class Order:
    """Shuffled passes over `count` items, one after the other, cut into steps of `per_step` items.

    A step may reach across the end of a pass, so no item is skipped there and none comes early. With
    `steps` None there are `epochs` whole passes, and the last step holds what is left of them.
    """

    def __init__(self, count: int, per_step: int, *, seed: int, steps: int | None, epochs: int) -> None:
        self.count = count
        self.per_step = per_step
        self.seed = seed
        self.steps = steps or math.ceil(count * epochs / per_step)
        self.total = self.steps * per_step if steps else count * epochs
        self._shuffled: dict[int, np.ndarray] = {}  # the pass in use, by its number

    def batch(self, step: int) -> list[int]:
        """Return the items of a step (from 1)."""
        first = (step - 1) * self.per_step
        positions = range(first, min(first + self.per_step, self.total))
        return [int(self._pass(position // self.count)[position % self.count]) for position in positions]

    def extra(self, step: int) -> Iterator[int]:
        """Yield the items that a step does not hold, in an order of the step's own, each once."""
        taken = set(self.batch(step))
        for item in np.random.default_rng([self.seed, step, EXTRA_STREAM]).permutation(self.count):
            if int(item) not in taken:
                yield int(item)

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._shuffled:
            self._shuffled = {number: np.random.default_rng([self.seed, number]).permutation(self.count)}
        return self._shuffled[number]
