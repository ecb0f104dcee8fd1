"""Finding the problem, its answer and its worked solution in one raw row of a data set.

| layout | problem | answer |
|---|---|---|
| GSM8K | `question` | what follows `####` in `answer`; the text before is the worked solution |
| MATH, MATH-500 | `problem` | `answer`, else the last `\\boxed{}` of `solution` |
| AIME | `problem`, `question`, `Problem` | `answer`, `Answer`: text or whole number |
| verl, DAPO | user message of `prompt` | `reward_model.ground_truth` |
| others | `prompt`, `problem`, `question` | `ground_truth`, `final_answer`, `expected_answer` |
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Any, NamedTuple

from s2dcli.errors import DataError
from s2dcli.files.records import Message

TEXT_FIELDS = ("prompt", "problem", "question")
# A worked solution is asked last: where a row has a gold column, that is what its authors grade by.
ANSWER_FIELDS = ("answer", "ground_truth", "final_answer", "expected_answer", "solution")
ID_FIELDS = ("id", "unique_id")
OTHER_FIELDS = ("reward_model", "extra_info", "data_source", "problem_sha256", "source", "completion", "completion_ids")

BARE_ANSWER_CHARS = 64  # a `solution` of one line, no longer than this and without \boxed{}, is itself the answer
NEARLY_THE_SAME = 0.7  # difflib's ratio from which a column's name counts as a misspelling

# DAPO-Math-17k (BytedTsinghua-SIA, Apache-2.0) wraps every problem in the first of these texts;
# the others are those of widespread copies that ask for \boxed{}.
_DAPO_TASK = "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
DAPO_PREFIXES = tuple(
    f"{_DAPO_TASK}{form} where $Answer is the answer to the problem.\n\n"
    for form in ("$Answer (without quotes)", "\\boxed{$Answer} (without quotes)", "\\boxed{$Answer}")
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'

_GSM8K_GOLD = re.compile(r"(?:^|\n)####[ \t]*(\S[^\n]*)\s*\Z")  # on the last line only: elsewhere it is a markdown heading
_GSM8K_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace counts as text
_ONLY_BOX = re.compile(r"\$*\\(?:boxed|fbox)\s*\{.*\}\.?\$*\.?", re.DOTALL)


class Row(NamedTuple):
    """One raw row: `where` is its place for error messages, `index` its position from 0."""

    where: str
    record: dict
    dataset: str
    split: str
    index: int


class Question(NamedTuple):
    """The bare problem text, the messages that go before it, and whether DAPO's wrapper was around it."""

    text: str
    before: list[Message]
    unwrapped: bool


class Gold(NamedTuple):
    """The gold answer and the worked solution; each is "" where the row has none."""

    answer: str
    solution: str


def wanted(columns: list[str]) -> list[str]:
    """Return the columns that are worth decoding: all of them where a near miss must be named."""
    known = {*TEXT_FIELDS, *ANSWER_FIELDS, *ID_FIELDS, *OTHER_FIELDS}
    lower = {column.lower() for column in columns}
    if lower.isdisjoint(TEXT_FIELDS) or lower.isdisjoint((*ANSWER_FIELDS, "reward_model")):
        return columns
    return [column for column in columns if column.lower() in known]


def _find(record: dict, names: tuple[str, ...]) -> tuple[str, Any] | None:
    """Return the first of the fields that holds something, whatever its case; None if none does."""
    for name in names:
        value = record.get(name)
        if not _is_empty(value):
            return name, value
    by_lower = {key.lower(): key for key in record if isinstance(key, str)}
    for name in names:
        key = by_lower.get(name)
        if key is not None and not _is_empty(record[key]):
            return key, record[key]
    return None


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def _missing(record: dict, names: tuple[str, ...], what: str) -> str:
    """Say which field is empty, or which one is missing and what its misspelling may be."""
    for key in record:
        if key.lower() in names:
            return f"field {key!r} is empty, so there is no {what}"
    pairs = [(difflib.SequenceMatcher(None, name, key.lower()).ratio(), name, key) for name in names for key in record]
    likeness, name, key = max(pairs, default=(0.0, "", ""))
    if likeness > NEARLY_THE_SAME:
        return f"no field {name!r} (did you mean {key!r}?)"
    return f"no {what}: no field {', '.join(map(repr, names[:-1]))} or {names[-1]!r}"


def question(record: dict, where: str) -> Question:
    """Find the problem in a row. Raises DataError if there is none or it is neither text nor chat."""
    found = _find(record, TEXT_FIELDS)
    if found is None:
        raise DataError(_missing(record, TEXT_FIELDS, "problem text"), where=where)
    name, value = found
    before: list[Message] = []
    if isinstance(value, list):
        *before, text = _chat(value, name, where)
    elif isinstance(value, str):
        text = value
    else:
        raise DataError(f"field {name!r} is {_type_name(value)}, text or a list of messages was expected", where=where)
    for prefix in DAPO_PREFIXES:
        if text.startswith(prefix) and text.endswith(DAPO_SUFFIX):
            return Question(text[len(prefix) : -len(DAPO_SUFFIX)].strip(), before, True)
    return Question(text.strip(), before, False)


