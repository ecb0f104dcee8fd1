"""`s2d compare`: evaluations, paired by problem; or two runs, setting by setting.

    s2d compare runs/eval-direct runs/eval-bridge
    s2d compare direct-seed1 direct-seed2 -- bridge-seed1 bridge-seed2
    s2d compare --settings runs/direct runs/bridge

Without --settings, A and B are output folders of `s2d eval` or files of graded rollouts. The difference B - A of avg@k is taken
over the problems that both have, and its standard error over these problems from the differences themselves: the two are
measured on the same problems, so how hard each one is cancels out. The 95 % interval is that of the paired t-test, p that of
flipping signs: the share of all ways to swap A and B on some problems that bring a difference at least as large. `detectable` is the
smallest true difference that so many problems and samples find in 80 % of comparisons (stats/pairs.py has the formulas).

More than two results are compared pair by pair, with p corrected for their number by Holm's method. With `--` between them, those before it
are evaluations of one route trained with several seeds, those behind it of another: problems and seeds are both
random then, crossed with each other, and the interval holds for other seeds too (stats/crossed.py has the model).

Problem sets, k, sampling (temperature, top-p, top-k, length limit) and verifiers that differ are warned of.

With --settings, A and B are checkpoints, run or eval folders, or files that s2d wrote. What is printed are
the settings, inputs, models, labels and versions in which they differ, and nothing else: a fair contrast
differs in the one thing that it is named after.

Results are a few lines in words on a terminal, a markdown table elsewhere, and with --json one object.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any

import typer

from s2dcli import console, stats
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.eval_folder import graded_path
from s2dcli.files.ledger import distinct_labels, manifest_of
from s2dcli.files.manifest import NEVER_COMPARED, flag
from s2dcli.files.records import read_counted, take, take_reward
from s2dcli.help import BEHIND

DECODING = ("temperature", "top_p", "top_k", "max_tokens")  # of `sampler`; both sides should have it in common
NUCLEUS = ("top_p", "top_k")  # without effect in greedy decoding
NONE = "-"
HASH_DIGITS = 12  # of a sha256 that are shown


@dataclass(frozen=True)
class Result:
    """One evaluation: the scores of each problem, by problem_sha256, and how it was sampled and graded."""

    path: str
    scores: dict[str, Sequence[float]]
    decoding: dict[str, set[float | str]]


def compare(
    context: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="A B",
            help="Eval folders or graded rollouts, A... -- B... for two routes of several seeds; with --settings any two outputs.",
            show_default=False,
        ),
    ],
    settings: Annotated[bool, typer.Option("--settings", help="In which settings two runs differ, instead of their results.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Compare results, paired by problem, or the settings of two runs."""
    behind = len(context.meta[BEHIND])
    before = len(runs) - behind
    if len(runs) < 2:
        raise UsageError("one result is no comparison", hint="s2d compare A B")
    if settings:
        if len(runs) > 2:
            raise UsageError(f"--settings compares two runs, {len(runs)} were given")
        a, b = runs
        found = {name: {"a": one, "b": other} for name, one, other in _differences(manifest_of(a), manifest_of(b))}
        text = console.markdown([["", a, b], *([name, *sides.values()] for name, sides in found.items())]) if found else ""
    else:
        results = [_read(path) for path in runs]
        in_words = console.claim_stdout().isatty()
        if behind and before and len(runs) > 2:
            found = _routes(results[:before], results[before:])
            text = (_words if in_words else _table)([(f"{before} seeds, {runs[0]} ...", f"{behind} seeds, {runs[before]} ...", found)])
        elif len(runs) == 2:
            found = _paired(*results)
            text = (_words if in_words else _table)([(*runs, found)])
        else:
            found, pairs = _all_pairs(results)
            text = (_words if in_words else _table)(pairs)
    if as_json:
        jsonl.print_result(found)
        return
    out = console.claim_stdout()
    out.write(text.encode())
    out.flush()
    if not found:
        console.info("no setting differs")


# Results


def _paired(a: Result, b: Result) -> stats.Figures:
    """Return the paired difference of two results. Warns of what else than the model is different."""
    found = _checked(lambda: stats.paired_difference(a.scores, b.scores), f"{a.path} (A) and {b.path} (B)")
    _warn_of_missing([a, b], found["problems"])
    _warn_of_unlike([a, b])
    if found["k"][0] != found["k"][1]:
        counts = f"{a.path} has {found['k'][0]} samples of each problem, {b.path} has {found['k'][1]}"
        console.warn(f"{counts}: the quantity is the same, its noise is not")
    return found


