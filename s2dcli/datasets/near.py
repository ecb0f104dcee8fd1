"""Near-duplicates: the same problem reworded or reformatted, which a hash of its text does not find.

Two problems are near-duplicates if the shorter one shares many of its n-grams of words with the longer one, and
one of them has all the numbers of the other. Case, LaTeX's spacing, delimiters, fonts and fractions, brackets,
punctuation and pictures do not count. Plus signs, minus signs and comparisons do.

The constants are a choice between missing and flagging too much, made on public data: 22 paraphrases of AIME 2024
problems (20 found), MATH-500 in other LaTeX between other sentences (472 of 500 found; the others have fewer than
MIN_SHARED n-grams), and pairs that are known to differ: of 4,994 DeepMath problems, cleared of MATH-500 by their
authors, 5 are flagged (2 of them do ask for the same), of GSM8K's 7,473 training problems none against its test set.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from typing import NamedTuple

NGRAM = 4  # words; of the paraphrases, DeepMath: 3 finds 22, flags 12; 5 finds 20, flags none, also of the 2 that are the same
SHARED = 0.4  # of the shorter problem's n-grams; 0.3 finds 22 and flags 10, 0.5 finds 20 and flags none
MIN_SHARED = 6  # n-grams; fewer are a phrase ("determine the number of ways to ..."), unless they are all that both have; 3 flags 13

_PICTURE = re.compile(r"\[asy\].*?(?:\[/asy\]|\Z)", re.DOTALL)
_IN_NUMBERS = re.compile(r"\\!|\{,\}|(?<=\d),(?=\d{3}(?!\d))")  # 10,\!000 and 10{,}000 and 10,000 are 10000
_FRACTION = re.compile(r"\\[dtc]?frac(?:\s*(\d)(\d))?(?![a-z])", re.IGNORECASE)
_LAYOUT = re.compile(r"\\(?:[^a-z]|(?:q?quad|left|right|displaystyle|begin|end|text[a-z]*|math[a-z]*|bigg?[lr]?)(?![a-z]))", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?|[-+=<>!|]")


class Near(NamedTuple):
    """The most similar problem of an index, and the share of the shorter one's n-grams that both have."""

    name: str
    shared: float


def words(text: str) -> list[str]:
    """Return what counts of a problem: words, numbers and signs in lower case."""
    text = _IN_NUMBERS.sub("", _PICTURE.sub(" ", unicodedata.normalize("NFKC", text)))
    return _WORD.findall(_LAYOUT.sub(" ", _FRACTION.sub(r" \1 \2 ", text)).lower())


def _ngrams(of: list[str]) -> set[int]:
    return {hash(tuple(of[start : start + NGRAM])) for start in range(max(1, len(of) - NGRAM + 1))}


def _numbers(of: list[str]) -> Counter[str]:
    return Counter(word for word in of if word[0].isdigit())


class NearIndex:
    """Problems to be recognised again, as an inverted index over their n-grams."""

    def __init__(self) -> None:
        self._places: dict[int, list[int]] = defaultdict(list)  # n-gram -> the problems that have it
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._numbers: list[Counter[str]] = []

    def add(self, text: str, name: str) -> None:
        found = words(text)
        ngrams = _ngrams(found)
        for ngram in ngrams:
            self._places[ngram].append(len(self._names))
        self._names.append(name)
        self._sizes.append(len(ngrams))
        self._numbers.append(_numbers(found))

    def find(self, text: str) -> Near | None:
        """Return the most similar near-duplicate; None if there is none."""
        found = words(text)
        ngrams = _ngrams(found)
        shared: Counter[int] = Counter()
        for ngram in ngrams & self._places.keys():
            shared.update(self._places[ngram])
        numbers = _numbers(found)
        best = None
        for place, count in shared.items():
            share = count / min(len(ngrams), self._sizes[place])
            is_enough = count >= MIN_SHARED or count == len(ngrams) == self._sizes[place]
            if is_enough and share >= max(SHARED, best.shared if best else 0.0):
                theirs = self._numbers[place]
                if numbers <= theirs or theirs <= numbers:
                    best = Near(self._names[place], share)
        return best
