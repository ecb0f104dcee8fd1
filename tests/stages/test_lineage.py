"""`s2d lineage`, and the warnings of `eval` and `report`, through the command line."""

import json
import shutil

import pytest
from conftest import read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def pipeline(s2d, toy, few, tmp_path_factory):
    """teacher -> rollouts -> graded -> student trained on the correct ones -> evaluated; only what is last is kept."""
    root = tmp_path_factory.mktemp("pipeline")
    for command in (
        ["rollout", "-m", toy / "teacher", few, "-n", 4, "--max-tokens", 16, "-o", root / "rollouts.jsonl"],
        ["verify", root / "rollouts.jsonl", "-o", root / "graded.jsonl"],
        [
            *("fkl-warmup", "--student", toy / "student", "--rollouts", root / "graded.jsonl", "--hard-labels", "--only-correct"),
            *("-o", root / "sft", "--steps", 2, "--lr", 1e-3),
        ],
    ):
        result = s2d(*command)
        assert result.code == 0, result.err
    for path in ("rollouts.jsonl", "graded.jsonl"):
        (root / path).unlink()
        (root / f"{path}.s2d.json").unlink()
    return root


def test_the_tree_tells_stages_settings_costs_and_labels(s2d, pipeline, toy):
    result = s2d("lineage", pipeline / "sft")
    assert (result.code, result.err) == (0, "")
    tree = result.out.decode()
    branches = [line.split(":")[0].split("─ ")[-1] for line in tree.splitlines()]
    for branch in (f"student {toy / 'student'}", f"input {pipeline / 'graded.jsonl'}", f"input {pipeline / 'rollouts.jsonl'}"):
        assert branch in branches
    assert "sft: fkl-warmup, 2 updates" in tree
    assert "--hard-labels --only-correct --steps 2 --lr 0.001" in tree
    assert "-n 4 --max-tokens 16" in tree
    assert "32 rollouts" in tree
    assert f"{toy / 'student'}: not made by s2d" in tree
    assert "       8 distinct labels in all" in tree


def test_the_tree_shows_what_was_given_and_not_what_a_preset_implied(s2d, toy, few, tmp_path):
    given = ["--loss", "dapo", "--clip-high", 0.28, "--steps", 1, "-n", 2, "--problems-per-step", 2, "--max-tokens", 8, "--lr", 1e-6]
    trained = s2d("grpo", "-m", toy / "teacher", few, "-o", tmp_path / "rl", *given)
    assert trained.code == 0, trained.err
    settings = s2d("lineage", tmp_path / "rl").out.decode().splitlines()[1]
    assert settings.startswith("│  ")
    assert sorted(settings[3:].split(" --")) == sorted(
        ["-n 2", "max-tokens 8", "loss dapo", "clip-high 0.28", "steps 1", "problems-per-step 2", "lr 1e-06"]
    )
    evaluated = s2d("eval", "-m", tmp_path / "rl", few, "-k", 1, "--max-tokens", 8, "-o", tmp_path / "eval")
    assert evaluated.code == 0, evaluated.err
    assert settings in s2d("lineage", tmp_path / "eval").out.decode()  # in a record as in the manifest itself
    found = s2d("lineage", tmp_path / "rl", "--json").result
    assert found["options"]["aggregate"] == "token"  # what was used is recorded all the same
    assert "aggregate" not in found["given"]


def test_json_is_for_machines(s2d, pipeline):
    found = s2d("lineage", pipeline / "sft", "--json").result
    assert found["command"] == "fkl-warmup"
    assert found["labels"] == {"distinct": 8, "by_stage": [{"stage": f"fkl-warmup {pipeline / 'sft'}", "labels": 8}]}
    assert {record["command"] for record in found["ancestors"].values()} == {"rollout", "verify"}
    assert found["warnings"] == []


def test_a_model_that_s2d_did_not_make_has_cost_nothing(s2d, toy):
    result = s2d("lineage", toy / "student")
    assert (result.code, result.err) == (0, "")
    assert result.out.decode().splitlines() == [f"{toy / 'student'}: not made by s2d", "", "       0 distinct labels in all"]


