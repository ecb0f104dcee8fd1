r"""What is right: the verdict on one completion against one gold answer.

The gold answer comes first. It is normalised and understood, as an exact number, a choice letter,
words, or what math-verify can parse; only then is the completion looked at, so that whatever goes
wrong from there on is the completion's doing and scores 0.0. Comparisons go from cheap to dear: equal
text, exact rationals, letters and words, floating-point values that plainly differ, sets of real
numbers, named values, lists element by element, equation chains, and sympy last, behind the caps of
`caps.py`. Where this differs from math-verify on purpose stands in `tests/grade/deviations.py`, each
row a test.

Decisions. A number that is not worked out counts, `123 \cdot 456` for 56088, and `4\%` counts for both
4 and 0.04: a gold answer does not say what was asked for. Where that is what a model is to learn,
`MATH_STRICT` (the reward `math:strict`) wants a number given as a number, and a percentage is a
hundredth. The order of a list counts where the problem asks for one (`ordered`); if that is not known,
where the gold list is three numbers or more that do not look like a set of solutions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise, product
from typing import NamedTuple

from s2dcli.grade import caps, estimate, exact, parts, reals, symbolic
from s2dcli.grade.extract import extract, from_prose, last_box
from s2dcli.grade.normalise import bracketed, is_prose, is_words, normalise, split, unwrap, words

POLICY = "s2d.math/2"  # raise the number when a verdict may change

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
FAILURES = (TIMEOUT, KILLED, MEMORY, CRASHED, FAILED, WORKER_FAILURE)  # of a reward, not of the answer alone

EXTRACTED_LENGTH = 1000  # characters of the extracted answer that the verdict carries
MOST_SIGNS = 3  # plus-minus signs of one element
MOST_ELEMENTS = 20  # of a list whose elements need sympy
CACHE = 4096  # verdicts and gold answers that a worker remembers: groups share them
CACHED_LENGTH = 300  # characters of an answer whose verdict is remembered

_ALTERNATIVES = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])")
_SET = re.compile(r"(?:[A-Za-z] ?\\in ?)?\\(?:\{|lbrace)(.*)\\(?:\}|rbrace)", re.DOTALL)
_RELATION = re.compile(r"\\approx(?![A-Za-z])")
_INEQUALITY = re.compile(r"[<>!:]=|[<>]|\\(?:leq?|geq?|neq?|lt|gt|in|subset\w*|to|equiv)(?![A-Za-z])")
_LABEL = re.compile(r"(?=[^=]*[A-Za-z])[A-Za-z\\(|][^=+*/^<>\[\]-]{0,60}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9 ]{0,30}:\s*")
_CHOICE = re.compile(r"\(?([A-J])\)?(?:[).:](?:\s.*)?)?|\(([A-J])\).*", re.DOTALL)
_CHOICE_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{\s*(\(?[A-J]\)?[^{}]*)\}")
_BASE = re.compile(r"(\d+)\s*_\s*\{?\s*(\d+)\s*\}?")
_DEGREES = re.compile(r"\^ ?(?:\\circ|\{ ?\\circ ?\})")
_DOTS = re.compile(r"\\[lc]?dots(?![A-Za-z])|\.\.\.")
_ADJACENT = re.compile(r"\d \.?\d")
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_VARIABLE = re.compile(r"[A-Za-z]")
_FUNCTION = re.compile(r"([A-Za-z]) ?\( ?([A-Za-z]) ?\)")
_BRACED = re.compile(r"([\^_])\{(\w)\}")
_POINT = re.compile(r"[A-Z]'? ?(\([^()]*,.*\))")
_COLUMN = re.compile(r"\\begin ?\{[pb]?matrix\}([^&]*?)(?:\\\\ ?)?\\end ?\{[pb]?matrix\}", re.DOTALL)


Progress = Callable[[bool, str], None]


class Judge(NamedTuple):
    """A way of comparing normalised answers: `same(gold, prediction, ordered)`.

    `reads`: it has to understand the gold answer, and looks for the answer in a sentence.
    """

    same: Callable[[str, str, bool | None], bool]
    reads: bool


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
    """Return the normalised gold answer; of a worked solution, what it boxes."""
    box = last_box(text)
    return normalise(text if box is None else box)


@lru_cache(maxsize=CACHE)
def problem_of(gold: str) -> str:
    """Return why a normalised gold answer is not understood, "" if it is."""
    elements = _elements(gold)[1] if not caps.refusal(gold) else [gold]
    for element in elements:
        if approximation := parts.approximation(element):
            element = approximation[0]
        if exact.read(element) or _letter(element) or is_words(element) or _DOTS.fullmatch(element) or parts.choices(element):
            continue
        if estimate.estimate(_right_side(element)) is not None or _BASE.fullmatch(element):
            continue
        if refusal := caps.refusal(element):
            return f"{REFUSED}: {refusal}"
        if symbolic.parse(_right_side(element)) is None and symbolic.parse(gold) is None:
            return "" if reals.pieces(gold) else "not read by math-verify"
    return ""


def grade(
    gold: str,
    completion: str,
    thinking: bool,
    ordered: bool | None = None,
    *,
    judge: Judge,
    lenient: bool,
    progress: Progress,
) -> Verdict:
    """Return the verdict on one completion. `progress(understood, extracted)` is told how far it got.

    `thinking`: the prompt ends inside the reasoning. `ordered`: whether the problem asks for a list in an
    order, None where that has to be told from the gold answer.
    """
    if not gold.strip():
        return Verdict(None, "", GOLD_MISSING)
    found, why_not = extract(completion, thinking, lenient)
    if found is not None and len(found) <= CACHED_LENGTH and len(gold) <= CACHED_LENGTH:
        return _cached_verdict(gold, found, "", ordered, judge, progress)
    return _verdict(gold, found, why_not, ordered, judge, progress)


def _verdict(gold: str, found: str | None, why_not: str, ordered: bool | None, judge: Judge, progress: Progress) -> Verdict:
    shown = _shown(found or "")
    wanted = gold_answer(gold)
    if found is not None and wanted and is_same(wanted, normalise(found)):
        return Verdict(1.0, shown, "")
    if judge.reads:
        problem = problem_of(wanted) if wanted else "empty"
        if problem:
            return Verdict(None, shown, f"{GOLD_UNPARSABLE}: {problem}")
    progress(True, shown)
    if found is None:
        return Verdict(0.0, "", f"{NO_ANSWER}: {why_not}")
    if judge.reads and is_prose(found) and not is_words(wanted):
        found = from_prose(found) or found
    try:
        return Verdict(float(judge.same(wanted, normalise(found), ordered)), shown, "")
    except Refused as refusal:
        return Verdict(0.0, shown, f"{REFUSED}: {refusal}")


_cached_verdict = lru_cache(maxsize=CACHE)(_verdict)


def _shown(found: str) -> str:
    found = found.strip()
    return found if len(found) <= EXTRACTED_LENGTH else found[:EXTRACTED_LENGTH] + "..."


def _squeeze(text: str) -> str:
    return text.replace(" ", "")


def is_same(gold: str, prediction: str) -> bool:
    """Whether two normalised answers are the same text, blanks and needless braces aside."""
    gold, prediction = _squeeze(gold), _squeeze(prediction)
    return gold == prediction or ("{" in gold + prediction and _BRACED.sub(r"\1\2", gold) == _BRACED.sub(r"\1\2", prediction))


@lru_cache(maxsize=CACHE)
def is_right(gold: str, prediction: str, ordered: bool | None = None) -> bool:
    """Whether a normalised prediction is the gold answer. Raises Refused beyond the caps."""
    if is_same(gold, prediction):
        return True
    if not prediction:
        return False
    left, right = exact.read(gold), exact.read(prediction)
    if left and right:
        return exact.equal(left, right)
    if all(picked := (parts.choices(gold), parts.choices(prediction))) and any(separate for separate, _ in picked):
        return picked[0][1] == picked[1][1]
    if letter := _letter(gold):
        return letter == (_letter(prediction) or _letter(prediction.upper() if len(prediction.strip("()")) == 1 else ""))
    if (by_words := _same_words(gold, prediction)) is not None:
        return by_words
    if left and exact.may_be_rounded(left) and not _VARIABLE.search(_COMMAND.sub("", prediction)) and "." not in prediction:
        value = estimate.estimate(prediction)
        if value is not None and exact.rounds_to(Fraction(value), left):
            return True
    if estimate.differ(gold, prediction):
        return False
    if refusal := caps.refusal(prediction):
        raise Refused(refusal)
    if "\\approx" in gold or "\\approx" in prediction:
        return _same_approximated(gold, prediction, ordered)
    if gold.count(":") > 1 and gold.count(":") == prediction.count(":"):
        return parts.same_ratio(gold, prediction, is_right)
    if (reals.is_condition(gold) or reals.is_condition(prediction)) and reals.same(gold, prediction, is_right):
        return True
    if (named := _without_names(gold, prediction)) is not None:
        return is_right(*named)
    if renamed := parts.same_parameter(gold, prediction):
        return is_right(gold, renamed)
    sides_wanted, sides = _sides(gold), _sides(prediction)
    if len(sides_wanted) > 1 or len(sides) > 1:
        return _same_sides(gold, sides_wanted, prediction, sides)
    gold, prediction = _as_tuples(gold, prediction)
    kind, wanted = _elements(gold)
    kind_found, found = _elements(prediction)
    if len(wanted) > 1 or len(found) > 1:
        if any(len(elements) == 1 and estimate.estimate(text) is not None for elements, text in ((wanted, gold), (found, prediction))):
            return False  # one value is not a list
        ordered = _is_sequence(gold, wanted) if ordered is None else ordered
        same = _same_elements(kind, wanted, kind_found, found, ordered and kind == kind_found == "")
        if same is not None:
            return same
    return _same_leaf(gold, prediction)


def is_right_number(gold: str, prediction: str, ordered: bool | None = None) -> bool:
    """Whether a prediction is right and, where the gold answer is made of numbers, is made of numbers that are worked out.

    Those are integers, decimals, fractions, mixed numbers and powers of ten with a factor. A percentage is
    a hundredth of its number.
    """
    if not is_right(gold, prediction, ordered):
        return False
    wanted, found = ([exact.read(normalise(_sides(element)[-1])) for element in _elements(text)[1]] for text in (gold, prediction))
    if None in wanted or is_same(gold, prediction):
        return True
    if None in found:
        return False
    if {number.percent for number in wanted} == {number.percent for number in found}:
        return True
    values, others = (sorted(number.value / (100 if number.percent else 1) for number in numbers) for numbers in (wanted, found))
    return values == others


MATH = Judge(is_right, reads=True)
MATH_STRICT = Judge(is_right_number, reads=True)
EXACT = Judge(lambda gold, prediction, _: is_same(gold, prediction), reads=False)


def _same_words(gold: str, prediction: str) -> bool | None:
    """Compare answers of which at least one is words, None where the words do not decide."""
    in_words = is_words(gold)
    if in_words or is_words(prediction) or "set" in gold or "nothing" in gold:
        meant = parts.phrase(gold), parts.phrase(prediction)
        if all(meant):
            return meant[0] == meant[1]
    if not in_words:
        return None
    if words(gold) == words(prediction) or parts.sentence_says(gold, prediction) or parts.calls_it(prediction, gold):
        return True
    return False if is_prose(gold) or gold.startswith("\\text") else None


def _same_approximated(gold: str, prediction: str, ordered: bool | None) -> bool:
    r"""Compare answers of which at least one has a decimal behind it, `\frac{7}{9} \approx 0.78`; that must fit what it stands for."""
    if len(_elements(gold)[1]) > 1 and len(_elements(prediction)[1]) > 1:
        same = _same_elements("", _elements(gold)[1], "", _elements(prediction)[1], bool(ordered))
        return bool(same)
    wanted, found = parts.approximation(gold), parts.approximation(prediction)
    if ("\\approx" in gold and wanted is None) or ("\\approx" in prediction and found is None):
        return _same_sides(gold, _sides(gold), prediction, _sides(prediction))
    if found is not None:
        prediction, decimal = found
        value = _value(_right_side(prediction))
        if value is None and _LABEL.fullmatch(prediction):
            prediction = f"{prediction}={decimal.text}"
        elif value is not None and abs(value - decimal.value) * 10 ** max(decimal.decimals, 0) > 1:
            return False
    if wanted is None:
        return is_right(gold, prediction, ordered) or (found is not None and is_right(gold, found[1].text))
    return is_right(wanted[0], prediction, ordered) or prediction == wanted[1].text


def _value(text: str) -> Fraction | None:
    """Return the value of a formula without variables, as far as a float has it."""
    if number := exact.read(text):
        return number.value
    value = None if _VARIABLE.search(_COMMAND.sub("", text)) else estimate.estimate(text)
    return None if value is None else Fraction(value)


def _without_names(gold: str, prediction: str) -> tuple[str, str, bool | None] | None:
    """Write answers that name several values without the names, and say whether their order counts; None if neither does."""
    wanted, found = parts.solutions(gold), parts.solutions(prediction)
    if wanted and found:
        if set(wanted[0]) != set(found[0]):
            return None
        return parts.bare(wanted, wanted[0]), parts.bare(found, wanted[0]), False
    if wanted:
        if "=" in prediction:
            return None
        written = parts.bare(wanted, wanted[0])
        if len(wanted[0]) > 1 and len(wanted[1]) == 1 and not bracketed(prediction):
            prediction = f"({','.join(_elements(prediction)[1])})"
        return written, prediction, False
    if found and "=" not in gold:
        written = parts.bare(found, found[0])
        return gold, written if bracketed(gold) or len(found[1]) > 1 else written[1:-1], None
    return None


def _letter(text: str) -> str:
    """Return the letter of a multiple-choice answer, "" if it is none."""
    inner = _CHOICE_TEXT.fullmatch(text)
    match = _CHOICE.fullmatch((inner[1] if inner else text).strip())
    return (match[1] or match[2]) if match else ""


def _elements(text: str) -> tuple[str, list[str]]:
    """Return the kind of a list ("", "{", or its brackets as "(]") and its elements, labels removed."""
    text = parts.AND.sub(",", text)
    kind = ""
    if bracketed(text) and len(tuples := _both_signs(text)) > 1:
        return kind, tuples
    if match := _SET.fullmatch(text):
        kind, text = "{", match[1]
    elif bracketed(text) and len(split(text[1:-1])) > 1:
        kind, text = text[0] + text[-1], text[1:-1]
    elements = [part for part in (normalise(_NAME.sub("", part.strip(), count=1)) for part in split(text)) if part]
    if len(elements) == 1 and _SET.fullmatch(_right_side(elements[0])) and kind == "":
        return _elements(_right_side(elements[0]))
    if not kind.startswith(("(", "[")):
        elements = [side for element in elements for side in _both_signs(element)]
    return kind, elements


def _both_signs(text: str) -> list[str]:
    """Return the answers that an element with plus-minus stands for; in a tuple the signs are independent."""
    number = len(_PLUS_MINUS.findall(text))
    if number == 0 or number > MOST_SIGNS or (number > 1 and not bracketed(text)):
        return [text]
    pieces = _PLUS_MINUS.split(text)
    return [normalise("".join(a + b for a, b in zip(pieces, (*signs, ""), strict=True))) for signs in product("+-", repeat=number)]


def _as_tuples(gold: str, prediction: str) -> tuple[str, str]:
    """Write a column vector as a tuple if the other answer is one, and leave out the name of a point, `A(1,2)`."""
    if bracketed(gold) != bracketed(prediction):
        gold, prediction = (match[1] if (match := _POINT.fullmatch(text)) else text for text in (gold, prediction))
    columns = [_COLUMN.fullmatch(text) for text in (gold, prediction)]
    if bool(columns[0]) == bool(columns[1]):
        return gold, prediction
    tuples = [f"({','.join(column[1].split(chr(92) * 2))})" if column else "" for column in columns]
    return tuples[0] or gold, tuples[1] or prediction


def _is_sequence(gold: str, wanted: list[str]) -> bool:
    """Whether a plain gold list means its order: three numbers or more, named by nothing, that are not in order of size.

    A set of solutions is written from the smallest or from the largest on, has `or` in it, or a number and its opposite.
    """
    values = [exact.read(element) for element in wanted]
    if len(values) < 3 or None in values or "=" in gold or ":" in gold or _ALTERNATIVES.search(gold):
        return False
    numbers = [value.value for value in values]
    if any(-number in numbers for number in numbers if number):
        return False
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
            raise Refused(f"a list of more than {MOST_ELEMENTS} elements that are not numbers")
        match = next((at for at, other in enumerate(left) if is_right(element, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _sides(text: str) -> list[str]:
    """Cut an answer at the equals signs outside all brackets; a list of equations is not cut."""
    if ("=" not in text and "\\approx" not in text) or len(split(parts.AND.sub(",", text))) > 1:
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
    """Ask math-verify about two answers that are not lists."""
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
