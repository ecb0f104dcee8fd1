r"""Rational numbers, read exactly: integers, decimals, fractions, mixed numbers, powers of ten, percent.

Two answers that are both rational are decided here, without sympy and without rounding.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MOST_DIGITS = 1000  # of one number; longer ones are compared as text
MOST_POWER = 400  # of ten
LEAST_DIGITS = 3  # significant digits from which a decimal gold answer may be a rounded one
FLOAT_DIGITS = 15  # significant digits that a float has
FLOAT_ERROR = Fraction(1, 10**15)  # relative
LONG_DIGITS = 10  # significant digits from which a decimal answer may be a fraction worked out by a calculator

_UNSIGNED = r"(?:\d++(?:\.\d*+)?|\.\d++)"
_NUMBER = re.compile(rf"([-+]?) ?({_UNSIGNED})")
_FRACTION = re.compile(
    rf"([-+]?) ?(?:(\d++) ?)?\\frac ?(?:\{{ ?([-+]?) ?({_UNSIGNED}) ?\}}|(\d)) ?(?:\{{ ?([-+]?) ?({_UNSIGNED}) ?\}}|(\d))"
)
_SLASH = re.compile(rf"([-+]?) ?({_UNSIGNED}) ?[/:] ?(?:\( ?)?([-+]?) ?({_UNSIGNED})(?: ?\))?")
_MIXED_SLASH = re.compile(r"([-+]?) ?(\d++) (\d++)/(\d++)")
_SCIENTIFIC = re.compile(rf"([-+]?) ?({_UNSIGNED}) ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{{ ?([-+]?\d++) ?\}}|\(([-+]?\d++)\)|(\d))")
_EXPONENT = re.compile(rf"([-+]?) ?({_UNSIGNED})[eE]([-+]?\d++)")
_PERCENT = re.compile(r" ?(?:\\?%|percent|pct)$| ?\\(?:text|mathrm|mbox) ?\{ ?(?:\\?%|percent|pct|percentage) ?\}$")
_DEGREES = re.compile(r" ?\^ ?(?:\\circ|\{ ?\\circ ?\})(?: ?C| ?F)?$| ?\\degree$")
_UNIT = re.compile(r" ?\\(?:text|mbox|mathrm|textrm|rm|mathit|operatorname)(?:bf|it|rm)? ?\{[^{}\d]*\}(?: ?\^ ?(?:\d|\{ ?-?\d ?\}))?$")
_WORD_UNIT = (
    r"(?:(?:square|cubic|sq) )?(?:[kcm]m|[mk]g|lb|oz|ft|in|mi|yd|mph|kph|ml|sec|min|hr|(?:kilo|centi|milli)?met(?:er|re)|(?:kilo)?gram"
    r"|inch|inche|feet|foot|mile|yard|second|minute|hour|day|week|month|year|dollar|cent|unit|degree|radian|lit(?:er|re)|point|people)s?"
)
_PLAIN_UNIT = re.compile(
    rf" ?(?<![A-Za-z]){_WORD_UNIT}(?: ?(?:/|per) ?(?:{_WORD_UNIT}|[hs]))?(?: ?\^ ?(?:\d|\{{ ?-?\d ?\}}))?$|(?<=\d) m/s$"
)
_CURRENCY = re.compile(r"^([-+]?) ?(?:\\?\$|[€£¥₹]|\\(?:text|mathrm) ?\{ ?(?:\\?\$|USD) ?\}) ?(?=[\d.])")


class Exact(NamedTuple):
    """A rational number and how it was written."""

    value: Fraction
    percent: bool
    decimals: int  # digits after the point of a plain decimal, -1 for other notations
    digits: int  # significant digits of a plain decimal
    text: str  # without unit and signs of percent, degree and currency


def _sign(mark: str | None) -> int:
    return -1 if mark == "-" else 1


def _unsigned(text: str) -> Fraction:
    return Fraction("0" + text if text.startswith(".") else text.rstrip(".") if text.endswith(".") else text)


def read(text: str) -> Exact | None:
    """Return the rational number that a normalised answer is, None if it is something else.

    A unit in `\\text{...}`, a currency sign and a degree sign are passed over.
    """
    if not any("0" <= mark <= "9" for mark in text[:12]) and not text.startswith(("\\frac", "-\\frac", "+\\frac", "\\$", "\\text")):
        return None
    if len(text) > 2 * MOST_DIGITS + 40:
        return None
    bare = _UNIT.sub("", text).rstrip()
    percent = bool(_PERCENT.search(bare)) or bool(_PERCENT.search(text))
    bare = _PERCENT.sub("", bare if not _PERCENT.search(text) else text)
    bare = _DEGREES.sub("", bare)
    bare = _PLAIN_UNIT.sub("", bare) if bare[-1:].isalpha() or "^" in bare else bare
    bare = _CURRENCY.sub(r"\1", bare).strip()
    plain = _NUMBER.fullmatch(bare)
    if plain:
        if len(plain[2]) > MOST_DIGITS:
            return None
        decimals = len(plain[2].partition(".")[2]) if "." in plain[2] else -1
        digits = len(plain[2].replace(".", "").lstrip("0"))
        return Exact(_sign(plain[1]) * _unsigned(plain[2]), percent, decimals, digits, bare)
    value = _compound(bare)
    return None if value is None else Exact(value, percent, -1, 0, bare)


def _compound(text: str) -> Fraction | None:
    if match := _FRACTION.fullmatch(text):
        sign, whole, sign_above, above, above_digit, sign_below, below, below_digit = match.groups()
        numerator = _sign(sign_above) * _unsigned(above or above_digit)
        denominator = _sign(sign_below) * _unsigned(below or below_digit)
        if denominator == 0 or (whole and (sign_above or sign_below)):
            return None
        return _sign(sign) * (Fraction(whole or 0) + numerator / denominator)
    if match := _MIXED_SLASH.fullmatch(text):
        sign, whole, above, below = match.groups()
        return _sign(sign) * (Fraction(whole) + Fraction(above) / Fraction(below)) if int(below) else None
    if match := _SLASH.fullmatch(text):
        sign, above, sign_below, below = match.groups()
        denominator = _sign(sign_below) * _unsigned(below)
        return _sign(sign) * _unsigned(above) / denominator if denominator else None
    if match := _SCIENTIFIC.fullmatch(text):
        return _power(match[1], match[2], match[3] or match[4] or match[5])
    if match := _EXPONENT.fullmatch(text):
        return _power(match[1], match[2], match[3])
    return None


def _power(sign: str, mantissa: str, exponent: str) -> Fraction | None:
    if len(exponent) > 5 or abs(int(exponent)) > MOST_POWER or len(mantissa) > MOST_DIGITS:
        return None
    return _sign(sign) * _unsigned(mantissa) * Fraction(10) ** int(exponent)


def equal(gold: Exact, prediction: Exact) -> bool:
    """Whether two rationals are the same answer.

    A percentage on one side only may be meant as `28` or as `0.28`. A gold answer that is a
    decimal of at least three significant digits is taken for a rounded one when the prediction is
    a fraction or a long decimal: 21.93 for 307/14. A long decimal is also the fraction that it is
    the value of, to its last digit: 0.1428571428571429 for 1/7.
    """
    values = {prediction.value}
    if gold.percent != prediction.percent:
        values |= {prediction.value / 100} if prediction.percent else {prediction.value * 100}
    if gold.value in values:
        return True
    if may_be_rounded(gold) and any(rounds_to(value, gold) for value in values):
        return prediction.digits >= LONG_DIGITS if prediction.decimals >= 0 else prediction.value.denominator > 1
    return _is_long_form(prediction, gold.value) if gold.decimals < 0 else _is_long_form(gold, prediction.value)


def _is_long_form(decimal: Exact, value: Fraction) -> bool:
    """Whether a long decimal is a fraction that was worked out: rounded or cut off, or off by a float's last bit."""
    if decimal.decimals < 0 or decimal.digits < LONG_DIGITS or value.denominator == 1:
        return False
    difference = abs(decimal.value - value)
    return difference * 10**decimal.decimals < 1 or (decimal.digits >= FLOAT_DIGITS and difference <= abs(value) * FLOAT_ERROR)


def may_be_rounded(gold: Exact) -> bool:
    """Whether a gold answer is a decimal of so many digits that it may be the rounded value of a formula."""
    return gold.decimals > 0 and gold.digits >= LEAST_DIGITS


def rounds_to(value: Fraction, gold: Exact) -> bool:
    """Whether `value`, rounded to as many decimals as the gold answer has, is the gold answer."""
    return abs(value - gold.value) * 2 * 10**gold.decimals <= 1
