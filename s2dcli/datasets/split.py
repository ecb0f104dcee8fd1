"""Disjoint random parts of the problems: `--split 1H=0.5,2H=0.5`."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction
from typing import NamedTuple

from s2dcli import console
from s2dcli.errors import UsageError
from s2dcli.files.records import Problem, sha256_text


class Part(NamedTuple):
    """One part of a split: a share of all problems, or a number of them."""

    name: str
    size: Fraction | int


def parse_split(text: str) -> list[Part]:
    """Parse `--split`. Raises UsageError on what is no list of NAME=SHARE or NAME=COUNT."""
    example = "e.g. --split 1H=0.5,2H=0.5 or --split train=512,test=200"
    parts = []
    for item in text.split(","):
        name, equals, size = (piece.strip() for piece in item.partition("="))
        if not equals or not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(f"--split: {item!r} is not NAME=SHARE or NAME=COUNT", hint=example)
        try:
            value = int(size) if re.fullmatch(r"[0-9]+", size) else Fraction(size)
        except (ValueError, ZeroDivisionError):
            raise UsageError(f"--split: {size!r} is neither a share nor a count", hint=example) from None
        if value <= 0 or (isinstance(value, Fraction) and value > 1):
            raise UsageError(f"--split: {name} = {size} is neither a share between 0 and 1 nor a count", hint=example)
        parts.append(Part(name, value))
    if len({part.name.lower() for part in parts}) < len(parts):
        raise UsageError("--split names a part twice", hint=example)
    shares = [part.size for part in parts if isinstance(part.size, Fraction)]
    if 0 < len(shares) < len(parts):
        raise UsageError("--split mixes shares and counts", hint="a share is of all problems: write 1.0 for all of them, 1 for one")
    if sum(shares) > 1:
        raise UsageError(f"--split: the shares add up to {float(sum(shares)):g}, more than 1", hint=example)
    return parts


def divide(problems: list[Problem], parts: list[Part], seed: int) -> list[list[Problem]]:
    """Cut the problems into disjoint random parts, each in the order of the sources.

    Problems are drawn in the order of sha256(seed, problem), so that a part depends on the seed and on
    which problems there are, not on their order or on a library's shuffle. Raises UsageError if
    there are too few.
    """
    drawn = sorted(range(len(problems)), key=lambda i: sha256_text(f"{seed}\n{problems[i].problem_sha256}"))
    if isinstance(parts[0].size, int):
        sizes = [int(part.size) for part in parts]
        if sum(sizes) > len(problems):
            raise UsageError(f"--split asks for {sum(sizes)} problems, there are {len(problems)}")
    else:
        # Rounding the boundaries, not the sizes, gives every problem away when the shares add up to 1.
        bounds = [round(sum(part.size for part in parts[:count]) * len(problems)) for count in range(len(parts) + 1)]
        sizes = [end - start for start, end in itertools.pairwise(bounds)]
    if 0 in sizes:
        raise UsageError(f"--split leaves nothing for {parts[sizes.index(0)].name}: there are {len(problems)} problems")
    divided, start = [], 0
    for size in sizes:
        divided.append([problems[i] for i in sorted(drawn[start : start + size])])
        start += size
    if start < len(problems):
        console.info(f"{len(problems) - start} problems are in no part of the split")
    return divided
