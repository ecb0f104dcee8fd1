"""Charts as inline SVG: no scripts, no style attributes; colours and type are those of the page's style sheet.

Every chart has a text for those who do not see it, as its `aria-label`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from s2dcli.report.markup import Markup, tag

Point = tuple[float, float | None]  # None: not measured, a gap in the line

WIDTH, HEIGHT = 280, 150  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 8, 22  # margins of the plot
WIDE, TALL, NAMES = 440, 260, 140  # of a scatter plot, and the room for names at its right
NAMED = 6  # points up to which their names stand beside them; more have numbers, and the names stand below
BESIDE, BESIDE_NUMBERED = 10, 16  # distance between points of the same x, which stand beside each other
LABEL_HEIGHT = 15  # distance between the names of two points
MOST_POINTS = 300  # of a line; longer ones are drawn by the means of equal parts
TICKS = 3


class Scale(NamedTuple):
    """Maps values from `low` to `high` to positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{self.start + share * (self.end - self.start):.1f}".removesuffix(".0")


def number(value: float) -> str:
    """Write a number of any size with three digits."""
    if value and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Return round numbers, `count` or somewhat more of them, that reach from `low` or below to `high` or above."""
    if high <= low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, last + 1)]


def interval(value: float, low: float, high: float, label: str) -> Markup:
    """Return a rate with its interval on a line from 0 to 1."""
    across = Scale(0, 1, 4, 116)
    return tag(
        "svg",
        tag("line", x1=across(0), x2=across(1), y1=8, y2=8, class_="axis"),
        [tag("line", x1=across(at), x2=across(at), y1=6, y2=10, class_="axis") for at in (0, 0.5, 1)],
        tag("line", x1=across(low), x2=across(high), y1=8, y2=8, class_="whisker"),
        tag("circle", cx=across(value), cy=8, r=2.5, class_="dot"),
        viewBox="0 0 120 16",
        class_="interval",
        width=120,
        height=16,
        role="img",
        aria_label=label,
    )


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most MOST_POINTS points: the means of equal parts of a longer line."""
    if len(points) <= MOST_POINTS:
        return list(points)
    edges = [len(points) * part // MOST_POINTS for part in range(MOST_POINTS + 1)]
    found: list[Point] = []
    for start, end in pairwise(edges):
        known = [y for _, y in points[start:end] if y is not None]
        found.append((points[(start + end - 1) // 2][0], sum(known) / len(known) if known else None))
    return found


def line(title: str, points: Sequence[Point], *, errors: Sequence[float] = (), rate: bool = False) -> Markup:
    """Return a curve over steps as a figure; with `errors`, points with whiskers of 95 %. A `rate` is written in per cent."""
    write = percent if rate else number
    known = [(x, y) for x, y in points if y is not None]
    whiskers = [(x, y - 1.96 * e, y + 1.96 * e) for (x, y), e in zip(known, errors, strict=True)] if errors else []
    values = [y for _, y in known] + [end for _, low, high in whiskers for end in ((max(0, low), min(1, high)) if rate else (low, high))]
    low, high = min(values), max(values)
    marks = ticks(0 if low >= 0 and low < 0.6 * high else low, min(high, 1.0) if rate else high)
    across, up = _frame([x for x, _ in points], marks)
    drawn = thinned(points)
    lines = [
        tag("polyline", points=" ".join(f"{across(x)},{up(y)}" for x, y in part), class_="curve")
        for part in _unbroken(drawn)
        if len(part) > 1
    ]
    alone = known if errors or len(known) < 12 else [part[0] for part in _unbroken(drawn) if len(part) == 1]
    last = known[-1][1]
    heard = f"{title}: {write(known[0][1])} at step {known[0][0]:g}, {write(last)} at step {known[-1][0]:g}; "
    heard += f"lowest {write(min(y for _, y in known))}, highest {write(max(y for _, y in known))}"
    clip = marks[0], marks[-1]
    picture = tag(
        "svg",
        _grid(marks, across, up, points, write),
        [
            tag("line", x1=across(x), x2=across(x), y1=up(max(below, clip[0])), y2=up(min(above, clip[1])), class_="whisker")
            for x, below, above in whiskers
        ],
        lines,
        [tag("circle", cx=across(x), cy=up(y), r=2, class_="dot") for x, y in alone],
        tag("line", y1=TOP, y2=HEIGHT - BOTTOM, class_="cursor", hidden=True),
        data_x=" ".join(f"{value:.9g}" for value in across),
        data_y=" ".join(f"{value:.9g}" for value in up),
        data_rate=rate,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=heard,
    )
    return tag("figure", tag("figcaption", title, tag("span", write(last), class_="last")), picture, class_="chart")


def shares(title: str, names: Sequence[str], steps: Sequence[float], rows: Sequence[Sequence[float]]) -> Markup:
    """Return parts of a whole over steps as stacked areas: a row is a step, its numbers are the parts."""
    parts = [[row[index] for row in rows] for index in range(len(names))]
    totals = [sum(row) or 1.0 for row in rows]
    points = [thinned([(step, value / total) for step, value, total in zip(steps, part, totals, strict=True)]) for part in parts]
    xs = [x for x, _ in points[0]]
    if len(xs) == 1:  # an area needs a width
        xs, points = [xs[0] - 0.5, xs[0] + 0.5], [part * 2 for part in points]
    across, up = _frame(xs, [0.0, 0.5, 1.0])
    areas, below = [], [0.0] * len(xs)
    for index, part in enumerate(points):
        above = [base + (y or 0.0) for base, (_, y) in zip(below, part, strict=True)]
        outline = [f"{across(x)},{up(y)}" for x, y in zip(xs, above, strict=True)]
        outline += [f"{across(x)},{up(y)}" for x, y in zip(reversed(xs), reversed(below), strict=True)]
        areas.append(tag("polygon", points=" ".join(outline), class_=f"area part{index % 6}"))
        below = above
    whole = sum(totals)
    means = [sum(part) / whole for part in parts]
    heard = f"{title}: " + ", ".join(f"{name} {mean:.0%}" for name, mean in zip(names, means, strict=True))
    picture = tag(
        "svg",
        areas,
        _grid([0.0, 0.5, 1.0], across, up, [(x, 0.0) for x in xs], percent),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=heard,
    )
    keys = [
        tag("li", tag("span", class_=f"key part{index % 6}", aria_hidden="true"), f"{name} {mean:.0%}")
        for index, (name, mean) in enumerate(zip(names, means, strict=True))
    ]
    return tag("figure", tag("figcaption", title), picture, tag("ul", keys, class_="keys"), class_="chart")


def scatter(title: str, x_title: str, points: Sequence[tuple[str, float, float, float, float]]) -> Markup:
    """Return named rates with their intervals, (name, x, y, low, high), over a quantity x that starts at 0."""
    x_marks = ticks(0, max(x for _, x, *_ in points), 4)
    y_marks = [0.0, 0.25, 0.5, 0.75, 1.0]
    left, bottom = 46, 42
    numbered = len(points) > NAMED
    names = 28 if numbered else NAMES
    across, up = Scale(0, x_marks[-1], left + 14, WIDE - names), Scale(0, 1, TALL - bottom, 18)
    grid = [
        [
            tag("line", x1=left, x2=WIDE - 8, y1=up(y), y2=up(y), class_="grid"),
            tag("text", percent(y), x=left - 6, y=up(y), dy="0.35em", text_anchor="end"),
        ]
        for y in y_marks
    ]
    grid += [tag("text", f"{x:g}", x=across(x), y=TALL - bottom + 17, text_anchor="middle") for x in x_marks]
    ordered = sorted(points, key=lambda point: (point[1], point[2]))
    if numbered:
        shown = [(str(index), *rest) for index, (_, *rest) in enumerate(ordered, start=1)]
        keys = tag("ul", [tag("li", tag("b", index), f" {name}") for index, (name, *_) in enumerate(ordered, start=1)], class_="keys")
    else:
        shown, keys = ordered, None
    marks = []
    for _, group in groupby(shown, key=lambda point: point[1]):
        marks += (_numbered if numbered else _named)(list(group), across, up)
    heard = f"{title}: " + "; ".join(f"{name} {percent(y)} with {x:g} labels" for name, x, y, _, _ in points)
    picture = tag(
        "svg",
        grid,
        tag("text", x_title, x=(left + WIDE - names) / 2, y=TALL - 6, text_anchor="middle"),
        marks,
        viewBox=f"0 0 {WIDE} {TALL}",
        role="img",
        aria_label=heard,
    )
    return tag("figure", tag("figcaption", title), picture, keys, class_="chart wide")


def _beside(count: int, distance: float, at: float) -> list[float]:
    """Return the places of points that belong at one."""
    return [at + distance * (index - (count - 1) / 2) for index in range(count)]


def _dot(at: float, y: float, low: float, high: float, up: Scale) -> list[Markup]:
    return [
        tag("line", x1=at, x2=at, y1=up(low), y2=up(high), class_="whisker"),
        tag("circle", cx=at, cy=up(y), r=3.5, class_="dot"),
    ]


def _numbered(same: Sequence[tuple[str, float, float, float, float]], across: Scale, up: Scale) -> list[Markup]:
    """Points of one x with a short name above each."""
    marks: list[Markup] = []
    for at, (name, _, y, low, high) in zip(_beside(len(same), BESIDE_NUMBERED, float(across(same[0][1]))), same, strict=True):
        marks += _dot(at, y, low, high, up)
        marks.append(tag("text", name, x=at, y=f"{float(up(high)) - 4:.1f}", text_anchor="middle", class_="name"))
    return marks


def _named(same: Sequence[tuple[str, float, float, float, float]], across: Scale, up: Scale) -> list[Markup]:
    """Points of one x with their names at the right, one above the other."""
    places = _beside(len(same), BESIDE, float(across(same[0][1])))
    names_at = places[-1] + BESIDE / 2 + 8
    marks: list[Markup] = []
    lowest = math.inf  # where the next name may stand
    for at, (name, _, y, low, high) in zip(places, same, strict=True):
        height = min(float(up(y)), lowest)
        lowest = height - LABEL_HEIGHT
        marks += _dot(at, y, low, high, up)
        marks.append(tag("line", x1=at + 4, x2=names_at - 2, y1=up(y), y2=f"{height:.1f}", class_="axis"))
        marks.append(tag("text", name, x=names_at, y=f"{height:.1f}", dy="0.35em", class_="name"))
    return marks


def _frame(xs: Sequence[float], marks: Sequence[float]) -> tuple[Scale, Scale]:
    low, high = min(xs), max(xs)
    if low == high:
        low, high = low - 1, high + 1
    return Scale(low, high, LEFT, WIDTH - RIGHT), Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)


def _grid(marks: Sequence[float], across: Scale, up: Scale, points: Sequence[Point], write: Callable[[float], str]) -> list[Markup]:
    found = []
    for mark in marks:
        found.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=up(mark), y2=up(mark), class_="grid"))
        found.append(tag("text", write(mark), x=LEFT - 5, y=up(mark), dy="0.35em", text_anchor="end"))
    first, last = points[0][0], points[-1][0]
    below = HEIGHT - 6
    found.append(tag("text", f"step {first:g}", x=LEFT, y=below))
    if last != first:
        found.append(tag("text", f"{last:g}", x=WIDTH - RIGHT, y=below, text_anchor="end"))
    return found


def _unbroken(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """Return the parts of a line between its gaps."""
    return [list(part) for known, part in groupby(points, key=lambda point: point[1] is not None) if known]
