"""The sections of the page: results, label efficiency, training, lineage, rollouts, settings; None where there is nothing to show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from s2dcli import __version__, console
from s2dcli.files.ledger import Branch, behind, branches, costs, distinct_labels, settings, spent, unknown_parents
from s2dcli.files.manifest import flag, plain
from s2dcli.report import charts
from s2dcli.report.collect import Column, Result
from s2dcli.report.markup import Markup, join, tag
from s2dcli.report.rollouts import HEAD, TAIL, Rollouts
from s2dcli.report.tables import labels_of, notes
from s2dcli.report.training import Stage, curves, interval_of

NONE = "–"

Section = tuple[str, str, Markup]  # anchor, heading, content
Cells = Mapping[str, Mapping[Column, Result]]  # row -> column -> result
Heads = Mapping[Column, Mapping[str, str]]  # column -> figure -> heading
Defaults = Mapping[str, Mapping[str, Any]]  # command -> option -> default


def _scrolling(label: str, table: Markup) -> Markup:
    """Return a table that scrolls sideways where it is too wide, also by keyboard."""
    return tag("div", table, class_="scroll", role="region", aria_label=label, tabindex=0)


def _row(name: str, cells: Sequence[Any]) -> Markup:
    return tag("tr", tag("th", name, scope="row"), cells)


def _table(caption: str, head: Sequence[str], rows: Sequence[Markup], class_: str = "") -> Markup:
    heads = [tag("th", title, scope="col") for title in head]
    content = tag("thead", tag("tr", heads)), tag("tbody", rows)
    return _scrolling(caption, tag("table", tag("caption", caption, class_="unseen"), content, class_=class_ or None))


def _percent(value: object) -> str:
    return f"{100 * value:.1f}" if isinstance(value, int | float) else NONE


# Results


def results_section(cells: Cells, heads: Heads, results: Sequence[Result]) -> Section | None:
    if not results:
        return None
    labels, tokens = labels_of(dict(cells)), {name: _tokens_of(row) for name, row in cells.items()}
    known = any(tokens.values())
    rows = []
    for name, row in cells.items():
        spent_here = [tag("td", NONE if labels[name] is None else f"{labels[name]:,}", class_="number")] if labels else []
        used = [tag("td", f"{tokens[name]:,}" if tokens[name] else NONE, class_="number")] if known else []
        rows.append(_row(name, [*(_rate(name, row.get(column)) for column in heads), *spent_here, *used]))
    head = ["", *(names["avg_at_k"] for names in heads.values())]
    head += [name for name, there in {"labels": labels, "tokens": known}.items() if there]
    legend = [tag("li", note) for note in notes(dict(heads))]
    legend.append(tag("li", "The line beside a rate runs from 0 to 100 %; on it stand the rate and its 95 % interval."))
    if labels:
        legend.append(tag("li", "labels: problems whose answers any stage of the lineage has learnt from, each counted once."))
    if known:
        legend.append(tag("li", "tokens: of all completions that the stages of the lineage have sampled or learnt from."))
    cautions = [tag("li", f"{result.name}: {caution}") for result in results for caution in result.cautions]
    return (
        "results",
        "Results",
        join(
            tag("ul", list(dict.fromkeys(cautions)), class_="cautions", aria_label="Warnings") if cautions else None,
            _table("Results", head, rows, "rates"),
            tag("ul", legend, class_="notes"),
            tag("details", tag("summary", "All figures"), _figures(results, heads)),
        ),
    )


def _tokens_of(row: Mapping[Column, Result]) -> int:
    manifest = next((result.manifest for result in row.values() if result.manifest), None)
    records = behind(manifest, manifest["ancestors"]).values() if manifest else ()
    return sum(int(record["counts"].get("tokens", 0)) for record in records)


def _rate(name: str, result: Result | None) -> Markup:
    if result is None or result.avg_at_k is None:
        return tag("td", NONE, class_="rate")
    value = tag("span", f"{_percent(result.avg_at_k)} ± {_percent(result.se)}", class_="value")
    ends = interval_of(result)
    if ends is None:
        return tag("td", value, class_="rate")
    words = "{:.1f} to {:.1f}".format(*(100 * end for end in ends))
    picture = charts.interval(result.avg_at_k, *ends, f"{name}: {_percent(result.avg_at_k)} %, 95 % interval {words}")
    return tag("td", tag("div", value, picture, tag("span", words, class_="ends"), class_="rate-parts"), class_="rate")


def _figures(results: Sequence[Result], heads: Heads) -> Markup:
    """Return what else is known of each result: a row a result, those of one column together."""
    powers = list(dict.fromkeys(j for result in results for j in _dict(result, "pass") if j != "1"))
    powers.sort(key=lambda j: int(j) if j.isdigit() else 0)
    head = ["", "measured", "avg@k", *(f"pass@{j}" for j in powers), "maj@k", "truncated", "without truncated", "no answer"]
    head += ["not graded", "tokens/rollout", "median", "95 % below", "seconds"]
    rows = []
    for column, names in heads.items():
        for result in (each for each in results if each.column == column):
            figures, length = result.figures, _dict(result, "length")
            chances = [_dict(result, "pass").get(j) or {} for j in powers]
            values = [
                _with_error(result.avg_at_k, result.se),
                *(_with_error(chance.get("value"), chance.get("se")) for chance in chances),
                _with_error(figures.get("maj_at_k"), figures.get("maj_at_k_se")),
                _percent(result.truncated),
                _with_error(_dict(result, "untruncated").get("avg_at_k"), _dict(result, "untruncated").get("se")),
                _percent(figures.get("no_answer_rate")),
                _count(figures.get("ungraded")),
                _count(figures.get("mean_tokens")),
                _count(length.get("0.5")),
                _count(length.get("0.95")),
                _count(figures.get("seconds")),
            ]
            measured = tag("td", names["avg_at_k"], class_="words")
            rows.append(_row(result.name, [measured, *(tag("td", value, class_="number") for value in values)]))
    return _table("All figures, rates in per cent", head, rows)


def _dict(result: Result, name: str) -> dict[str, Any]:
    found = result.figures.get(name)
    return found if isinstance(found, dict) else {}


def _with_error(value: object, error: object) -> str:
    return _percent(value) + (f" ± {_percent(error)}" if isinstance(error, int | float) and isinstance(value, int | float) else "")


def _count(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else NONE


# Label efficiency, training, lineage


def efficiency_section(cells: Cells, heads: Heads) -> Section | None:
    figures = []
    for column, names in heads.items():
        points = []
        for name, row in cells.items():
            result = row.get(column)
            if result is not None and result.avg_at_k is not None and result.labels is not None:
                points.append((console.printable(name), result.labels, result.avg_at_k, *(interval_of(result) or [result.avg_at_k] * 2)))
        if len(points) > 1 and any(x for _, x, *_ in points):
            figures.append(charts.scatter(names["avg_at_k"], "distinct labels spent", points))
    if not figures:
        return None
    note = "Accuracy against the labels that the lineage has cost, with 95 % intervals over problems."
    return "efficiency", "Label efficiency", join(tag("p", note, class_="notes"), tag("div", figures, class_="charts wide"))


def training_section(stages: Sequence[Stage]) -> Section | None:
    parts = []
    for stage in stages:
        if not stage.trains:
            continue
        facts = [", ".join(costs(stage.record)), f"used by: {', '.join(stage.used_by)}" if stage.used_by else ""]
        drawn = curves(stage)
        parts.append(
            tag(
                "article",
                tag("h3", stage.title),
                [tag("p", fact, class_="notes") for fact in facts if fact],
                tag("p", stage.missing, class_="notes") if stage.missing else None,
                tag("div", drawn, class_="charts") if drawn else None,
            )
        )
    return ("training", "Training", join(parts)) if parts else None


def lineage_section(results: Sequence[Result]) -> Section | None:
    trees, seen = [], set()
    for result in results:
        manifest = result.manifest
        if manifest is None or (result.name, result.checkpoint) in seen:
            continue
        seen.add((result.name, result.checkpoint))
        below = [branch for branch in branches(manifest, manifest["ancestors"]) if branch.role != "input"]
        if not any(branch.record for branch in below):
            continue
        number = len(distinct_labels(manifest))
        unknown = unknown_parents(manifest)
        rows = [tag("li", f"{len(labels):,} labels: {title}") for title, labels in spent(manifest)]
        trees.append(
            tag(
                "details",
                tag("summary", tag("strong", result.name), " ", tag("span", f"{number:,} distinct labels", class_="chip")),
                _tree(below),
                tag("ul", rows, class_="notes") if rows else None,
                tag("p", f"Unknown ancestry: {', '.join(unknown)}; what that has cost is not known.", class_="notes") if unknown else None,
                open=True,
            )
        )
    return ("lineage", "Lineage", join(trees)) if trees else None


def _tree(below: Sequence[Branch]) -> Markup:
    items = []
    for branch in below:
        made_by = branch.record
        told = [f"{made_by['command']}, {branch.note}"] if made_by and branch.note else [branch.note] if branch.note else []
        chips = [made_by["command"], *costs(made_by)] if made_by and not branch.note else []
        head = [tag("span", branch.role, class_="role"), " ", tag("code", branch.name)]
        for text in (*chips, *told):
            kind = "notes" if text in told else "chip labels" if text.endswith(" labels") else "chip"
            head += [" ", tag("span", text, class_=kind)]
        given = settings(made_by) if made_by and not branch.note else ""
        items.append(
            tag(
                "li",
                tag("div", head),
                tag("div", tag("code", given), class_="given") if given else None,
                _tree(branch.branches) if branch.branches else None,
            )
        )
    return tag("ul", items, class_="tree")


# Rollouts


def rollouts_section(results: Sequence[Result], heads: Heads, rollouts: Rollouts) -> Section | None:
    if not rollouts.seen:
        return None
    shown, seen = rollouts.shown, len(rollouts.seen)
    note = f"All {seen:,} problems."
    if shown < seen:
        note = f"{shown:,} of {seen:,} problems, drawn by their hash; the others are left out for the size of the page (--page-size)."
    note += f" Texts of more than {HEAD + TAIL:,} characters lack their middle. Differences are taken over all problems."
    if not shown:
        return "rollouts", "Rollouts", tag("p", note, class_="notes")
    have = [number for number, count in enumerate(rollouts.counts) if count]
    first, second = _first_pair(results, have)
    groups = []
    for column, names in heads.items():
        like = [number for number in have if results[number].column == column]
        options = [tag("option", results[number].name, value=number, selected=number == first) for number in like]
        if options:
            groups.append(tag("optgroup", options, label=names["avg_at_k"]))
    shows = {"all": "all samples", "right": "right", "wrong": "wrong", "truncated": "truncated", "ungraded": "not graded"}
    changes = {"changed": "other score in B than in A", "better": "better in B", "worse": "worse in B"}
    show = [
        [tag("option", text, value=value) for value, text in shows.items()],
        tag("optgroup", [tag("option", text, value=value) for value, text in changes.items()], label="changed between A and B"),
    ]
    controls = tag(
        "form",
        tag("label", tag("span", "A"), tag("select", groups, id="a")),
        tag("label", tag("span", "B"), tag("select", id="b", data_first="" if second is None else second)),
        tag("label", tag("span", "Show"), tag("select", show, id="show")),
        tag("label", tag("span", "Search"), tag("input", type="search", id="search", autocomplete="off", spellcheck="false")),
        class_="controls",
        aria_label="Which rollouts are shown",
        role="search",
    )
    viewer = tag(
        "div",
        controls,
        tag("div", id="difference", class_="difference", role="status"),
        tag("p", id="count", class_="notes", role="status"),
        tag("ol", id="problems", class_="problems"),
        tag("button", "Show more", type="button", id="more", hidden=True),
        id="viewer",
        hidden=True,
    )
    without = tag("noscript", tag("p", "Rollouts are shown by a script of this page, which is switched off here."))
    return "rollouts", "Rollouts", join(tag("p", note, class_="notes"), without, viewer)


def _first_pair(results: Sequence[Result], have: Sequence[int]) -> tuple[int, int | None]:
    """Return which results are shown at first: the last two of the first column that has rollouts."""
    like = [number for number in have if results[number].column == results[have[0]].column]
    return (like[-2], like[-1]) if len(like) > 1 else (like[0], None)


# Settings


def settings_section(stages: Sequence[Stage], results: Sequence[Result], defaults: Defaults) -> Section | None:
    evaluations = [(f"eval {result.name}", result.manifest) for result in results if result.manifest]
    records = [*((stage.title, stage.record) for stage in stages), *evaluations]
    parts = [_settings_of(title, record, defaults.get(record["command"], {})) for title, record in records if record["options"]]
    if not parts:
        return None
    note = f"Marked: what differs from the default of s2d {__version__}."
    return "settings", "Settings", join(tag("p", note, class_="notes"), parts)


def _settings_of(title: str, record: Mapping[str, Any], defaults: Mapping[str, Any]) -> Markup:
    differing, others = [], []
    for name, value in record["options"].items():
        default = plain(defaults.get(name))
        # None as a default is worked out by the command, so what it has become is no departure from it
        differs = value != default and (name in record["given"] or (name in defaults and default is not None))
        words = [tag("td", tag("code", _written(value)))]
        if differs:
            marked = tag("th", tag("span", "≠ ", class_="mark", aria_hidden="true"), tag("code", flag(name)), scope="row")
            was = tag("td", tag("code", _written(default)) if name in defaults else NONE, class_="default")
            differing.append(tag("tr", marked, words, was, class_="differs"))
        else:
            others.append(tag("tr", tag("th", tag("code", flag(name)), scope="row"), words))
    about = [f"{package} {version}" for package, version in record["versions"].items() if version]
    about += [f"commit {record['commit'][:12]}"] if record["commit"] else []
    tables = [(f"{title}: what differs from the defaults", ["option", "value", "default"], differing)]
    tables.append((f"{title}: defaults", ["option", "value"], others))
    marked_table, rest_table = (_table(*table, "settings") if table[2] else None for table in tables)
    return tag(
        "details",
        tag("summary", tag("strong", title), " ", tag("span", f"{len(differing)} differ from the defaults", class_="chip")),
        tag("p", ", ".join(about), class_="notes"),
        marked_table,
        tag("details", tag("summary", f"{len(others)} at their defaults"), rest_table) if rest_table else None,
    )


def _written(value: Any) -> str:
    if value is None:
        return NONE
    return value if isinstance(value, str) else json.dumps(value)
