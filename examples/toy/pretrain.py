"""Make the toy family: problems, a tokenizer, a teacher and a student, all from scratch.

    python examples/toy/pretrain.py --out toy
    python examples/toy/pretrain.py --out toy-1 --seed 1

The task is arithmetic on six digits, read from left to right, where `-` is the ABSOLUTE
difference: 7-1-5-6+4-5= has the running totals 6, 1, 5, 9, 4 and the answer 4. Nested absolute
values cannot be guessed without the steps. A solution has one of three styles, told by its
first token:

    direct   \\boxed{4}                   no totals
    terse    ,1,9,4\\n\\boxed{4}           every second total
    careful  =6=1=5=9=4\\n\\boxed{4}       every total

How the models come to be able to be careful and seldom are: ../pretraining.py. The numbers were tuned on the validation split only.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pretraining import SPECIAL, Recipe, Task, main

# The task
NUM_DIGITS = 6
OPERATORS = "+---"  # drawn evenly from these four
TOTAL_LIMIT = 20  # problems with a running total of 20 or more are rejected
NOISE_RATE = 0.03  # share of a pre-training solution's totals that are off
NOISE_RANGE = 9  # by at most so much, and then carried on
SPLITS = {"1H": 512, "2H": 512, "validation": 200, "test": 320}

# The tokens, in the order of their ids
TOKENS = [*SPECIAL, "\n", ",", "\\boxed", "{", "}", "+", "-", "*", "=", *map(str, range(TOTAL_LIMIT))]
PROMPT_TOKENS = 14  # <|user|>, six digits, five operators, =, <|assistant|>: 1 + 6 + 5 + 1 + 1
MAX_RESPONSE_TOKENS = 16  # a careful solution: five times = and a total, newline, \boxed { 4 }, end

STYLES = {"direct": "\\boxed", "terse": ",", "careful": "="}  # style: its first token

# Problems and solutions


def running_totals(problem: str, noise: random.Random | None = None) -> list[int]:
    """Return the five running totals of a problem such as `7-1-5-6+4-5=`; the last is its answer.

    With `noise` a total is now and then off, and the next ones follow from the wrong one.
    """
    total, totals = int(problem[0]), []
    for operator, digit in zip(problem[1:-1:2], problem[2:-1:2], strict=True):
        total = total + int(digit) if operator == "+" else abs(total - int(digit))
        if noise and noise.random() < NOISE_RATE:
            total += noise.randint(-NOISE_RANGE, NOISE_RANGE)
        if noise:
            total = min(max(total, 0), TOTAL_LIMIT - 1)
        totals.append(total)
    return totals


def draw_problem(rng: random.Random) -> str:
    while True:
        digits = [str(rng.randint(1, 9)) for _ in range(NUM_DIGITS)]
        operators = [rng.choice(OPERATORS) for _ in range(NUM_DIGITS - 1)]
        problem = digits[0] + "".join(o + d for o, d in zip(operators, digits[1:], strict=True)) + "="
        if max(running_totals(problem)) < TOTAL_LIMIT:
            return problem


def write_solution(totals: list[int], style: str) -> str:
    """Return the text of a solution, without the end token."""
    shown = {"direct": [], "terse": [*totals[1:-1:2], totals[-1]], "careful": totals}[style]
    steps = "".join(f"{STYLES[style]}{total}" for total in shown)
    return f"{steps}\n\\boxed{{{totals[-1]}}}" if steps else f"\\boxed{{{totals[-1]}}}"


TASK = Task(
    dataset="toy-arithmetic",
    tokens=TOKENS,
    token_pattern=r"\\boxed|1[0-9]|[0-9]|[\s\S]",
    prompt_tokens=PROMPT_TOKENS,
    max_response_tokens=MAX_RESPONSE_TOKENS,
    splits=SPLITS,
    styles=STYLES,
    best_style="careful",
    drawn={"direct": 0.10, "terse": 0.15, "careful": 0.75},
    wanted={"direct": 0.45, "terse": 0.40, "careful": 0.15},
    recipes={
        "teacher": Recipe(hidden_size=64, learning_rate=4e-3, decay_at=0.75, stop_at=1.0),
        "student": Recipe(hidden_size=32, learning_rate=5e-3, decay_at=0.32, stop_at=0.45),
    },
    draw_problem=draw_problem,
    identity=lambda problem: problem,
    answer=lambda problem: str(running_totals(problem)[-1]),
    solve=lambda problem, style, rng: write_solution(running_totals(problem, noise=rng), style),
    is_right=lambda text, problem: text.endswith(f"\\boxed{{{problem.answer}}}"),
)

if __name__ == "__main__":
    main(TASK)
