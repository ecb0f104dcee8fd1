"""`s2d compare`: two evaluations, paired by problem; or two runs, setting by setting.

    s2d compare runs/eval-direct runs/eval-bridge
    s2d compare --settings runs/direct runs/bridge

Without --settings, A and B are output folders of `s2d eval` or files of graded rollouts. The difference
B - A of avg@k is taken over the problems that both have, and its standard error over these problems from
the differences themselves: the two are measured on the same problems, so how hard each one is cancels out.

With --settings, A and B are checkpoints, run or eval folders, or files that s2d wrote. What is printed are
the settings, inputs, models, labels and versions in which they differ, and nothing else: a fair contrast
differs in the one thing that it is named after.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from s2dcli import console, stats
from s2dcli.errors import DataError
from s2dcli.files import jsonl
from s2dcli.files.ledger import distinct_labels, manifest_of
from s2dcli.files.manifest import NEVER_COMPARED, flag
from s2dcli.files.records import take, take_reward

GRADED = "rollouts.jsonl"  # in the output folder of s2d eval
NONE = "-"
HASH_DIGITS = 12  # of a sha256 that are shown


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Eval folder or graded rollouts; with --settings any output.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.", show_default=False)],
    settings: Annotated[bool, typer.Option("--settings", help="In which settings two runs differ, instead of their results.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Compare two results, paired by problem, or the settings of two runs."""
    if settings:
        found = {name: {"a": one, "b": other} for name, one, other in _differences(manifest_of(a), manifest_of(b))}
        table = [["", a, b], *([name, sides["a"], sides["b"]] for name, sides in found.items())]
    else:
        scores = [_scores(path) for path in (a, b)]
        try:
            found = stats.paired_difference(*scores)
        except ValueError as error:
            raise DataError(f"cannot be compared: {error}", where=f"{a} and {b}") from None
        for path, side in zip((a, b), scores, strict=True):
            if len(side) > found["problems"]:
                console.warn(f"{path}: {len(side) - found['problems']} problems are not in the other one and left out")
        table = _result_table(a, b, found)
    if as_json:
        jsonl.print_result(found)
        return
    out = console.claim_stdout()
    out.write(console.markdown(table).encode() if len(table) > 1 else b"")
    out.flush()
    if len(table) == 1:
        console.info("no setting differs")


# Results


def _scores(path: str) -> dict[str, list[float]]:
    """Return the rewards of each problem, by problem_sha256. Raises DataError if they are not there or k varies."""
    file = str(Path(path) / GRADED) if Path(path).is_dir() else path
    scores: dict[str, list[float]] = {}
    for where, record in jsonl.read(file, "graded rollouts"):
        reward = take_reward(record, where)
        scores.setdefault(take(record, "problem_sha256", str, where), []).append(float(reward or 0.0))
    if not scores:
        raise DataError("holds no graded rollouts", where=file)
    return scores


def _result_table(a: str, b: str, found: dict[str, Any]) -> list[list[str]]:
    def percent(figure: float) -> str:
        return f"{100 * figure:.1f}"

    z, p = ("-" if found[name] is None else f"{found[name]:.2g}" for name in ("z", "p"))
    heads = ["", f"{a} (A)", f"{b} (B)", "B - A", "SE", "z", "p"]
    values = [*(percent(found[name]) for name in ("a", "b", "difference", "se")), z, p]
    return [heads, [f"per cent of {found['problems']} problems", *values]]


# Settings


def _differences(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (what, A's, B's) for each thing in which two manifests differ."""
    sides = (a, b)
    yield from _unlike([{"command": (side["command"], side["command"] or "not made by s2d")} for side in sides])
    yield from _unlike([_options(side, named={item[key] for other in sides for item, key in _named(other)}) for side in sides])
    yield from _unlike([{f"input {n}": _identified(item, "path", "sha256") for n, item in enumerate(side["inputs"], 1)} for side in sides])
    yield from _unlike([_models(side) for side in sides])
    for what, labels in (("labels", [set(side["labels"]) for side in sides]), ("labels of the lineage", [*map(distinct_labels, sides)])):
        if labels[0] != labels[1]:
            yield f"{what} ({len(labels[0] & labels[1])} shared)", *(str(len(side)) for side in labels)
    versions = [{**side["versions"], "commit": side["commit"]} for side in sides]
    yield from _unlike([{name: (version, version or NONE) for name, version in side.items()} for side in versions])


def _unlike(sides: list[dict[str, tuple[Any, str]]]) -> Iterator[tuple[str, str, str]]:
    """Yield what the sides, name -> (identity, how it is shown), do not have in common."""
    missing = (None, NONE)
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        one, other = (side.get(name, missing) for side in sides)
        if one[0] != other[0]:
            yield name, one[1], other[1]


def _named(manifest: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    yield from ((item, "path") for item in manifest["inputs"])
    yield from ((item, "name") for item in manifest["parents"])


def _options(manifest: dict[str, Any], named: set[str]) -> dict[str, tuple[Any, str]]:
    """Return flag -> value; files and models are left to be compared by what is in them."""
    return {
        flag(name): (value, NONE if value is None else value if isinstance(value, str) else json.dumps(value))
        for name, value in manifest["options"].items()
        if name not in NEVER_COMPARED and not (isinstance(value, str) and value in named)
    }


def _models(manifest: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Return role -> models; only the role of sampler may have several."""
    models: dict[str, list[tuple[str, str]]] = {}
    for parent in manifest["parents"]:
        models.setdefault(parent["role"], []).append(_identified(parent, "name", "weights_sha256"))
    return {role: ({identity for identity, _ in found}, ", ".join(shown for _, shown in found)) for role, found in models.items()}


def _identified(item: dict[str, Any], name: str, sha256: str) -> tuple[str, str]:
    return item[sha256] or item[name], f"{item[name]} ({item[sha256][:HASH_DIGITS] or 'no hash'})"
