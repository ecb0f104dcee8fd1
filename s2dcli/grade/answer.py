r"""What is right: the verdict on one completion against one gold answer.

The gold answer comes first. It is normalised and understood, as an exact number, a choice letter,
words, or what math-verify can parse; only then is the completion looked at, so that whatever goes
wrong from there on is the completion's doing and scores 0.0. Comparisons go from cheap to dear:
equal text, exact rationals, letters and words, floating-point values that plainly differ, lists
element by element, equation chains, and sympy last, behind the caps of `caps.py`. Where this differs from math-verify on purpose stands in
`tests/grade/deviations.py`, each row a test.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise, product
from typing import NamedTuple

from s2dcli.grade import caps, estimate, exact, symbolic
from s2dcli.grade.extract import extract, from_prose, neighbouring_boxes
from s2dcli.grade.normalise import bracketed, is_prose, is_words, normalise, split, unwrap, words

POLICY = "s2d.math/1"  # raise the number when a verdict may change

# What `verify_error` begins with.
NO_ANSWER = "no answer"
GOLD_MISSING = "gold missing"
GOLD_UNPARSABLE = "gold unparsable"
TIMEOUT = "timeout"  # the soft deadline, in the worker
KILLED = "killed"  # the hard deadline, by the supervisor
MEMORY = "memory"
CRASHED = "crashed"  # the worker died twice on this row
REFUSED = "refused"  # beyond the caps
FAILED = "failed"  # an exception
NOT_JUDGED = "not judged"  # a user's function returned None
WORKER_FAILURE = "worker failure"

EXTRACTED_LENGTH = 1000  # characters of the extracted answer that the verdict carries
MOST_SIGNS = 3  # plus-minus signs of one element
MOST_ELEMENTS = 20  # of a list whose elements need sympy
CACHE = 4096  # verdicts and gold answers that a worker remembers: groups share them
CACHED_LENGTH = 300  # characters of an answer whose verdict is remembered

_AND = re.compile(
    r"\s*,?\s*(?:\\(?:text|mbox|mathrm|textrm) ?\{[^{}]*?(?<![A-Za-z])(?:and|or),?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*"
)
_SET = re.compile(r"\\(?:\{|lbrace)(.*)\\(?:\}|rbrace)", re.DOTALL)
_RELATION = re.compile(r"\\approx(?![A-Za-z])")
_INEQUALITY = re.compile(r"[<>!:]=|[<>]|\\(?:leq?|geq?|neq?|lt|gt|in|subset\w*|to|equiv)(?![A-Za-z])")
_LABEL = re.compile(r"(?=[^=]*[A-Za-z])[A-Za-z\\(][^=+*/^<>\[\]-]{0,60}")
_NAME = re.compile(r"[A-Za-z][A-Za-z ]{0,30}:\s*")
_CHOICE = re.compile(r"\(?([A-J])\)?(?:[).:](?:\s.*)?)?|\(([A-J])\).*", re.DOTALL)
_CHOICE_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{\s*(\(?[A-J]\)?[^{}]*)\}")
_BASE = re.compile(r"(\d+)\s*_\s*\{?\s*(\d+)\s*\}?")
_DEGREES = re.compile(r"\^ ?(?:\\circ|\{ ?\\circ ?\})")
_DOTS = re.compile(r"\\[lc]?dots(?![A-Za-z])|\.\.\.")
_ADJACENT = re.compile(r"\d \.?\d")
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_FUNCTION = re.compile(r"([A-Za-z]) ?\( ?([A-Za-z]) ?\)")
_COLUMN = re.compile(r"\\begin ?\{[pb]?matrix\}([^&]*?)(?:\\\\ ?)?\\end ?\{[pb]?matrix\}", re.DOTALL)


Judge = Callable[[str, str], bool]
Progress = Callable[[bool, str], None]


class Verdict(NamedTuple):
    """`score` is None where the gold answer is missing or not understood."""

    score: float | None
    extracted: str
    error: str


class Refused(Exception):
    """An answer is beyond the caps."""


def warm_up() -> None:
    """Import math-verify and fill its parser's tables, which forked workers then share."""
    for latex in (
        r"\frac{1}{2}", r"x^2+3x-\sqrt{2}", r"(1,2)", r"\{1,2,3\}", r"[0,1)\cup(2,\infty)", r"x=5", r"2\pi r", r"5!",
        r"\frac{-b+\sqrt{b^2-4ac}}{2a}", r"0<x\leq 3", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\log_2(x)+\sin^2(x)", r"\binom{n}{k}",
        r"y=mx+b", r"90^\circ", r"10\%", r"e^{i\pi}", r"\text{yes}", r"x_1+x_{2}", r"-\frac{3\sqrt{5}}{7}", r"1,2,3", r"\sum_{k=1}^{n}k",
        r"|x-1|", r"2\cdot3", r"f(x)=2x+1", r"(-1,2]", r"(-\frac{1}{3},2/3,5)", r"6-5i", r"-2+7i", r"\cot x", r"(a+5)(b+2)", r"2x-7y+4=0",
    ):  # fmt: skip
        symbolic.parse(latex)
    for pair in (("x+1", "1+x"), (r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt{2}", "1.5"), (r"\frac{x}{2}", "0.5x"), ("(1,2)", "(1,x)")):
        symbolic.equal(*pair)


@lru_cache(maxsize=CACHE)
def gold_answer(text: str) -> str:
    """Return the normalised gold answer; of a worked solution, what it boxes (all boxes, if several)."""
    box = neighbouring_boxes(text)
    return normalise(text if box is None else box)


@lru_cache(maxsize=CACHE)
def problem_of(gold: str) -> str:
    """Return why a normalised gold answer is not understood, "" if it is."""
    elements = _elements(gold)[1] if not caps.refusal(gold) else [gold]
    for element in elements:
        if exact.read(element) or _letter(element) or is_words(element) or _DOTS.fullmatch(element):
            continue
        if estimate.estimate(_right_side(element)) is not None or _BASE.fullmatch(element):
            continue
        if refusal := caps.refusal(element):
            return f"{REFUSED}: {refusal}"
        if symbolic.parse(_right_side(element)) is None and symbolic.parse(gold) is None:
            return "not read by math-verify"
    return ""


def grade(
    gold: str,
    completion: str,
    thinking: bool,
    *,
    judge: Judge,
    lenient: bool,
    progress: Progress,
) -> Verdict:
    """Return the verdict on one completion. `progress(understood, extracted)` is told how far it got."""
    if not gold.strip():
        return Verdict(None, "", GOLD_MISSING)
    found, why_not = extract(completion, thinking, lenient)
    if found is not None and len(found) <= CACHED_LENGTH and len(gold) <= CACHED_LENGTH:
        return _cached_verdict(gold, found, "", judge, progress)
    return _verdict(gold, found, why_not, judge, progress)


def _verdict(gold: str, found: str | None, why_not: str, judge: Judge, progress: Progress) -> Verdict:
    shown = _shown(found or "")
    wanted = gold_answer(gold)
    if found is not None and wanted and is_same(wanted, normalise(found)):
        return Verdict(1.0, shown, "")
    if judge is is_right:
        problem = problem_of(wanted) if wanted else "empty"
        if problem:
            return Verdict(None, shown, f"{GOLD_UNPARSABLE}: {problem}")
    progress(True, shown)
    if found is None:
        return Verdict(0.0, "", f"{NO_ANSWER}: {why_not}")
    if judge is is_right and is_prose(found) and not is_words(wanted):
        found = from_prose(found) or found
    try:
        return Verdict(float(judge(wanted, normalise(found))), shown, "")
    except Refused as refusal:
        return Verdict(0.0, shown, f"{REFUSED}: {refusal}")


_cached_verdict = lru_cache(maxsize=CACHE)(_verdict)


def _shown(found: str) -> str:
    found = found.strip()
    return found if len(found) <= EXTRACTED_LENGTH else found[:EXTRACTED_LENGTH] + "..."


def _squeeze(text: str) -> str:
    return text.replace(" ", "")


def is_same(gold: str, prediction: str) -> bool:
    """Whether two normalised answers are the same text, blanks aside."""
    return _squeeze(gold) == _squeeze(prediction)


@lru_cache(maxsize=CACHE)
def is_right(gold: str, prediction: str) -> bool:
    """Whether a normalised prediction is the gold answer. Raises Refused beyond the caps."""
    if is_same(gold, prediction):
        return True
    if not prediction:
        return False
    left, right = exact.read(gold), exact.read(prediction)
    if left and right:
        return exact.equal(left, right)
    if letter := _letter(gold):
        return letter == (_letter(prediction) or _letter(prediction.upper() if len(prediction.strip("()")) == 1 else ""))
    if is_words(gold):
        if words(gold) == words(prediction):
            return True
        if is_prose(gold) or gold.startswith("\\text"):
            return False
    if estimate.differ(gold, prediction):
        return False
    if refusal := caps.refusal(prediction):
        raise Refused(refusal)
    sides_wanted, sides = _sides(gold), _sides(prediction)
    if len(sides_wanted) > 1 or len(sides) > 1:
        return _same_sides(gold, sides_wanted, prediction, sides)
    gold, prediction = _as_tuples(gold, prediction)
    kind, wanted = _elements(gold)
    kind_found, found = _elements(prediction)
    if len(wanted) > 1 or len(found) > 1:
        if any(len(parts) == 1 and estimate.estimate(text) is not None for parts, text in ((wanted, gold), (found, prediction))):
            return False  # one value is no list
        sequence = kind == kind_found == "" and _is_sequence(gold, wanted)
        same = _same_elements(kind, wanted, kind_found, found, sequence)
        if same is not None:
            return same
    return _same_leaf(gold, prediction)


def _letter(text: str) -> str:
    """Return the letter of a multiple-choice answer, "" if it is none."""
    inner = _CHOICE_TEXT.fullmatch(text)
    match = _CHOICE.fullmatch((inner[1] if inner else text).strip())
    return (match[1] or match[2]) if match else ""


def _elements(text: str) -> tuple[str, list[str]]:
    """Return the kind of a list ("", "{", or its brackets as "(]") and its elements, labels removed."""
    text = _AND.sub(",", text)
    kind = ""
    if bracketed(text) and len(tuples := _both_signs(text)) > 1:
        return kind, tuples
    if match := _SET.fullmatch(text):
        kind, text = "{", match[1]
    elif bracketed(text) and len(split(text[1:-1])) > 1:
        kind, text = text[0] + text[-1], text[1:-1]
    parts = [part for part in (normalise(_NAME.sub("", part.strip(), count=1)) for part in split(text)) if part]
    if len(parts) == 1 and _SET.fullmatch(_right_side(parts[0])) and kind == "":
        return _elements(_right_side(parts[0]))
    if not kind.startswith(("(", "[")):
        parts = [side for part in parts for side in _both_signs(part)]
    return kind, parts


def _both_signs(text: str) -> list[str]:
    """Return the answers that an element with plus-minus stands for; in a tuple the signs are independent."""
    number = len(_PLUS_MINUS.findall(text))
    if number == 0 or number > MOST_SIGNS or (number > 1 and not bracketed(text)):
        return [text]
    pieces = _PLUS_MINUS.split(text)
    return [normalise("".join(a + b for a, b in zip(pieces, (*signs, ""), strict=True))) for signs in product("+-", repeat=number)]


def _as_tuples(gold: str, prediction: str) -> tuple[str, str]:
    """Write a column vector as a tuple if the other answer is one."""
    columns = [_COLUMN.fullmatch(text) for text in (gold, prediction)]
    if bool(columns[0]) == bool(columns[1]):
        return gold, prediction
    tuples = [f"({','.join(column[1].split(chr(92) * 2))})" if column else "" for column in columns]
    return tuples[0] or gold, tuples[1] or prediction


def _is_sequence(gold: str, wanted: list[str]) -> bool:
    """Whether a plain gold list means its order: three numbers or more, named by nothing, that are not in order of size.

    A set of solutions is written from the smallest or from the largest on.
    """
    values = [exact.read(element) for element in wanted]
    if len(values) < 3 or None in values or "=" in gold or ":" in gold:
        return False
    numbers = [value.value for value in values]
    return numbers not in (sorted(numbers), sorted(numbers, reverse=True))


def _same_elements(kind: str, wanted: list[str], kind_found: str, found: list[str], sequence: bool) -> bool | None:
    """Compare two lists, None where math-verify should see them whole."""
    ordered = kind.startswith(("(", "[")) or kind_found.startswith(("(", "["))
    if ordered and kind != kind_found:
        both = all(one.startswith(("(", "[")) for one in (kind, kind_found))
        several = len(wanted) > 1 and len(found) > 1
        return False if several and (both or len(wanted) != len(found)) else None
    if kind == kind_found == "{":
        wanted, found = list(dict.fromkeys(wanted)), list(dict.fromkeys(found))
    if len(wanted) != len(found):
        return None if "\\infty" in "".join(wanted + found) else False
    if ordered or sequence:
        return all(is_right(a, b) for a, b in zip(wanted, found, strict=True))
    left = list(found)
    for element in sorted(wanted, key=lambda e: exact.read(e) is None):
        if len(left) > MOST_ELEMENTS and exact.read(element) is None:
            raise Refused(f"a list of more than {MOST_ELEMENTS} elements that are no numbers")
        match = next((at for at, other in enumerate(left) if is_right(element, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _sides(text: str) -> list[str]:
    """Cut an answer at the equals signs outside all brackets; a list of equations is not cut."""
    if ("=" not in text and "\\approx" not in text) or len(split(_AND.sub(",", text))) > 1:
        return [text]
    text = _RELATION.sub(lambda match: match[0] if match[0] != "\\approx" else "=", text)
    return [side.strip() for side in split(text, "=")] if not _INEQUALITY.search(text) else [text]


def _right_side(text: str) -> str:
    """Return what a label stands before: `5` of `x = 5`; other texts as they are."""
    sides = _sides(text)
    return sides[-1] if len(sides) == 2 and _LABEL.fullmatch(sides[0]) else text


def _same_sides(gold: str, wanted: list[str], prediction: str, found: list[str]) -> bool:
    """Compare answers of which at least one has an equals sign.

    The numbers in a chain must agree with each other, so that `41 = 42` is not 42.
    """
    wanted, found = ([unwrap(side) for side in sides] for sides in (wanted, found))
    numbers = [side for side in found if _is_number(side)]
    if any(not is_right(one, other) for one, other in pairwise(numbers)):
        return False
    if len(wanted) == 1:
        return (bool(numbers) or bool(_LABEL.fullmatch(found[0]))) and is_right(gold, normalise(found[-1]))
    if len(found) == 1:
        return bool(_LABEL.fullmatch(wanted[0])) and is_right(normalise(wanted[-1]), prediction)
    if _squeeze(wanted[0]) == _squeeze(found[0]):
        return is_right(normalise(wanted[-1]), normalise(found[-1]))
    functions = [_FUNCTION.fullmatch(side) for side in (wanted[0], found[0])]
    if all(functions) and functions[0][1] == functions[1][1]:
        renamed = re.sub(rf"(?<![A-Za-z\\]){functions[1][2]}(?![A-Za-z])", functions[0][2], found[-1])
        return is_right(normalise(wanted[-1]), normalise(renamed))
    return _same_leaf(gold, prediction)


def _is_number(text: str) -> bool:
    """Whether a text has digits and no letters outside LaTeX commands."""
    return any(mark.isdigit() for mark in text) and not any(mark.isalpha() for mark in _COMMAND.sub("", text))


def _same_leaf(gold: str, prediction: str) -> bool:
    """Ask math-verify about two answers that are no lists."""
    if _DOTS.search(gold) or _DOTS.search(prediction):
        return False  # math-verify leaves the dots out
    base, base_found = _BASE.fullmatch(gold), _BASE.fullmatch(prediction)
    if base or base_found:
        digits = [match[1] if match else text for match, text in ((base, gold), (base_found, prediction))]
        return digits[0] == digits[1] and (base is None or base_found is None or base[2] == base_found[2])
    if _ADJACENT.search(prediction) and "\\frac" not in prediction and "matrix" not in prediction:
        return False  # math-verify adds them up
    if bool(_DEGREES.search(gold)) != bool(_DEGREES.search(prediction)) and ("\\pi" in gold or "\\pi" in prediction):
        gold, prediction = (_DEGREES.sub(r" \\cdot \\frac{\\pi}{180}", text) for text in (gold, prediction))
    for text in (gold, prediction):
        if refusal := caps.refusal(text):
            raise Refused(refusal)
    return symbolic.equal(gold, prediction)