def _chat(messages: list, name: str, where: str) -> list:
    """Return the system messages of a chat and, last, the text of its one user message."""
    texts = [(message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None) for message in messages]
    roles = [role for role, _ in texts]
    if not all(isinstance(content, str) for _, content in texts) or roles[-1:] != ["user"] or set(roles[:-1]) - {"system"}:
        raise DataError(f"field {name!r} must be a list of messages: system messages, if any, and one user message with text", where=where)
    if not texts[-1][1].strip():
        raise DataError(f"field {name!r} has an empty user message, so there is no problem text", where=where)
    return [*({"role": role, "content": content} for role, content in texts[:-1]), texts[-1][1]]


def gold(record: dict, where: str, *, required: bool = True) -> Gold:
    """Find the gold answer and the worked solution in a row.

    Raises DataError if there is no answer, unless it is not required, or if it is neither text nor number.
    """
    model = record.get("reward_model")
    if isinstance(model, dict) and _is_empty(record.get("answer")) and not _is_empty(model.get("ground_truth")):
        name, value = "reward_model.ground_truth", model["ground_truth"]
    else:
        found = _find(record, ANSWER_FIELDS)
        if found is None:
            if required:
                message = _missing(record, ANSWER_FIELDS, "answer")
                raise DataError(message, where=where, hint="--unlabelled keeps problems without answers")
            return Gold("", "")
        name, value = found
    text = _as_text(value, name, where)
    answer, solution = split_solution(text)
    if name.lower() == "solution" and answer == text and not _is_bare_answer(text):
        if required:
            raise DataError(
                f"no answer: field {name!r} has neither \\boxed{{}} nor a last line with ####", where=where, hint="add a field 'answer'"
            )
        return Gold("", "")
    found = _find(record, ("solution",))
    if not solution and found is not None and isinstance(found[1], str):
        answer_in_solution, solution = split_solution(found[1].strip())
        if not solution and not _is_bare_answer(answer_in_solution):
            solution = answer_in_solution
    return Gold(answer, solution)


def _is_bare_answer(text: str) -> bool:
    return "\n" not in text and len(text) <= BARE_ANSWER_CHARS


def _type_name(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"not a finite number ({value})"
    names = {bool: "true or false", int: "an integer", float: "a number", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _as_text(value: Any, name: str, where: str) -> str:
    """Return an answer as text: "025" stays "025", 25 and 25.0 become "25"."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    raise DataError(f"field {name!r} is {_type_name(value)}, text or a number was expected", where=where)


def split_solution(text: str) -> tuple[str, str]:
    """Return (answer, worked solution) of an answer column: GSM8K's ####, a last \\boxed{}, or the bare answer."""
    if mark := _GSM8K_GOLD.search(text) if "####" in text else None:
        return mark[1].strip(), _GSM8K_CALCULATOR.sub("", text[: mark.start()]).strip()
    boxed = last_boxed(text)
    if boxed is None:
        return text, ""
    is_only_box = _ONLY_BOX.fullmatch(text.strip()) and len(_BOX.findall(text)) == 1
    return boxed, "" if is_only_box else text.strip()


def last_boxed(text: str) -> str | None:
    """Return what the last `\\boxed{...}` (also `\\fbox{...}`, `\\boxed 5`) holds; None if there is none that closes."""
    for box in reversed(list(_BOX.finditer(text)) if "box" in text else []):
        start = box.end()
        if not text.startswith("{", start):
            bare = re.match(r"[^\s$]+", text[start:])
            if bare:
                return bare[0].rstrip(".,")
            continue
        depth = 0
        for brace in _BRACE.finditer(text, start):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0 and brace[0] == "}":
                return text[start + 1 : brace.start()].strip()
    return None


class Origin(NamedTuple):
    """Where a problem comes from: the given id ("" if none), and the `source` column of the problems file."""

    id: str
    source: dict[str, Any]


def origin(row: Row) -> Origin:
    """Return a row's id and source; verl's `data_source` and `extra_info` are more telling than file names."""
    record = row.record
    extra = record.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    index = extra.get("index")
    found = _find(record, ID_FIELDS)
    given = found[1] if found else index if isinstance(index, str) else ""
    dataset, split = record.get("data_source"), extra.get("split")
    source = {
        "dataset": dataset if isinstance(dataset, str) and dataset else row.dataset,
        "split": split if isinstance(split, str) else row.split,
        "index": index if type(index) is int else row.index,  # always a whole number, so that the column has one type
    }
    return Origin(str(given) if isinstance(given, str | int) and not isinstance(given, bool) else "", source)
