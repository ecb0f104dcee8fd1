r"""The rewards that a row can be given, and how they are named on the command line.

    math                            1.0 if the answer is mathematically the gold answer, else 0.0
    math:strict                     the same, but a number must be given as a number: `123 \cdot 456` is not 56088
    exact                           1.0 if it is the gold answer letter by letter, else 0.0
    python:MODULE:FUNCTION          what FUNCTION(completion, answer, record) returns

Each may be followed by `=WEIGHT` (1 if absent); the reward of a row is the weighted sum. A
user's function gets the completion's text, the gold answer and the whole record, and returns a
number, a bool, or None where it cannot judge.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from s2dcli.errors import UsageError, nearest

MATH = "math"
MATH_STRICT = "math:strict"
EXACT = "exact"
PYTHON = "python"
BUILT_IN = (MATH, MATH_STRICT, EXACT)


@dataclass(frozen=True, slots=True)
class Reward:
    """One reward: its name (the specification without the weight) and its weight in the sum."""

    name: str
    weight: float = 1.0

    @property
    def built_in(self) -> bool:
        return self.name in BUILT_IN


def parse(specification: str) -> Reward:
    """Return the reward that `math`, `exact=0.5` or `python:my.module:function=2` stands for."""
    name, separator, number = specification.partition("=")
    name = name.strip()
    try:
        weight = float(number) if separator else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(f"the weight of a reward is a number, not {number!r}", where=f"--reward {specification}")
    kind, *rest = name.split(":")
    if kind == PYTHON:
        if len(rest) != 2 or not all(rest):
            raise UsageError("a function is named python:MODULE:FUNCTION", where=f"--reward {specification}")
    elif name not in BUILT_IN:
        raise UsageError(
            f"unknown reward {name!r}{nearest(name, BUILT_IN)}",
            where=f"--reward {specification}",
            hint="there are math, math:strict, exact and python:MODULE:FUNCTION",
        )
    return Reward(name, weight)


def parse_all(specifications: list[str]) -> list[Reward]:
    """Return the rewards of a command line. Raises UsageError if one is named twice or none is named."""
    rewards = [parse(specification) for specification in specifications]
    if not rewards:
        raise UsageError("at least one reward is needed", hint="--reward math")
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"reward {name!r} is given twice", hint="one --reward with the sum of the weights")
    return rewards


def load(name: str) -> Callable[[str, str, dict], Any]:
    """Return the user's function that `python:MODULE:FUNCTION` names. Raises ImportError."""
    _, module_name, function_name = name.split(":")
    function = getattr(importlib.import_module(module_name), function_name, None)
    if function is None:
        raise ImportError(f"module {module_name!r} has no function {function_name!r}")
    if not callable(function):
        raise ImportError(f"{module_name}:{function_name} is a {type(function).__name__}, not a function")
    return function


def score_of(value: Any) -> float | None:
    """Return what a user's function answered as a float, or None. Raises TypeError or ValueError."""
    if value is None:
        return None
    score = float(value)
    if not math.isfinite(score):
        raise ValueError(f"returned {score}")
    return score
