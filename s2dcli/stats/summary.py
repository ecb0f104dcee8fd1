"""What an evaluation reports of graded rollouts, as one pass over them finds it: a few numbers a problem are kept, no row.

What is right is the `label` of a graded row; its `reward` is what training maximises, and has a mean of its own.

The spread that is reported is that over problems, for one checkpoint: it says how far the figure
would move with other problems of the same kind, not with another training run.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from s2dcli.errors import DataError
from s2dcli.stats.basic import avg_at_k, mean, pass_at_k, score_interval, standard_error, variance_parts

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # of the completions' lengths; nearest rank
NO_ANSWER = "no answer"  # what `verify_error` says where a completion holds none

Figures = dict[str, Any]


def verdict(reward: float | None) -> bool | None:
    """Return what a reward alone says of an answer: 1 is right, 0 is wrong, and no other number says either."""
    return {0: False, 1: True}.get(reward)


def is_right(record: Mapping[str, Any]) -> bool | None:
    """Return the label of a graded row, or for a file whose grader writes none, the verdict of its reward."""
    return record["label"] if "label" in record else verdict(record["reward"])


class Scores:
    """The score of each sample by problem, from graded rows that come one by one: 1.0 if it is right, else 0.0."""

    def __init__(self) -> None:
        self._by_problem: dict[str, array] = {}
        self._answered: set[str] = set()
        self._unlabelled = 0  # samples with a reward that are neither right nor wrong
        self._right = 0
        self.ungraded = 0  # samples that are neither right nor wrong

    def add(self, problem: str, record: Mapping[str, Any]) -> bool | None:
        """Take one graded row of a problem into account. Returns whether it is right."""
        right, reward = is_right(record), record["reward"]
        scores = self._by_problem.get(problem)
        if scores is None:
            scores = self._by_problem[problem] = array("d")
        scores.append(right is True)
        self._right += right is True
        self.ungraded += right is None
        self._unlabelled += right is None and reward is not None
        if right is not None or reward is not None or record.get("answer") != "":
            self._answered.add(problem)
        return right

    def by_problem(self) -> dict[str, array]:
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
        return not self._unlabelled or self._right > 0


@dataclass(slots=True)
class Tally:
    """What is counted of one problem's samples."""

    problem_sha256: str
    rewards: array = field(default_factory=lambda: array("d"))
    ungraded: int = 0
    no_answer: int = 0
    truncated: int = 0
    right_truncated: int = 0
    tokens: int = 0
    votes: dict[str, int] = field(default_factory=dict)  # of the wrong answers, by their text


