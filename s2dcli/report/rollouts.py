"""Graded rollouts as the page holds them: the scores of all, and the texts of as many problems as there is room for.

Which problems these are depends on their sha256 alone, so they are a fair sample, the same one for every result.
"""

from __future__ import annotations

import json
from bisect import insort
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from s2dcli import stats
from s2dcli.console import printable
from s2dcli.errors import DataError
from s2dcli.files.records import VerdictLine, read_counted, take, take_reward, text_of
from s2dcli.report.collect import Result

HEAD, TAIL = 4000, 2000  # characters that are kept of a longer text's beginning and end
MOST_COMPARED = 12  # results of a column that are compared with each other: 66 pairs
# What JSON leaves as it is, and HTML does not
_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&"})

Sample = list[Any]  # [1 right, 0 wrong or None, truncated, tokens, extracted, text, error], and without a label the reward


def shortened(text: str) -> str:
    """Return a text without its middle if it is long, with control characters made visible."""
    if len(text) > HEAD + TAIL:
        left_out = len(text) - HEAD - TAIL
        text = f"{text[:HEAD]}\n[... {left_out:,} characters are left out here ...]\n{text[-TAIL:]}"
    return printable(text)


def dumps(value: Any) -> str:
    """Return JSON that can stand in a script element: ASCII, without <, > and &."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


class Rollouts:
    """The graded rollouts of several results, read one after another, in memory for what may stand in `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.scores: list[dict[str, Sequence[float]]] = []  # of each result: problem -> its samples' scores
        self.counts: list[int] = []  # of each result's rollouts
        self.seen: set[str] = set()  # problems of any result
        self._used = 0
        self._limit = ""  # problems from this sha256 on are left out; "" while there is room for all
        self._order: list[str] = []  # of the problems that are kept, by sha256
        self._problems: dict[str, dict[str, Any]] = {}  # in the order in which they came
        self._sizes: dict[str, int] = {}

    def read(self, result: Result) -> None:
        """Read a result's graded rollouts, if it has any. Raises DataError."""
        scores, number, count = stats.Scores(), len(self.scores), 0
        if result.graded:
            for line in read_counted(result.graded):
                take_reward(line.record, line.where)
                take({"label": None, **line.record}, "label", (bool, type(None)), line.where)
                problem = take(line.record, "problem_sha256", str, line.where)
                right = scores.add(problem, line.record)
                self.seen.add(problem)
                count += 1
                if not self._limit or problem < self._limit:
                    self._keep(problem, number, line, right)
        self.counts.append(count)
        self.scores.append(scores.by_problem() if scores.meaningful else {})

    def _keep(self, problem: str, number: int, line: VerdictLine, right: bool | None) -> None:
        record = {"finish_reason": "", "extracted": "", "verify_error": "", "answer": "", "prompt": "", **line.record}
        try:
            text = text_of(record["completion"])
            asked = record["prompt"]
            prompt = [["", asked]] if isinstance(asked, str) else [[message["role"], message["content"]] for message in asked]
            about = {"prompt": [[role, shortened(content)] for role, content in prompt], "gold": shortened(record["answer"])}
            about["id"] = printable(str(record.get("problem_id", problem[:12])))
            written = [shortened(value) for value in (record["extracted"], text, record["verify_error"])]
        except (KeyError, TypeError, AttributeError):
            raise DataError("fields of a rollout are missing or of the wrong type", where=line.where) from None
        tokens = record.get("completion_ids")
        counted = tokens if isinstance(tokens, int) else len(tokens) if isinstance(tokens, list) else None
        sample: Sample = [None if right is None else int(right), int(record["finish_reason"] == "length"), counted, *written]
        if right is None and record["reward"] is not None:
            sample.append(record["reward"])
        if problem not in self._problems:
            self._problems[problem] = {**about, "samples": {}}
            self._sizes[problem] = 0
            self._grow(problem, len(dumps(about)))
            insort(self._order, problem)
        self._problems[problem]["samples"].setdefault(number, []).append(sample)
        self._grow(problem, len(dumps(sample)) + 1)
        self.shrink(self.room)

    def _grow(self, problem: str, size: int) -> None:
        self._sizes[problem] += size
        self._used += size

    def shrink(self, room: int) -> None:
        """Leave out problems, those of the largest sha256 first, until the others take at most `room` bytes."""
        while self._used > room and self._order:
            self._limit = self._order.pop()
            self._used -= self._sizes.pop(self._limit)
            del self._problems[self._limit]

    @property
    def shown(self) -> int:
        """Number of problems whose texts are there."""
        return len(self._problems)

    def problems(self) -> list[dict[str, Any]]:
        """Return the problems with their texts: id, prompt, gold and the samples of each result, None where it has none."""
        numbers = range(len(self.scores))
        return [{**about, "samples": [about["samples"].get(number) for number in numbers]} for about in self._problems.values()]

    def differences(self, results: Sequence[Result]) -> dict[str, dict[str, Any]]:
        """Return the paired differences of results that share a column, "A,B" -> what `s2d compare A B` finds."""
        columns: dict[Any, list[int]] = {}
        for number, result in enumerate(results):
            if self.scores[number]:
                columns.setdefault(result.column, []).append(number)
        found = {}
        for numbers in columns.values():
            for a, b in permutations(numbers[:MOST_COMPARED], 2):
                if f"{b},{a}" in found:
                    found[f"{a},{b}"] = _swapped(found[f"{b},{a}"])
                else:
                    try:
                        found[f"{a},{b}"] = stats.paired_difference(self.scores[a], self.scores[b])
                    except ValueError as error:  # no problem in both, or unequal numbers of samples
                        found[f"{a},{b}"] = {"impossible": str(error)}
        return found


def _swapped(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the difference A - B from that of B - A."""
    if "impossible" in found:
        return dict(found)
    ends = found["ci95"] and [-end for end in reversed(found["ci95"])]
    sides = {"a": found["b"], "b": found["a"], "wins": found["losses"], "losses": found["wins"], "k": found["k"][::-1]}
    return {**found, **sides, "difference": -found["difference"], "t": found["t"] and -found["t"], "ci95": ends}
