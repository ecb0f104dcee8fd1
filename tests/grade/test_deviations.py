"""The table of deliberate deviations from math-verify, row by row."""

import logging

import deviations
import pytest

from s2dcli.grade import answer


def math_verify_says(gold: str, completion: str) -> bool:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(completion)))


@pytest.mark.parametrize("row", deviations.TABLE, ids=lambda row: f"{row.gold}|{row.completion}")
def test_verdicts_are_as_the_table_says(row):
    verdict = answer.grade(row.gold, row.completion, False, judge=answer.MATH, lenient=False, progress=lambda *_: None)
    assert verdict.score == float(row.here)
    assert math_verify_says(row.gold, row.completion) is row.math_verify
