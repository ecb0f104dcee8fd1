"""`s2d compare` through the command line."""

import pytest
from conftest import read_jsonl, write_jsonl

from s2dcli import stats


@pytest.fixture(scope="module")
def pair(s2d, toy, few, tmp_path_factory):
    """Two evaluations that differ in the model alone."""
    root = tmp_path_factory.mktemp("pair")
    for name in ("student", "teacher"):
        result = s2d("eval", "-m", toy / name, few, "-k", 4, "--max-tokens", 16, "--reward", "exact", "-o", root / name)
        assert result.code == 0, result.err
    return root / "student", root / "teacher"


def scores(folder):
    found = {}
    for row in read_jsonl(folder / "rollouts.jsonl"):
        found.setdefault(row["problem_sha256"], []).append(row["reward"])
    return found


def test_results_are_paired_by_problem(s2d, pair):
    found = s2d("compare", *pair, "--json").result
    assert found == stats.paired_difference(*map(scores, pair))
    assert found["problems"] == 8
    table = s2d("compare", *pair)
    assert table.code == 0
    assert f"{100 * found['difference']:.1f} | {100 * found['se']:.1f}" in table.out.decode()


def test_problems_that_only_one_has_are_left_out_and_said(s2d, pair, tmp_path):
    rows = read_jsonl(pair[0] / "rollouts.jsonl")
    part = write_jsonl(tmp_path / "part.jsonl", rows[:20])
    result = s2d("compare", part, pair[1], "--json")
    assert result.result["problems"] == 5
    assert result.err == f"warning: {pair[1]}: 3 problems are not in the other one and left out\n"
    other = write_jsonl(tmp_path / "other.jsonl", [{**row, "problem_sha256": "0"} for row in rows])
    refused = s2d("compare", other, pair[1])
    assert refused.code == 1
    assert "cannot be compared: no problem is in both" in refused.err
    ungraded = write_jsonl(tmp_path / "ungraded.jsonl", [{"problem_sha256": "0"}])
    assert "grade it first: s2d verify" in s2d("compare", ungraded, pair[1]).err


def test_settings_shows_the_named_thing_alone(s2d, pair, toy):
    result = s2d("compare", "--settings", *pair)
    assert (result.code, result.err) == (0, "")
    head, _, *rows = result.out.decode().splitlines()
    assert str(pair[0]) in head
    assert len(rows) == 1
    assert rows[0].startswith("| model ")
    assert str(toy / "teacher") in rows[0]
    same = s2d("compare", "--settings", pair[0], pair[0])
    assert (same.code, same.out, same.err) == (0, b"", "no setting differs\n")


def test_settings_lists_options_inputs_and_labels(s2d, pair, toy, few, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", read_jsonl(few)[:4])
    assert s2d("eval", "-m", toy / "student", other, "-k", 2, "--max-tokens", 16, "--reward", "exact", "-o", tmp_path / "e").code == 0
    found = s2d("compare", "--settings", pair[0], tmp_path / "e", "--json").result
    assert found.keys() == {"-k", "input 1"}
    assert found["-k"] == {"a": "4", "b": "2"}
    assert found["input 1"]["b"].startswith(str(other))
