"""Accuracy against distinct labels spent, as a table and as an SVG of its own: what a label brings by which way.

Results of one name whose lineages have cost equally many labels are training runs of one recipe: their mean is a point, and
the band around it the 95 % interval of Student's t over these runs. A name without labels is a line across, to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from s2dcli import stats
from s2dcli.errors import DataError
from s2dcli.report.charts import Scale, percent, ticks
from s2dcli.report.collect import Column, Result
from s2dcli.report.markup import Markup, raw, tag
from s2dcli.report.page import GENERATOR
from s2dcli.report.tables import headings

WIDTH, HEIGHT = 640, 340  # of the picture, in its own units
LEFT, TOP, BOTTOM, NAMES = 52, 40, 48, 190  # margins of the plot; the names stand at its right
NAME_HEIGHT = 18  # least distance between two names
TITLE_Y = 18
MOST_MARKS = 8  # numbers below the axis; of more, only powers of two stand there

MARK = f'data-generator="{GENERATOR}"'.encode()  # by which --overwrite knows a picture of ours

# Colours are told apart with every common colour blindness (Okabe and Ito); a viewer's dark theme gets lighter ones.
_COLOURS = [("#0072b2", "#56b4e9"), ("#d55e00", "#f0925a"), ("#009e73", "#4cc9a4"), ("#8a5fb0", "#c39be0")]
_STYLE = """
svg { --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --rule: #d9dde2; background: var(--paper); }
text { fill: var(--soft); font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
.name { font-weight: 600; } .title { fill: var(--ink); font-size: 15px; font-weight: 600; }
.grid { stroke: var(--rule); } .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.level { stroke-width: 1.5; stroke-dasharray: 5 4; }
.band { opacity: 0.18; stroke: none; }
"""


class Point(NamedTuple):
    """A recipe with so many labels: the mean of avg@k over its training runs, with its standard error and 95 % interval over these."""

    name: str
    labels: int
    runs: int
    avg_at_k: float
    se: float | None  # None with one run, and so is the interval
    ci95: tuple[float, float] | None


def label_points(results: Iterable[Result]) -> tuple[Column, list[Point]]:
    """Return what all results have in common, and the points in order of names and labels.

    Raises DataError for results that cannot be compared, whose labels are unknown, or that come from one checkpoint twice.
    """
    results = list(results)
    first = results[0]
    seen: dict[str, str] = {}
    for result in results:
        if result.column != first.column:
            raise DataError(f"differs from {first.where} in data set or decoding", where=result.where, hint="draw one way of evaluation")
        if result.labels is None:
            raise DataError("the labels behind it are not known: it has no s2d.json, or a parent is unknown", where=result.where)
        if result.avg_at_k is None:
            raise DataError("has no avg@k: its rewards have no notion of right", where=result.where)
        if result.checkpoint and (other := seen.setdefault(result.checkpoint, result.where)) != result.where:
            raise DataError(f"is of the same checkpoint as {other}: one training run would count twice", where=result.where)
    order = {name: place for place, name in enumerate(dict.fromkeys(result.name for result in results))}

    def key(result: Result) -> tuple[int, int]:
        return order[result.name], result.labels or 0

    points = []
    for (_, labels), found in groupby(sorted(results, key=key), key=key):
        group = list(found)
        rates = [result.avg_at_k or 0.0 for result in group]
        centre, error = stats.mean(rates), stats.standard_error(rates)
        reach = stats.t_quantile(stats.SIGNIFICANT, len(rates) - 1) * error if len(rates) > 1 else 0.0
        interval = (max(0.0, centre - reach), min(1.0, centre + reach)) if len(rates) > 1 else None
        points.append(Point(group[0].name, labels, len(rates), centre, error if interval else None, interval))
    if not any(point.labels for point in points):
        raise DataError("has cost no label, and so have all others: there is no curve to draw", where=first.where)
    return first.column, points


def table(points: Sequence[Point]) -> list[list[str]]:
    """Return the points as rows of labels and columns of names, in per cent, the first row the headings."""
    cells = {(point.name, point.labels): point for point in points}
    names = list(dict.fromkeys(point.name for point in points))

    def cell(point: Point | None) -> str:
        if point is None:
            return "-"
        return f"{100 * point.avg_at_k:.1f}" + (f" ± {100 * point.se:.1f}" if point.se is not None else "")

    return [["labels", *names]] + [
        [str(labels), *(cell(cells.get((name, labels))) for name in names)] for labels in sorted({point.labels for point in points})
    ]


def note(column: Column, points: Sequence[Point]) -> str:
    """Return what is to be said of the table and the picture."""
    runs = sorted({point.runs for point in points if point.labels})
    if runs[-1] == 1:
        spread = "one training run a point, so the spread over runs is not known"
    else:
        number = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
        spread = f"{number} training runs a point, ± the standard error over training runs"
    return f"{_heading(column)}: per cent, {column.problems} problems; {spread}."


def _heading(column: Column) -> str:
    return headings([column])[column]["avg_at_k"]


def draw(column: Column, points: Sequence[Point]) -> bytes:
    """Return the picture: a file of its own, in light and dark, without scripts."""
    curves = {name: [point for point in points if point.name == name] for name in dict.fromkeys(point.name for point in points)}
    spent = sorted({point.labels for point in points if point.labels})
    low, high = math.log2(spent[0]), math.log2(spent[-1])
    across = Scale(low, high if high > low else low + 1, LEFT + 12, WIDTH - NAMES)
    ends = [end for point in points for end in (point.ci95 or (point.avg_at_k, point.avg_at_k))]
    marks = [mark for mark in ticks(min(ends), max(ends), 5) if -1e-9 <= mark <= 1 + 1e-9]
    up = Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    numbers = spent if len(spent) <= MOST_MARKS else [labels for labels in spent if math.log2(labels).is_integer()]
    frame = [
        [tag("line", x1=LEFT, x2=WIDTH - NAMES, y1=up(mark), y2=up(mark), class_="grid") for mark in marks],
        [tag("text", percent(mark), x=LEFT - 8, y=up(mark), dy="0.35em", text_anchor="end") for mark in marks],
        [tag("text", f"{labels:,}", x=across(math.log2(labels)), y=HEIGHT - BOTTOM + 20, text_anchor="middle") for labels in numbers],
        tag("text", "distinct labels spent", x=(LEFT + WIDTH - NAMES) / 2, y=HEIGHT - 8, text_anchor="middle"),
    ]
    heights = _apart([float(up(curve[-1].avg_at_k)) for curve in curves.values()])
    title = _heading(column)
    drawn = [_curve(curve, place, across, up, height) for place, (curve, height) in enumerate(zip(curves.values(), heights, strict=True))]
    style = _STYLE + "".join(_colours(place, 0) for place in range(len(curves)))
    style += "@media (prefers-color-scheme: dark) {\nsvg { --paper: #15171a; --ink: #e4e6e9; --soft: #9aa4af; --rule: #343a41; }\n"
    style += "".join(_colours(place, 1) for place in range(len(curves))) + "}\n"
    heard = f"{title} against labels. " + "; ".join(
        f"{name}: " + ", ".join(f"{percent(point.avg_at_k)} with {point.labels:,}" for point in curve) for name, curve in curves.items()
    )
    picture = tag(
        "svg",
        raw("style", style),
        tag("title", heard),
        tag("text", title, x=LEFT, y=TITLE_Y, class_="title"),
        frame,
        drawn,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        width=WIDTH,
        height=HEIGHT,
        role="img",
        data_generator=GENERATOR,
    )
    return f"{picture}\n".encode()


def _colours(place: int, theme: int) -> str:
    colour = _COLOURS[place % len(_COLOURS)][theme]
    return f".c{place} {{ stroke: {colour}; }} .f{place} {{ fill: {colour}; }}\n"


def _curve(points: Sequence[Point], place: int, across: Scale, up: Scale, height: float) -> list[Markup]:
    """Return the band, line, dots and name of one recipe."""
    levels = [
        tag("line", x1=LEFT, x2=WIDTH - NAMES, y1=up(point.avg_at_k), y2=up(point.avg_at_k), class_=f"level c{place}")
        for point in points
        if not point.labels
    ]
    at = [(across(math.log2(point.labels)), point) for point in points if point.labels]
    sure = [(x, *point.ci95) for x, point in at if point.ci95]
    outline = [f"{x},{up(high)}" for x, _, high in sure] + [f"{x},{up(low)}" for x, low, _ in reversed(sure)]
    return [
        *([tag("polygon", points=" ".join(outline), class_=f"band f{place}")] if len(sure) > 1 else []),
        *levels,
        *([tag("polyline", points=" ".join(f"{x},{up(point.avg_at_k)}" for x, point in at), class_=f"curve c{place}")] if at else []),
        *(tag("circle", cx=x, cy=up(point.avg_at_k), r=3.5, class_=f"f{place}") for x, point in at),
        tag("text", points[0].name, x=WIDTH - NAMES + 10, y=f"{height:.1f}", dy="0.35em", class_=f"name f{place}"),
    ]


def _apart(heights: Sequence[float]) -> list[float]:
    """Return heights moved down, where need be, so that names do not lie on each other."""
    found = list(heights)
    below = -math.inf
    for place in sorted(range(len(found)), key=found.__getitem__):
        found[place] = max(found[place], below + NAME_HEIGHT)
        below = found[place]
    return found
