r"""What is right, what is wrong, and what is neither."""

import pytest

from s2dcli.grade import answer


def verdict(gold, completion, judge=answer.is_right, lenient=False, thinking=False):
    return answer.grade(gold, completion, thinking, judge=judge, lenient=lenient, progress=lambda *_: None)


RIGHT = [
    (r"\frac{1}{x-1}-\frac{1}{x+1}", r"\frac{2}{x^2-1}"), (r"\sin(2x)", r"2\sin(x)\cos(x)"),
    ("B", "b"), ("C", "(c)"),
    ("(100,200)", "(100, 200)"), ("100, 200", "200, 100"), (r"\{100,200\}", "200, 100"), ("1,234", "1234"), ("12,345.5", "12345.5"),
    ("1,234", r"{1,234}"), ("1,234", r"1,234\text{ cm}"),
    ("7", "7"), ("7", "7.0"), ("7", "+7"), ("-7", "−7"), ("7", "007"), ("7", "７"), ("70", "7\u200b0"), ("7", "$7$"),
    ("7", r"\(7\)"), ("7", "{7}"), ("7", "(7)"), ("7", "((((7))))"), ("1200", "1,200"), ("1200", "1{,}200"),
    ("1200", r"1\,200"), ("1200", "1 200"), ("1234567", r"1,\!234,\!567"), ("0.5", ".5"), ("1/2", "0.5"),
    (r"\frac12", "1/2"), (r"\frac{1}{2}", r"\dfrac{2}{4}"), ("2.5", r"2\frac{1}{2}"), ("-2.5", r"-2\frac12"),
    ("0.003", r"3\times 10^{-3}"), ("5000", "5e3"), ("15%", r"15\%"), ("15", r"15\%"), ("0.15", r"15\%"),
    ("15", r"15\text{ cm}"), ("15", r"15\text{ cm}^2"), (r"15\mbox{ cm}", "15"), (r"45^\circ", "45"), (r"\$15", "15"),
    ("x=3", "3"), ("3", "x = 3"), ("3", "f(2) = 3"), (r"\sqrt{8}", r"2\sqrt{2}"), ("(x+1)^2", "x^2+2x+1"), ("1,2", "2, 1"),
    ("1,2", r"\{2,1\}"), ("1,2", r"1\text{ and }2"), ("(1,2)", r"\left( 1, 2 \right)"), ("(0.5,2)", r"(\frac12, 2)"),
    (r"[0,\infty)", r"[0, +\infty)"), (r"1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2"), (r"\text{even}", "even"),
    ("even", r"\text{Even}"), ("B", "(B)"), ("(B)", r"\text{B}"), ("B", "B. nine"), ("x<3", "3>x"),
    (r"x \in [1,2]", "[1,2]"), (r"\frac{1}{0}", r"\frac{1}{0}"), ("1101_2", "1101_{2}"), ("1101_2", "1101"),
    (r"\boxed{5}", "5"), ("10^{400}", "10^{400}"), ("1" * 5000, "1" * 5000), (r"\tan^2 y+1", r"\sec^2 y"),
    ("3:2", r"\frac{3}{2}"), ("f(x)=2x", "f(y)=2y"),
]  # fmt: skip

