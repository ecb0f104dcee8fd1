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

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from s2dcli import console
from s2dcli.files import jsonl
from s2dcli.files.ledger import Branch, branches, costs, distinct_labels, manifest_of, settings, spent, unknown_parents, warnings
from s2dcli.files.records import take


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
        lines = [_headline(path, manifest), *_lines(manifest, branches(manifest, manifest["ancestors"])), ""]
        lines += [f"{number:8} labels  {title}" for title, number in labels]
        lines.append(f"{len(distinct_labels(manifest)):8} distinct labels in all")
        out = console.claim_stdout()
        out.write("".join(console.printable(line) + "\n" for line in lines).encode())
        out.flush()
    for caution in cautions:
        console.warn(caution)
    if unknown := unknown_parents(manifest):
        console.warn(f"unknown ancestry: {', '.join(unknown)} sampled what was learnt from, and what that has cost is not known")


def _headline(name: str, record: Mapping[str, Any]) -> str:
    return f"{name}: {', '.join([record['command'] or 'not made by s2d', *costs(record)])}"


def _lines(record: Mapping[str, Any], below: list[Branch]) -> Iterator[str]:
    """Yield the lines below a headline: the settings, and a branch for each parent and input."""
    if given := settings(record):
        yield f"{'│' if below else ' '}  {given}"
    for branch in below:
        corner, stem = ("└─ ", "   ") if branch is below[-1] else ("├─ ", "│  ")
        name = f"{branch.role} {branch.name}"
        if branch.record is None:
            yield corner + (f"{name}: {branch.note}" if branch.note else name)
        elif branch.note:
            yield f"{corner}{name}: {branch.record['command']}, {branch.note}"
        else:
            yield corner + _headline(name, branch.record)
            yield from (stem + line for line in _lines(branch.record, branch.branches))
