"""One page of HTML that needs no network: results, label efficiency, training curves, lineage, rollouts, settings.

What runs in it is allowed by its hash alone (Content-Security-Policy), and nothing can be loaded from anywhere. All but the
rollouts, which a script shows from a block of JSON, can be read without scripts.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from s2dcli import __version__, console
from s2dcli.errors import UsageError
from s2dcli.files import jsonl
from s2dcli.files.atomic import disk_errors, whole_file
from s2dcli.report.collect import Result
from s2dcli.report.katex import Katex
from s2dcli.report.markup import Markup, raw, tag
from s2dcli.report.rollouts import Rollouts, dumps
from s2dcli.report.sections import (
    Cells,
    Defaults,
    Heads,
    Section,
    efficiency_section,
    lineage_section,
    results_section,
    rollouts_section,
    settings_section,
    training_section,
)
from s2dcli.report.tables import headings
from s2dcli.report.training import Stage

GENERATOR = "s2d report"
MARK = f'<meta name="generator" content="{GENERATOR}">'.encode()  # by which --overwrite knows a page of ours
HEAD_BYTES = 4096  # in which it stands
SLACK = 512  # bytes for what depends on how many rollouts are left out


def check_page(name: str, overwrite: bool, mark: bytes = MARK) -> None:
    """Raise UsageError if there is a file that may not be replaced: any without `overwrite`, and with it all but those of ours."""
    if jsonl.is_stream(name):
        return
    jsonl.refuse_existing(name, overwrite)
    path = Path(name)
    if path.is_dir():
        raise UsageError("is a folder, a file was expected", where=name)
    if path.is_file() and path.stat().st_size and mark not in path.read_bytes()[:HEAD_BYTES]:
        raise UsageError("was not written by s2d report, which leaves it alone", where=name, hint="choose another name")


def write_page(name: str, content: bytes) -> None:
    """Write a page to a file, which appears when it is whole, or to standard output or a pipe. Raises DataError."""
    path = Path(name)
    if jsonl.is_stream(name) or (path.exists() and not path.is_file()):
        with jsonl.open_output(name, overwrite=True) as writer:
            writer.write_line(content)
        return
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(content)


def build_page(
    results: Sequence[Result],
    cells: Cells,
    stages: Sequence[Stage],
    defaults: Defaults,
    size: int,
    katex: Katex | None = None,
) -> tuple[bytes, Rollouts]:
    """Return a page of `size` bytes at most, but for what is no rollout, and the rollouts of which it holds some."""
    rollouts = Rollouts(size)
    for result in results:
        rollouts.read(result)
    differences = rollouts.differences(results)
    heads = headings(list(dict.fromkeys(result.column for result in results)))
    named = [{"name": console.printable(result.name), "column": heads[result.column]["avg_at_k"]} for result in results]
    empty = dumps({"results": named, "problems": [], "differences": differences})

    def page() -> bytes:
        sections = [
            results_section(cells, heads, results),
            efficiency_section(cells, heads),
            training_section(stages),
            lineage_section(results),
            rollouts_section(results, heads, rollouts),
            settings_section(stages, results, defaults),
        ]
        return _document(_title(heads, stages), [section for section in sections if section], katex)

    before = len(page()) + len(empty) + SLACK
    rollouts.shrink(size - before)
    data = dumps({"results": named, "problems": rollouts.problems(), "differences": differences})
    held = tag("script", Markup(data), type="application/json", id="data") if rollouts.shown else Markup("")
    return page().replace(b"<!--data-->", held.encode()), rollouts


def _title(heads: Heads, stages: Sequence[Stage]) -> str:
    names = list(dict.fromkeys(column.dataset for column in heads if column.dataset))
    return ", ".join(names) or ("Training" if stages else "Results")


def _document(title: str, sections: Sequence[Section], katex: Katex | None) -> bytes:
    own = {name: files("s2dcli.report").joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    styles = [own["css"], *([katex.style] if katex else [])]
    scripts = [*([katex.script] if katex else []), own["js"]]
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hashes(scripts)}",
            f"style-src {_hashes(styles)}",
            *(["font-src data:"] if katex else []),
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="generator", content=GENERATOR),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{title}: s2d report"),
        [raw("style", style) for style in styles],
    )
    themes = [
        tag("label", tag("input", type="radio", name="theme", value=value), tag("span", value), class_="theme")
        for value in ("auto", "light", "dark")
    ]
    links = [tag("li", tag("a", heading, href=f"#{anchor}")) for anchor, heading, _ in sections]
    body = tag(
        "body",
        tag("a", "Skip to the results", href="#main", class_="skip"),
        tag(
            "header",
            tag("h1", title),
            tag("fieldset", tag("legend", "Theme"), themes, id="themes", hidden=True),
            tag("nav", tag("ul", links), aria_label="Sections"),
        ),
        tag(
            "main",
            [
                tag("section", tag("h2", heading, id=f"{anchor}-heading"), content, id=anchor, aria_labelledby=f"{anchor}-heading")
                for anchor, heading, content in sections
            ],
            id="main",
        ),
        tag("footer", tag("p", f"Made by s2d {__version__}", f", math by KaTeX {katex.version}" if katex else None, ".")),
        Markup("<!--data-->"),
        [raw("script", script) for script in scripts],
    )
    return ("<!doctype html>\n" + tag("html", head, body, lang="en") + "\n").encode()


def _hashes(contents: Sequence[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
