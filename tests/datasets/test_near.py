"""Near-duplicates: what is found again, and what is another problem."""

import random
import time

import pytest

from s2dcli.datasets.near import NearIndex, words

CHIPS = (
    "There is a collection of $25$ indistinguishable white chips and $25$ indistinguishable black chips. Find the number of ways to "
    "place some of these chips in the $25$ unit cells of a $5\\times5$ grid such that each cell contains at most one chip."
)
LOGARITHMS = (
    "There exist real numbers $x$ and $y$, both greater than 1, such that "
    "$\\log_x\\left(y^x\\right)=\\log_y\\left(x^{4y}\\right)=10$. Find $xy$."
)


def near(one: str, other: str) -> bool:
    index = NearIndex()
    index.add("How many positive divisors does 196 have, and how many of them are odd and less than 30?", "another")
    index.add(one, "this")
    found = index.find(other)
    return found is not None and found.name == "this"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # plain text for LaTeX, another way to ask
        (LOGARITHMS, "Let x and y be real numbers, both greater than 1, such that log_x(y^x) = log_y(x^(4y)) = 10. What is xy?"),
        # spacing, fractions, delimiters, case
        (
            r"Evaluate $\dfrac{1}{2}\left(3+\sqrt{12}\right)\,+\,\tfrac14$ to 2 decimal places.",
            r"EVALUATE \(\frac12 ( 3+ \sqrt{12} ) + \frac{1}{4}\) TO 2 DECIMAL PLACES",
        ),
        # sentences in another order, an instruction added
        (CHIPS, "Solve this. " + CHIPS.replace("There is a collection of", "Take").replace("$", "") + " Write your answer in a box."),
        ("Find $x^2 + 10{,}000$ if $x = 7$.", "find x\u00b2 + 10,000 if x = 7"),
        ("Simplify $\\sqrt{242}$.", "simplify \\(\\sqrt{ 242}\\)"),
    ],
)
def test_reworded_and_reformatted_problems_are_found(one, other):
    assert near(one, other)
    assert near(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # one template, other numbers
        (
            "A train travels 360 miles in 3 hours. At the same rate, how many additional hours would it take to travel 240 miles?",
            "A plane travels 1200 miles in 3 hours. At the same rate, how many additional hours would it take to travel 2000 miles?",
        ),
        (CHIPS, CHIPS.replace("25", "36")),
        # a common phrase
        (
            "Determine the number of ways to arrange the letters of the word ELLIPSE.",
            "Determine the number of ways to arrange the numbers 0, 0, 1, 1 such that no two consecutive integers are the same.",
        ),
        # too short to be recognised within another problem
        (
            r"Compute $\sin 120^\circ$.",
            r"Find $\sin 20^\circ \sin 40^\circ \sin 60^\circ \sin 80^\circ \sin 100^\circ \sin 120^\circ$.",
        ),
        ("Simplify $\\sqrt{242}$.", "Simplify $\\sqrt{24}$."),
    ],
)
def test_other_problems_are_not(one, other):
    assert not near(one, other)
    assert not near(other, one)


def test_pictures_and_layout_are_no_words():
    assert words(r"Find $\text{area}\,[ABC]$. [asy] draw((0,0)--(3,4)); [/asy]") == ["find", "area", "abc"]


def test_the_most_similar_problem_is_named():
    index = NearIndex()
    index.add(CHIPS.replace("unit cells", "small squares"), "far")
    index.add(CHIPS, "same")
    assert index.find(CHIPS.lower()) == ("same", 1.0)


def test_a_large_set_takes_seconds():
    draw = random.Random(0)
    texts = [
        " ".join(f"w{'abcdefgh'[draw.randrange(8)]}{'xyz'[draw.randrange(3)]} {draw.randrange(9)}" for _ in range(40)) for _ in range(5000)
    ]
    index = NearIndex()
    for text in texts[:500]:
        index.add(text, text)
    start = time.monotonic()
    assert [text for text in texts if index.find(text)] == texts[:500]
    assert time.monotonic() - start < 20
