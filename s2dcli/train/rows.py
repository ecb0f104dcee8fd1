"""Training rows: a rollout as the trainers hold it, with what a step's algorithm writes beside it.

Ids are int32 and log-probs float32, 8 bytes for each completion token, and the rows of a group share their
prompt's ids. What was sampled and graded is never overwritten: `logprobs` and `reward` stay apart from
the annotations below them, which an algorithm fills in and the objectives (objectives.py) read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from s2dcli.files.records import Rollout, dataset_of
from s2dcli.models.rows import Row, as_ids
from s2dcli.options import Aggregate
from s2dcli.train.advantages import token_weights


@dataclass(slots=True, eq=False, kw_only=True)
class TrainingRow(Row):
    """One completion: its identity, what was sampled, its verdict, and the annotations of a step."""

    group_id: str = ""
    sample_index: int = 0
    problem_sha256: str = ""
    dataset: str = ""  # `source.dataset` of its problem
    logprobs: np.ndarray  # the sampler's, of each completion token [T], nats
    truncated: bool = False  # the length limit ended it
    reward: float | None = None  # None: not graded
    record: dict[str, Any] | None = None  # the whole row as a file has it, where it may be written again

    weight: float = 0.0  # of each token in the loss; token_weights
    advantage: float = 0.0
    trainer_logprobs: np.ndarray | None = None  # of the policy before the step's first update [T], where something needs them
    old_logprobs: np.ndarray | None = None  # denominator of the ratio [T]; None: the policy's own, of a single update
    reference_logprobs: np.ndarray | None = None  # [T]
    teacher_logprobs: np.ndarray | None = None  # [T]
    importance_weights: np.ndarray | None = None  # correct for a sampler that is not the trainer [T]
    sequence_log_ratio: float | None = None  # mean over its tokens of policy - old

    def __post_init__(self) -> None:
        Row.__post_init__(self)  # not super(): slots make the class anew
        self.logprobs = np.asarray(self.logprobs, dtype=np.float32)


Group = list[TrainingRow]

THIRDS = ("first", "middle", "last")  # of a completion


def thirds(length: int) -> np.ndarray:
    """Return which of THIRDS each token of a completion is in, [T]: token t of T in third 3t // T."""
    return np.arange(length) * len(THIRDS) // length


class RowMaker:
    """Makes training rows of rollouts; rows with equal prompts share one array."""

    def __init__(self) -> None:
        self._prompts: dict[bytes, np.ndarray] = {}

    @property
    def num_prompts(self) -> int:
        """Distinct prompts so far."""
        return len(self._prompts)

    def row(self, rollout: Rollout, reward: float | None = None, record: dict[str, Any] | None = None) -> TrainingRow:
        prompt_ids = as_ids(rollout.prompt_ids)
        return TrainingRow(
            self._prompts.setdefault(prompt_ids.tobytes(), prompt_ids),
            rollout.completion_ids,
            group_id=rollout.group_id,
            sample_index=rollout.sample_index,
            problem_sha256=rollout.problem_sha256,
            dataset=sys.intern(dataset_of(rollout.source)),
            logprobs=rollout.completion_logprobs,
            truncated=rollout.truncated,
            reward=reward,
            record=record,
        )


def cut(rows: Sequence[TrainingRow], num_tokens: int | None) -> list[TrainingRow]:
    """Return rows with their first `num_tokens` completion tokens; None leaves them whole. A row that is there twice stays one."""
    if num_tokens is None:
        return list(rows)
    first = slice(num_tokens)
    shorter = {
        row: replace(row, completion_ids=row.completion_ids[first], logprobs=row.logprobs[first])
        for row in rows
        if len(row.completion_ids) > num_tokens
    }
    return [shorter.get(row, row) for row in rows]


def renamed(group: Group, group_id: str) -> Group:
    """Return a group under another name, without annotations: what a step writes never reaches the next."""
    records = [None if row.record is None else {**row.record, "group_id": group_id} for row in group]
    return [replace(row, group_id=group_id, record=record) for row, record in zip(group, records, strict=True)]


def set_weights(rows: Sequence[TrainingRow], aggregate: Aggregate, max_tokens: int) -> None:
    """Give the rows of one update the weight of their tokens; see advantages.token_weights."""
    for row, weight in zip(rows, token_weights([len(row.completion_ids) for row in rows], aggregate, max_tokens), strict=True):
        row.weight = weight
