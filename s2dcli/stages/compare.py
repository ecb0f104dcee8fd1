"""`s2d compare`: two evaluations, paired by problem; or two runs, setting by setting.

    s2d compare runs/eval-direct runs/eval-bridge
    s2d compare --settings runs/direct runs/bridge

Without --settings, A and B are output folders of `s2d eval` or files of graded rollouts, with equally many
samples of each problem. The difference B - A of avg@k is taken over the problems that both have, and its
standard error over these problems from the differences themselves: the two are measured on the same problems,
so how hard each one is cancels out. p and the 95 % interval are those of the paired t-test. Sides that were
sampled in different ways (temperature, top-p, top-k, length limit) are warned of.

With --settings, A and B are checkpoints, run or eval folders, or files that s2d wrote. What is printed are
the settings, inputs, models, labels and versions in which they differ, and nothing else: a fair contrast
differs in the one thing that it is named after.

Results are a few lines in words on a terminal, a markdown table elsewhere, and with --json one object.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from s2dcli import console, stats
from s2dcli.errors import DataError
from s2dcli.files import jsonl
from s2dcli.files.eval_folder import graded_path
from s2dcli.files.ledger import distinct_labels, manifest_of
from s2dcli.files.manifest import NEVER_COMPARED, flag
from s2dcli.files.records import take, take_reward

DECODING = ("temperature", "top_p", "top_k", "max_tokens")  # of `sampler`; both sides should have it in common
NUCLEUS = ("top_p", "top_k")  # without effect in greedy decoding
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
        text = console.markdown([["", a, b], *([name, *sides.values()] for name, sides in found.items())]) if found else ""
    else:
        found = _paired(a, b)
        text = _in_words(a, b, found) if console.claim_stdout().isatty() else _table(a, b, found)
    if as_json:
        jsonl.print_result(found)
        return
    out = console.claim_stdout()
    out.write(text.encode())
    out.flush()
    if not found:
        console.info("no setting differs")


# Results


def _paired(a: str, b: str) -> stats.Figures:
    """Return the paired difference of two results. Warns of what else than the model is different."""
    (scores_a, decoding_a), (scores_b, decoding_b) = (_read(path) for path in (a, b))
    try:
        found = stats.paired_difference(scores_a, scores_b)
    except ValueError as error:
        raise DataError(f"cannot be compared: {error}", where=f"{a} (A) and {b} (B)") from None
    for path, scores in ((a, scores_a), (b, scores_b)):
        if len(scores) > found["problems"]:
            console.warn(f"{path}: {len(scores) - found['problems']} problems are not in the other one and left out")
    both = [name for name in decoding_a if name in decoding_b and decoding_a[name] != decoding_b[name]]
    if both:
        unlike = ", ".join(f"{name} {_listed(decoding_a[name])} and {_listed(decoding_b[name])}" for name in both)
        console.warn(f"{a} and {b} were sampled in different ways, the difference is not the models' alone: {unlike}")
    return found


def _read(path: str) -> tuple[dict[str, list[float]], dict[str, set[float]]]:
    """Return the scores of each problem, by problem_sha256, and the values of DECODING that the rows were sampled with."""
    file = graded_path(path)
    scores = stats.Scores()
    decoding: dict[str, set[float]] = {}
    for where, record in jsonl.read(file, "graded rollouts"):
        take_reward(record, where)
        take({"label": None, **record}, "label", (bool, type(None)), where)
        scores.add(take(record, "problem_sha256", str, where), record)
        sampler = take({"sampler": {}, **record}, "sampler", dict, where)  # other tools write none
        for name in DECODING:
            if name in sampler and (name not in NUCLEUS or sampler.get("temperature") != 0):
                decoding.setdefault(name, set()).add(take(sampler, name, (float, int), where))
    by_problem = scores.by_problem()
    if not by_problem:
        raise DataError("holds no graded rollouts", where=file)
    if not scores.meaningful:
        raise DataError(f"cannot be compared: {stats.NO_NOTION}", where=file, hint=stats.NO_NOTION_HINT)
    return by_problem, decoding


def _listed(values: set[float]) -> str:
    return " or ".join(f"{value:g}" for value in sorted(values))


def _table(a: str, b: str, found: stats.Figures) -> str:
    percents = [f"{100 * found[name]:.1f}" for name in ("a", "b", "difference", "se")]
    tests = [NONE if found[name] is None else f"{found[name]:.2g}" for name in ("t", "p")]
    heads = ["", f"{a} (A)", f"{b} (B)", "B - A", "SE", "t", "p"]
    return console.markdown([heads, [f"per cent of {found['problems']} problems", *percents, *tests]])


def _in_words(a: str, b: str, found: stats.Figures) -> str:
    """Return the comparison as a few lines for a person."""
    problems, difference, p = found["problems"], found["difference"], found["p"]
    rows = [
        ("A", f"{100 * found['a']:6.1f} %       {a}"),
        ("B", f"{100 * found['b']:6.1f} %       {b}"),
        ("difference B - A", f"{100 * difference:+6.1f} points  over the {problems} problems of both"),
    ]
    if p is None:
        alike = "The same score" if difference == 0 else "The same difference"
        meaning = f"{alike} on every problem: there is no spread to judge chance by."
    else:
        rows += [
            ("standard error", f"{100 * found['se']:6.1f} points"),
            ("95 % interval", f"{100 * found['low']:+6.1f} to {100 * found['high']:+.1f} points"),
            ("p", f"{p:8.2g}      two-sided, t with {problems - 1} degrees of freedom"),
        ]
        if p < stats.SIGNIFICANT:
            better = "B" if difference > 0 else "A"
            meaning = f"{better} is better: between equals a difference this large would come by chance in {100 * p:.2g} % of comparisons."
        else:
            meaning = "These problems cannot tell A and B apart: the interval includes zero."
    lines = [f"{name:18}{value}" for name, value in rows]
    return "".join(console.printable(line) + "\n" for line in [*lines, "", meaning])


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
