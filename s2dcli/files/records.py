"""The records that stages hand to each other: problems and rollouts, one JSON object a line.

Every row of a file has the same keys, a string is never null and integers stay below 2^53, so
that `datasets` and jq read every column back with the type it was written with.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from s2dcli import stats, world
from s2dcli.errors import DataError, nearest
from s2dcli.files import jsonl

ROLLOUT_SCHEMA = "s2d.rollout/1"
FLOAT32_MAX = 3.4e38  # training keeps numbers as float32
SHOWN_DIGITS = 20
SEED_BITS = 53  # JSON readers that keep numbers as float64 hold integers exactly up to 2^53

Message = dict[str, str]  # {"role": ..., "content": ...}


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def problem_sha256(text: str) -> str:
    """Hash a bare problem text: NFC, white space folded to single blanks, ends stripped.

    Nothing that changes mathematics is folded: NFKC would make one problem of "2² + 1" and "22 + 1".
    """
    return sha256_text(" ".join(unicodedata.normalize("NFC", text).split()))


def row_seed(seed: int, group_id: str, sample_index: int) -> int:
    """Seed of one completion, below 2^53: the same whatever batch, shard or host draws it."""
    digest = hashlib.sha256(f"{seed}\n{group_id}\n{sample_index}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def _kind(value: Any) -> str:
    names = {str: "text", int: "integer", float: "number", bool: "boolean", list: "list", dict: "object"}
    return names.get(type(value), "null")


def take(record: dict, field: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return a field of a record. Raises DataError that names the field, the line and a likely typo."""
    if field not in record:
        raise DataError(f"no field {field!r}{nearest(field, record)}", where=where)
    value = record[field]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(_kind(k()) for k in kinds)
        raise DataError(f"field {field!r} is {_kind(value)}, {expected} was expected", where=where)
    return value


def take_messages(record: dict, field: str, where: str) -> list[Message]:
    """Return a field that holds a list of {role, content}."""
    messages = take(record, field, list, where)
    if not messages:
        raise DataError(f"field {field!r} holds no message", where=where)
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"field {field!r} must be a list of objects with role and content", where=where)
    return messages


def take_ids(record: dict, field: str, where: str) -> list[int]:
    """Return a field that holds a list of token ids."""
    ids = take(record, field, list, where)
    if not all(type(i) is int and i >= 0 for i in ids):
        raise DataError(f"field {field!r} must be a list of token ids", where=where)
    return ids


def take_number(record: dict, field: str, where: str) -> float:
    """Return a field that holds a finite number."""
    value = take(record, field, (float, int), where)
    if not abs(value) < FLOAT32_MAX:
        raise DataError(f"field {field!r} is {str(value)[:SHOWN_DIGITS]}, a finite number was expected", where=where)
    return value


def take_logprobs(record: dict, field: str, where: str) -> list[float]:
    """Return a field that holds a list of finite numbers."""
    values = take(record, field, list, where)
    if not {*map(type, values)} <= {float} or not abs(sum(values)) < FLOAT32_MAX:  # fast for good rows
        for position, value in enumerate(values):
            take_number({f"{field}[{position}]": value}, f"{field}[{position}]", where)
    return values


def take_reward(record: dict, where: str) -> float | None:
    """Return the reward of a graded row, None where it has no verdict."""
    if "reward" not in record:
        name = where.rpartition(":")[0]
        piped = name == jsonl.input_name(jsonl.STDIN)
        through = "pipe it through s2d verify" if piped else f"s2d verify {shlex.quote(name)} -o graded.jsonl"
        raise DataError("no field 'reward'", where=where, hint=f"grade it first: {through}")
    return None if record["reward"] is None else take_number(record, "reward", where)


def text_of(messages: list[Message] | str) -> str:
    """Return the text of a completion or prompt given as messages or as a plain string."""
    return messages if isinstance(messages, str) else "\n".join(message["content"] for message in messages)


