r"""Sets of real numbers, whether written as intervals or as conditions.

`(-\infty,-2] \cup \{1\}`, `a \leq -2 \text{ or } a = 1`, `\{x \mid x \neq 2\}`, `\mathbb{R} \setminus \{2\}`, `|k| > 2`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from s2dcli.grade import estimate
from s2dcli.grade.normalise import bracketed, normalise, split

INFINITY = r"\infty"
MOST_PIECES = 12

_NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?: ?_ ?(?:\w|\{\w+\}))?")
_CONDITION = re.compile(r"[<>]|\\(?:[lgn]eq?|[lg]t|in|cup|setminus|backslash|infty)(?![A-Za-z])|\\mathbb ?\{?R|real")
_RELATION = re.compile(r"(<|>|\\[lgn]eq(?![A-Za-z])|\\[lg]t(?![A-Za-z])|=|\\in(?![A-Za-z]))")
_OR = re.compile(r"\\cup(?![A-Za-z])|\\lor(?![A-Za-z])|\\vee(?![A-Za-z])|,? ?\\text ?\{,? ?or,? ?\}|,? or ")
_BUILDER = re.compile(
    rf"\\\{{ ?({_NAME.pattern}) ?(?:\\in ?(?:\\mathbb ?\{{R\}}|\\mathbb R))? ?"
    r"(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|\||:) ?(.*)\\\}",
    re.DOTALL,
)
_MINUS = re.compile(r"(.*)(?:\\setminus|\\backslash)(?![A-Za-z]) ?(?:\\\{(.*)\\\}|(\{.*\}))", re.DOTALL)
_LINE = re.compile(r"\\mathbb ?(?:\{ ?R ?\}|R)|\\R|(?:\\text ?\{ ?)?(?:[Aa]ll |[Aa]ny )?real(?:s| numbers?)(?: ?\})?")
_POINTS = re.compile(r"\\\{(.*)\\\}", re.DOTALL)
_MODULUS = re.compile(r"\|(.+)\||\\[lr]?vert ?(.+?) ?\\[lr]?vert")
_FLIPPED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq", r"\lt": r"\gt", r"\gt": r"\lt"}


class Piece(NamedTuple):
    """An interval, or a point where both ends are the same."""

    low: str
    high: str
    closed_low: bool
    closed_high: bool


def is_condition(text: str) -> bool:
    """Whether a text is more than a pair of brackets: it has an inequality, a union, an infinity, the real line."""
    return bool(_CONDITION.search(text))


def same(gold: str, prediction: str, equal: Callable[[str, str], bool]) -> bool:
    """Whether both are sets of real numbers, made of the same pieces; `equal` compares their ends."""
    wanted, found = pieces(gold), pieces(prediction)
    if not wanted or not found or len(wanted) != len(found):
        return False

    def agree(one: Piece, other: Piece) -> bool:
        return one[2:] == other[2:] and all(a == b if INFINITY in a + b else equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))

    return all(agree(one, other) for one, other in zip(wanted, found, strict=True))


def pieces(text: str) -> list[Piece] | None:
    """Return the pieces of a set of real numbers from left to right, None if the text is none that is understood."""
    text = text.strip()
    if match := _BUILDER.fullmatch(text):
        text = match[2].strip()
    parts = [part.strip() for part in _OR.split(text)]
    if len(parts) > MOST_PIECES:
        return None
    found: list[Piece] = []
    for part in parts:
        some = _piece(part)
        if some is None:
            return None
        found += some
    ends = [_value(piece.low) for piece in found]
    if None in ends:  # ends in letters: the order is the writer's
        return found
    return [piece for _, piece in sorted(zip(ends, found, strict=True), key=lambda pair: pair[0])]


def _value(end: str) -> float | None:
    if INFINITY in end:
        return float("-inf") if end.startswith("-") else float("inf")
    return estimate.estimate(end) if not any(mark.isalpha() for mark in re.sub(r"\\[A-Za-z]+", "", end)) else None


def _end(text: str) -> str:
    text = normalise(text)
    return text.lstrip("+ ") if INFINITY in text else text


def _piece(text: str) -> list[Piece] | None:
    if match := _BUILDER.fullmatch(text):
        return pieces(match[2])
    if _LINE.fullmatch(text):
        return [Piece("-" + INFINITY, INFINITY, False, False)]
    if match := _MINUS.fullmatch(text):
        whole, points = _piece(match[1].strip()), [_end(point) for point in split(match[2] or match[3].strip("{}"))]
        if whole is None or len(whole) != 1:
            return None
        return _without(whole[0], points)
    if bracketed(text):
        ends = split(text[1:-1])
        if len(ends) != 2:
            return None
        return [Piece(_end(ends[0]), _end(ends[1]), text[0] == "[", text[-1] == "]")]
    if match := _POINTS.fullmatch(text):
        return [Piece(point, point, True, True) for point in map(_end, split(match[1]))]
    return _relation(text)


def _without(whole: Piece, points: list[str]) -> list[Piece] | None:
    values = [_value(point) for point in points]
    if None in values and len(points) > 1:
        return None
    if None not in values:
        points = [point for _, point in sorted(zip(values, points, strict=True))]
    lows, highs = [whole.low, *points], [*points, whole.high]
    return [
        Piece(low, high, whole.closed_low and n == 0, whole.closed_high and n == len(points))
        for n, (low, high) in enumerate(zip(lows, highs, strict=True))
    ]


def _relation(text: str) -> list[Piece] | None:
    tokens = [token.strip() for token in _RELATION.split(text)]
    if len(tokens) == 5:  # a < x < b
        low, left, name, right, high = tokens
        if left in (">", r"\geq", r"\gt"):
            low, left, right, high = high, _FLIPPED.get(right, ""), _FLIPPED.get(left, ""), low
        if not _NAME.fullmatch(name) or left not in ("<", r"\leq", r"\lt") or right not in ("<", r"\leq", r"\lt"):
            return None
        return [Piece(_end(low), _end(high), left == r"\leq", right == r"\leq")]
    if len(tokens) != 3:
        return None
    name, sign, bound = tokens
    if sign == r"\in":
        return pieces(bound) if _NAME.fullmatch(name) else None
    if not (_NAME.fullmatch(name) or _MODULUS.fullmatch(name)) and sign in _FLIPPED:
        name, sign, bound = bound, _FLIPPED[sign], name
    end = _end(bound)
    if match := _MODULUS.fullmatch(name):
        value = _value(end)
        if not _NAME.fullmatch((match[1] or match[2]).strip()) or value is None or value <= 0:
            return None
        negative = _end(f"-({end})" if any(mark in end for mark in "+-") else f"-{end}")
        closed = sign in (r"\leq", r"\geq")
        if sign in ("<", r"\lt", r"\leq"):
            return [Piece(negative, end, closed, closed)]
        if sign in (">", r"\gt", r"\geq"):
            return [Piece("-" + INFINITY, negative, False, closed), Piece(end, INFINITY, closed, False)]
        return None
    if not _NAME.fullmatch(name):
        return None
    if sign == "=":
        return [Piece(end, end, True, True)]
    if sign == r"\neq":
        return [Piece("-" + INFINITY, end, False, False), Piece(end, INFINITY, False, False)]
    if sign in ("<", r"\lt", r"\leq"):
        return [Piece("-" + INFINITY, end, False, sign == r"\leq")]
    return [Piece(end, INFINITY, sign == r"\geq", False)]
