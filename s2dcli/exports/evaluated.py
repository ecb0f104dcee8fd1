"""What an export is made of: the results of one evaluation, its graded rows, and what its data set and model are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from s2dcli import stats

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
LOCAL = "local"  # owner of models that have none on the hub
_NOT_PORTABLE = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Metric:
    """One figure: its name as lm-eval writes it (exact_match, pass@8, maj@16), what it is, value and standard error over problems."""

    name: str
    description: str
    value: float
    error: float


@dataclass(frozen=True)
class Evaluated:
    """`results` as in results.json, `rows` makes the graded rollouts anew, `task` names the benchmark, `when` is in seconds since 1970,
    `canonical` tells which wrong answers are one (stats.Summary).
    """

    results: Mapping[str, Any]
    rows: Callable[[], Iterator[Mapping[str, Any]]]
    task: str
    when: float
    canonical: Callable[[str], str]

    @cached_property
    def first(self) -> Mapping[str, Any]:
        return next(self.rows())

    @property
    def dataset(self) -> str:
        return str(self.first["source"].get("dataset", ""))

    @property
    def split(self) -> str:
        return str(self.first["source"].get("split", ""))

    @property
    def on_hub(self) -> bool:
        """Whether the data set is named by a hub id."""
        return HUB_ID.fullmatch(self.dataset) is not None

    @cached_property
    def model(self) -> tuple[str, str]:
        """Owner and name: of a hub id those, of a folder `local` and its last parts."""
        name = str(self.results["model"])
        if HUB_ID.fullmatch(name) and not Path(name).exists():
            owner, model = name.split("/")
            return owner, model
        parts = [part for part in Path(name).parts if part not in ("/", ".", "..")]
        return LOCAL, portable("-".join(parts[-2:])) or "model"

    @cached_property
    def metrics(self) -> list[Metric]:
        """avg@k, pass@j and maj@k; none where the rewards have no notion of right."""
        found, k = self.results, self.results["k"]
        if found["avg_at_k"] is None:
            return []
        metrics = [Metric("exact_match", f"avg@{k}: mean over problems of the share of right samples", found["avg_at_k"], found["se"])]
        for j in stats.powers_of_two(k)[1:]:
            value, error = found["pass"][str(j)].values()
            metrics.append(Metric(f"pass@{j}", f"unbiased estimate of the chance that one of {j} samples is right", value, error))
        if found["maj_at_k"] is not None and k > 1:
            metrics.append(Metric(f"maj@{k}", f"majority vote of {k} samples, ties split", found["maj_at_k"], found["maj_at_k_se"]))
        return metrics


def portable(text: str) -> str:
    """Return a text as part of a path on any system."""
    return _NOT_PORTABLE.sub("-", text).strip("-.")
