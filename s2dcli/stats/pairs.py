"""Two results on the same problems: their difference, how sure it is, and what it would take to be sure.

All of it is computed from the differences d_i of the problems' mean scores. The problems are the independent observations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from s2dcli.stats.basic import mean, standard_error, variance_parts
from s2dcli.stats.student import POWER, SIGNIFICANT, t_quantile, t_test

Scores = Mapping[str, Sequence[float]]  # problem -> the score of each sample

# Scores are multiples of 1/k: differences between them that are smaller than this are rounding.
ROUNDING = 1e-12
ENUMERATED = 12  # problems up to which all sign patterns of differences that are no multiples of 1/k are tried
EXACT_BYTES = 4e9  # of whole-number arithmetic that an exact p may take: some seconds
MANY = 1_000_000  # degrees of freedom at which Student's t is a normal distribution
DRAWS = 100_000  # sign patterns of a Monte Carlo p, whose standard error is then 0.0007 at p = 0.05
MONTE_CARLO_SEED = 0


def paired_difference(first: Scores, second: Scores) -> dict[str, Any]:
    """Compare two sets of scores problem by problem, over the problems that both have.

    problems; k of each; a and b (avg@k of each); difference (b - a); se, of the differences' mean; t = difference / se and
    p_t, two-sided, from Student's t with problems - 1 degrees of freedom; ci95, the interval of that t; p, two-sided, by
    flipping signs (`sign_flip_test`), and p_method; wins, losses, ties: problems on which b is better, worse, equal;
    detectable: the smallest true difference that is found with POWER; more_problems and more_samples
    (of each problem, on either side): what would make the one seen detectable, 0 if it is, None if no number would or k = 1
    cannot tell; resolved: p < 0.05 and the interval is on one side of zero.

    Where all differences are equal there is no spread to judge by: se is 0, t, p_t, ci95 and detectable are None.
    Pairing takes the spread of the problems' difficulty out of the comparison, so the se is that of either
    average only if the two are unrelated. Raises ValueError if no problem is shared or if the sample counts differ within a set.
    """
    shared = [problem for problem in first if problem in second]
    if not shared:
        raise ValueError("no problem is in both")
    k_a, k_b = (_num_samples(side, scores_of) for side, scores_of in (("A", first), ("B", second)))
    means = [(mean(first[problem]), mean(second[problem])) for problem in shared]
    differences = [b - a for a, b in means]
    spread = max(differences) - min(differences) >= ROUNDING
    difference, error = mean(differences), standard_error(differences) if spread else 0.0
    p, method = sign_flip_test(differences, math.lcm(k_a, k_b))
    found = {
        "problems": len(shared),
        "k": [k_a, k_b],
        "a": mean(a for a, _ in means),
        "b": mean(b for _, b in means),
        "difference": difference,
        "se": error,
        **inference(difference, error, len(shared) - 1),
        "p": p,
        "p_method": method,
        "wins": sum(value > ROUNDING for value in differences),
        "losses": sum(value < -ROUNDING for value in differences),
        "ties": sum(abs(value) <= ROUNDING for value in differences),
        "detectable": detectable(error, len(shared) - 1) if spread else None,
        "more_problems": _more_problems(difference, error, len(shared)) if spread else None,
        "more_samples": _more_samples([(first[name], second[name]) for name in shared], difference, error) if spread else None,
    }
    return {**found, "resolved": is_resolved(found)}


def _num_samples(side: str, scores_of: Scores) -> int:
    (name, k), *_ = ((problem, len(scores)) for problem, scores in scores_of.items())
    for problem, scores in scores_of.items():
        if len(scores) != k:
            raise ValueError(f"problem {problem!r} has {len(scores)} samples in {side}, but problem {name!r} has {k} there")
    return k


def inference(difference: float, error: float, degrees: float) -> dict[str, Any]:
    """Return t, p_t and ci95 of a difference with a standard error of so many degrees of freedom; None where there is no error."""
    if not error:
        return {"t": None, "p_t": None, "ci95": None}
    margin = error * t_quantile(SIGNIFICANT, degrees)
    t = difference / error
    return {"t": t, "p_t": t_test(t, degrees), "ci95": [difference - margin, difference + margin]}


def is_resolved(found: Mapping[str, Any]) -> bool:
    """Whether a comparison tells the two apart: both its p and its interval say so."""
    return found["ci95"] is not None and found["p"] < SIGNIFICANT and (found["ci95"][0] > 0 or found["ci95"][1] < 0)


def sign_flip_test(differences: Sequence[float], denominator: int) -> tuple[float, str]:
    """Return the two-sided p of a sum of differences, and how it was found: exact or monte-carlo.

    Where two results are equally good, each difference d_i is as likely as -d_i. p is the share of the 2^n patterns of signs
    whose sum is at least as far from zero as the one seen. d_i are multiples of 1 / `denominator`, so the number of
    patterns with each sum is a coefficient of the product of (1 + x^|d_i|), which whole numbers hold exactly; where
    that is too much work, DRAWS patterns are drawn, and the one seen counts as one of them.
    """
    steps = [abs(value) * denominator for value in differences if abs(value) > ROUNDING]
    seen = abs(math.fsum(differences)) * denominator
    whole = [round(step) for step in steps]
    if max((abs(a - b) for a, b in zip(steps, whole, strict=True)), default=0.0) < 1e-6:
        width = (len(whole) + 8) // 8  # bytes of a coefficient: at most 2^n
        if len(whole) * sum(whole) * width <= EXACT_BYTES:
            return _exact(whole, round(seen), width), "exact"
    elif len(steps) <= ENUMERATED:
        sums = [0.0]
        for step in steps:
            sums = [total + sign for total in sums for sign in (step, -step)]
        return sum(abs(total) >= seen - 1e-9 for total in sums) / len(sums), "exact"
    return _drawn(steps, seen), "monte-carlo"


def _exact(steps: Sequence[int], seen: int, width: int) -> float:
    """Return the share of sign patterns of whole steps with |sum| >= seen; a sum is total - 2 x (what is turned negative)."""
    total, patterns = sum(steps), 1
    for step in steps:
        patterns += patterns << (8 * width * step)
    content = patterns.to_bytes((total + 1) * width, "little")
    negative = (total - seen) // 2  # at most this much turned negative: a sum of at least `seen`
    tail = sum(int.from_bytes(content[at * width : (at + 1) * width], "little") for at in range(negative + 1))
    return 1.0 if seen == 0 else 2 * tail / 2 ** len(steps)


def _drawn(steps: Sequence[float], seen: float) -> float:
    import numpy as np  # not for every comparison

    draw = np.random.default_rng(MONTE_CARLO_SEED)
    values, extreme, rows = np.asarray(steps), 0, max(1, 2**22 // len(steps))
    for start in range(0, DRAWS, rows):
        signs = draw.integers(0, 2, (min(rows, DRAWS - start), len(steps)), dtype=np.int8)
        extreme += int((np.abs(2 * (signs @ values) - values.sum()) >= seen - 1e-9).sum())
    return (extreme + 1) / (DRAWS + 1)


def detectable(error: float, degrees: float) -> float:
    """Return the smallest true difference that a two-sided test at 5 % finds with POWER: (t_0.975 + t_0.8) x se."""
    return error * _reach(degrees)


def _reach(degrees: float) -> float:
    return t_quantile(SIGNIFICANT, degrees) + t_quantile(2 * (1 - POWER), degrees)


def _more_problems(difference: float, error: float, problems: int) -> int | None:
    """Return how many further problems like these would make the difference seen detectable; None if it is zero."""
    if abs(difference) < ROUNDING:
        return None
    deviation = error * math.sqrt(problems)
    # With as many problems as make Student's t a normal one fewer would do: no more are needed than a few beyond that
    needed = max(problems, math.floor((_reach(MANY) * deviation / difference) ** 2))
    while detectable(deviation / math.sqrt(needed), needed - 1) > abs(difference):
        needed += 1
    return needed - problems


def _more_samples(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], difference: float, error: float) -> int | None:
    """Return how many further samples of each problem on either side would make the difference seen detectable.

    None if k = 1 does not tell decoding noise from problems, or if the problems' own spread is too large for any number.
    """
    k_a, k_b = (len(scores) for scores in pairs[0])
    within = [variance_parts([round(math.fsum(pair[side])) for pair in pairs], k).within for side, k in enumerate((k_a, k_b))]
    if abs(difference) < ROUNDING or None in within:
        return None
    problems, target = len(pairs), abs(difference) / _reach(len(pairs) - 1)
    if error <= target:
        return 0
    between = max(0.0, error**2 * problems - within[0] / k_a - within[1] / k_b)
    room = target**2 * problems - between  # what decoding may contribute
    if room <= 0:
        return None
    more = 0
    while within[0] / (k_a + more) + within[1] / (k_b + more) > room:  # doubling, then back by halves
        more = max(1, 2 * more)
    step = more // 2
    while step:
        if within[0] / (k_a + more - step) + within[1] / (k_b + more - step) <= room:
            more -= step
        step //= 2
    return more


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number: Holm's step-down procedure (1979), which keeps the chance of any false claim at 5 %."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected
