"""The page of `s2d report --html`: what it says, what it leaves out, and how a browser takes it."""

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import browser
import pytest
from conftest import read_jsonl, write_jsonl

from s2dcli.errors import DataError, UsageError
from s2dcli.files.records import problem_sha256
from s2dcli.report import charts
from s2dcli.report.katex import read_katex
from s2dcli.report.markup import Markup, join, raw, tag
from s2dcli.report.page import check_page
from s2dcli.report.rollouts import HEAD, TAIL

HOSTILE = (
    "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><!--data--> & \"quoted\" \u202eevil\u2066 \x1b[2J"
    " <svg onload=window.pwned=3> <a href='javascript:window.pwned=4'>x</a>"
)
SHOWN = HOSTILE.replace("\u202e", "\\u202e").replace("\u2066", "\\u2066").replace("\x1b", "\\x1b")  # with marks made visible
MATH = r"We have $\frac{1}{2} + \frac{1}{2} = 1$, so \(x^2 = 1\) and $\href{javascript:window.pwned=5}{x}$ \boxed{1}"
SAMPLER = {"model": "m", "revision": "", "step": 0, "checkpoint": "", "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 64}
SAMPLER |= {"logprobs_mode": "processed_logprobs", "engine": "transformers", "template": "own"}
KATEX = Path(sys.prefix) / "katex.tgz"  # of `make browser`


def graded(problem: int, sample: int, right: bool | None, text: str = "so \\boxed{1}", **changes) -> dict:
    question = f"{problem}+{problem}="
    row = {
        "schema": "s2d.rollout/1",
        "problem_id": f"p{problem}",
        "problem_sha256": problem_sha256(question),
        "group_id": f"p{problem}",
        "sample_index": sample,
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": text}],
        "answer": str(2 * problem),
        "prompt_ids": [1, 2],
        "completion_ids": [3, 4, 5],
        "completion_logprobs": [-0.1, -0.2, -0.3],
        "finish_reason": "stop",
        "seed": 1,
        "source": {"dataset": "sums", "split": "test", "index": problem},
        "sampler": SAMPLER,
        "template_sha256": "",
        "reward": None if right is None else float(right),
        "rewards": {},
        "label": right,
        "extracted": "1",
        "verifier": "by hand",
        "verify_error": "",
    }
    return {**row, **changes}


class Work(NamedTuple):
    """Where the fixture has put things."""

    folder: Path
    runs: list[str]  # what is reported
    training: Path
    page: Path


@pytest.fixture(scope="module")
def work(s2d, toy, few, tmp_path_factory) -> Work:
    """Two evaluations of rollouts made by hand, a training and its evaluation, and the page about them."""
    folder = tmp_path_factory.mktemp("page")
    a = [graded(problem, sample, problem < 2) for problem in range(6) for sample in range(2)]
    b = [graded(problem, sample, problem in (0, 2, 3) or (problem == 4 and sample == 0)) for problem in range(6) for sample in range(2)]
    a[2:4] = [graded(1, 0, True, HOSTILE, extracted=HOSTILE, finish_reason="length"), graded(1, 1, None, verify_error=HOSTILE)]
    b[2] = graded(1, 0, False, f"<think>{HOSTILE} and\n more</think>\n{MATH}", extracted=r"\frac{1}{2}")
    for row in (*a[4:6], *b[4:6]):
        row["prompt"] = [{"role": "system", "content": HOSTILE}, *row["prompt"]]
    for name, rows, title in (("a", a, "plain"), ("b", b, f"B {HOSTILE}")):
        path = write_jsonl(folder / f"{name}.jsonl", rows)
        assert s2d("eval", "--rollouts", path, "-o", folder / name, "--name", title).code == 0
    run = folder / "run"
    sampling = ["--max-tokens", 8, "--workers", 1]
    trained = ["--steps", 3, "--problems-per-step", 4, "--lr", 2e-4, "--eval-problems", few, "--eval-every", 1, "-n", 4]
    assert s2d("grpo", "--model", toy / "student", few, "-o", run, *trained, *sampling).code == 0
    assert s2d("eval", "--model", run, few, "-k", 2, "-o", folder / "c", "--name", "trained", *sampling).code == 0
    runs = [str(folder / name) for name in "abc"]
    page = folder / "page.html"
    done = s2d("report", *runs, "--html", page)
    assert done.code == 0, done.err
    assert "rollouts of 14 of 14 problems in it" in done.err
    assert done.out == s2d("report", *runs).out  # the table is printed too
    return Work(folder, runs, run, page)


class Elements(HTMLParser):
    """The elements of a page, and their texts."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))
        self._open.append(name)

    def handle_endtag(self, name):
        while self._open and self._open.pop() != name:
            pass

    def handle_data(self, text):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(text)


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


def row_of(page: Path, name: str) -> str:
    """Return the text of a row of the first table."""
    table = page.read_text().split("</table>")[0]
    row = next(row for row in table.split("<tr>") if f'<th scope="row">{name}' in row)
    return re.sub(r"<[^>]*>", " ", row)


def test_what_is_not_markup_is_escaped():
    assert tag("p", "<b>", tag("i", '"&'), None, ["x", 1], title='"<', class_="a", hidden=True, lang=None) == (
        '<p title="&quot;&lt;" class="a" hidden>&lt;b&gt;<i>"&amp;</i>x1</p>'
    )
    assert tag("p", "\u202e\x1b") == "<p>\\u202e\\x1b</p>"
    assert isinstance(join("<", Markup("<br>")), Markup)
    for content in ("</SCRIPT>", "<!-- x"):
        with pytest.raises(ValueError, match="cannot stand"):
            raw("script", content)


def test_a_page_is_its_own_elements_alone_whatever_the_rollouts_say(work):
    text, elements = work.page.read_text(), Elements(work.page)
    assert not {name for name, _ in elements.found} & {"img", "iframe", "object", "embed", "link", "base", "foreignobject"}
    for name, attributes in elements.found:
        assert not [key for key in attributes if key.startswith("on") or key in ("style", "srcdoc", "action")], (name, attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert elements.found.count(("script", {})) == 1
    policy = next(attributes["content"] for _, attributes in elements.found if "http-equiv" in attributes)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy
    assert "http" not in policy
    for name in ("script", "style"):
        own = re.findall(rf"<{name}>(.*?)</{name}>", text, re.S)
        hashes = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in own]
        assert rules[f"{name}-src"] == " ".join(f"'sha256-{digest}'" for digest in hashes)


def test_rollouts_are_all_there_as_text(work):
    data = data_of(work.page)
    assert [result["name"] for result in data["results"]] == ["plain", f"B {SHOWN}", "trained"]
    problem = next(problem for problem in data["problems"] if problem["id"] == "p1")
    assert problem["gold"] == "2"
    assert problem["prompt"] == [["user", "1+1="]]
    assert problem["samples"][0] == [[1, 1, 3, SHOWN, SHOWN, ""], [None, 0, 3, "1", "so \\boxed{1}", SHOWN]]
    assert problem["samples"][2] is None
    rows = read_jsonl(work.folder / "c" / "rollouts.jsonl")
    written = {problem["id"]: problem["samples"][2] for problem in data["problems"] if problem["samples"][2]}
    for row in rows:
        sample = written[row["problem_id"]][row["sample_index"]]
        assert sample[0] == int(row["label"])
        assert sample[1:3] == [int(row["finish_reason"] == "length"), len(row["completion_ids"])]
        assert sample[3:] == [row["extracted"], row["completion"][0]["content"], row["verify_error"]]


def test_figures_are_those_of_the_results(s2d, work):
    for name, folder in (("plain", "a"), ("trained", "c")):
        results = json.loads((work.folder / folder / "results.json").read_text())
        row = row_of(work.page, name)
        assert f"{100 * results['avg_at_k']:.1f} ± {100 * results['se']:.1f}" in row
        assert "{:.1f} to {:.1f}".format(*(100 * end for end in results["ci95"])) in row
    spent = json.loads(s2d("lineage", work.training, "--json").out)["labels"]["distinct"]
    assert spent == 8
    assert row_of(work.page, "trained").split()[-2] == "8"
    assert "8 distinct labels" in work.page.read_text()
    counts = json.loads((work.training / "step-000003" / "s2d.json").read_text())["counts"]
    assert row_of(work.page, "trained").split()[-1] == f"{int(counts['tokens']):,}"
    compared = json.loads(s2d("compare", *work.runs[:2], "--json").out)
    differences = data_of(work.page)["differences"]
    assert differences["0,1"] == compared
    swapped = json.loads(s2d("compare", *work.runs[1::-1], "--json").out)
    assert differences["1,0"].keys() == swapped.keys()
    for name, value in swapped.items():
        assert differences["1,0"][name] == pytest.approx(value), name
    assert set(differences) == {"0,1", "1,0"}  # the third is of other problems


def figure(text: str, title: str) -> str:
    return next(part for part in text.split("<figure") if f"<figcaption>{title}<" in part)


def test_curves_are_those_of_the_metrics(work):
    rows = read_jsonl(work.training / "metrics.jsonl")
    text = work.page.read_text()
    for title, name in (("reward", "reward"), ("tokens a rollout", "mean_tokens"), ("entropy, nats a token", "entropy")):
        drawn = figure(text, title)
        points = [tuple(map(float, point.split(","))) for point in re.search(r'polyline points="([^"]*)"', drawn)[1].split()]
        ticks = [(float(y), float(value.replace(",", ""))) for y, value in re.findall(r'<text x="43" y="([\d.]+)"[^>]*>([^<]*)<', drawn)]
        (low, start), (high, end) = ticks[0], ticks[-1]
        read = [start + (y - low) / (high - low) * (end - start) for _, y in points]
        assert read == pytest.approx([row[name] for row in rows], abs=0.01 * (end - start))
        assert [x for x, _ in points] == pytest.approx([48, 160, 272])
    evals = read_jsonl(work.training / "evals.jsonl")
    drawn = figure(text, f"evaluation, avg@{evals[0]['k']}")
    assert f"{charts.percent(evals[-1]['avg_at_k'])} at step 3" in drawn
    assert drawn.count('class="whisker"') == len(evals)
    shares = figure(text, "time by phase")
    phases = {name: sum(row[name] for row in rows) for name in rows[0] if name.endswith("_seconds")}
    main = max(phases, key=phases.get)
    assert main.removesuffix("_seconds") in shares


def test_curves_are_drawn_if_the_folder_still_holds_the_run(s2d, work, tmp_path):
    def drawn():
        done = s2d("report", work.runs[2], "--html", "-")
        assert done.code == 0, done.err
        return b"<figcaption>reward<" in done.out

    step, manifest = work.training / "step-000003", work.training / "s2d.json"
    kept = manifest.read_text()
    step.rename(tmp_path / "step")  # as --keep-last does
    assert drawn()
    manifest.write_text(kept.replace('"seed": 0', '"seed": 1'))
    assert not drawn()
    manifest.write_text(kept)
    (tmp_path / "step").rename(step)
    assert drawn()


def test_charts_have_gaps_and_means_where_data_does():
    points = [(1, 0.5), (2, None), (3, 0.25), (4, 0.75)]
    drawn = charts.line("reward", points)
    assert drawn.count("<polyline") == 1
    assert drawn.count("<circle") == 3
    assert "0.5 at step 1, 0.75 at step 4; lowest 0.25, highest 0.75" in drawn
    long = charts.thinned([(step, float(step)) for step in range(1000)])
    assert len(long) == charts.MOST_POINTS
    assert sum(y for _, y in long) / len(long) == pytest.approx(499.5, rel=0.01)
    assert charts.ticks(0, 0.83) == pytest.approx([0, 0.5, 1.0])
    assert charts.ticks(3, 3) == pytest.approx([1, 2, 3, 4, 5])
    assert (charts.number(0.0000123), charts.number(12345.6), charts.number(0)) == ("1.23e-5", "12,346", "0")


def test_settings_that_differ_from_the_defaults_are_marked(work):
    text = work.page.read_text()
    part = next(part for part in text.split("<details>") if part.startswith(f"<summary><strong>grpo {work.training}"))
    marked = re.findall(r'<tr class="differs">(.*?)</tr>', part)
    cells = [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in marked]
    assert ["≠ --lr", "0.0002", "1e-06"] in cells
    assert ["≠ --steps", "3", "–"] in cells
    assert not {"≠ --temperature", "≠ --aggregate", "≠ --seed"} & {row[0] for row in cells}


def test_a_page_stays_within_its_size_and_says_what_it_leaves_out(s2d, tmp_path):
    long = "x" * 9000
    rows = [graded(problem, 0, problem % 2 == 0, f"{long}{problem}") for problem in range(100)]
    path = write_jsonl(tmp_path / "graded.jsonl", rows)
    assert s2d("eval", "--rollouts", path, "-o", tmp_path / "eval").code == 0
    page = tmp_path / "page.html"
    done = s2d("report", tmp_path / "eval", "--html", page, "--page-size", "200kB")
    assert done.code == 0, done.err
    assert 180_000 < page.stat().st_size <= 200_000
    problems = data_of(page)["problems"]
    assert f"{len(problems)} of 100 problems, drawn by their hash" in page.read_text()
    assert f"rollouts of {len(problems)} of 100 problems in it" in done.err
    hashes = sorted(row["problem_sha256"] for row in rows)[: len(problems)]
    assert [problem["id"] for problem in problems] == [row["problem_id"] for row in rows if row["problem_sha256"] in hashes]
    kept = problems[0]["samples"][0][0][4]
    assert kept.startswith("x" * HEAD + f"\n[... {9000 + len(problems[0]['id']) - 1 - HEAD - TAIL:,} characters are left out here ...]\nx")


def test_what_may_be_written_and_read_is_checked_first(s2d, work, tmp_path):
    def refused(*arguments):
        done = s2d("report", work.runs[0], *arguments, cwd=tmp_path)
        assert not done.out
        return done.code, done.err

    page = tmp_path / "page.html"
    page.write_text("<p>mine")
    assert refused("--html", page) == (2, f"error: {page}: output exists; --overwrite replaces it, or choose another -o\n")
    for place, says in ((page, "was not written by s2d report"), (tmp_path, "is a folder")):
        with pytest.raises(UsageError, match=says):
            check_page(str(place), overwrite=True)
    page.write_bytes(work.page.read_bytes())
    assert s2d("report", work.training, "--html", page, "--overwrite").code == 0
    assert page.read_bytes() != work.page.read_bytes()
    assert "Training" in page.read_text()
    code, said = refused(work.training)
    assert (code, said) == (1, f"error: {work.training}: is the folder of a training and has no results; --html FILE draws its curves\n")
    for arguments, says in (
        (["--katex", "x"], "goes with --html FILE"),
        (["--html", "new.html", "--page-size", "1kB"], "too little for a page"),
        (["--csv", "--latex"], "--csv and --latex exclude each other"),
    ):
        code, said = refused(*arguments)
        assert code == 2
        assert says in said
    assert not (tmp_path / "new.html").exists()


def test_katex_is_read_from_its_package_fonts_included(tmp_path):
    dist = tmp_path / "dist"
    (dist / "fonts").mkdir(parents=True)
    (dist / "contrib").mkdir()
    (tmp_path / "package.json").write_text('{"name": "katex", "version": "0.0.1"}')
    (dist / "katex.min.js").write_text("var katex = {}")
    (dist / "contrib" / "auto-render.min.js").write_text("var renderMathInElement")
    sources = 'src:url(fonts/A.woff2) format("woff2"),url(fonts/A.woff) format("woff")'
    (dist / "katex.min.css").write_text(f"@font-face{{font-family:A;{sources};font-weight:400}}.katex{{}}")
    with pytest.raises(DataError, match="No such file"):
        read_katex(str(tmp_path))
    (dist / "fonts" / "A.woff2").write_bytes(b"font")
    found = read_katex(str(tmp_path))
    assert found.style == "@font-face{font-family:A;src:url(data:font/woff2;base64,Zm9udA==) format('woff2');font-weight:400}.katex{}"
    assert found.script == "var katex = {}\nvar renderMathInElement"
    (tmp_path / "package.json").write_text('{"name": "mathjax", "version": "4"}')
    with pytest.raises(DataError, match="is the package 'mathjax'"):
        read_katex(str(tmp_path))


needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium here (make browser installs it)")


@pytest.fixture
def opened():
    """Open pages in Chromium, which is closed at the end."""
    browsers = []

    def open_page(page: Path) -> browser.Browser:
        browsers.append(browser.Browser(page))
        return browsers[-1]

    yield open_page
    for each in browsers:
        each.close()


CHOOSE = "((id, value) => {{ const it = document.getElementById(id); it.value = value; it.dispatchEvent(new Event('{}')); }})"
SHOWN_PROBLEMS = "[...document.querySelectorAll('#problems > li h3')].map((each) => each.textContent)"
CONTRAST = """(() => {
  const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3)
    .map((part) => part / 255).map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const paper = getComputedStyle(document.body).backgroundColor;
  return ['body', '.notes', 'nav a', '.right .verdict', '.wrong .verdict', '.chip'].map((name) => {
    const pair = [paper, getComputedStyle(document.querySelector(name)).color].map(light).sort();
    return (pair[1] + 0.05) / (pair[0] + 0.05);
  });
})()"""


@needs_chromium
def test_a_browser_shows_filters_and_themes_without_errors_or_requests(work, opened):
    tab = opened(work.page)
    tab.size(1200, 900)
    tab.wait("!document.getElementById('viewer').hidden")
    choose, write = CHOOSE.format("change"), CHOOSE.format("input")
    assert tab.run("[document.getElementById('a').value, document.getElementById('b').value]") == ["0", "1"]
    told = tab.run("document.getElementById('difference').textContent")
    both = data_of(work.page)["differences"]["0,1"]
    assert f"{100 * both['difference']:+.1f} ± {100 * both['se']:.1f} points".replace("-", "\u2212") in told
    assert f"{both['wins']} better in B, {both['losses']} worse, {both['ties']} equal" in told
    assert ("Not resolved" in told) is not both["resolved"]

    # Filters: A is right on 0 and half of 1, B on 0, 2, 3 and half of 4
    expected = {
        "all": ["p0", "p1", "p2", "p3", "p4", "p5"],
        "right": ["p0", "p1", "p2", "p3", "p4"],
        "wrong": ["p1", "p2", "p3", "p4", "p5"],
        "truncated": ["p1"],
        "ungraded": ["p1"],
        "changed": ["p1", "p2", "p3", "p4"],
        "better": ["p2", "p3", "p4"],
        "worse": ["p1"],
    }
    for shown, problems in expected.items():
        tab.run(f"{choose}('show', {shown!r})")
        assert tab.run(SHOWN_PROBLEMS) == problems, shown
        assert tab.run("document.getElementById('count').textContent") == f"{len(problems)} of 14 problems"
    tab.run(f"{choose}('show', 'all')")
    tab.run(f"{write}('search', 'EVIL')")
    tab.wait("document.getElementById('count').textContent === '2 of 14 problems'")
    assert tab.run(SHOWN_PROBLEMS) == ["p1", "p2"]

    # A hostile rollout, its answer, its prompt and its route's name are text
    tab.run("document.querySelectorAll('#problems details').forEach((each) => { each.open = true; })")
    tab.wait("document.querySelectorAll('#problems .reasoning').length === 1")
    texts = tab.run("[...document.querySelectorAll('#problems .text')].map((each) => each.textContent)")
    assert SHOWN in texts
    assert any(text.startswith(f"<think>{SHOWN}") for text in texts)
    assert SHOWN in tab.run("[...document.querySelectorAll('.answer')].map((each) => each.textContent)")
    assert f"B {SHOWN}" in tab.run("[...document.querySelectorAll('th')].map((each) => each.textContent)")
    assert tab.run("document.querySelectorAll('img, main script, main a, svg[onload]').length") == 0
    assert tab.run("window.pwned") is None

    # Another pair, and one result alone
    tab.run(f"{write}('search', '')")
    tab.run(f"{choose}('a', '2')")
    assert tab.run("[...document.getElementById('b').options].map((each) => each.value)") == [""]
    assert len(tab.run(SHOWN_PROBLEMS)) == 8
    assert tab.run("document.querySelector('#show [value=changed]').disabled") is True

    # Themes, by the system's wish and by the switch
    tab.run(f"{choose}('a', '0')")
    papers = []
    for scheme in ("light", "dark"):
        tab.scheme(scheme)
        papers.append(tab.run("getComputedStyle(document.body).backgroundColor"))
        assert min(tab.run(CONTRAST)) >= 4.5  # WCAG AA
    assert papers[0] != papers[1]
    tab.run("document.querySelector('input[name=theme][value=light]').click()")
    assert tab.run("getComputedStyle(document.body).backgroundColor") == papers[0]
    tab.run("document.querySelector('input[name=theme][value=dark]').click()")
    tab.scheme("light")
    assert tab.run("getComputedStyle(document.body).backgroundColor") == papers[1]

    # The pointer reads a curve
    rows = read_jsonl(work.training / "metrics.jsonl")
    where = "[...document.querySelectorAll('.chart')].find((each) => each.textContent.startsWith('tokens a rollout'))"
    tab.run(f"{where}.scrollIntoView({{ behavior: 'instant', block: 'center' }})")
    left, top, width, height = tab.run(f"(({{ x, y, width, height }}) => [x, y, width, height])({where}.lastChild.getBoundingClientRect())")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + 0.57 * width, y=top + height / 2)
    step, value = re.fullmatch(r"step (\d+): ([\d.]+)", tab.run(f"{where}.querySelector('.last').textContent")).groups()
    assert step == "2"
    assert float(value) == pytest.approx(rows[1]["mean_tokens"], rel=0.01)

    # A phone: nothing is wider than the screen but what scrolls by itself
    tab.size(360, 740, mobile=True)
    assert tab.run("document.scrollingElement.scrollWidth") <= 360

    # Keyboard and screen reader: the first stop leads past the navigation; whatever takes part has a name
    tab.press("Tab")
    assert tab.run("document.activeElement.className") == "skip"
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    named = {"combobox", "searchbox", "button", "radio", "image", "img", "region", "link", "navigation", "figure", "group"}
    unnamed = [node for node in nodes if node["role"]["value"] in named - {"group", "figure"} and not node.get("name", {}).get("value")]
    assert unnamed == []
    roles = {node["role"]["value"] for node in nodes}
    assert {"main", "navigation", "banner", "contentinfo", "searchbox"} <= roles
    assert tab.troubles() == []


@needs_chromium
def test_results_without_labels_or_rollouts_make_a_page_too(s2d, work, opened, tmp_path):
    rows = [graded(problem, 0, None, reward=-1.5, verify_error="") for problem in range(3)]
    path = write_jsonl(tmp_path / "shaped.jsonl", rows)
    assert s2d("eval", "--rollouts", path, "-o", tmp_path / "shaped").code == 0
    assert s2d("report", tmp_path / "shaped", "--html", tmp_path / "shaped.html").code == 0
    tab = opened(tmp_path / "shaped.html")
    assert "not graded" in tab.run("document.querySelector('.sample').textContent")
    assert "reward -1.5" in tab.run("document.querySelector('.sample').textContent")
    assert tab.troubles() == []
    results = json.dumps(json.loads((work.folder / "a" / "results.json").read_text())).encode()
    done = s2d("report", "-", "--html", "-", stdin=results)
    assert done.code == 0, done.err
    assert done.out.startswith(b"<!doctype html>")
    assert b"Rollouts" not in done.out


@needs_chromium
@pytest.mark.skipif(not KATEX.exists(), reason="KaTeX is not there (make browser loads it)")
def test_a_browser_typesets_math_and_nothing_else(s2d, work, opened):
    page = work.folder / "math.html"
    done = s2d("report", *work.runs, "--html", page, "--katex", KATEX)
    assert done.code == 0, done.err
    assert page.stat().st_size < 2_000_000
    done = s2d("report", *work.runs, "--html", work.folder / "small.html", "--katex", KATEX, "--page-size", "100kB")
    assert "larger than --page-size 100kB, without any rollouts" in done.err
    assert "0 of 14 problems" in (work.folder / "small.html").read_text()
    tab = opened(page)
    tab.wait("!document.getElementById('viewer').hidden")
    tab.run("document.querySelectorAll('#problems details').forEach((each) => { each.open = true; })")
    tab.wait("document.querySelectorAll('#problems .text .katex').length >= 2")
    assert tab.run("[...document.querySelectorAll('.answer .katex .mfrac')].length") == 1
    assert tab.run("document.fonts.ready.then(() => document.fonts.check('16px KaTeX_Main'))") is True
    assert tab.run("document.querySelectorAll('main a, img, main script').length") == 0
    assert tab.run("window.pwned") is None
    assert tab.troubles() == []
