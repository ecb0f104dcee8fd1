"""avg@k, pass@k and their standard errors. All rates are fractions between 0 and 1.

The spread that is reported is that over problems, for one checkpoint: it says how far the figure
would move with other problems of the same kind, not with another training run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean. Raises ValueError if there are no values."""
    values = list(values)
    if not values:
        raise ValueError("the mean of no values")
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean: sample standard deviation (n - 1) / sqrt(n).

    One value has no spread to estimate it from; the result is then 0.0, since JSON has no NaN.
    Raises ValueError if there are no values.
    """
    centre = mean(values)
    if len(values) == 1:
        return 0.0
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def avg_at_k(scores_by_problem: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Return avg@k and its standard error over problems.

    A problem's score is the mean of its k samples (1.0 right, 0.0 wrong), avg@k the mean over
    problems; the standard error is that of the problems' scores, so that the k samples of one
    problem are never counted as k independent observations. With a single problem it is 0.0,
    see `standard_error`. Raises ValueError, naming the problem, if the sample counts differ.
    """
    if not scores_by_problem:
        raise ValueError("no problems were scored")
    first, num_samples = next((problem, len(scores)) for problem, scores in scores_by_problem.items())
    for problem, scores in scores_by_problem.items():
        if not scores:
            raise ValueError(f"problem {problem!r} has no samples")
        if len(scores) != num_samples:
            raise ValueError(f"problem {problem!r} has {len(scores)} samples, but problem {first!r} has {num_samples}")
    means = [mean(scores) for scores in scores_by_problem.values()]
    return mean(means), standard_error(means)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of the chance that at least one of k samples is right.

    1 - C(n - c, k) / C(n, k) for c right ones among n samples: the share of all subsets of size k
    that hold a right one (Chen et al. 2021, arXiv 2107.03374, Eq. 1). Computed with whole numbers.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} correct among {num_samples} samples")
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} cannot be estimated from {num_samples} samples")
    subsets = math.comb(num_samples, k)
    return (subsets - math.comb(num_samples - num_correct, k)) / subsets


def paired_difference(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> dict[str, float | int | None]:
    """Compare two sets of scores problem by problem, over the problems that both have.

    problems, a and b (avg@k of each there), difference (b - a: the mean over problems of the difference of
    their mean scores), se (of that mean; problems are the independent observations), z = difference / se,
    and p, two-sided, from the normal distribution. Where all differences are equal, se is 0 and z and p
    are None. Pairing takes the spread of the problems' difficulty out of the comparison, so the se is
    that of either average only if the two are unrelated. Raises ValueError if no problem is shared.
    """
    shared = [problem for problem in first if problem in second]
    if not shared:
        raise ValueError("no problem is in both")
    means = [(mean(first[problem]), mean(second[problem])) for problem in shared]
    differences = [b - a for a, b in means]
    difference, error = mean(differences), standard_error(differences)
    z = difference / error if error else None
    return {
        "problems": len(shared),
        "a": mean(a for a, _ in means),
        "b": mean(b for _, b in means),
        "difference": difference,
        "se": error,
        "z": z,
        "p": None if z is None else math.erfc(abs(z) / math.sqrt(2)),
    }


# A reward of at least this much counts as solved where a yes or no is needed (pass@k).
SOLVED = 1.0


class Summary:
    """What an evaluation reports, of graded rollouts that come one by one with the same number of samples each."""

    def __init__(self) -> None:
        self._scores: dict[str, list[float]] = {}  # by problem_id
        self._truncated: list[float] = []
        self._tokens: list[float] = []
        self._ungraded = 0

    def add(self, record: Mapping) -> None:
        """Take one graded rollout into account; a null reward counts as wrong."""
        reward = record["reward"]
        self._ungraded += reward is None
        self._scores.setdefault(record["problem_id"], []).append(reward or 0.0)
        self._truncated.append(float(record["finish_reason"] == "length"))
        self._tokens.append(float(len(record["completion_ids"])))

    def figures(self) -> dict[str, float | int]:
        """Return problems, k, avg_at_k, se, pass_at_k (k the samples per problem), truncated (share that hit the
        length limit), mean_tokens, ungraded.

        Raises ValueError if there were no rollouts or the sample counts differ.
        """
        average, error = avg_at_k(self._scores)
        k = len(next(iter(self._scores.values())))
        solved = [pass_at_k(k, sum(score >= SOLVED for score in values), k) for values in self._scores.values()]
        return {
            "problems": len(self._scores),
            "k": k,
            "avg_at_k": average,
            "se": error,
            "pass_at_k": mean(solved),
            "truncated": mean(self._truncated),
            "mean_tokens": mean(self._tokens),
            "ungraded": self._ungraded,
        }


def summarize(graded: Iterable[Mapping]) -> dict[str, float | int]:
    """Return the `Summary.figures` of graded rollouts."""
    summary = Summary()
    for record in graded:
        summary.add(record)
    return summary.figures()
