r"""What math-verify is asked, and how far it is believed.

Its parser and its comparison are used, its extraction and its timeouts are not. A parse counts
only if it has read the whole answer, and a "yes" about two numbers only if they agree to a
relative tolerance: math-verify rounds to six decimals, so that all tiny numbers equal zero.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

FLOAT_ROUNDING = 6  # decimals; math-verify's default
NUMERIC_PRECISION = 15  # digits; math-verify's default
GUARD_DIGITS = 40  # digits to which two numbers are worked out again
EXACT_TOLERANCE = 1e-20  # relative, between two exact numbers
FLOAT_TOLERANCE = 1e-4  # relative, where one is a decimal; six decimals of 0.01 are this exact
PLAIN_DIFFERENCE = 1e-4  # relative above 1, absolute below: far more than six decimals round away
POINT, STEP, POINT_SCALE = 13719, 2357, 10_000  # expressions are tried at 1.3719, 1.6076, ...: no special values
SIGNS = ((1, 1), (-1, -1), (1, -1))  # of the values at the points
CACHE = 2048  # parsed answers that a worker remembers

_COMMAND = re.compile(r"\\(?:text|mbox|mathrm) ?\{[^{}]*+\}|\\[A-Za-z]++")
_BARE_ARGUMENT = re.compile(
    r"\\(a?(?:rc)?(?:sin|cos|tan|cot|sec|csc)|ln|log)( ?\^ ?(?:\d|\{ ?-?\d ?\}))? ?"
    r"([A-Za-z]|\\(?:alpha|beta|gamma|theta|phi|varphi|omega|lambda|mu|pi))(?![A-Za-z])(?= ?\\(?:cdot|times))"
)
_IMAGINARY = re.compile(r"[0-9}]i(?![A-Za-z])")
_LAST_WORD = re.compile(r"[A-Za-z ]++(?:\^\{?\d\}?)?$")


@lru_cache(maxsize=1)
def _tools() -> Any:
    """Import math-verify and latex2sympy: a second and 100 MB, so not before it is needed."""
    from latex2sympy2_extended import latex2sympy2, math_normalization
    from math_verify import grader, parser

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    class WholeParser(latex2sympy2._Latex2Sympy):
        """Remembers its token stream, to see whether the grammar stopped before the end."""

        def create_parser(self, latex_str: str) -> Any:
            parser = super().create_parser(latex_str)
            if not hasattr(self, "stream"):
                self.stream = parser.getTokenStream()
            return parser

    class Tools:
        normalise = staticmethod(math_normalization.normalize_latex)
        with_units, without_units = (
            math_normalization.NormalizationConfig(
                basic_latex=True, units=units, malformed_operators=True, nits=True, boxed="none", equations=False
            )
            for units in (True, False)
        )
        latex_parser = WholeParser
        looks_complex = staticmethod(grader.should_treat_as_complex)
        last_equation = staticmethod(parser.get_last_eq)
        equal = staticmethod(grader.sympy_expr_eq)

    return Tools


@lru_cache(maxsize=CACHE)
def parse(text: str) -> Any:
    """Return the sympy expression of a normalised answer, None if math-verify cannot read all of it."""
    tools = _tools()
    if "\\cdot" in text or "\\times" in text:
        text = _BARE_ARGUMENT.sub(r"\\\1\2(\3)", text)  # the grammar takes all of `t \cdot u` for the argument of `\cos t \cdot u`
    latex = tools.normalise(text, tools.without_units if _has_variables(text) else tools.with_units)
    if not latex:
        return None
    expression = _parse(latex)
    if expression is None and (last := tools.last_equation(latex)) != latex:
        expression = _parse(last)
    return expression


def _has_variables(text: str) -> bool:
    """Whether letters stand before the last word: then that is a variable, too, and no unit."""
    return any(mark.isalpha() for mark in _LAST_WORD.sub("", _COMMAND.sub("", text)))


def _parse(latex: str) -> Any:
    import sympy

    tools = _tools()
    is_complex = bool(tools.looks_complex(latex) or _IMAGINARY.search(latex))
    converter = tools.latex_parser(is_real=not is_complex)
    try:
        expression = converter.parse(latex)
        if is_complex and "\\sum" not in latex and isinstance(expression, sympy.Expr):
            expression = expression.subs({symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"})
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the parser raises bare Exception, sympy anything
        return None
    return expression if converter.stream.LA(1) == -1 else None  # -1: end of input


@lru_cache(maxsize=CACHE)
def equal(gold: str, prediction: str) -> bool:
    """Whether math-verify calls two normalised answers equal, and numbers bear it out."""
    left, right = parse(gold), parse(prediction)
    if left is None or right is None:
        return False
    if (known := _compare_values(left, right)) is not None:
        return known
    try:
        same = _tools().equal(left, right, FLOAT_ROUNDING, NUMERIC_PRECISION)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return False
    return bool(same) and _numbers_agree(left, right)


def _compare_values(left: Any, right: Any) -> bool | None:
    """Compare two expressions at a few points: that spares sympy the search for a proof, and finds what it misses.

    False if they plainly differ at one point, True if they agree to many digits at all of them,
    None if that cannot be told.
    """
    import sympy

    sides = (left, right)
    if not all(isinstance(side, sympy.Expr) and not side.has(sympy.UnevaluatedExpr) for side in sides):
        return None
    names, other_names = left.free_symbols, right.free_symbols
    if any(side.is_Symbol for side in sides) or (names and other_names and names != other_names):
        return None  # names: `odd`, `a_1` and `a_{1}`, are math-verify's to compare
    symbols = sorted(names | other_names, key=str)
    hard = any(side.has(sympy.Float, sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative) for side in sides)
    try:
        for signs in SIGNS:
            point = {symbol: signs[n % 2] * sympy.Rational(POINT + STEP * n, POINT_SCALE) for n, symbol in enumerate(symbols)}
            a, b = (side.evalf(NUMERIC_PRECISION if hard else GUARD_DIGITS, subs=point) for side in sides)
            size = max(abs(a), abs(b))
            if complex(abs(a - b)).real > PLAIN_DIFFERENCE * max(1.0, complex(size).real):
                return False
            if hard or not symbols or not bool(abs(a - b) <= EXACT_TOLERANCE * size):
                return None
    except (MemoryError, RecursionError):
        raise
    except Exception:  # no number comes out: a limit, an unknown function, a division by zero
        return None
    return True


def _numbers_agree(left: Any, right: Any) -> bool:
    """Whether two expressions that were called equal are close, if they are numbers."""
    import sympy

    if isinstance(left, sympy.Eq) != isinstance(right, sympy.Eq):
        left, right = (side.rhs if isinstance(side, sympy.Eq) else side for side in (left, right))
    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)) or left.free_symbols or right.free_symbols:
        return True
    if left == right:
        return True
    tolerance = FLOAT_TOLERANCE if left.has(sympy.Float) or right.has(sympy.Float) else EXACT_TOLERANCE
    try:
        a, b = (sympy.N(side.doit(), GUARD_DIGITS) for side in (left, right))
        if left.has(sympy.UnevaluatedExpr) != right.has(sympy.UnevaluatedExpr):
            return True  # a percentage on one side only: both readings are math-verify's to decide
        return bool(abs(a - b) <= tolerance * max(abs(a), abs(b)))
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return True