class Summary:
    """What an evaluation reports, of graded rollouts that come one by one with the same number of samples each.

    `canonical` brings two ways of writing one answer to the same text, for maj@k.
    """

    def __init__(self, canonical: Callable[[str], str] = str.strip) -> None:
        self._canonical = canonical
        self._scores = Scores()
        self._tallies: dict[str, Tally] = {}
        self._lengths = array("q")
        self._extracted = False  # whether any answer was extracted

    def add(self, record: Mapping[str, Any]) -> None:
        """Take one graded rollout into account."""
        problem, reward, ids = record["problem_id"], record["reward"], record["completion_ids"]
        tokens = ids if isinstance(ids, int) else len(ids)  # records.read_verdicts counts them
        right = self._scores.add(problem, record)
        tally = self._tallies.get(problem)
        if tally is None:
            tally = self._tallies[problem] = Tally(record.get("problem_sha256", ""))
        if reward is not None:
            tally.rewards.append(reward)
        truncated = record["finish_reason"] == "length"
        tally.ungraded += right is None
        tally.truncated += truncated
        tally.right_truncated += truncated and right is True
        tally.tokens += tokens
        self._lengths.append(tokens)
        answer = record.get("extracted", "")
        if answer:
            self._extracted = True
            if not right:
                text = self._canonical(answer)
                tally.votes[text] = tally.votes.get(text, 0) + 1
        elif not right and NO_ANSWER in record.get("verify_error", "").split(": ")[:2]:  # "no answer: ...", "math: no answer: ..."
            tally.no_answer += 1

    def figures(self) -> Figures:
        """Return problems, k (samples per problem), avg_at_k, se, pass_at_k, mean_reward and mean_reward_se (over
        problems, without null rewards), truncated (share that hit the length limit), mean_tokens, ungraded.

        avg_at_k, se and pass_at_k are None where the rewards have no notion of right (`Scores.meaningful`); ungraded
        are the samples without a label, which count as wrong, or there those without a reward, which are left out.
        Raises DataError if problems have no answer, ValueError if there were no rollouts or the sample counts differ.
        """
        scores = self._scores.by_problem()
        average, error = avg_at_k(scores)
        k, samples = len(next(iter(scores.values()))), len(self._lengths)
        rewards = [mean(tally.rewards) for tally in self._tallies.values() if tally.rewards]
        right, graded = self._scores.meaningful, sum(len(tally.rewards) for tally in self._tallies.values())
        return {
            "problems": len(scores),
            "k": k,
            "avg_at_k": average if right else None,
            "se": error if right else None,
            "pass_at_k": self._pass(k)[0] if right else None,
            "mean_reward": mean(rewards) if rewards else None,
            "mean_reward_se": standard_error(rewards) if rewards else None,
            "truncated": sum(tally.truncated for tally in self._tallies.values()) / samples,
            "mean_tokens": sum(self._lengths) / samples,
            "ungraded": self._scores.ungraded if right else samples - graded,
        }

    def report(self) -> Figures:
        """Return the `figures` and what says how sure they are, and of what they are made up. Raises as these do.

        se_over: what the errors are over; ci95 (`basic.score_interval`); se_problems and se_decoding: what the choice of problems
        and the sampling contribute to se, the roots of variance_between / problems and variance_within / (k problems)
        (`basic.variance_parts`); pass: pass@j for j = 1, 2, 4, ..., k, each with its se; maj_at_k and its se; untruncated: the score of
        the samples that ended by themselves, over the problems that have any; ungraded_rate and no_answer_rate,
        shares of the samples; tokens: those of all completions; length: quantiles of theirs, in tokens.
        """
        found = self.figures()
        k, samples = found["k"], len(self._lengths)
        right = [round(sum(scores)) for scores in self._scores.by_problem().values()]
        between, within = variance_parts(right, k)
        known = found["avg_at_k"] is not None
        lengths = sorted(self._lengths)
        more = {
            "se_over": "problems",
            "ci95": score_interval(found["avg_at_k"], found["se"], found["problems"]) if known else None,
            "variance_between": between if known else None,
            "variance_within": within if known else None,
            "se_problems": math.sqrt(between / len(right)) if known and between is not None else None,
            "se_decoding": math.sqrt(within / k / len(right)) if known and within is not None else None,
            "pass": {str(j): dict(zip(("value", "se"), self._pass(j), strict=True)) for j in powers_of_two(k)} if known else None,
            **self._majority(known),
            "untruncated": self._untruncated(k) if known else None,
            "ungraded_rate": found["ungraded"] / samples,
            "no_answer_rate": sum(tally.no_answer for tally in self._tallies.values()) / samples,
            "tokens": sum(self._lengths),
            "length": {f"{share:g}": lengths[max(0, math.ceil(share * samples) - 1)] for share in QUANTILES},
        }
        return {**found, **more}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield what was counted of each problem, in the order in which they came."""
        known = self._scores.meaningful
        for problem, scores in self._scores.by_problem().items():
            tally, right = self._tallies[problem], round(sum(scores))
            yield {
                "problem_id": problem,
                "problem_sha256": tally.problem_sha256,
                "samples": len(scores),
                "right": right if known else None,
                "score": right / len(scores) if known else None,
                "majority": majority_score(right, tally.votes) if known and self._extracted else None,
                "mean_reward": mean(tally.rewards) if tally.rewards else None,
                "ungraded": tally.ungraded,
                "no_answer": tally.no_answer,
                "truncated": tally.truncated,
                "mean_tokens": tally.tokens / len(scores),
            }

    def _pass(self, j: int) -> tuple[float, float]:
        """Return pass@j, the mean over problems of its unbiased estimates, and their standard error."""
        chances: dict[tuple[int, int], float] = {}  # there are few different ones
        values = []
        for scores in self._scores.by_problem().values():
            key = (len(scores), round(sum(scores)))
            if key not in chances:
                chances[key] = pass_at_k(*key, j)
            values.append(chances[key])
        return mean(values), standard_error(values)

    def _majority(self, known: bool) -> Figures:
        if not known or not self._extracted:
            return {"maj_at_k": None, "maj_at_k_se": None}
        scores = self._scores.by_problem()
        values = [majority_score(round(sum(scores[problem])), tally.votes) for problem, tally in self._tallies.items()]
        return {"maj_at_k": mean(values), "maj_at_k_se": standard_error(values)}

    def _untruncated(self, k: int) -> Figures:
        scores = self._scores.by_problem()
        whole = [
            (sum(scores[problem]) - tally.right_truncated) / (k - tally.truncated)
            for problem, tally in self._tallies.items()
            if tally.truncated < k
        ]
        samples = len(self._lengths) - sum(tally.truncated for tally in self._tallies.values())
        score, error = (mean(whole), standard_error(whole)) if whole else (None, None)
        return {"avg_at_k": score, "se": error, "problems": len(whole), "samples": samples}


def powers_of_two(k: int) -> list[int]:
    """Return 1, 2, 4, ... up to k, and k itself."""
    return [*(2**power for power in range(k.bit_length()) if 2**power < k), k]


def majority_score(right: int, votes: Mapping[str, int]) -> float:
    """Return a problem's score in maj@k: 1 if the right answer has most votes, 1 / n if it shares that with n - 1 wrong ones, else 0.

    All right samples vote for one answer, however they write it: the grader found each equal to the gold. Wrong ones vote together
    if their texts are the same. Samples without an answer do not vote.
    """
    most = max(votes.values(), default=0)
    if right == 0 or right < most:
        return 0.0
    return 1 / (1 + sum(count == right for count in votes.values()))


def vote(right: int, wrong: Iterable[str], canonical: Callable[[str], str] = str.strip) -> float:
    """Return the `majority_score` of a problem with so many right samples and these wrong answers."""
    return majority_score(right, Counter(map(canonical, wrong)))


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


def problems_or_samples(figures: Figures) -> str:
    """Answer of a `report`: would more problems or more samples of each make avg@k surer? "" where k = 1 cannot tell."""
    if not figures["se_decoding"] and not figures["se_problems"]:
        return ""
    n, k, between, within = (figures[name] for name in ("problems", "k", "variance_between", "variance_within"))
    variances = (between + within / k, (between + within / k) / 2, between + within / (2 * k), between)  # of a problem's score
    now, problems, samples, floor = (math.sqrt(variance / n) for variance in variances)
    decoding = within / k / variances[0]
    better = "more problems" if decoding < 0.5 else "either"
    return (
        f"more problems or more k: {better}. {decoding:.0%} of the variance is decoding noise: the error of {now:.1%} would be "
        f"{problems:.1%} with twice the problems, {samples:.1%} with twice the k, {floor:.1%} with any k; "
        f"on exactly these problems it is {figures['se_decoding']:.1%}"
    )
