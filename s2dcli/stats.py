"""avg@k, pass@k and their standard errors. All rates are fractions between 0 and 1.

What is right is the `label` of a graded row; its `reward` is what training maximises, and has a mean of its own.

The spread that is reported is that over problems, for one checkpoint: it says how far the figure
would move with other problems of the same kind, not with another training run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from s2dcli.errors import DataError

# Scores are multiples of 1/k: differences between them that are smaller than this are rounding.
ROUNDING = 1e-12

SIGNIFICANT = 0.05  # p below which a difference is more than chance; the interval is that of 1 - this

Figures = dict[str, float | int | None]


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


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22, Lentz's method)."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the complement converges fast
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    d = 1.0 / (1.0 - (a + b) * x / (a + 1))
    c, fraction, m, step = 1.0, d, 0, 0.0
    while abs(step - 1.0) > 1e-15 and m < 100_000:
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        step = 1.0
        for coefficient in (even, odd):
            d = 1.0 / (1.0 + coefficient * d)
            c = 1.0 + coefficient / c
            step *= c * d
        fraction *= step
    return front * fraction


def t_test(t: float, degrees: int) -> float:
    """Return the two-sided p of Student's t: the chance of a |t| at least as large where there is no difference."""
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def t_quantile(p: float, degrees: int) -> float:
    """Return the t whose two-sided p is `p`, by bisection."""
    low, high = 0.0, 1.0
    while t_test(high, degrees) > p:
        high *= 2
    while high - low > ROUNDING * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_test(middle, degrees) > p else (low, middle)
    return high


