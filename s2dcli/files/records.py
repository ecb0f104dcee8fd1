"""The records that stages hand to each other: problems and rollouts, one JSON object a line.

Every row of a file has the same keys, a string is never null and integers stay below 2^53, so
that `datasets` and jq read every column back with the type it was written with.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from s2dcli.errors import DataError, nearest
from s2dcli.files import jsonl

ROLLOUT_SCHEMA = "s2d.rollout/1"
SEED_BITS = 53  # JSON readers that keep numbers as float64 hold integers exactly up to 2^53

Message = dict[str, str]  # {"role": ..., "content": ...}


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def problem_sha256(text: str) -> str:
    """Hash a bare problem text: NFKC, white space folded to single blanks, ends stripped."""
    return sha256_text(" ".join(unicodedata.normalize("NFKC", text).split()))


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


def text_of(messages: list[Message] | str) -> str:
    """Return the text of a completion or prompt given as messages or as a plain string."""
    return messages if isinstance(messages, str) else "\n".join(message["content"] for message in messages)


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
        return cls(
            id=take(record, "id", str, where),
            prompt=take_messages(record, "prompt", where),
            answer=take(record, "answer", str, where),
            problem_sha256=take(record, "problem_sha256", str, where),
            source=take(record, "source", dict, where),
        )

    def to_record(self) -> dict:
        return asdict(self)


@dataclass(slots=True)
class Rollout:
    """One completion of one problem; the fields are the columns of a rollouts file."""

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
    reasoning_open: bool = False  # the rendered prompt ends inside <think>, which its messages need not show

    @classmethod
    def from_record(cls, record: dict, where: str) -> Rollout:
        kinds = {"prompt": take_messages, "completion": take_messages, "prompt_ids": take_ids, "completion_ids": take_ids}
        values = {}
        for column in fields(cls):
            if column.name == "reasoning_open" and column.name not in record:
                continue
            if column.name in kinds:
                values[column.name] = kinds[column.name](record, column.name, where)
            else:
                kind = {
                    "sample_index": int,
                    "seed": int,
                    "source": dict,
                    "sampler": dict,
                    "completion_logprobs": list,
                    "reasoning_open": bool,
                }
                values[column.name] = take(record, column.name, kind.get(column.name, str), where)
        row = cls(**values)
        if len(row.completion_logprobs) != len(row.completion_ids):
            raise DataError(
                f"{len(row.completion_ids)} completion_ids but {len(row.completion_logprobs)} completion_logprobs",
                where=where,
            )
        return row

    def to_record(self) -> dict:
        return {"schema": ROLLOUT_SCHEMA, **{name: getattr(self, name) for name in self.__slots__}}

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


def read_problems(path: str | Path) -> list[Problem]:
    """Read a problems file. Raises DataError on a bad record, a repeated id or an empty file."""
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for where, record in jsonl.read(path, "problems"):
        if "prompt_ids" in record or "completion" in record:
            raise DataError("this is a rollout, a problem was expected", where=where)
        if "id" not in record and {"problem", "question", "prompt"} & record.keys():
            raise DataError("not a problem record", where=where, hint=f"make one: s2d prepare {path} -o problems.jsonl")
        problem = Problem.from_record(record, where)
        if problem.id in seen:
            raise DataError(f"id {problem.id!r} was already used at {seen[problem.id]}", where=where)
        seen[problem.id] = where
        problems.append(problem)
    if not problems:
        raise DataError("holds no problems", where=jsonl.input_name(path))
    return problems


def read_rollouts(path: str | Path) -> Iterator[tuple[str, Rollout, dict]]:
    """Yield (where, rollout, whole record) for each line; (group_id, sample_index) must be unique."""
    seen: set[tuple[str, int]] = set()
    for where, record in jsonl.read(path, "rollouts"):
        rollout = Rollout.from_record(record, where)
        key = (rollout.group_id, rollout.sample_index)
        if key in seen:
            raise DataError(f"group {key[0]!r} has sample {key[1]} twice", where=where)
        seen.add(key)
        yield where, rollout, record