WRONG = [
    ("x", r"\sqrt{x^2}"), (r"2\ln x", r"\ln(x^2)+1"), (r"\sin x", r"\cos x"), ("x^3", "x^{3.0001}"),
    ("(100,200)", "(200,100)"), ("1, 234", "1234"), ("(100,200)", "100200"), ("2^{10}", "2^{11}"), (r"2\frac12", "1"),
    (r"\frac{1}{2}ab", r"\frac{1}{2}a"),
    ("7", "8"), ("7", "70"), ("7", "-7"), ("7", "7x"), ("7", "x+7"), ("7", "6=7"), ("7", "x=6=7"),
    ("7", "(-\\infty,\\infty)"), ("7", "7,8"), ("7,7", "7"), ("7", "7,7"), ("1/3", "0.333333"), ("0.3333333", "0.333333"),
    ("12345678901234567891", "12345678901234567890"), (r"2^{-80}", r"2^{-81}"), ("0", r"10^{-30}"),
    (r"\frac{1}{50!}", r"\frac{1}{51!}"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("1,2", "1,3"), ("1,2,3", "1,2"),
    (r"x^2+1", r"y^2+1"), (r"x+1", "x-1"), (r"\pi", "3.14159"), (r"1-\frac{1}{e}", r"1+\frac{1}{e}"), ("1101_2", "1101_3"),
    ("1235", r"1\,234"), ("235", r"1\,234"), ("B", "C"), ("(B)", "(A) and not (B)"), (r"\text{even}", "odd"),
    ("even", r"\text{not even}"), ("15%", "1500"), ("10", r"0.1\%"), (r"60^\circ", r"\frac{\pi}{4}"), ("4", r"4\sqrt(2)"),
    ("5", r"\frac{5}{0}"), ("x=3", "y=3"), ("5", "{}"), ("3", "3!"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "found"), RIGHT)
def test_right(gold, found):
    assert verdict(gold, f"\\boxed{{{found}}}").score == 1.0


@pytest.mark.parametrize(("gold", "found"), WRONG)
def test_wrong(gold, found):
    graded = verdict(gold, f"\\boxed{{{found}}}")
    assert graded.score == 0.0


@pytest.mark.parametrize(
    "found",
    [
        "9^{9^{9}}",
        "2^{99999999}",
        "1.5^{100000000}",
        "1e99999999",
        "99999999!",
        "((9!)!)!",
        r"\binom{99999999}{5}",
        r"\sum_{k=1}^{99999999} k",
        r"\frac{1}{1+" * 200 + "1" + "}" * 200,
        "x+" * 3000 + "x",
        "7" * 3000 + "x",
        r"\begin{pmatrix}" + "&".join("1" * 200) + r"\end{pmatrix}",
    ],
)
def test_what_is_too_large_is_refused_and_scores_zero(found):
    graded = verdict("5", f"\\boxed{{{found}}}")
    assert graded.score == 0.0
    assert graded.error.startswith(answer.REFUSED)


def test_harmless_depth_and_signs_are_seen_through():
    assert verdict("3", "\\boxed{" + "(" * 3000 + "3" + ")" * 3000 + "}").score == 1.0
    assert verdict("3", "\\boxed{" + "{" * 20000 + "3" + "}" * 20000 + "}").score == 1.0
    assert verdict("3", "\\boxed{" + "-" * 4000 + "3}").score == 1.0
    assert verdict("3", "\\boxed{" + "-" * 4001 + "3}").score == 0.0
    assert verdict("3", "\\" * 50000 + "boxed{3}").score == 1.0


def test_without_a_gold_answer_there_is_no_verdict():
    assert verdict("", r"\boxed{5}") == (None, "5", answer.GOLD_MISSING) or verdict("", r"\boxed{5}").score is None
    assert verdict("  ", "no box").error == answer.GOLD_MISSING
    unread = verdict(r"\frac{1}{", r"\boxed{5}")
    assert unread.score is None
    assert unread.error.startswith(answer.GOLD_UNPARSABLE)
    assert verdict(r"\frac{1}{", "no box").score is None
    assert verdict("9^{9^{9}}", r"\boxed{5}").error.startswith(answer.GOLD_UNPARSABLE)


def test_without_an_answer_the_score_is_zero_and_says_so():
    for completion in ("five", r"\boxed{}", r"<think> \boxed{5}"):
        graded = verdict("5", completion)
        assert graded.score == 0.0
        assert graded.error.startswith(answer.NO_ANSWER)
    assert verdict("5", r"\boxed{5}", thinking=True).score == 0.0


def test_a_wrong_answer_is_no_error():
    assert verdict("5", r"\boxed{6}") == (0.0, "6", "")


def test_exact_compares_letters():
    assert verdict("x+1", r"\boxed{x + 1}", judge=answer.is_same).score == 1.0
    assert verdict("x+1", r"\boxed{1+x}", judge=answer.is_same).score == 0.0
    assert verdict(r"\frac{1}{", r"\boxed{5}", judge=answer.is_same).score == 0.0


def test_what_was_extracted_is_bounded():
    assert len(verdict("5", "\\boxed{" + "9" * 10**6 + "}").extracted) < 2000


def test_progress_is_told_once_the_gold_answer_is_understood():
    told = []
    answer.grade("5", r"\boxed{\sqrt{26}}", False, judge=answer.is_right, lenient=False, progress=lambda *note: told.append(note))
    assert told == [(True, r"\sqrt{26}")]
    told.clear()
    answer.grade(r"\frac{3}{", r"\boxed{6}", False, judge=answer.is_right, lenient=False, progress=lambda *note: told.append(note))
    assert told == []
