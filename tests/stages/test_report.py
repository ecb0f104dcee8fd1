"""`s2d report` through its command line: the table, its notes, and what is refused."""

import csv
import io
import json
import subprocess
import sys
from typing import NamedTuple

import pytest

RESULT = {
    "name": "direct GRPO",
    "model": "student",
    "checkpoint": "aaaa",
    "problems": 320,
    "k": 4,
    "avg_at_k": 0.593,
    "se": 0.018,
    "pass_at_k": 0.9,
    "truncated": 0.012,
    "ungraded": 0,
    "dataset": "test",
    "temperature": 1.0,
    "top_p": 1.0,
    "max_tokens": 16,
    "seed": 0,
    "mean_tokens": 9.5,
}
GREEDY = {"temperature": 0.0, "k": 1, "avg_at_k": 0.87, "se": 0.019}
BRIDGE = {"name": "RL-teacher bridge", "checkpoint": "bbbb", "avg_at_k": 0.773, "se": 0.015}


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def report(s2d, tmp_path):
    """Run `s2d report` in the test's folder."""

    def run(*arguments, stdin=""):
        done = s2d("report", *arguments, stdin=stdin.encode(), cwd=tmp_path)
        return Done(done.code, done.out.decode(), done.err)

    return run


@pytest.fixture
def result(tmp_path):
    """Return a function that writes an eval output folder and returns its name."""

    def write(folder, **changes):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "results.json").write_text(json.dumps({**RESULT, **changes}, indent=2))
        return folder

    return write


def test_table_has_a_row_for_each_name_and_a_column_for_each_decoding(report, result):
    runs = [result("a"), result("b", **GREEDY), result("c", **BRIDGE)]
    done = report(*runs[:2], "c/results.json")
    assert done.code == 0
    assert done.err == ""
    assert done.out == (
        "|                   | test avg@4 (T=1) | test avg@1 (greedy) |\n"
        "| ----------------- | ---------------: | ------------------: |\n"
        "| direct GRPO       |       59.3 ± 1.8 |          87.0 ± 1.9 |\n"
        "| RL-teacher bridge |       77.3 ± 1.5 |                   - |\n"
        "\n"
        "- test avg@4 (T=1): per cent; 320 problems, k = 4; ± is the standard error over problems, not over retrained checkpoints.\n"
        "- test avg@1 (greedy): per cent; 320 problems, k = 1; ± is the standard error over problems, not over retrained checkpoints.\n"
    )


def test_columns_all_adds_pass_at_k_and_truncation(report, result):
    done = report(result("a"), "--columns", "all")
    head, _, row = (line.strip("| ").split(" | ") for line in done.out.splitlines()[:3])
    assert [cell.strip() for cell in head] == ["test avg@4 (T=1)", "test pass@4 (T=1)", "test truncated (T=1)"]
    assert [cell.strip() for cell in row] == ["direct GRPO", "59.3 ± 1.8", "90.0", "1.2"]


def test_unlike_settings_never_share_a_column(report, result):
    runs = [
        result("a"),
        result("b", name="longer", max_tokens=32),
        result("c", name="fewer", problems=100),
        result("d", name="nucleus", top_p=0.95, temperature=0.6, top_k=20),
    ]
    header = report(*runs).out.splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "",
        "test avg@4 (T=1, 16 tokens, 320 problems)",
        "test avg@4 (T=1, 32 tokens, 320 problems)",
        "test avg@4 (T=1, 16 tokens, 100 problems)",
        "test avg@4 (T=0.6, top-p 0.95, top-k 20)",
    ]


def test_csv_is_in_per_cent_with_the_error_in_a_column_of_its_own(report, result):
    done = report(result("a"), result("b", **GREEDY), result("c", **BRIDGE), "--csv")
    assert list(csv.reader(io.StringIO(done.out))) == [
        ["name", "test avg@4 (T=1)", "test avg@4 (T=1) se", "test avg@1 (greedy)", "test avg@1 (greedy) se"],
        ["direct GRPO", "59.3000", "1.8000", "87.0000", "1.9000"],
        ["RL-teacher bridge", "77.3000", "1.5000", "", ""],
    ]


def test_latex_is_a_tabular_whose_special_characters_are_escaped(report, result):
    runs = [result("a", name=r"100% of $x_1$ & {y} \ ~#^"), result("b", **GREEDY), result("c", **BRIDGE)]
    lines = report(*runs, "--latex").out.splitlines()
    assert lines[:2] == [f"% {note}" for note in (line.removeprefix("- ") for line in report(*runs).out.splitlines()[-2:])]
    assert lines[2:5] == [r"\begin{tabular}{lrr}", r"\toprule", r" & test avg@4 (T=1) & test avg@1 (greedy) \\"]
    name = r"100\% of \$x\_1\$ \& \{y\} \textbackslash{} \textasciitilde{}\#\textasciicircum{}"
    assert lines[5:7] == [r"\midrule", rf"{name} & 59.3 $\pm$ 1.8 & - \\"]
    assert lines[-3:] == [r"RL-teacher bridge & 77.3 $\pm$ 1.5 & - \\", r"\bottomrule", r"\end{tabular}"]


def test_json_gives_fractions_and_null_for_what_is_missing(report, result):
    done = report(result("a"), result("b", **GREEDY), result("c", **BRIDGE), "--json")
    table = json.loads(done.out)
    assert [column["label"] for column in table["columns"]] == ["test avg@4 (T=1)", "test avg@1 (greedy)"]
    first, second = (row["cells"] for row in table["rows"])
    assert first["test avg@1 (greedy)"]["avg_at_k"] == 0.87
    assert second["test avg@4 (T=1)"]["se"] == 0.015
    assert second["test avg@1 (greedy)"] is None