def _all_pairs(results: list[Result]) -> tuple[stats.Figures, list[tuple[str, str, stats.Figures]]]:
    """Compare every two results; p_holm is corrected for their number, and says what is resolved."""
    pairs = [(a.path, b.path, _paired(a, b)) for a, b in combinations(results, 2)]
    for (_, _, found), corrected in zip(pairs, stats.holm([found["p"] for _, _, found in pairs]), strict=True):
        found["p_holm"] = corrected
        found["resolved"] = found["resolved"] and corrected < stats.SIGNIFICANT
    return {"comparisons": [{"name_a": a, "name_b": b, **found} for a, b, found in pairs], "correction": "holm"}, pairs


def _routes(first: list[Result], second: list[Result]) -> stats.Figures:
    """Return the difference of two routes, each with several training seeds."""
    scores = [[result.scores for result in route] for route in (first, second)]
    both = [*first, *second]
    found = _checked(lambda: stats.route_difference(*scores), f"{first[0].path} ... (A) and {second[0].path} ... (B)")
    _warn_of_missing(both, found["problems"])
    _warn_of_unlike(both)
    counts = {len(next(iter(result.scores.values()))) for result in both}
    if len(counts) > 1:
        console.warn(f"these results have {_listed(counts)} samples of each problem: their noise is not the same")
    return found


def _checked(compared: Callable[[], stats.Figures], where: str) -> stats.Figures:
    try:
        return compared()
    except ValueError as error:
        raise DataError(f"cannot be compared: {error}", where=where) from None


def _warn_of_missing(results: list[Result], shared: int) -> None:
    other = "in the other one" if len(results) == 2 else "in all others"
    for result in results:
        if len(result.scores) > shared:
            console.warn(f"{result.path}: {len(result.scores) - shared} problems are not {other} and left out")


def _warn_of_unlike(results: list[Result]) -> None:
    """Warn of results that were sampled or graded in different ways."""
    names = f"{results[0].path} and {results[1].path}" if len(results) == 2 else "these results"
    for kind, known in (("sampled", DECODING), ("graded", ("verifier",))):
        values = {name: [result.decoding[name] for result in results if name in result.decoding] for name in known}
        unlike = {name: list(map(_listed, found)) for name, found in values.items() if any(value != found[0] for value in found)}
        if unlike:
            told = ", ".join(f"{name} {' and '.join(dict.fromkeys(found))}" for name, found in unlike.items())
            console.warn(f"{names} were {kind} in different ways, the difference is not the models' alone: {told}")


def _read(path: str) -> Result:
    """Read graded rollouts. Raises DataError."""
    file = graded_path(path)
    scores = stats.Scores()
    decoding: dict[str, set[float | str]] = {}
    for where, _, record in read_counted(file):
        take_reward(record, where)
        take({"label": None, **record}, "label", (bool, type(None)), where)
        scores.add(take(record, "problem_sha256", str, where), record)
        sampler = take({"sampler": {}, **record}, "sampler", dict, where)  # other tools write none
        for name in DECODING:
            if name in sampler and (name not in NUCLEUS or sampler.get("temperature") != 0):
                decoding.setdefault(name, set()).add(take(sampler, name, (float, int), where))
        if "verifier" in record:
            decoding.setdefault("verifier", set()).add(take(record, "verifier", str, where))
    by_problem = scores.by_problem()
    if not by_problem:
        raise DataError("holds no graded rollouts", where=file)
    if not scores.meaningful:
        raise DataError(f"cannot be compared: {stats.NO_NOTION}", where=file, hint=stats.NO_NOTION_HINT)
    return Result(path, by_problem, decoding)


def _listed(values: set[float | str]) -> str:
    return " or ".join(value if isinstance(value, str) else f"{value:g}" for value in sorted(values))


Pairs = list[tuple[str, str, stats.Figures]]  # (A, B, what was found)


