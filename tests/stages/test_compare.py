"""`s2d compare` through the command line."""

import contextlib
import json
import os
import pty
import tempfile

import pytest
from conftest import read_jsonl, start, wait, write_jsonl

from s2dcli import stats


@pytest.fixture(scope="module")
def pair(s2d, toy, few, tmp_path_factory):
    """Two evaluations that differ in the model alone."""
    root = tmp_path_factory.mktemp("pair")
    for name in ("student", "teacher"):
        result = s2d("eval", "-m", toy / name, few, "-k", 4, "--max-tokens", 16, "--reward", "exact", "-o", root / name)
        assert result.code == 0, result.err
    return root / "student", root / "teacher"


def scores(path):
    found = {}
    for row in read_jsonl(path / "rollouts.jsonl" if path.is_dir() else path):
        found.setdefault(row["problem_sha256"], []).append(float(row["label"] is True))
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


def changed(folder, path, **fields):
    """Copy an evaluation's rows with other fields; those of `sampler` are merged."""
    sampler = fields.pop("sampler", {})
    rows = [{**row, **fields, "sampler": {**row["sampler"], **sampler}} for row in read_jsonl(folder / "rollouts.jsonl")]
    return write_jsonl(path, rows)


def test_labels_are_compared_and_not_rewards(s2d, pair, tmp_path):
    found = s2d("compare", *pair, "--json").result
    assert 0 < found["b"] < 1
    other = changed(pair[1], tmp_path / "other.jsonl", reward=-7.5)
    assert s2d("compare", pair[0], other, "--json").result == found
    rows = [{name: value for name, value in row.items() if name != "label"} for row in read_jsonl(pair[1] / "rollouts.jsonl")]
    assert s2d("compare", pair[0], write_jsonl(tmp_path / "foreign.jsonl", rows), "--json").result == found


def test_unequal_samples_are_refused(s2d, pair, tmp_path):
    rows = read_jsonl(pair[1] / "rollouts.jsonl")
    result = s2d("compare", pair[0], write_jsonl(tmp_path / "half.jsonl", rows[:-2]))
    assert (result.code, result.out) == (1, b"")
    assert "has 2 samples in B, but problem" in result.err
    three = write_jsonl(tmp_path / "three.jsonl", [row for row in rows if row["sample_index"] < 3])
    compared = s2d("compare", pair[0], three, "--json")
    assert compared.result["k"] == [4, 3]
    assert f"{three} has 3: the quantity is the same, its noise is not" in compared.err


def test_other_sampling_is_warned_of(s2d, pair, tmp_path):
    assert s2d("compare", *pair, "--json").err == ""
    greedy = changed(pair[1], tmp_path / "greedy.jsonl", sampler={"temperature": 0.0, "top_p": 0.5, "max_tokens": 32})
    (warning,) = s2d("compare", pair[0], greedy, "--json").err.splitlines()
    assert warning == (
        f"warning: {pair[0]} and {greedy} were sampled in different ways, the difference is not the models' alone: "
        "temperature 1 and 0, max_tokens 16 and 32"
    )
    narrow = changed(pair[1], tmp_path / "narrow.jsonl", sampler={"top_p": 0.5})
    assert s2d("compare", narrow, pair[0], "--json").err.endswith("alone: top_p 0.5 and 1\n")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward": "1.0"}, "field 'reward' is text"),
        ({"label": 1}, "field 'label' is integer, boolean or null was expected"),
        ({"sampler": {"temperature": "hot"}}, "field 'temperature' is text, number or integer was expected"),
        ({"problem_sha256": 7}, "field 'problem_sha256' is integer, text was expected"),
    ],
)
def test_rows_with_wrong_types_are_one_line(s2d, pair, tmp_path, fields, message):
    bad = changed(pair[1], tmp_path / "bad.jsonl", **fields)
    result = s2d("compare", pair[0], bad)
    assert (result.code, result.out) == (1, b"")
    assert result.err.startswith(f"error: {bad}:1: {message}")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("versions", None), ("commit", 3), ("counts", {"tokens": "many"}), ("given", None), ("step", "x"), ("measured", [[]])],
)
def test_manifests_without_fields_are_one_line(s2d, pair, tmp_path, field, value):
    manifest = json.loads((pair[0] / "s2d.json").read_text())
    target = manifest["parents"][0] if field == "step" else manifest
    target[field] = value
    if value is None:
        del target[field]
    (tmp_path / "s2d.json").write_text(json.dumps(manifest))
    (tmp_path / "results.json").write_bytes((pair[0] / "results.json").read_bytes())
    for command in (["compare", "--settings", pair[1], tmp_path], ["lineage", tmp_path], ["report", tmp_path]):
        result = s2d(*command)
        assert (result.code, result.out) == (1, b"")
        assert result.err.startswith(f"error: {tmp_path / 's2d.json'}: not a manifest of this version of s2d: ")
        assert repr(field) in result.err
        assert result.err.count("\n") == 1


