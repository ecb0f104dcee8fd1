r"""Grade completions against their gold answers: `s2d verify`.

Every JSON object in gives one line out, in order, as soon as it and its predecessors are graded,
with six fields added: `reward` (float or null), `rewards` (each reward by name), `label` (right or
not), `extracted` (the answer that was found), `verifier` (name, version, settings) and
`verify_error` ("" or what went wrong: no answer, timeout, killed, memory, ...). All other fields
pass through as they were written. Only `completion` and `answer` are needed.

The last complete `\boxed{}` after the reasoning is the answer. A completion without an answer, or
one that broke the grader, scores 0.0: a null would reward it. Null means that the gold answer is
missing or not understood, or that our own machinery failed. See `grade/` for what is right.

    s2d verify rollouts.jsonl -o graded.jsonl
    s2d rollout --model CKPT problems.jsonl | s2d verify --workers 4 | s2d eval --rollouts -

`--diff OLD.jsonl` grades an already graded file again (or ROLLOUTS, matched by group_id and
sample_index) and says which verdicts changed. `--resume` resumes an unfinished file.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from s2dcli import console
from s2dcli.errors import DataError, nearest
from s2dcli.files import jsonl
from s2dcli.files.manifest import describe, sidecar
from s2dcli.files.output import check_output, complete_lines, is_finished, open_recorded, resumable
from s2dcli.files.records import take_reward
from s2dcli.options import GradingOptions, OutFile, Overwrite, Resume, Rollouts, flatten

LOOKED_AT = 1000  # rows among which one must have a completion
SHOWN_LINES = 100  # bad lines and changed verdicts that are named one by one; the rest is counted
SHOWN_CHARACTERS = 60  # of an answer in a message
# On --resume: what says how the work is done or reported, not what becomes of a row
QUESTIONS = {"prompt", "problem", "question"}
MAY_CHANGE = {"workers", "skip_invalid", "diff"}

Key = tuple[Any, Any] | int


class Extract(StrEnum):
    """Where an answer may be found: in a box only, or without one in the last stated answer too."""

    strict = "strict"
    lenient = "lenient"


class Rows:
    """The records of a stream of lines; lines that are not JSON objects are reported and skipped."""

    def __init__(self, lines: jsonl.RawLines) -> None:
        self._lines = lines
        self._parsed: deque[dict] = deque()
        self.under_way: deque[tuple[str, bytes, dict]] = deque()  # taken by the grader, not yet written
        self.num_bad = 0

    def require_completions(self, source: str) -> None:
        """Raise DataError if this is a file of problems: the first rows have a prompt and none has a completion."""
        while len(self._parsed) < LOOKED_AT and not any("completion" in record for record in self._parsed) and self._take():
            pass
        if any("completion" in record for record in self._parsed) or not any(QUESTIONS & record.keys() for record in self._parsed):
            return
        raise DataError(
            "these are problems: no row has a field 'completion' to grade",
            where=jsonl.input_name(source),
            hint=f"sample completions first: s2d rollout --model CKPT {source} | s2d verify",
        )

    def fileno(self) -> int:
        return self._lines.fileno()

    def ready(self) -> bool:
        """Whether a record, or the end, can be had at once."""
        while not self._parsed and self._lines.ready():
            if not self._take():
                return True
        return bool(self._parsed)

    def _take(self) -> bool:
        """Parse one line; False at the end."""
        for where, raw in self._lines:
            try:
                record = jsonl.parse_strict(raw, where)
            except DataError as error:
                self.num_bad += 1
                if self.num_bad <= SHOWN_LINES:
                    console.warn(str(error))
                elif self.num_bad == SHOWN_LINES + 1:
                    console.warn("further lines that are no JSON objects are only counted")
            else:
                self.under_way.append((where, raw, record))
                self._parsed.append(record)
            return True
        return False

    def __iter__(self) -> Rows:
        return self

    def __next__(self) -> dict:
        while not self._parsed:
            if not self._take():
                raise StopIteration
        return self._parsed.popleft()


class Changes:
    """Compares verdicts with those of an earlier run."""

    def __init__(self, old: str | None) -> None:
        self._old = None if old is None else dict(self._verdicts(old))
        self.counts: Counter[str] = Counter()
        self.num_missing = 0
        self._number = 0

    @staticmethod
    def _key(record: dict, number: int) -> Key:
        """Return what identifies a row in two files: group and sample, or else its place."""
        group, sample = record.get("group_id"), record.get("sample_index")
        return (group, sample) if isinstance(group, str) and isinstance(sample, int) else number

    def _verdicts(self, path: str) -> Any:
        for number, (where, record) in enumerate(jsonl.read(path, "graded rollouts"), 1):
            take_reward(record, where)
            yield self._key(record, number), {name: record.get(name) for name in ("reward", "label", "verifier")}

    def look(self, where: str, record: dict, verdict: dict) -> None:
        """Compare one verdict with the old one and report a change."""
        self._number += 1
        before = record if self._old is None else self._old.get(self._key(record, self._number))
        if before is None or "reward" not in before:
            self.num_missing += 1
            return
        if before["reward"] == verdict["reward"] and before.get("label") == verdict["label"]:
            return
        change = f"{_name(before)} -> {_name(verdict)}"
        self.counts[change] += 1
        if self.counts.total() <= SHOWN_LINES:
            gold, found = (str(text)[:SHOWN_CHARACTERS] for text in (record.get("answer"), verdict["extracted"]))
            why = f", {verdict['verify_error']}" if verdict["verify_error"] else ""
            console.info(f"{where}: {change} (answer {gold!r}, extracted {found!r}{why})")

    def report(self, total: int) -> None:
        console.info(f"{self.counts.total()} of {total} verdicts changed")
        for change, number in self.counts.most_common():
            console.info(f"  {number:6} {change}")
        if self.num_missing:
            console.warn(f"{self.num_missing} rows have no earlier verdict")


def _name(verdict: dict) -> str:
    reward = "null" if verdict["reward"] is None else f"{verdict['reward']:g}" if isinstance(verdict["reward"], int | float) else "?"
    label = {True: "right", False: "wrong"}.get(verdict.get("label"), "not graded")
    return label if reward in ("1", "0", "null") else f"{label} ({reward})"


def _report(tally: Counter[str], errors: Counter[str], examples: dict[str, str], rows: Rows, num_without: int, unlike: str) -> None:
    """Say on standard error how many rows were right, wrong and not graded, and why."""
    total = tally.total()
    console.info(f"{total} rows graded: {tally['right']} right, {tally['wrong']} wrong, {tally['null']} without a verdict")
    for error, number in errors.most_common():
        console.info(f"  {number:6} {error}" + (f": {examples[error]}" if error in examples else ""))
    if num_without:
        console.warn(f"{num_without} rows have no field 'completion'{unlike}: that counts as no answer")
    if tally["unlabelled"]:
        console.warn(f"{tally['unlabelled']} of {total} rows have a reward but no label: it says neither right (1) nor wrong (0)")
    if tally["null"]:
        console.warn(f"{tally['null']} of {total} rows have a null reward; their verify_error says why")
    if not total and not rows.num_bad:
        console.warn("the input is empty")


def verify(
    *,
    rollouts: Rollouts = jsonl.STDIN,
    out: OutFile = jsonl.STDIN,
    grading: GradingOptions,
    extract: Annotated[
        Extract, typer.Option("--extract", help="strict: boxes only; lenient: without a box, the last stated answer.")
    ] = Extract.strict,
    skip_invalid: Annotated[bool, typer.Option("--skip-invalid", help="Exit with 0 although some lines were no JSON objects.")] = False,
    diff: Annotated[str | None, typer.Option("--diff", metavar="OLD.jsonl", help="Grade again and say which verdicts changed.")] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Grade completions against their gold answers.

    Reads rollouts as JSONL and writes each with its reward, label and extracted answer. Hanging,
    crashing or malformed answers cost their row at most its deadline, and never the run.
    """
    settings = flatten(locals())
    from s2dcli.grade.pool import MATH, VERDICT, Grader, failures

    started = time.monotonic()
    source = diff if diff is not None and jsonl.is_stream(rollouts) else rollouts
    check_output(out, [source, *([diff] if diff else [])], command="verify", overwrite=overwrite, resume=resume)
    manifest = describe("verify", settings, inputs=[source])
    old = resumable(Path(out), sidecar(out), manifest, MAY_CHANGE) if resume else None
    if not jsonl.is_stream(source) and is_finished(out, old):
        _refuse_invalid(old["counts"]["invalid"], source, skip_invalid)
        return
    done = sum(1 for _ in complete_lines(out)) if old else 0
    tally: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    examples: dict[str, str] = {}  # of each kind of failure, the first in words
    num_without, unlike = 0, ""
    with ExitStack() as stack:
        stream = stack.enter_context(jsonl.open_input(source, "rollouts"))
        rows = Rows(jsonl.RawLines(stream, jsonl.input_name(source)))
        rows.require_completions(source)
        changes = Changes(None if source == diff else diff) if diff is not None else None
        grader = Grader(grading.reward or [MATH], grading.workers, grading.timeout, grading.memory_limit, extract.value)
        stack.enter_context(grader)
        writer = stack.enter_context(open_recorded(out, manifest, overwrite=overwrite, kept=done if old else None))
        advance = stack.enter_context(console.progress("grading", None, "rows"))
        console.detail(f"verifier: {grader.verifier}")
        depth = 1 if len(grader.rewards) == 1 else 2  # "timeout", or with several rewards "math: timeout"

        def take(verdict: dict) -> bytes:
            """Count a verdict and return the row that it completes."""
            nonlocal num_without, unlike
            where, raw, record = rows.under_way.popleft()
            advance()
            label = {True: "right", False: "wrong", None: "unlabelled"}[verdict["label"]]
            tally["null" if verdict["reward"] is None else label] += 1
            if verdict["verify_error"]:
                failed = dict(failures(grader.rewards, verdict["verify_error"]))
                examples.update(failed | examples)
                errors.update(list(failed) or [": ".join(verdict["verify_error"].split(": ")[:depth])])
            if "completion" not in record:
                unlike = unlike or nearest("completion", record)
                num_without += 1
            if changes:
                changes.look(where, record, verdict)
            return jsonl.with_fields(raw, record, verdict)

        for line in complete_lines(out, done):
            if not line.record.keys() >= {*VERDICT} or next(rows, None) is None or take({f: line.record[f] for f in VERDICT}) != line.raw:
                raise DataError(f"cannot be resumed: this row was not made from {source}", where=line.where, hint="--overwrite restarts")
        for verdict in grader.grade(rows):
            writer.write_line(take(verdict))
            writer.flush()
        manifest["counts"] = {"rollouts": tally.total(), **tally, "invalid": rows.num_bad, "seconds": time.monotonic() - started}
    _report(tally, errors, examples, rows, num_without, unlike)
    if changes:
        changes.report(tally.total())
    _refuse_invalid(rows.num_bad, source, skip_invalid)


def _refuse_invalid(num_bad: int, source: str, accepted: bool) -> None:
    if num_bad and not accepted:
        problem = f"{num_bad} lines are no JSON objects; all others were graded"
        raise DataError(problem, where=jsonl.input_name(source), hint="--skip-invalid accepts that")