def test_a_contaminated_evaluation_is_caught(s2d, pipeline, few, toy, tmp_path):
    (caught,) = s2d("lineage", pipeline / "sft", "--problems", few).err.splitlines()
    assert caught == f"warning: contamination: 8 of 8 evaluated problems were learnt from, by fkl-warmup {pipeline / 'sft'}"
    others = write_jsonl(tmp_path / "others.jsonl", read_jsonl(toy / "problems" / "validation.jsonl")[6:16])
    out = tmp_path / "eval"
    evaluated = s2d("eval", "-m", pipeline / "sft", others, "-k", 1, "--max-tokens", 8, "--reward", "exact", "-o", out)
    assert evaluated.code == 0
    assert "warning: contamination: 2 of 10 evaluated problems were learnt from" in evaluated.err
    reported = s2d("report", out)
    assert reported.code == 0
    assert f"warning: {out}: contamination: 2 of 10 evaluated problems" in reported.err
    piped = s2d("eval", "--rollouts", "-", stdin=(out / "rollouts.jsonl").read_bytes())
    assert "contamination: 2 of 10" in piped.err  # the rows name the checkpoint, its folder the labels
    clean = s2d("eval", "-m", toy / "student", others, "-k", 1, "--max-tokens", 8, "--reward", "exact")
    assert "contamination" not in clean.err


def test_replayed_labels_are_noticed(s2d, pipeline, toy, few, tmp_path):
    rolled = s2d("rollout", "-m", pipeline / "sft", few, "-n", 2, "--max-tokens", 16)
    graded = s2d("verify", stdin=rolled.out)
    assert s2d("grpo", "-m", pipeline / "sft", "--rollouts", "-", "-o", tmp_path / "rl", "--steps", 1, stdin=graded.out).code == 0
    result = s2d("lineage", tmp_path / "rl")
    assert (
        f"warning: replay: grpo {tmp_path / 'rl'} learns again from 8 of 8 labels, spent by fkl-warmup {pipeline / 'sft'} before"
        in result.err
    )
    assert "sampler" in result.out.decode()
    assert "       8 distinct labels in all" in result.out.decode()


def test_a_sampler_that_is_gone_is_unknown_ancestry(s2d, pipeline, toy, few, tmp_path):
    shutil.copytree(pipeline / "sft", tmp_path / "gone")
    rolled = s2d("rollout", "-m", tmp_path / "gone", few, "-n", 2, "--max-tokens", 16)
    shutil.rmtree(tmp_path / "gone")
    learnt = s2d(
        "fkl-warmup",
        "--student",
        toy / "student",
        "--rollouts",
        "-",
        "--hard-labels",
        "-o",
        tmp_path / "run",
        "--steps",
        1,
        stdin=rolled.out,
    )
    assert learnt.code == 0, learnt.err
    result = s2d("lineage", tmp_path / "run")
    assert f"sampler {tmp_path / 'gone'} at step 2: unknown ancestry" in result.out.decode()
    assert "what that has cost is not known" in result.err


def test_text_in_manifests_cannot_drive_the_terminal(s2d, pipeline, tmp_path):
    shutil.copytree(pipeline / "sft", tmp_path / "sft")
    path = tmp_path / "sft" / "step-000002" / "s2d.json"
    manifest = json.loads(path.read_text())
    manifest["given"].append("dtype")
    manifest["options"]["dtype"] = "\x1b]0;owned\x07\u202e"
    manifest["parents"][0]["name"] = "\x1b[2J"
    path.write_text(json.dumps(manifest))
    shown = s2d("lineage", tmp_path / "sft").out
    assert b"\x1b" not in shown
    assert "\u202e" not in shown.decode()
    assert b"\\x1b]0;owned\\x07\\u202e" in shown


@pytest.mark.parametrize(("named", "message"), [("nothing", "no such file or folder"), ("problems", "was not made by s2d")])
def test_what_has_no_lineage_is_one_line(s2d, toy, named, message):
    result = s2d("lineage", toy / named)
    assert (result.code, result.out) == (1, b"")
    assert message in result.err
    assert result.err.count("\n") == 1