def on_terminal(arguments):
    """Run a command whose standard output is a terminal. Returns what it wrote there."""
    ours, theirs = pty.openpty()
    with open(os.devnull, "rb") as nothing, tempfile.TemporaryFile() as err:
        assert wait(start([str(argument) for argument in arguments], nothing.fileno(), theirs, err.fileno())) == 0
    os.close(theirs)
    found = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(ours, 1 << 16):
            found += chunk
    os.close(ours)
    return found.decode().replace("\r\n", "\n")


def test_a_terminal_gets_words(s2d, pair, tmp_path):
    found = s2d("compare", *pair, "--json").result
    shown = on_terminal(["compare", *pair])
    assert f"A                 {100 * found['a']:6.1f} %       {pair[0]}\n" in shown
    assert f"difference B - A  {100 * found['difference']:+6.1f} points  over the 8 problems of both\n" in shown
    low, high = found["ci95"]
    assert f"95 % interval     {100 * low:+6.1f} to {100 * high:+.1f} points\n" in shown
    assert f"problems             {found['wins']} better, {found['losses']} worse, {found['ties']} equal in B\n" in shown
    assert "\n\nNot resolved: these problems cannot tell A and B apart, the interval includes zero.\n" in shown
    assert f"with {found['more_problems']} more problems like these" in shown
    always = changed(pair[1], tmp_path / "always.jsonl", label=True)
    rows = [{**row, "label": number == 0} for number, row in enumerate(read_jsonl(pair[0] / "rollouts.jsonl"))]
    never = write_jsonl(tmp_path / "never.jsonl", rows)
    better = on_terminal(["compare", always, never])
    chance = 100 * s2d("compare", always, never, "--json").result["p"]
    assert chance == pytest.approx(100 * 2 / 2**8)  # all eight problems favour A: two patterns of signs of 256
    assert better.endswith(f"A is better: between equals a difference this large would come by chance in {chance:.2g} % of comparisons.\n")
    same = on_terminal(["compare", pair[0], pair[0]])
    assert same.endswith("The same score on every problem: there is no spread to judge chance by.\n")
    assert s2d("compare", *pair).out.startswith(b"|")


def test_more_than_two_are_compared_pair_by_pair_with_holms_correction(s2d, pair, tmp_path):
    third = changed(pair[1], tmp_path / "third.jsonl", label=True)
    result = s2d("compare", *pair, third, "--json").result
    pairs = result["comparisons"]
    assert [(one["name_a"], one["name_b"]) for one in pairs] == [
        (str(a), str(b)) for a, b in ((pair[0], pair[1]), (pair[0], third), (pair[1], third))
    ]
    assert [one["p_holm"] for one in pairs] == stats.holm([one["p"] for one in pairs])
    alone = s2d("compare", pair[0], third, "--json").result
    assert {**alone, "p_holm": 0, "resolved": 0} == {**{k: v for k, v in pairs[1].items() if "name" not in k}, "p_holm": 0, "resolved": 0}
    assert all(one["p_holm"] < 0.05 for one in pairs if one["resolved"])
    table = s2d("compare", *pair, third).out.decode()
    assert table.count("\n|") == 4
    assert "p (Holm)" in table


def test_the_object_of_a_comparison_has_what_scripts_need(s2d, pair):
    found = s2d("compare", *pair, "--json").result
    assert {"difference", "se", "ci95", "p", "wins", "losses", "ties", "detectable"} <= found.keys()
    assert found["wins"] + found["losses"] + found["ties"] == found["problems"]
    low, high = found["ci95"]
    assert low <= found["difference"] <= high
    assert "not resolved" in s2d("compare", *pair).out.decode()


def test_seeds_of_two_routes_are_crossed_with_problems(s2d, pair, tmp_path):
    rows = read_jsonl(pair[1] / "rollouts.jsonl")
    seeds = []
    for seed in range(3):  # another seed of the second route: every seventh sample the other way round
        flipped = [{**row, "label": row["label"] != (number % 7 == seed)} for number, row in enumerate(rows)]
        seeds.append(write_jsonl(tmp_path / f"b{seed}.jsonl", flipped))
    first = [pair[0], write_jsonl(tmp_path / "a1.jsonl", read_jsonl(pair[0] / "rollouts.jsonl")[::-1])]
    result = s2d("compare", "--json", *first, "--", *seeds).result
    assert result == stats.route_difference(*([scores(path) for path in side] for side in (first, seeds)))
    assert result["seeds"] == [2, 3]
    shown = on_terminal(["compare", *first, "--", *seeds])
    assert f"of the problems, {100 * result['se_seeds']:.1f} of the training seeds)" in shown
    single = s2d("compare", first[0], "--", *seeds)
    assert (single.code, "one training seed says nothing about others" in single.err) == (1, True)
    plain = s2d("compare", "--json", "--", *pair)
    assert plain.result == s2d("compare", *pair, "--json").result
    assert s2d("compare", pair[0]).code == 2
    assert s2d("compare", "--settings", *pair, pair[0]).code == 2


def test_another_verifier_is_warned_of(s2d, pair, tmp_path):
    other = changed(pair[1], tmp_path / "other.jsonl", verifier="mine/1")
    (warning,) = s2d("compare", pair[0], other, "--json").err.splitlines()
    assert warning.startswith(f"warning: {pair[0]} and {other} were graded in different ways")
    assert warning.endswith(" and mine/1")
