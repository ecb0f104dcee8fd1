"""Reading manifests: the ancestors of a checkpoint, which labels they have cost, and what should give pause.

A label is spent when a stage learns from a problem's answer: as a reward, by filtering with it, or as a
supervised target. Evaluating spends nothing, but figures on problems that were learnt from mean little.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from s2dcli.errors import DataError
from s2dcli.files.checkpoint import latest_step
from s2dcli.files.manifest import MANIFEST, UNKNOWN, describe, flag, read_manifest, sidecar

Record = Mapping[str, Any]
UNITS = {"updates": "updates", "problems": "problems", "rollouts": "rollouts", "tokens": "tokens", "seconds": "s"}


class Branch(NamedTuple):
    """A parent or input in a lineage: what it was to the stage that used it, its name, what made it, and what that came from."""

    role: str  # "input" for a file
    name: str
    record: Record | None  # None where s2d did not make it
    note: str  # why there is no record, or no more is shown
    branches: list[Branch]


def manifest_of(name: str) -> dict[str, Any]:
    """Return the manifest of a folder (of a run: its latest step's) or file; an empty one for a model that s2d did not make.

    Raises DataError if there is neither.
    """
    path = Path(name)
    folder = latest_step(path) if path.is_dir() else path
    found = folder / MANIFEST if path.is_dir() else sidecar(path)
    if found.is_file():
        return read_manifest(found)
    if (folder / "config.json").is_file():
        return describe("", {})
    missing = "no such file or folder" if not path.exists() else f"was not made by s2d (no {found.name}), and is no checkpoint"
    raise DataError(missing, where=name)


def title(record: Record) -> str:
    """Return how a stage's run is called in a message: its command and where it wrote to."""
    out = record["options"].get("out")
    return f"{record['command']} {out}" if out else record["command"]


def costs(record: Record) -> list[str]:
    """Return what a stage's run has done, each count with its unit, and the labels it has spent."""
    counts = [f"{record['counts'][count]:,.0f} {unit}" for count, unit in UNITS.items() if record["counts"].get(count)]
    return [*counts, *([f"{len(record['labels'])} labels"] if record["labels"] else [])]


def settings(record: Record) -> str:
    """Return the options that were given, but for those that name files and models."""
    named = {item.get("path", item.get("name")) for item in (*record["inputs"], *record["parents"])}
    return " ".join(
        flag(name) if value is True else f"{flag(name)} {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in record["options"].items()
        if name in record["given"] and (not isinstance(value, str) or value not in named)
    )


def branches(record: Record, ancestors: Mapping[str, Record], shown: set[str] | None = None) -> list[Branch]:
    """Return what a stage's run came from, and what that came from in turn; what was shown already is not shown again."""
    shown = set() if shown is None else shown
    items = [(parent["role"], f"{parent['name'] or '(no name)'}{_at_step(parent)}", parent) for parent in record["parents"]]
    items += [("input", item["path"], item) for item in record["inputs"]]
    found = []
    for role, name, item in items:
        made_by = ancestors.get(item["record"])
        if made_by is None:
            unmade = "unknown ancestry" if item["record"] == UNKNOWN else "not made by s2d" if "role" in item else ""
            found.append(Branch(role, name, None, unmade, []))
        elif item["record"] in shown:
            found.append(Branch(role, name, made_by, "as above", []))
        else:
            shown.add(item["record"])
            found.append(Branch(role, name, made_by, "", branches(made_by, ancestors, shown)))
    return found


def _at_step(parent: Mapping[str, Any]) -> str:
    return f" at step {parent['step']}" if parent["step"] else ""


def behind(record: Record, ancestors: Mapping[str, Record]) -> dict[str, Record]:
    """Return the ancestors of a record, each once, nearest first, by name."""
    found: dict[str, Record] = {}
    waiting = [record]
    while waiting:
        current = waiting.pop(0)
        for item in (*current["parents"], *current["inputs"]):
            name = item["record"]
            if name in ancestors and name not in found:
                found[name] = ancestors[name]
                waiting.append(ancestors[name])
    return found


def spent(manifest: Record) -> list[tuple[str, set[str]]]:
    """Return (title, labels) of each run in a lineage that has learnt from labels, the oldest first."""
    records = [manifest, *behind(manifest, manifest["ancestors"]).values()]
    return [(title(record), set(record["labels"])) for record in reversed(records) if record["labels"]]


def distinct_labels(manifest: Record) -> set[str]:
    """Return the problem_sha256 of all problems whose labels a lineage has cost."""
    return set().union(*(labels for _, labels in spent(manifest)))


def unknown_parents(manifest: Record) -> list[str]:
    """Return the names of samplers in a lineage whose manifests were not found: what they have cost is not known."""
    records = [manifest, *behind(manifest, manifest["ancestors"]).values()]
    return sorted({parent["name"] for record in records for parent in record["parents"] if parent["record"] == UNKNOWN})


def warnings(manifest: Record, measured: Collection[str] = ()) -> Iterator[str]:
    """Yield what should give pause: evaluation problems that were learnt from, labels that were learnt from twice.

    `measured` are problem_sha256 beside those that the manifest of an evaluation names itself.
    """
    ancestors = manifest["ancestors"]
    evaluated = {*manifest.get("measured", ()), *measured}
    taught = [(name, labels & evaluated) for name, labels in spent(manifest)]
    if seen := set().union(*(labels for _, labels in taught)):
        who = ", ".join(name for name, labels in taught if labels)
        yield f"contamination: {len(seen)} of {len(evaluated)} evaluated problems were learnt from, by {who}"
    for record in [manifest, *behind(manifest, ancestors).values()]:
        before = [(title(other), set(other["labels"])) for other in behind(record, ancestors).values()]
        again = set(record["labels"]) & set().union(*(labels for _, labels in before))
        if again:
            who = ", ".join(name for name, labels in before if labels & again)
            yield f"replay: {title(record)} learns again from {len(again)} of {len(record['labels'])} labels, spent by {who} before"
