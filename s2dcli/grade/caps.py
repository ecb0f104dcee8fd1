r"""What is refused before sympy sees it: answers whose size alone would cost seconds or gigabytes.

The limits are far above what an answer needs and far below what hurts; what slips through still
meets the worker's deadline and memory limit.
"""

from __future__ import annotations

import math
import re

MOST_CHARACTERS = 2000
MOST_DEPTH = 30  # nested brackets
MOST_DIGITS = 1000  # of one number
MOST_POWER_DIGITS = 5000  # of a numeric power
MOST_EXPONENT = 10_000  # also the upper end of a sum
MOST_FACTORIAL = 10_000  # also the upper number of a binomial coefficient
MOST_CELLS = 100  # of a matrix
MOST_REPLACEMENTS = 50

_DIGITS = re.compile(rf"\d{{{MOST_DIGITS + 1}}}")
_POWER = re.compile(r"(\d++(?:\.\d++)?)\s*+(?:\^|\*\*)\s*+(?:\{\s*+[-+]?(\d++)\s*+\}|\(\s*+[-+]?(\d++)\s*+\)|(\d++))")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*+[{(]?\s*+[-+]?\s*+(\d++)")
_FLOAT = re.compile(r"\d[eE][-+]?\d{5}")
_FACTORIAL = re.compile(r"(\d++)\s*+[})]*+\s*+!")
_REPEATED_FACTORIAL = re.compile(r"!\s*+[})]*+\s*+!")
_BINOMIAL = re.compile(r"\\(?:binom|choose)\s*+\{?\s*+(\d++)|(\d++)\s*+\\choose")


def _depth(text: str) -> int:
    depth = deepest = 0
    for mark in text:
        if mark in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif mark in ")]}":
            depth -= 1
    return deepest


def _power_is_huge(text: str) -> bool:
    """Whether a numeric power, or a tower of them, has too many digits: the innermost is worked out first."""
    for _ in range(MOST_REPLACEMENTS):
        match = _POWER.search(text)
        if not match:
            return False
        base = float(match[1]) if len(match[1]) < 300 else math.inf
        exponent = match[2] or match[3] or match[4]
        if len(exponent) > 6:
            return True
        digits = int(exponent) * abs(math.log10(base)) if base > 0 else 0.0
        if digits > MOST_POWER_DIGITS:
            return True
        value = str(int(base ** int(exponent))) if digits < 15 else "9" * math.ceil(digits)
        text = f"{text[: match.start()]}{value}{text[match.end() :]}"
    return True


def refusal(text: str) -> str:
    """Return why an answer is refused, "" if it is not."""
    if len(text) > MOST_CHARACTERS:
        return f"longer than {MOST_CHARACTERS} characters"
    if _depth(text) > MOST_DEPTH:
        return f"nested deeper than {MOST_DEPTH}"
    if _DIGITS.search(text):
        return f"a number of more than {MOST_DIGITS} digits"
    if "^" in text or "**" in text:
        if any(len(digits) > 6 or int(digits) > MOST_EXPONENT for digits in _EXPONENT.findall(text)):
            return f"an exponent or bound above {MOST_EXPONENT}"
        if _power_is_huge(text):
            return f"a power of more than {MOST_POWER_DIGITS} digits"
    if _FLOAT.search(text):
        return "a float out of range"
    if "!" in text and (_REPEATED_FACTORIAL.search(text) or any(len(n) > 6 or int(n) > MOST_FACTORIAL for n in _FACTORIAL.findall(text))):
        return f"a factorial above {MOST_FACTORIAL}"
    if any(len(n) > 6 or int(n) > MOST_FACTORIAL for pair in _BINOMIAL.findall(text) for n in pair if n):
        return f"a binomial coefficient above {MOST_FACTORIAL}"
    if text.count("&") > MOST_CELLS:
        return f"a matrix of more than {MOST_CELLS} cells"
    return ""
