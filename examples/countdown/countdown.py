r"""The verifier of countdown problems: `--reward python:countdown:verify`, with this folder on PYTHONPATH.

A problem `3,5,2:16` asks for an expression with the value 16 in which each of the numbers 3, 5 and 2 stands once. Many are right:
the last \boxed{} of a completion is worked out, and not compared with the answer that the file of problems gives.
"""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

# What an expression may consist of; of everything else Python's parser never hears.
EXPRESSION = re.compile(r"[0-9+\-*/() ]+", re.ASCII)
# Characters; a right answer to three numbers below 100 takes 13. Longer ones could nest deeper than the parser can go.
LONGEST = 100
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
PROBLEM = re.compile(r"\d+(?:,\d+)*:\d+", re.ASCII)


def verify(completion: str, answer: str, record: dict) -> float | None:
    """Return 1.0 if the completion's last box reaches the problem's target, else 0.0; None if the prompt is no countdown problem."""
    problem = record["prompt"][-1]["content"]
    if not PROBLEM.fullmatch(problem):
        return None
    numbers, _, target = problem.partition(":")
    start = completion.rfind("\\boxed{")
    boxed, closed, _ = completion[start:].removeprefix("\\boxed{").partition("}")
    if start < 0 or not closed:
        return 0.0
    try:
        value, used = evaluate(boxed)
    except ValueError:
        return 0.0
    return float(value == int(target) and sorted(used) == sorted(map(int, numbers.split(","))))


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """Return the exact value of an expression of whole numbers, + - * / and brackets, and the numbers in it.

    Raises ValueError for everything else: signs, powers, division by zero, 2(3), 07.
    """
    if len(text) > LONGEST or not EXPRESSION.fullmatch(text) or "**" in text or "//" in text:
        raise ValueError(f"no expression: {text[:LONGEST]!r}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        used: list[int] = []
        return _value(tree, used), used
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"no expression: {text!r}") from error


def _value(node: ast.expr, used: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            used.append(number)
            return Fraction(number)
        case ast.BinOp(left, sign, right) if type(sign) in OPERATORS:
            return OPERATORS[type(sign)](_value(left, used), _value(right, used))
    raise ValueError(f"no expression: {type(node).__name__}")
