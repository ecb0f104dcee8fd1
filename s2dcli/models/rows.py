"""Rows of token ids as arrays: four bytes an id, and one copy of a prompt that several rows share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(slots=True, eq=False)
class Row:
    """One sequence to run through a model: losses and scores look at the completion's tokens only.

    Ids are int32 arrays; lists are converted. A row stands for itself: two rows are equal only if they are one.
    """

    prompt_ids: np.ndarray
    completion_ids: np.ndarray

    def __post_init__(self) -> None:
        self.prompt_ids, self.completion_ids = as_ids(self.prompt_ids), as_ids(self.completion_ids)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def as_ids(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)