def test_two_results_for_one_cell_name_both_files(report, result):
    done = report(result("a"), result("b", seed=1))
    assert (done.code, done.out) == (1, "")
    assert "a/results.json" in done.err
    assert "b/results.json" in done.err
    assert len(done.err.splitlines()) == 1


def test_missing_and_misspelt_fields_name_file_and_field(report, tmp_path, result):
    result("a")
    path = tmp_path / "a" / "results.json"
    record = {("avg_at_K" if key == "avg_at_k" else key): value for key, value in RESULT.items()}
    path.write_text(json.dumps(record))
    done = report("a")
    assert (done.code, done.out) == (1, "")
    assert "a/results.json: no field 'avg_at_k' (did you mean 'avg_at_K'?)" in done.err


@pytest.mark.parametrize(
    ("content", "says"), [('{"name": "x"', "not a line of JSON"), ("[]", "JSON object was expected"), (None, "cannot read")]
)
def test_broken_results_say_where(report, tmp_path, content, says):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    done = report("results.json")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: results.json: ")
    assert says in done.err


def test_folder_without_results_and_nan_are_refused(report, tmp_path, result):
    (tmp_path / "empty").mkdir()
    assert "no results.json" in report("empty").err
    done = report(result("nan", se=float("nan")))
    assert done.code == 1
    assert "field 'se' is not a finite number" in done.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": "20"}, "field 'top_k' is text, integer was expected"),
        ({"top_k": [20]}, "field 'top_k' is list, integer was expected"),
        ({"ungraded": "none"}, "field 'ungraded' is text, integer was expected"),
        ({"k": 0}, "field 'k' is 0, at least 1 was expected"),
        ({"problems": -3}, "field 'problems' is -3, at least 1 was expected"),
        ({"se": None}, "field 'se' is null, number or integer was expected"),
        ({"truncated": True}, "field 'truncated' is boolean, number or integer was expected"),
        ({"mean_reward": {}}, "field 'mean_reward' is object, number or integer was expected"),
        ({"name": None}, "field 'name' is null, text was expected"),
        ({"avg_at_k": 10**400}, "field 'avg_at_k' is not a finite number"),
    ],
)
def test_wrong_types_are_one_line_with_file_and_field(report, result, changes, message):
    done = report(result("a", **changes))
    assert (done.code, done.out, done.err) == (1, "", f"error: a/results.json: {message}\n")


def test_rewards_without_a_notion_of_right_are_shown_beside_the_rates(report, result):
    plain = result("a", mean_reward=0.593, mean_reward_se=0.018)
    shaped = result("b", name="shaped", avg_at_k=None, se=None, pass_at_k=None, mean_reward=-7.5, mean_reward_se=0.25)
    done = report(plain, shaped)
    assert done.out.splitlines()[3].split("|")[2].strip() == "-"
    assert "warning: b/results.json: the rewards have no notion of right" in done.err
    table = report(plain, shaped, "--columns", "all").out.splitlines()[:4]
    head, _, first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert head[-1] == "test mean reward (T=1)"
    assert first[1:] == ["59.3 ± 1.8", "90.0", "1.2", "0.593 ± 0.018"]
    assert second[1:] == ["-", "-", "1.2", "-7.5 ± 0.25"]
    assert report(plain, shaped, "--columns", "all", "--csv").out.splitlines()[2] == "shaped,,,,1.2000,-7.5"
    cells = json.loads(report(plain, shaped, "--json").out)["rows"][1]["cells"]["test avg@4 (T=1)"]
    assert (cells["avg_at_k"], cells["mean_reward"]) == (None, -7.5)
    assert "mean reward" not in report(plain, "--columns", "all").out


@pytest.mark.parametrize("form", ["markdown", "csv", "json", "latex"])
def test_control_characters_never_reach_the_terminal(report, result, form):
    name = result("a", name="evil\x1b[2J|\r\nname\x9b", dataset="te\x07st\t")
    done = report(name, f"--{form}")
    assert done.code == 0
    assert not {char for char in done.out + done.err if (ord(char) < 32 and char != "\n") or 127 <= ord(char) < 160}
    assert "evil" in done.out
    if form == "markdown":
        assert done.out.splitlines()[2].count("|") == 4  # one of them escaped


def test_a_row_of_two_checkpoints_and_ungraded_answers_are_warned_about(report, result):
    done = report(result("a"), result("b", **GREEDY, ungraded=3), "-q")
    assert "3 answers could not be graded" in done.err
    assert "mixes checkpoints" not in done.err
    done = report("a", result("c", **{**GREEDY, "checkpoint": "cccc"}))
    assert "row 'direct GRPO' mixes checkpoints: a/results.json, c/results.json" in done.err


def test_results_come_from_standard_input_too(report, result):
    lines = "\n".join(json.dumps({**RESULT, **changes}) for changes in ({}, BRIDGE))
    result("b", **GREEDY)
    done = report("-", "b", stdin=lines)
    assert [line.split("|")[1].strip() for line in done.out.splitlines()[2:4]] == ["direct GRPO", "RL-teacher bridge"]


def test_no_heavy_package_is_imported(tmp_path, result):
    heavy = ["torch", "transformers", "datasets", "pyarrow", "math_verify", "matplotlib"]
    code = (
        "import sys; from s2dcli.cli import app\n"
        f"try: app(['report', {result('a')!r}])\nexcept SystemExit: pass\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.stderr.splitlines()[-1] == "[]"
    assert "59.3 ± 1.8" in done.stdout
