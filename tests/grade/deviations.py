r"""Where verdicts differ from math-verify's on purpose.

Every row is a test (`tests/grade/test_deviations.py`): math-verify 0.9.0, given the gold answer in
a box and the completion, must still give `math_verify`, and the grader must give `here`. A row
that math-verify has mended turns its test red and can go.
"""

from __future__ import annotations

from typing import NamedTuple


class Deviation(NamedTuple):
    """One case: gold answer, completion, math-verify's verdict, ours, and the rule behind it."""

    rule: str
    gold: str
    completion: str
    math_verify: bool
    here: bool


LAST_BOX = "the last complete box counts, with those that only `and`, `or`, a comma or spacing joins to it; prose does not outvote it"
EMPTY_BOX = "an empty box is no answer, whatever stands before it"
REASONING = "what stands before the last </think> is dropped; an unclosed <think> means no answer"
STRICT = "without a box there is no answer, unless --extract lenient"
INCOMPLETE = "a box that is never closed is no box"
CHAIN = "the numbers in a chain of equations must agree with each other"
EXACT = "rational numbers are decided exactly, not to six decimals"
ROUNDED_GOLD = "a decimal gold answer of three digits or more may be a fraction or formula rounded to it"
SMALL = "numbers must agree relative to their size: tiny ones are not all zero"
COUNT = "every element of a list counts, also one that is there twice"
ORDER = "a plain list of three numbers or more that is not in order of size is a sequence: its order counts"
BASE = "a number's base belongs to it, where both name one"
SPACED = "a number may be grouped, `1\\,234`, `1 234`, `x = 1,234`; it is no mixed number and no list"
POINTS = "formulas that agree to many digits at several points are equal, though sympy finds no proof"
BRACES = "braces around the whole answer are none of it"
WHOLE = "what is parsed must be all of the answer"
UNICODE = "full-width, invisible and typographic characters are read as what they look like"
FULL_STOP = "a full stop behind an answer is none of it"
SIGNS = "a run of signs is folded into one"
ROOT = "\\sqrt(2) is the root of 2"
DEGREES = "degrees equal radians where one side names pi"
IMAGINARY = "i is the imaginary unit where nothing else is named so"
VARIABLE = "a last letter is a variable, not a unit, where other variables stand before it"
LABELS = "names before the elements of a list are labels"
FUNCTION = "the name of a function's variable does not matter"
COLUMN = "a column vector is the tuple of its entries"
INDEPENDENT_SIGNS = "plus-minus signs in a tuple are independent"
SET_BUILDER = "a set in builder notation is its condition"
LETTER = "a choice is its letter, with or without the text of the choice"
DOTS = "a list with dots is not compared by the elements it happens to name"
RATIO = "a ratio of two integers is a fraction; a decimal gold answer may be it rounded"
JOINED = "boxes that only `and`, `or`, a comma or spacing joins are one answer of several parts"
LONG = "a long decimal is the fraction that it is the value of, to its last digit"
APPROXIMATION = "a decimal behind `\\approx` does not change the answer, but must fit it"
NAMED = "values that are named stay with their names: p=7, q=3 is the point (7,3) and not 3,7"
CONDITION = "a condition on a real number is the set that fulfils it"
PRODUCT = "a product or power that is not worked out is the number that it gives, except for the reward math:strict"
PERCENT = "4 % answers both 4 and 0.04, where one side has the sign; for math:strict it is 0.04"
PARAMETER = "the name of a whole-number parameter does not matter"
PROSE = "of a sentence in the box, the last formula or number is the answer"

