r"""Answers that are more than one formula: named values, approximations, choices of several letters, stock phrases."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from s2dcli.grade.exact import Exact, read
from s2dcli.grade.normalise import normalise, split, words

CACHE = 4096  # answers
AND = re.compile(
    r"\s*,?\s*(?:\\(?:text|mbox|mathrm|textrm) ?\{[^{}]*?(?<![A-Za-z])(?:and|or),?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*"
)
NAME = r"(?:\|[A-Za-z]{1,3}\||[A-Za-z]{1,4}'*|\\[A-Za-z]+(?: ?[A-Z]{1,3})?)"

_ASSIGNMENT = re.compile(rf"({NAME})(?: ?_ ?(\w|\{{[^{{}}]*\}}))? ?= ?([^=<>]+)")
_NAMED_TUPLE = re.compile(rf"\( ?({NAME}(?: ?, ?{NAME})+) ?\) ?= ?([^=<>]+)")
_CHOICES = re.compile(r"\(?[A-H]\)?(?: ?(?:,|and|&)* ?\(?[A-H]\)?)+")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf) ?\{([^{}]*)\}")
_LETTER = re.compile(r"[A-H]")
_YES_OR_NO = re.compile(r"(yes|no|true|false) ?(?:[,.;:].*)?", re.DOTALL)
_PARAMETER = re.compile(r"(?<![A-Za-z\\])[klmn](?![A-Za-z])")
_NONE = re.compile(
    r"(?:there (?:is|are|exists?) )?no (?:(?:real|such|integer|valid|positive|other) )*"
    r"(?:solutions?|roots?|functions?|integers?|numbers?|values?|polynomials?|pairs?|triples?)(?: exists?)?"
    r"|(?:the )?empty ?set|none(?: exists?)?|(?:it )?do(?:es)? not exist|dne|emptyset|varnothing|"
)
_REALS = re.compile(r"(?:all|any|every) (?:reals?|real numbers?)(?: x| values?)?|mathbb r")
_INFINITE = re.compile(r"infinite(?:ly many)?(?: solutions)?|infinity|infty")
_NEGATED = re.compile(r"\b(?:not|no|never|none|neither|nor|without|only)\b|n't\b")
_NO_SUBJECT = re.compile(r"the|all|any|every|each|there|its|this|that|when|for|both|either")


Solutions = tuple[tuple[str, ...], list[list[str]]]


def solutions(text: str) -> Solutions | None:
    """Return the names and, for each solution, their values: `p=7,q=3;p=11,q=3` has two of p and q.

    Names that differ in a number below them only, `x_1=2,x_2=5`, are one name with several values. None for
    other texts, and for a single value.
    """
    if text.count("=") < 2:
        return _named_tuples(text)
    found = [_ASSIGNMENT.fullmatch(part.strip()) for part in split(AND.sub(",", text)) if part.strip()]
    if None in found or len(found) < 2:
        return _named_tuples(text)
    indices = [(match[2] or "").strip("{} ") for match in found]
    one_name = len({match[1] for match in found}) == 1 and all(not index or index.isdigit() for index in indices)
    rows: list[dict[str, str]] = [{}]
    for match, index in zip(found, indices, strict=True):
        name = match[1] if one_name else f"{match[1]}_{index}"
        if name in rows[-1]:
            rows.append({})
        rows[-1][name] = normalise(match[3])
    names = tuple(rows[0])
    if any(row.keys() != rows[0].keys() for row in rows):
        return None
    return tuple(name.rstrip("_") for name in names), [[row[name] for name in names] for row in rows]


def _named_tuples(text: str) -> Solutions | None:
    """Return the solutions that `(p,q)=(7,3),(11,3)` names."""
    match = _NAMED_TUPLE.fullmatch(text)
    if not match:
        return None
    names = tuple(name.strip() for name in match[1].split(","))
    rows = []
    for part in split(AND.sub(",", match[2])):
        part = part.strip()
        if not (part.startswith("(") and part.endswith(")")):
            return None
        rows.append([normalise(value) for value in split(part[1:-1])])
    return (names, rows) if all(len(row) == len(names) for row in rows) else None


def bare(given: Solutions, order: tuple[str, ...]) -> str:
    """Write solutions without their names, the values of each in the order of the names `order`."""
    names, rows = given
    at = [names.index(name) for name in order]
    if len(order) == 1:
        return ",".join(row[0] for row in rows)
    return ",".join(f"({','.join(row[place] for place in at)})" for row in rows)


def approximation(text: str) -> tuple[str, Exact] | None:
    r"""Cut `\frac{7}{9} \approx 0.78` into what is approximated and the decimal, None if it is something else."""
    sides = split(text.replace(r"\approx", "≈"), "≈")
    if len(sides) != 2 or len(split(AND.sub(",", text))) != 1:
        return None
    decimal = read(normalise(sides[1]))
    return (normalise(sides[0]), decimal) if decimal else None


@lru_cache(maxsize=CACHE)
def choices(text: str) -> tuple[bool, frozenset[str]] | None:
    """Return the letters of a choice of several, `ABD` or `A, B and D`, and whether anything stands between them."""
    plain = _TEXT_COMMAND.sub(r"\1", text).strip()
    if not _CHOICES.fullmatch(plain):
        return None
    letters = _LETTER.findall(plain)
    return not plain.isalpha(), frozenset(letters)


@lru_cache(maxsize=CACHE)
def phrase(text: str) -> str:
    """Return what a stock phrase means, "" if it is none: no solution, all real numbers, infinitely many, yes, no."""
    plain = words(text.replace(r"\(", " "))
    if _NONE.fullmatch(plain) and (plain or text.strip() in (r"\{\}", r"\{ \}")):
        return "none"
    if _REALS.fullmatch(plain):
        return "reals"
    if _INFINITE.fullmatch(plain) and not text.startswith("-"):
        return "infinite"
    match = _YES_OR_NO.fullmatch(_TEXT_COMMAND.sub(r"\1", text).strip().lower())
    return match[1] if match else ""


def sentence_says(gold: str, prediction: str) -> bool:
    """Whether one word is what a gold sentence says: its subject, `Petya receives the last token`, or what something `is`."""
    told, word = words(gold).split(), words(prediction)
    if len(told) < 3 or not word.isalpha() or len(word) < 3 or _NO_SUBJECT.fullmatch(word) or _NEGATED.search(" ".join(told)):
        return False
    return (word == told[0] and _TEXT_COMMAND.sub(r"\1", gold).strip()[:1].isupper()) or calls_it(gold, prediction)


def calls_it(sentence: str, word: str) -> bool:
    """Whether a sentence ends in `is WORD`, and denies nothing."""
    told = words(sentence).split()
    return len(told) > 2 and told[-1] == words(word) and told[-2] in ("is", "are") and not _NEGATED.search(" ".join(told))


def same_ratio(gold: str, prediction: str, equal: Callable[[str, str], bool]) -> bool:
    """Whether two ratios of several numbers, `1:2:3`, are the same: number by number, or in proportion."""
    wanted, found = ([normalise(part) for part in text.split(":")] for text in (gold, prediction))
    numbers, others = ([read(part) for part in side] for side in (wanted, found))
    if None in numbers or None in others or not numbers[0].value or not others[0].value:
        return all(equal(a, b) for a, b in zip(wanted, found, strict=True))
    return all(a.value * others[0].value == b.value * numbers[0].value for a, b in zip(numbers, others, strict=True))


def same_parameter(gold: str, prediction: str) -> str:
    r"""Return the prediction with its whole-number parameter named as in the gold answer: `n\pi` for `k\pi`; "" if there is none."""
    turns = all(r"\pi" in text or r"\circ" in text for text in (gold, prediction))
    names, others = (set(_PARAMETER.findall(text)) for text in (gold, prediction))
    if not turns or len(names) != 1 or len(others) != 1 or names == others:
        return ""
    return _PARAMETER.sub(names.pop(), prediction)
