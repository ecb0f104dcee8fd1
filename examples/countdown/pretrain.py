"""Make the countdown family: problems, a tokenizer, a teacher and a student, all from scratch.

    python examples/countdown/pretrain.py --out countdown
    python examples/countdown/pretrain.py --out countdown-1 --seed 1

A problem 3,5,2:16 asks for an expression with the value 16 in which 3, 5 and 2 stand once each. A solution has one of two styles,
told by its first token:

    direct   \\boxed{(3+5)*2}                                a guess
    search   ;-2+4;+8-6;+8*16\\n\\boxed{(3+5)*2}              attempts, until one has the value 16

An attempt takes the numbers in their order: +8*16 stands for 3+5=8, 8*2=16. Attempts come in random order, and none with a value
below 0 or beyond the vocabulary. The problems can all be solved so; whoever finds another expression is right too (countdown.py).
How the models come to be able to search and seldom do: ../pretraining.py. The numbers were tuned on the validation split only.
"""

from __future__ import annotations

import itertools
import operator
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import countdown
from pretraining import SPECIAL, Recipe, Task, main

# The task
LARGEST_NUMBER = 12
LARGEST_VALUE = 49  # of an attempt, and of each step to it
LONGEST_SEARCH = 6  # attempts; an order of them that takes longer is drawn again
SPLITS = {"1H": 512, "2H": 512, "validation": 200, "test": 320}

STYLES = {"direct": "\\boxed", "search": ";"}  # style: its first token
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
# The tokens, in the order of their ids
TOKENS = [*SPECIAL, "\n", ",", ":", ";", "\\boxed", "{", "}", "(", ")", *OPERATORS, *map(str, range(LARGEST_VALUE + 1))]


def read(problem: str) -> tuple[list[int], int]:
    """Return the numbers and the target of a problem such as `3,5,2:16`."""
    numbers, _, target = problem.partition(":")
    return [int(number) for number in numbers.split(",")], int(target)


def attempts(numbers: list[int]) -> list[tuple[str, int, str, int]]:
    """Return what a search may try, as ("+", 8, "*", 16) for 3, 5, 2: operators and values, from left to right."""
    first, second, third = numbers
    found = []
    for one, other in itertools.product(OPERATORS, repeat=2):
        step = OPERATORS[one](first, second)
        value = OPERATORS[other](step, third)
        if 0 <= step <= LARGEST_VALUE and 0 <= value <= LARGEST_VALUE:
            found.append((one, step, other, value))
    return found


def draw_problem(rng: random.Random) -> str:
    while True:
        numbers = [rng.randint(1, LARGEST_NUMBER) for _ in range(3)]
        target = rng.randint(1, LARGEST_VALUE)
        if any(value == target for *_, value in attempts(numbers)):
            return f"{','.join(map(str, numbers))}:{target}"


def solve(problem: str, style: str, rng: random.Random) -> str:
    """Return the text of a solution: of a search in random order, all attempts up to the first that works."""
    numbers, target = read(problem)
    order = attempts(numbers)
    tried = LONGEST_SEARCH + 1
    while tried > LONGEST_SEARCH:
        rng.shuffle(order)
        tried = 1 + next(index for index, (*_, value) in enumerate(order) if value == target)
    one, _, other, _ = order[tried - 1]
    box = f"\\boxed{{({numbers[0]}{one}{numbers[1]}){other}{numbers[2]}}}"
    if style == "direct":
        return box
    return "".join(f";{one}{step}{other}{value}" for one, step, other, value in order[:tried]) + f"\n{box}"


TASK = Task(
    dataset="countdown",
    tokens=TOKENS,
    token_pattern=r"\\boxed|[0-9]+|[\s\S]",
    prompt_tokens=9,  # <|user|>, three numbers, two commas, a colon, the target, <|assistant|>
    max_response_tokens=42,  # six attempts of ; + 8 * 16 each, newline, \boxed { ( 3 + 5 ) * 2 }, end: 30 + 1 + 10 + 1
    splits=SPLITS,
    styles=STYLES,
    best_style="search",
    drawn={"direct": 0.25, "search": 0.75},
    wanted={"direct": 0.85, "search": 0.15},
    recipes={
        "teacher": Recipe(hidden_size=64, learning_rate=4e-3, decay_at=0.60, stop_at=1.0),
        "student": Recipe(hidden_size=32, learning_rate=5e-3, decay_at=0.25, stop_at=0.40),
    },
    draw_problem=draw_problem,
    identity=lambda problem: (tuple(sorted(read(problem)[0])), read(problem)[1]),  # in whichever order its numbers stand
    answer=lambda problem: solve(problem, "direct", random.Random(problem)).removeprefix("\\boxed{").removesuffix("}"),
    solve=solve,
    is_right=lambda text, problem: countdown.verify(text, problem.answer, {"prompt": problem.prompt}) == 1.0,
)

if __name__ == "__main__":
    main(TASK)