def _table(pairs: Pairs) -> str:
    """Return a row a comparison, in per cent."""
    holm = "p_holm" in pairs[0][2]
    heads = [
        "",
        "A",
        "B",
        "B - A",
        "SE",
        "95 % interval",
        *(["p"] if not holm else ["p", "p (Holm)"]),
        "wins/losses/ties",
        "detectable",
        "",
    ]
    rows = []
    for a, b, found in pairs:
        interval = NONE if found["ci95"] is None else "{:+.1f} to {:+.1f}".format(*(100 * end for end in found["ci95"]))
        ps = [NONE if found[name] is None else f"{found[name]:.2g}" for name in (["p", "p_holm"] if holm else ["p"])]
        detectable = NONE if found["detectable"] is None else f"{100 * found['detectable']:.1f}"
        counts = "/".join(str(found[name]) for name in ("wins", "losses", "ties"))
        percents = [f"{100 * found[name]:.1f}" for name in ("a", "b", "difference", "se")]
        rows.append([f"{a} (A), {b} (B)", *percents, interval, *ps, counts, detectable, "" if found["resolved"] else "not resolved"])
    seeds = " and training seeds" if "seeds" in pairs[0][2] else ""
    note = f"Per cent of {pairs[0][2]['problems']} problems; SE over problems{seeds}; detectable: with a power of {stats.POWER:.0%}.\n"
    return console.markdown([heads, *rows]) + "\n" + note


def _words(pairs: Pairs) -> str:
    """Return the comparisons as a few lines each for a person."""
    return "\n".join(_in_words(*pair) for pair in pairs)


def _in_words(a: str, b: str, found: stats.Figures) -> str:
    problems, difference, p = found["problems"], found["difference"], found["p"]
    rows = [
        ("A", f"{100 * found['a']:6.1f} %       {a}"),
        ("B", f"{100 * found['b']:6.1f} %       {b}"),
        ("difference B - A", f"{100 * difference:+6.1f} points  over the {problems} problems of {'both' if 'k' in found else 'all'}"),
    ]
    if found["ci95"] is None:
        alike = "The same score" if difference == 0 else "The same difference"
        meaning = [f"{alike} on every problem: there is no spread to judge chance by."]
    else:
        rows.append(("standard error", f"{100 * found['se']:6.1f} points" + _of_seeds(found)))
        rows.append(("95 % interval", f"{100 * found['ci95'][0]:+6.1f} to {100 * found['ci95'][1]:+.1f} points"))
        how = {"exact": "all ways to swap A and B", "monte-carlo": "random swaps of A and B"}.get(found["p_method"], "")
        rows.append(("p", f"{p:8.2g}      two-sided, " + (how or f"t with {found['degrees']:.1f} degrees of freedom")))
        if "p_holm" in found:
            rows.append(("p (Holm)", f"{found['p_holm']:8.2g}      corrected for the number of comparisons"))
        rows.append(("problems", f"   {found['wins']} better, {found['losses']} worse, {found['ties']} equal in B"))
        rows.append(("detectable", f"{100 * found['detectable']:6.1f} points  with a power of {stats.POWER:.0%}"))
        meaning = [_meaning(found), *([] if found["resolved"] else [_what_would(found)])]
    lines = [f"{name:18}{value}" for name, value in rows]
    return "".join(console.printable(line) + "\n" for line in [*lines, "", *filter(None, meaning)])


def _of_seeds(found: stats.Figures) -> str:
    if "seeds" not in found:
        return ""
    return f"  ({100 * found['se_problems']:.1f} of the problems, {100 * found['se_seeds']:.1f} of the training seeds)"


def _meaning(found: stats.Figures) -> str:
    if found["resolved"]:
        better, p = "B" if found["difference"] > 0 else "A", found.get("p_holm", found["p"])
        return f"{better} is better: between equals a difference this large would come by chance in {100 * p:.2g} % of comparisons."
    crossing = found["ci95"][0] <= 0 <= found["ci95"][1]
    why = "the interval includes zero" if crossing else f"p is not below {stats.SIGNIFICANT:g}"
    what = "These problems and seeds" if "seeds" in found else "These problems"
    return f"Not resolved: {what[0].lower()}{what[1:]} cannot tell A and B apart, {why}."


def _what_would(found: stats.Figures) -> str:
    """Say what would resolve a difference like the one seen."""
    if "seeds" in found:
        part = "more training seeds" if found["se_seeds"] > found["se_problems"] else "more problems"
        return f"A smaller difference than {100 * found['detectable']:.1f} points is likely missed; {part} would help most."
    problems, samples = found["more_problems"], found["more_samples"]
    if problems is None:
        return ""
    if samples is not None:
        more = f", or {samples} more samples of each"
    elif 1 in found["k"]:
        more = "; whether more samples help, k = 1 cannot tell"
    else:
        more = "; no number of samples of these problems would do"
    seen = f"A true difference of {100 * abs(found['difference']):.1f} points would be found with a power of {stats.POWER:.0%}"
    return f"{seen} with {problems} more problems like these{more}."


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