def dataset_of(source: Mapping[str, Any]) -> str:
    """Name of the data set in a `source` field, "" where there is none."""
    return str(source.get("dataset", ""))


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: what is asked (`prompt`), the gold `answer` ("" if unlabelled), and its identity."""

    id: str
    prompt: list[Message]
    answer: str
    problem_sha256: str
    source: dict[str, Any]

    @classmethod
    def from_record(cls, record: dict, where: str) -> Problem:
        source = take(record, "source", dict, where)
        for name, kind in (("dataset", str), ("split", str), ("index", int)):
            if name in source:
                take({f"source.{name}": source[name]}, f"source.{name}", kind, where)
        return cls(
            id=take(record, "id", str, where),
            prompt=take_messages(record, "prompt", where),
            answer=take(record, "answer", str, where),
            problem_sha256=take(record, "problem_sha256", str, where),
            source=source,
        )

    def to_record(self) -> dict:
        return asdict(self)


@functools.cache
def _columns(kind: type[Rollout]) -> tuple[str, ...]:
    return tuple(column.name for column in fields(kind) if column.name != "extra")


@dataclass(slots=True)
class Rollout:
    """One completion of one problem; the fields are the columns of a rollouts file, `extra` holds columns that are none of ours."""

    problem_id: str
    problem_sha256: str
    group_id: str
    sample_index: int
    prompt: list[Message]
    completion: list[Message]
    answer: str
    prompt_ids: list[int]
    completion_ids: list[int]
    completion_logprobs: list[float]
    finish_reason: str
    seed: int
    source: dict[str, Any]
    sampler: dict[str, Any]
    template_sha256: str
    reasoning_open: bool = field(default=False, kw_only=True)  # the rendered prompt ends inside <think>; its messages need not show it
    extra: dict[str, Any] = field(default_factory=dict, kw_only=True)

    @classmethod
    def from_record(cls, record: dict, where: str) -> Rollout:
        return cls(**_rollout_columns(record, where), extra=_without(record, cls))

    def to_record(self) -> dict:
        return {"schema": ROLLOUT_SCHEMA, **{name: getattr(self, name) for name in _columns(type(self))}, **self.extra}

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(slots=True, kw_only=True)
class Graded(Rollout):
    """A rollout with its verdict: what `s2d verify` adds. A reward or label of None: there is no verdict."""

    reward: float | None
    rewards: dict[str, float | None] = field(default_factory=dict)
    label: bool | None = None
    extracted: str = ""
    verifier: str = ""
    verify_error: str = ""

    @classmethod
    def from_record(cls, record: dict, where: str) -> Graded:
        """Only `reward` is required beside the columns of a rollout; without `label` it says what is right."""
        columns = _rollout_columns(record, where)
        take({f"sampler.{name}": value for name, value in columns["sampler"].items()}, "sampler.max_tokens", int, where)
        verdict = {"reward": take_reward(record, where)}
        for name, kind in {"rewards": dict, "label": (bool, type(None)), "extracted": str, "verifier": str, "verify_error": str}.items():
            if name in record:
                verdict[name] = take(record, name, kind, where)
        for name, value in verdict.get("rewards", {}).items():
            if value is not None:
                take_number({f"rewards.{name}": value}, f"rewards.{name}", where)
        verdict.setdefault("label", stats.is_right(record))
        return cls(**columns, **verdict, extra=_without(record, cls))


def _rollout_columns(record: dict, where: str) -> dict[str, Any]:
    """Return the columns of a rollout by name. Raises DataError that names file, line and field."""
    takes = {"prompt": take_messages, "completion": take_messages, "prompt_ids": take_ids, "completion_ids": take_ids}
    takes["completion_logprobs"] = take_logprobs
    kinds = {"sample_index": int, "seed": int, "source": dict, "sampler": dict, "reasoning_open": bool}
    record = {"reasoning_open": False, **record}  # files of other tools have no such column
    columns = {
        column.name: takes[column.name](record, column.name, where)
        if column.name in takes
        else take(record, column.name, kinds.get(column.name, str), where)
        for column in fields(Rollout)
        if column.name != "extra"
    }
    ids, logprobs = (len(columns[name]) for name in ("completion_ids", "completion_logprobs"))
    if ids != logprobs:
        raise DataError(f"{ids} completion_ids but {logprobs} completion_logprobs", where=where)
    return columns


def _without(record: dict, kind: type) -> dict[str, Any]:
    """Return the fields of a record that are no columns of `kind`."""
    known = {"schema", *(column.name for column in fields(kind))}
    return {name: value for name, value in record.items() if name not in known}


def read_problems(path: str | Path) -> list[Problem]:
    """Read a problems file; the main process does, for all. Raises DataError on a bad record, a repeated id or an empty file."""
    return world.from_main(_read_problems, path)


def _read_problems(path: str | Path) -> list[Problem]:
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for where, record in jsonl.read(path, "problems"):
        if "prompt_ids" in record or "completion" in record:
            raise DataError("this is a rollout, a problem was expected", where=where)
        if "id" not in record and {"problem", "question", "prompt"} & record.keys():
            raise DataError("not a problem record", where=where, hint=f"make one: s2d prepare {shlex.quote(str(path))} -o problems.jsonl")
        problem = Problem.from_record(record, where)
        if problem.id in seen:
            raise DataError(f"id {problem.id!r} was already used at {seen[problem.id]}", where=where)
        seen[problem.id] = where
        problems.append(problem)
    if not problems:
        raise DataError("holds no problems", where=jsonl.input_name(path))
    return problems


def require_labels(problems: list[Problem], hint: str = "RL needs labels; for unlabelled problems use s2d opd") -> list[Problem]:
    """Return problems that all have answers. Raises DataError."""
    unlabelled = [problem.id for problem in problems if not problem.answer]
    if unlabelled:
        raise DataError(
            f"{len(unlabelled)} of {len(problems)} problems have no answer to grade against, the first is {unlabelled[0]!r}",
            hint=hint,
        )
    return problems


Row = TypeVar("Row", bound=Rollout)


class Seen:
    """Which samples of which groups there were: a bit each, so that a million rows take some megabytes."""

    BITS = 4096  # sample indices from here on are kept one by one

    def __init__(self) -> None:
        self._bits: dict[str, int] = {}
        self._others: set[tuple[str, int]] = set()

    def add(self, group_id: str, sample_index: int, where: str) -> None:
        """Note a sample. Raises DataError if it was there before."""
        if 0 <= sample_index < self.BITS:
            bits, bit = self._bits.get(group_id, 0), 1 << sample_index
            again, self._bits[group_id] = bits & bit, bits | bit
        else:
            again = (group_id, sample_index) in self._others
            self._others.add((group_id, sample_index))
        if again:
            raise DataError(f"group {group_id!r} has sample {sample_index} twice", where=where)


def _read_rows(path: str | Path, kind: type[Row]) -> Iterator[tuple[str, Row]]:
    seen = Seen()
    for where, record in jsonl.read(path, "rollouts"):
        row = kind.from_record(record, where)
        seen.add(row.group_id, row.sample_index, where)
        yield where, row


def read_rollouts(path: str | Path) -> Iterator[tuple[str, Rollout]]:
    """Yield (where, rollout) for each line; (group_id, sample_index) must be unique. Raises DataError."""
    return _read_rows(path, Rollout)


def read_graded(path: str | Path) -> Iterator[tuple[str, Graded]]:
    """Yield (where, graded rollout) for each line; (group_id, sample_index) must be unique. Raises DataError."""
    return _read_rows(path, Graded)


# A list of numbers in a line of JSON; in a text its quotation marks would be escaped
_NUMBERS = re.compile(rb'"(prompt_ids|completion_ids|completion_logprobs)": ?\[([-+0-9.eE, ]*)\]')
_NUMBER_LISTS = {"prompt_ids": take_ids, "completion_ids": take_ids, "completion_logprobs": take_logprobs}
_REQUIRED = dict.fromkeys(("problem_id", "problem_sha256", "group_id", "finish_reason", "answer"), str)
_REQUIRED |= {"sample_index": int, "sampler": dict, "source": dict}
_OPTIONAL = {"label": (bool, type(None)), "extracted": str, "verifier": str, "verify_error": str}


class VerdictLine(NamedTuple):
    """A graded rollout as it is counted: in `record` a number of tokens stands where the line has ids or log-probs."""

    where: str
    raw: bytes
    record: dict[str, Any]


def read_counted(path: str | Path) -> Iterator[VerdictLine]:
    """Yield the lines of a file of graded rollouts, without parsing the token ids and log-probs that are most of it."""
    for where, raw in jsonl.read_raw(path, "graded rollouts"):
        yield VerdictLine(where, raw, jsonl.parse_line(_NUMBERS.sub(_counted, raw), where))


def _counted(match: re.Match[bytes]) -> bytes:
    numbers = match[2].strip()
    return b'"%b": %d' % (match[1], numbers.count(b",") + 1 if numbers else 0)


def read_verdicts(path: str | Path) -> Iterator[VerdictLine]:
    """Yield `read_counted` with what is counted of a row checked, and that (group_id, sample_index) is unique. Raises DataError."""
    seen = Seen()
    for line in read_counted(path):
        where, _, record = line
        for name, take_numbers in _NUMBER_LISTS.items():
            if type(record.get(name)) is not int:  # missing, or a list that has more than numbers in it or is written in another way
                record[name] = len(take_numbers(record, name, where))
        for name, kind in _REQUIRED.items():
            if type(record.get(name)) is not kind:
                take(record, name, kind, where)
        if type(record.get("reward")) is not float or not -FLOAT32_MAX < record["reward"] < FLOAT32_MAX:
            take_reward(record, where)
        for name, kind in _OPTIONAL.items():
            if name in record and not isinstance(record[name], kind):
                take(record, name, kind, where)
        ids, logprobs = record["completion_ids"], record["completion_logprobs"]
        if ids != logprobs:
            raise DataError(f"{ids} completion_ids but {logprobs} completion_logprobs", where=where)
        sampler = record["sampler"]
        if type(sampler.get("max_tokens")) is not int:
            take({f"sampler.{name}": value for name, value in sampler.items()}, "sampler.max_tokens", int, where)
        seen.add(record["group_id"], record["sample_index"], where)
        yield line