def paired_difference(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> Figures:
    """Compare two sets of scores problem by problem, over the problems that both have.

    problems, a and b (avg@k of each there), difference (b - a: the mean over problems of the difference of
    their mean scores), se (of that mean; problems are the independent observations), t = difference / se,
    p, two-sided, from Student's t with problems - 1 degrees of freedom, and low and high, the 95 % confidence
    interval of the difference. Where all differences are equal there is no spread to judge by: se is 0 and the
    last four are None. Pairing takes the spread of the problems' difficulty out of the comparison, so the se is
    that of either average only if the two are unrelated. Raises ValueError if no problem is shared or if the
    sample counts differ, within a set or between the two.
    """
    shared = [problem for problem in first if problem in second]
    if not shared:
        raise ValueError("no problem is in both")
    (name, k), *_ = ((problem, len(scores)) for problem, scores in first.items())
    for side, scores_of in (("A", first), ("B", second)):
        for problem, scores in scores_of.items():
            if len(scores) != k:
                raise ValueError(f"problem {problem!r} has {len(scores)} samples in {side}, but problem {name!r} has {k} in A")
    means = [(mean(first[problem]), mean(second[problem])) for problem in shared]
    differences = [b - a for a, b in means]
    difference, error = mean(differences), standard_error(differences)
    t = p = low = high = None
    if max(differences) - min(differences) < ROUNDING:
        error = 0.0
    else:
        t = difference / error
        p = t_test(t, len(shared) - 1)
        margin = error * t_quantile(SIGNIFICANT, len(shared) - 1)
        low, high = difference - margin, difference + margin
    return {
        "problems": len(shared),
        "a": mean(a for a, _ in means),
        "b": mean(b for _, b in means),
        "difference": difference,
        "se": error,
        "t": t,
        "p": p,
        "low": low,
        "high": high,
    }


def verdict(reward: float | None) -> bool | None:
    """Return what a reward alone says of an answer: 1 is right, 0 is wrong, and no other number says either."""
    return {0: False, 1: True}.get(reward)


def is_right(record: Mapping[str, Any]) -> bool | None:
    """Return the label of a graded row, or for a file whose grader writes none, the verdict of its reward."""
    return record["label"] if "label" in record else verdict(record["reward"])


class Scores:
    """The score of each sample by problem, from graded rows that come one by one: 1.0 if it is right, else 0.0."""

    def __init__(self) -> None:
        self._by_problem: dict[str, list[float]] = {}
        self._answered: set[str] = set()
        self._unlabelled = 0  # samples with a reward that are neither right nor wrong
        self.ungraded = 0  # samples that are neither right nor wrong

    def add(self, problem: str, record: Mapping[str, Any]) -> None:
        """Take one graded row of a problem into account."""
        right, reward = is_right(record), record["reward"]
        self._by_problem.setdefault(problem, []).append(float(right is True))
        self.ungraded += right is None
        self._unlabelled += right is None and reward is not None
        if right is not None or reward is not None or record.get("answer") != "":
            self._answered.add(problem)

    def by_problem(self) -> dict[str, list[float]]:
        """Return the scores. Raises DataError if problems have no answer to grade against."""
        unanswered = [problem for problem in self._by_problem if problem not in self._answered]
        if unanswered:
            raise DataError(
                f"{len(unanswered)} of {len(self._by_problem)} problems have no answer to grade against, the first is {unanswered[0]!r}",
                hint="measure on labelled problems, or grade with a reward that needs no answer: --reward python:MODULE:FUNCTION",
            )
        return self._by_problem

    @property
    def meaningful(self) -> bool:
        """Whether the rewards have a notion of right: not where samples have a reward but no label, and none is right."""
        return not self._unlabelled or any(1.0 in scores for scores in self._by_problem.values())


class Summary:
    """What an evaluation reports, of graded rollouts that come one by one with the same number of samples each."""

    def __init__(self) -> None:
        self._scores = Scores()
        self._rewards: dict[str, list[float]] = {}  # by problem_id
        self._truncated: list[float] = []
        self._tokens: list[float] = []

    def add(self, record: Mapping[str, Any]) -> None:
        """Take one graded rollout into account."""
        self._scores.add(record["problem_id"], record)
        if record["reward"] is not None:
            self._rewards.setdefault(record["problem_id"], []).append(record["reward"])
        self._truncated.append(float(record["finish_reason"] == "length"))
        self._tokens.append(float(len(record["completion_ids"])))

    def figures(self) -> Figures:
        """Return problems, k (samples per problem), avg_at_k, se, pass_at_k, mean_reward and mean_reward_se (over
        problems, without null rewards), truncated (share that hit the length limit), mean_tokens, ungraded.

        avg_at_k, se and pass_at_k are None where the rewards have no notion of right (`Scores.meaningful`); ungraded
        are the samples without a label, which count as wrong, or there those without a reward, which are left out.
        Raises DataError if problems have no answer, ValueError if there were no rollouts or the sample counts differ.
        """
        scores = self._scores.by_problem()
        average, error = avg_at_k(scores)
        k = len(next(iter(scores.values())))
        solved = mean(pass_at_k(k, values.count(1.0), k) for values in scores.values())
        rewards = [mean(values) for values in self._rewards.values()]
        right, graded = self._scores.meaningful, sum(map(len, self._rewards.values()))
        return {
            "problems": len(scores),
            "k": k,
            "avg_at_k": average if right else None,
            "se": error if right else None,
            "pass_at_k": solved if right else None,
            "mean_reward": mean(rewards) if rewards else None,
            "mean_reward_se": standard_error(rewards) if rewards else None,
            "truncated": mean(self._truncated),
            "mean_tokens": mean(self._tokens),
            "ungraded": self._scores.ungraded if right else len(self._tokens) - graded,
        }


def summarize(graded: Iterable[Mapping[str, Any]]) -> Figures:
    """Return the `Summary.figures` of graded rollouts."""
    summary = Summary()
    for record in graded:
        summary.add(record)
    return summary.figures()


NO_NOTION = "the rewards have no notion of right: samples have a reward but no label, and none is labelled right"
NO_NOTION_HINT = "grade with --reward math=0 as well: it labels the samples and leaves the reward as it is"


def cautions(figures: Figures) -> Iterator[str]:
    """Yield what the reader of an evaluation has to know about its figures."""
    if figures["avg_at_k"] is None:
        yield f"{NO_NOTION}; avg@k and pass@k are not known; {NO_NOTION_HINT}"
    if ungraded := figures["ungraded"]:
        counted = "and are left out" if figures["avg_at_k"] is None else "as right or wrong and count as wrong"
        yield f"{ungraded} answers could not be graded {counted}"


def in_words(figures: Figures) -> str:
    """Return an evaluation's main figures as one line."""
    reward = f"mean reward {figures['mean_reward']:.4g} ± {figures['mean_reward_se']:.2g}" if figures["mean_reward"] is not None else ""
    average = f"avg@{figures['k']} {figures['avg_at_k']:.1%} ± {figures['se']:.1%}" if figures["avg_at_k"] is not None else ""
    shown = ", ".join(filter(None, (average, "" if figures["mean_reward"] == figures["avg_at_k"] else reward)))
    return f"{shown} over {figures['problems']} problems; {figures['truncated']:.1%} truncated"
