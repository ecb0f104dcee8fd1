"""`s2d lineage`: where a checkpoint comes from, and how many labels it has cost.

    s2d lineage runs/opd
    s2d lineage runs/opd --problems test.jsonl
    s2d lineage runs/eval-opd --json | jq .labels.distinct

PATH is a checkpoint or run folder, the output folder of `s2d eval`, or a file that s2d wrote. The tree
names each stage, its parents and inputs, the options that were given, and what it has cost;
it is read from one manifest alone, so that it survives the folders it speaks of. Below it stand the labels
that were spent, each problem counted once. Evaluation problems that were learnt from are warned of
(contamination), and labels that a stage learns from although its ancestors had them (replay).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from s2dcli import console
from s2dcli.files import jsonl
from s2dcli.files.ledger import distinct_labels, manifest_of, spent, unknown_parents, warnings
from s2dcli.files.manifest import UNKNOWN, flag
from s2dcli.files.records import take

UNITS = {"updates": "updates", "problems": "problems", "rollouts": "rollouts", "tokens": "tokens", "seconds": "s"}


def lineage(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Checkpoint, run or eval folder, or a file that s2d wrote.", show_default=False)
    ],
    problems: Annotated[
        str | None, typer.Option("--problems", metavar="FILE", help="Evaluation problems to look for among the labels.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the tree.")] = False,
) -> None:
    """Show where a checkpoint comes from and how many labels it has cost."""
    manifest = manifest_of(path)
    evaluated = {take(record, "problem_sha256", str, where) for where, record in jsonl.read(problems, "problems")} if problems else set()
    labels = [(title, len(hashes)) for title, hashes in spent(manifest)]
    cautions = [*warnings(manifest, evaluated)]
    if as_json:
        by_stage = [{"stage": title, "labels": number} for title, number in labels]
        spending = {"distinct": len(distinct_labels(manifest)), "by_stage": by_stage}
        jsonl.print_result({"path": path, **manifest, "labels": spending, "warnings": cautions, "unknown": unknown_parents(manifest)})
    else:
        lines = [_headline(path, manifest), *_branches(manifest, manifest["ancestors"], set()), ""]
        lines += [f"{number:8} labels  {title}" for title, number in labels]
        lines.append(f"{len(distinct_labels(manifest)):8} distinct labels in all")
        out = console.claim_stdout()
        out.write("".join(console.printable(line) + "\n" for line in lines).encode())
        out.flush()
    for caution in cautions:
        console.warn(caution)
    if unknown := unknown_parents(manifest):
        console.warn(f"unknown ancestry: {', '.join(unknown)} sampled what was learnt from, and what that has cost is not known")


def _headline(name: str, record: dict[str, Any]) -> str:
    counts = [f"{record['counts'][count]:,.0f} {unit}" for count, unit in UNITS.items() if record["counts"].get(count)]
    labels = [f"{len(record['labels'])} labels"] if record["labels"] else []
    return f"{name}: {', '.join([record['command'] or 'not made by s2d', *counts, *labels])}"


def _branches(record: dict[str, Any], ancestors: dict[str, Any], shown: set[str]) -> Iterator[str]:
    """Yield the lines below a headline: the settings, and a branch for each parent and input."""
    items = [(f"{parent['role']} {_where(parent)}", parent) for parent in record["parents"]]
    items += [(f"input {item['path']}", item) for item in record["inputs"]]
    if settings := _settings(record):
        yield f"{'│' if items else ' '}  {settings}"
    for number, (name, item) in enumerate(items, 1):
        corner, stem = ("└─ ", "   ") if number == len(items) else ("├─ ", "│  ")
        made_by = ancestors.get(item["record"])
        if made_by is None:
            unmade = "unknown ancestry" if item["record"] == UNKNOWN else "not made by s2d" if "role" in item else ""
            yield corner + (f"{name}: {unmade}" if unmade else name)
        elif item["record"] in shown:
            yield f"{corner}{name}: {made_by['command']}, as above"
        else:
            shown.add(item["record"])
            yield corner + _headline(name, made_by)
            yield from (stem + line for line in _branches(made_by, ancestors, shown))


def _where(parent: dict[str, Any]) -> str:
    step = f" at step {parent['step']}" if parent["step"] else ""
    return f"{parent['name'] or '(no name)'}{step}"


def _settings(record: dict[str, Any]) -> str:
    """Return the options that were given, but for those that name files and models."""
    named = {item.get("path", item.get("name")) for item in (*record["inputs"], *record["parents"])}
    return " ".join(
        flag(name) if value is True else f"{flag(name)} {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in record["options"].items()
        if name in record["given"] and (not isinstance(value, str) or value not in named)
    )
