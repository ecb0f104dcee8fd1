"""The stages behind results: which runs made the measured checkpoints, and their curves where their folders still are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2dcli import stats
from s2dcli.errors import DataError
from s2dcli.files.checkpoint import step_name
from s2dcli.files.ledger import behind, manifest_of, title
from s2dcli.files.manifest import MANIFEST, RECORDED, read_manifest, record_of, sha256_json
from s2dcli.files.output import complete_lines
from s2dcli.files.run_folder import EVALS, METRICS
from s2dcli.report import charts
from s2dcli.report.collect import Result
from s2dcli.report.markup import Markup

# What is drawn of a training, in this order: field of metrics.jsonl, heading, whether it is a share.
CURVES = (
    ("reward", "reward", False),
    ("kl", "KL, nats a token", False),
    ("cross_entropy", "cross-entropy, nats a token", False),
    ("mixed_groups", "mixed groups", True),
    ("mean_tokens", "tokens a rollout", False),
    ("truncated", "truncated", True),
    ("entropy", "entropy, nats a token", False),
    ("logprob_mismatch", "log-prob mismatch, nats", False),
    ("loss", "loss", False),
    ("grad_norm", "gradient norm", False),
)
LEAST_SHARE = 0.005  # of the time, for a phase to be drawn
IDENTITY = ("command", "options", "inputs")  # what the manifests of one run's steps have in common
SECONDS = "_seconds"  # ends the names of the phases' times in metrics.jsonl


@dataclass
class Stage:
    """One run of a command in the lineage of what is reported: its record, and its rows if it is a training that was found."""

    record: Mapping[str, Any]
    used_by: list[str] = field(default_factory=list)  # rows of the table
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    missing: str = ""  # why a training has no rows here

    @property
    def title(self) -> str:
        return title(self.record)

    @property
    def trains(self) -> bool:
        return "updates" in self.record["counts"] or bool(self.metrics)


def is_run_folder(run: str) -> bool:
    """Whether a RUN argument is the folder of a training."""
    return (Path(run) / METRICS).is_file()


def stages_of(results: Iterable[Result], run_folders: Iterable[str]) -> list[Stage]:
    """Return the stages behind results and in run folders, each once, what came first first. Raises DataError."""
    found: dict[str, Stage] = {}
    for result in results:
        if result.manifest:
            for name, record in reversed(behind(result.manifest, result.manifest["ancestors"]).items()):
                stage = found.setdefault(name, Stage(record))
                if result.name not in stage.used_by:
                    stage.used_by.append(result.name)
    for run in run_folders:
        manifest = manifest_of(run)
        for name, record in reversed(behind(manifest, manifest["ancestors"]).items()):
            found.setdefault(name, Stage(record))
        name = sha256_json({field: manifest[field] for field in RECORDED if field in manifest})
        stage = found.setdefault(name, Stage(manifest))
        _read_rows(stage, Path(run), math.inf)
    for name, stage in found.items():
        if stage.trains and not stage.metrics:
            _look_up(name, stage)
    return list(found.values())


def _look_up(name: str, stage: Stage) -> None:
    """Read the rows of a training where its record says it was written, if what lies there is the same run."""
    folder = Path(str(stage.record["options"].get("out") or ""))
    step = int(stage.record["counts"].get("steps", 0))
    own, saved = folder / MANIFEST, folder / step_name(step) / MANIFEST
    try:
        same = saved.is_file() and record_of(saved, {}) == name
        if not same and own.is_file():  # a step may be gone (--keep-last), or be one of more by now
            manifest = read_manifest(own)
            same = all(manifest[field] == stage.record[field] for field in IDENTITY)
    except DataError:  # of another version
        same = False
    if same and (folder / METRICS).is_file():
        _read_rows(stage, folder, step or math.inf)
    else:
        stage.missing = f"no curves: {folder} is not there any more, or holds another run"


def _read_rows(stage: Stage, folder: Path, last: float) -> None:
    for name, rows in ((METRICS, stage.metrics), (EVALS, stage.evals)):
        lines = complete_lines(folder / name)
        rows += [line.record for line in lines if _number(line.record.get("step")) is not None and line.record["step"] <= last]


def curves(stage: Stage) -> list[Markup]:
    """Return the charts of a training: evaluations, then what metrics.jsonl has of CURVES, then the phases' shares of the time."""
    found = []
    steps = [row["step"] for row in stage.metrics]
    measured = [row for row in stage.evals if _number(row.get("avg_at_k")) is not None and _number(row.get("se")) is not None]
    if measured:
        points = [(row["step"], row["avg_at_k"]) for row in measured]
        heading = f"evaluation, avg@{measured[-1].get('k', '?')}"
        found.append(charts.line(heading, points, errors=[row["se"] for row in measured], rate=True))
    for name, heading, rate in CURVES:
        values = [_number(row.get(name)) for row in stage.metrics]
        if any(value is not None for value in values):
            found.append(charts.line(heading, list(zip(steps, values, strict=True)), rate=rate))
    phases = list(dict.fromkeys(name for row in stage.metrics for name in row if name.endswith(SECONDS)))
    seconds = [[_number(row.get(phase)) or 0.0 for phase in phases] for row in stage.metrics]
    whole = sum(map(sum, seconds))
    used = [index for index, _ in enumerate(phases) if sum(row[index] for row in seconds) > LEAST_SHARE * whole]
    if len(used) > 1:
        names = [phases[index].removesuffix(SECONDS) for index in used]
        found.append(charts.shares("time by phase", names, steps, [[row[index] for index in used] for row in seconds]))
    return found


def interval_of(result: Result) -> tuple[float, float]:
    """Return the 95 % interval of a result's avg@k; results of earlier versions do not tell it."""
    given = result.figures.get("ci95")
    if isinstance(given, list) and len(given) == 2 and None not in map(_number, given):
        return given[0], given[1]
    return stats.score_interval(result.avg_at_k, result.se, result.column.problems)


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
