"""Tables of collected results: markdown, LaTeX and CSV in per cent, JSON in fractions."""

from __future__ import annotations

import csv
import io

from s2dcli import console
from s2dcli.report.collect import REWARD, RIGHT, Column, Result

LABELS = "labels"  # heading of the distinct labels that a row has cost
# What LaTeX does not take as it is
_LATEX = {character: rf"\{character}" for character in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}


def headings(columns: list[Column]) -> dict[Column, dict[str, str]]:
    """Return the heading of each column's figures, with limits only where these tell columns apart."""
    labels = {}
    for column in columns:
        decoding = ["greedy" if column.temperature == 0 else f"T={column.temperature:g}"]
        if column.top_p < 1:
            decoding.append(f"top-p {column.top_p:g}")
        if column.top_k:
            decoding.append(f"top-k {column.top_k}")
        likes = [other for other in columns if other[:5] == column[:5]]
        if len({other.max_tokens for other in likes}) > 1:
            decoding.append(f"{column.max_tokens} tokens")
        if len({other.problems for other in likes}) > 1:
            decoding.append(f"{column.problems} problems")
        names = {"avg_at_k": f"avg@{column.k}", "pass_at_k": f"pass@{column.k}", "truncated": "truncated", "mean_reward": "mean reward"}
        labels[column] = {figure: f"{column.dataset} {name} ({', '.join(decoding)})" for figure, name in names.items()}
    return labels


def _cells(cells: dict[str, dict[Column, Result]], labels: dict[Column, dict[str, str]], figures: list[str]) -> list[list[str]]:
    """Return the table in per cent, its first row the headings."""

    def cell(result: Result | None, figure: str) -> str:
        if result is None or getattr(result, figure) is None:
            return "-"
        if figure == "mean_reward":
            return f"{result.mean_reward:.4g} ± {result.mean_reward_se:.2g}"
        spread = f" ± {100 * result.se:.1f}" if figure == "avg_at_k" else ""
        return f"{100 * getattr(result, figure):.1f}{spread}"

    spent = labels_of(cells) if len(figures) > 1 else {}
    table = [["", *(heads[figure] for heads in labels.values() for figure in figures), *([LABELS] if spent else [])]]
    for name, row in cells.items():
        last = ["-" if spent[name] is None else str(spent[name])] if spent else []
        table.append([name, *(cell(row.get(column), figure) for column in labels for figure in figures), *last])
    return table


def labels_of(cells: dict[str, dict[Column, Result]]) -> dict[str, int | None]:
    """Return the distinct labels that each row has cost; {} where none of them is known."""
    known = {name: [result.labels for result in row.values() if result.labels is not None] for name, row in cells.items()}
    found = {name: max(numbers, default=None) for name, numbers in known.items()}
    return found if any(number is not None for number in found.values()) else {}


def notes(labels: dict[Column, dict[str, str]]) -> list[str]:
    """Return what is to be said of each column."""
    note = "± is the standard error over problems, not over retrained checkpoints"
    columns = ((heads["avg_at_k"], f"{column.problems} problems, k = {column.k}") for column, heads in labels.items())
    return [f"{head}: per cent; {size}; {note}." for head, size in columns]


def as_markdown(cells: dict[str, dict[Column, Result]], labels: dict[Column, dict[str, str]], figures: list[str]) -> str:
    """Return an aligned markdown table in per cent, and below it one line for each column."""
    return console.markdown(_cells(cells, labels, figures)) + "\n" + "".join(f"- {note}\n" for note in notes(labels))


def as_latex(cells: dict[str, dict[Column, Result]], labels: dict[Column, dict[str, str]], figures: list[str]) -> str:
    """Return a LaTeX tabular in the rules of the package booktabs, in per cent; the notes are comments."""
    head, *rows = ([escape_latex(cell) for cell in row] for row in _cells(cells, labels, figures))
    lines = [
        *(f"% {note}" for note in notes(labels)),
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        *(r"\toprule", " & ".join(head) + r" \\", r"\midrule"),
        *(" & ".join(row) + r" \\" for row in rows),
        *(r"\bottomrule", r"\end{tabular}"),
    ]
    return "".join(f"{line}\n" for line in lines)


def escape_latex(text: str) -> str:
    """Return text as LaTeX typesets it: its special characters escaped, ± in math mode."""
    return "".join(_LATEX.get(character, character) for character in " ".join(console.printable(text).split()))


def as_csv(cells: dict[str, dict[Column, Result]], labels: dict[Column, dict[str, str]], figures: list[str]) -> str:
    """Return comma-separated values in per cent; what is missing is empty, as CSV readers expect."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ["avg_at_k", "se", *figures[1:]]
    heads = [head["avg_at_k"] + " se" if field == "se" else head[field] for head in labels.values() for field in fields]
    spent = labels_of(cells) if len(figures) > 1 else {}
    writer.writerow(["name", *heads, *([LABELS] if spent else [])])

    def cell(result: Result | None, field: str) -> str:
        value = getattr(result, field, None)
        return "" if value is None else f"{value:.6g}" if field == "mean_reward" else f"{100 * value:.4f}"

    for name, row in cells.items():
        values = [cell(row.get(column), field) for column in labels for field in fields]
        writer.writerow([name, *values, *([spent[name]] if spent else [])])
    return text.getvalue()


def as_json(cells: dict[str, dict[Column, Result]], labels: dict[Column, dict[str, str]]) -> dict:
    """Return columns and rows as one object, rates as fractions; a cell is null where there is no result."""

    def cell(result: Result | None) -> dict | None:
        if result is None:
            return None
        figures = {field: getattr(result, field) for field in (*RIGHT, "truncated", *REWARD)}
        more = {"labels": result.labels, "model": result.model, "checkpoint": result.checkpoint, "file": result.where}
        return {**figures, "ci95": result.figures.get("ci95"), **more}

    names = {column: heads["avg_at_k"] for column, heads in labels.items()}
    return {
        "columns": [{"label": label, **column._asdict()} for column, label in names.items()],
        "rows": [{"name": name, "cells": {label: cell(row.get(column)) for column, label in names.items()}} for name, row in cells.items()],
    }
