r"""A floating-point value of a formula, to tell plainly different answers apart without sympy.

A small strict grammar: numbers, letters, `\pi`, `+ - * / ^`, `\cdot`, `\times`, `\frac`, `\sqrt`, brackets.
Letters get fixed values, so that two formulas in the same letters that differ here differ. What
the grammar leaves open (functions, subscripts, mixed numbers, `1/2x`, units) has no value here, and
equality is never concluded from one.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

PLAIN_DIFFERENCE = 1e-4  # relative above 1, absolute below: far more than math-verify's six decimals
MOST_CHARACTERS = 200
CACHE = 4096

_TOKEN = re.compile(r" *(\d+\.?\d*|\.\d+|\\[A-Za-z]+|[A-Za-z]|[-+*/^(){}\[\]])")
_STARTS_FACTOR = re.compile(r"[A-Za-z({\\]")
_AMBIGUOUS_LETTERS = frozenset("deiEDI")  # differentials, Euler's number, the imaginary unit
_UNIT_AT_END = re.compile(r"[A-Za-z] *$")


class _Unreadable(Exception):
    """The text is not in the grammar."""


class _Reader:
    """One pass over the tokens of a formula, by recursive descent."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        self.at = 0
        end = 0
        while end < len(text):
            match = _TOKEN.match(text, end)
            if not match:
                raise _Unreadable
            self.tokens.append(match[1])
            end = match.end()
        self.tokens.append("")

    def take(self, expected: str = "") -> str:
        token = self.tokens[self.at]
        if expected and token != expected:
            raise _Unreadable
        self.at += 1
        return token

    @property
    def next(self) -> str:
        return self.tokens[self.at]

    def sum(self) -> float:
        sign = -1.0 if self.next == "-" else 1.0
        if self.next in ("+", "-"):
            self.take()
        total = sign * self.product()
        while self.next in ("+", "-"):
            total += self.product() if self.take() == "+" else -self.product()
        return total

    def product(self) -> float:
        value = self.power()
        divided = False
        while True:
            token = self.next
            if token in (r"\cdot", r"\times", "*"):
                self.take()
                value *= self.power()
            elif token in ("/", r"\div"):
                self.take()
                value /= self.power()
                divided = True
            elif token and (token == r"\frac" or token in (r"\sqrt", r"\pi") or _STARTS_FACTOR.fullmatch(token)):
                if divided or (token == r"\frac" and self.tokens[self.at - 1][0].isdigit()):
                    raise _Unreadable  # 1/2x, and 2\frac12 which may be mixed
                value *= self.power()
            else:
                return value

    def power(self) -> float:
        base = self.atom()
        if self.next != "^":
            return base
        self.take()
        if self.next and self.next[0].isdigit() and len(self.next) > 1:
            raise _Unreadable  # x^12 is x^1 times 2 in LaTeX, and meant otherwise
        exponent = self.atom()
        if self.next == "^":
            raise _Unreadable
        return math.pow(base, exponent)

    def atom(self) -> float:
        token = self.take()
        if token and (token[0].isdigit() or token[0] == "."):
            return float(token)
        if token in ("(", "{"):
            value = self.sum()
            self.take(")" if token == "(" else "}")
            return value
        if token == r"\pi":
            return math.pi
        if token == "e":
            return math.e
        if token == r"\sqrt":
            return self.root()
        if token == r"\frac":
            return self.argument() / self.argument()
        if len(token) == 1 and token.isalpha() and token not in _AMBIGUOUS_LETTERS:
            return 1.2 + math.sqrt(ord(token.lower()) - 90)  # math-verify knows no capitals
        raise _Unreadable

    def root(self) -> float:
        degree = 2.0
        if self.next == "[":
            self.take()
            degree = self.sum()
            self.take("]")
        radicand = self.argument()
        return math.pow(radicand, 1 / degree)

    def argument(self) -> float:
        """Read `{...}`, or the one digit that TeX takes as an argument."""
        if self.next == "{":
            return self.atom()
        token = self.next
        if not token or not token.isdigit():
            raise _Unreadable
        self.tokens[self.at] = token[1:]
        if len(token) == 1:
            self.at += 1
        return float(token[0])


@lru_cache(maxsize=CACHE)
def estimate(text: str) -> float | None:
    """Return the value of a normalised answer with fixed values for its letters, None if it has none."""
    if len(text) > MOST_CHARACTERS:
        return None
    try:
        reader = _Reader(text)
        value = reader.sum()
    except (_Unreadable, ArithmeticError, ValueError, RecursionError):
        return None
    return value if reader.at == len(reader.tokens) - 1 and math.isfinite(value) else None


def differ(gold: str, prediction: str) -> bool:
    """Whether two normalised answers plainly have different values."""
    letters, others = (_letters(text) for text in (gold, prediction))
    if letters != others and ((letters and others) or any(_UNIT_AT_END.search(text) for text in (gold, prediction))):
        return False  # a unit, or names that math-verify compares its own way
    a, b = estimate(gold), estimate(prediction)
    return a is not None and b is not None and abs(a - b) > PLAIN_DIFFERENCE * max(1.0, abs(a), abs(b))


_COMMAND = re.compile(r"\\[A-Za-z]+")


def _letters(text: str) -> frozenset[str]:
    return frozenset(mark for mark in _COMMAND.sub("", text).lower() if mark.isalpha() and mark != "e")