TABLE = (
    Deviation(LAST_BOX, "7", r"First \boxed{6}. No: \boxed{7}.", False, True),
    Deviation(LAST_BOX, "8", r"It is \boxed{9}. The final answer is $8$. I hope it is correct.", True, False),
    Deviation(JOINED, "9", "$\\boxed{8}$\n\n$\\boxed{9}$", True, False),
    Deviation(EMPTY_BOX, "11", r"About 11, I think. \boxed{}", True, False),
    Deviation(REASONING, "5", r"<think>Maybe \boxed{5}", True, False),
    Deviation(STRICT, "12", "The answer is 12", True, False),
    Deviation(INCOMPLETE, r"\frac{1}{3}", r"So \boxed{\frac{1}{3}", True, False),
    Deviation(CHAIN, "17", r"\boxed{16=17}", True, False),
    Deviation(CHAIN, "17", r"\boxed{y=16=17}", True, False),
    Deviation(EXACT, r"\frac{2}{3}", r"\boxed{0.666667}", True, False),
    Deviation(EXACT, "0.0000451", r"\boxed{0.0000452}", True, False),
    Deviation(ROUNDED_GOLD, "14.29", r"\boxed{\frac{100}{7}}", False, True),
    Deviation(SMALL, r"\frac{1}{3^{90}}", r"\boxed{\frac{1}{3^{91}}}", True, False),
    Deviation(COUNT, "4,4", r"\boxed{4}", True, False),
    Deviation(ORDER, "5, 12, 3", r"\boxed{12, 5, 3}", True, False),
    Deviation(BASE, "101_2", r"\boxed{101_3}", True, False),
    Deviation(SPACED, "5678", r"\boxed{5\,678}", False, True),
    Deviation(SPACED, "5678", r"\boxed{5 678}", False, True),
    Deviation(SPACED, "583", r"\boxed{5\,578}", True, False),
    Deviation(SPACED, "41,200", r"\boxed{x = 41,200}", False, True),
    Deviation(POINTS, r"\sqrt{x^2+2+2\sqrt{x^2+1}}", r"\boxed{1+\sqrt{x^2+1}}", False, True),
    Deviation(BRACES, r"(3,\infty)", r"\boxed{{(3,\infty)}}", False, True),
    Deviation(WHOLE, r"2 + \frac{3}{\mathrm{e}}", r"\boxed{\frac{3}{e} + 2}", False, True),
    Deviation(UNICODE, "25", "\\boxed{２５}", False, True),
    Deviation(UNICODE, "25", "\\boxed{2\u200b5}", False, True),
    Deviation(FULL_STOP, "81", r"\boxed{81.}", False, True),
    Deviation(SIGNS, "14-i", r"\boxed{14.0 + -1.0i}", False, True),
    Deviation(ROOT, r"5\sqrt{7}", r"\boxed{5\sqrt(7)}", False, True),
    Deviation(DEGREES, r"60^\circ", r"\boxed{\frac{\pi}{3}}", False, True),
    Deviation(IMAGINARY, r"e^{i\pi}", r"\boxed{-1}", False, True),
    Deviation(VARIABLE, r"\frac{5}{2}a + \frac{1}{2}m", r"\boxed{\frac{5a+m}{2}}", False, True),
    Deviation(LABELS, "9,4,1", r"\boxed{\text{Ann: } 9, \text{Bob: } 4, \text{Cy: } 1}", False, True),
    Deviation(FUNCTION, "g(t)=3t+1", r"\boxed{g(s)=3s+1}", False, True),
    Deviation(COLUMN, r"\begin{pmatrix} 1 \\ -4 \\ 6 \end{pmatrix}", r"\boxed{(1,-4,6)}", False, True),
    Deviation(INDEPENDENT_SIGNS, "(1,2),(1,-2),(-1,2),(-1,-2)", r"\boxed{(\pm 1, \pm 2)}", False, True),
    Deviation(SET_BUILDER, r"\{x \mid x > 3\}", r"\boxed{(3,\infty)}", False, True),
    Deviation(LETTER, "C", r"\boxed{(C) nine apples}", False, True),
    Deviation(DOTS, "4", r"\boxed{2, 4, \ldots, m}", True, False),
    Deviation(RATIO, "1.67", r"\boxed{5:3}", False, True),
    Deviation(LONG, r"\frac{1}{7}", r"\boxed{0.1428571428571428}", True, True),
    Deviation(APPROXIMATION, r"\frac{7}{9}", r"\boxed{\frac{7}{9} \approx 0.98}", True, False),
    Deviation(ROUNDED_GOLD, "1.34", r"\boxed{\frac{3+\sqrt{41}}{7}}", False, True),
    Deviation(NAMED, "p=7,q=3", r"\boxed{3,7}", True, False),
    Deviation(CONDITION, r"a \leq -2 \text{ or } a = 1", r"\boxed{(-\infty,-2]\cup\{1\}}", False, True),
    Deviation(PARAMETER, r"x = k\pi", r"\boxed{n\pi}", False, True),
    # Decided, though math-verify decides in the same way.
    Deviation(PRODUCT, "56088", r"\boxed{123 \cdot 456}", True, True),
    Deviation(PERCENT, "4", r"\boxed{4\%}", True, True),
    Deviation(PERCENT, "0.04", r"\boxed{4\%}", True, True),
    Deviation(PROSE, "30", r"\boxed{Anne has 30 $ left}", False, True),
)
