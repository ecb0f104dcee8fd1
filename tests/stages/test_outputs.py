"""What commands may write to: nothing of a user's is lost to --overwrite, a typo, an abort, or an output that is an input."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import read_jsonl, start, wait, write_jsonl
from faults import contents, differing

from s2dcli.files.manifest import sidecar

SAMPLING = ["-n", 2, "--max-tokens", 8]


@pytest.fixture(scope="module")
def made(s2d, toy, few, tmp_path_factory):
    """Outputs of every kind: rollouts.jsonl, graded.jsonl, problems.jsonl, eval/, run/."""
    root = tmp_path_factory.mktemp("made")
    grpo = ["grpo", "-m", toy / "teacher", few, *SAMPLING, "--steps", 2, "--problems-per-step", 2, "--save-every", 1, "--reward", "exact"]
    for command in (
        ["prepare", few, "-o", root / "problems.jsonl"],
        ["rollout", "-m", toy / "student", few, *SAMPLING, "-o", root / "rollouts.jsonl"],
        ["verify", root / "rollouts.jsonl", "-o", root / "graded.jsonl", "--reward", "exact"],
        ["eval", "-m", toy / "student", few, "-k", 2, "--max-tokens", 8, "--reward", "exact", "-o", root / "eval"],
        [*grpo, "-o", root / "run"],
    ):
        result = s2d(*command)
        assert result.code == 0, result.err
    return root


@pytest.fixture
def outputs(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def background(args: list[object], folder: Path) -> int:
    with open(os.devnull, "rb") as null, open(folder / "log", "wb") as log:
        return start([str(arg) for arg in args], null.fileno(), log.fileno(), log.fileno())


def test_a_mistake_beside_overwrite_costs_nothing(s2d, outputs, toy, few):
    before = contents(outputs)
    grpo = ["grpo", "-m", toy / "teacher", few, *SAMPLING, "--steps", 1, "-o", outputs / "run"]
    evaluate = ["eval", "-m", toy / "student", few, "--max-tokens", 8, "-k", 1, "-o", outputs / "eval"]
    rollout = ["rollout", "-m", toy / "student", few, *SAMPLING, "-o", outputs / "rollouts.jsonl"]
    verify = ["verify", outputs / "rollouts.jsonl", "-o", outputs / "graded.jsonl"]
    for command in (
        *([*grpo, *mistake] for mistake in (["--reward", "maths"], ["--engine", "vlm"], ["--attention", "flash"], ["--device", "tpu9"])),
        [*grpo, "--lora-targets", "q_proj"],
        [*grpo, "-m", toy / "nowhere"],
        [*evaluate, "--reward", "maths"],
        [*evaluate, "--engine", "vlm"],
        [*evaluate, "--chat-template-kwargs", "[]"],
        [*rollout, "--engine", "vlm"],
        [*rollout, "--attention", "flash"],
        [*verify, "--reward", "maths"],
        [*verify, "--memory-limit", "much"],
        ["verify", outputs / "nothing.jsonl", "-o", outputs / "graded.jsonl"],
    ):
        result = s2d(*command, "--overwrite")
        assert result.code != 0, command
        assert contents(outputs) == before, command


def test_a_file_is_replaced_when_the_new_one_is_complete(s2d, outputs, toy, tmp_path):
    before = contents(outputs)
    many = ["rollout", "-m", toy / "student", toy / "problems" / "1H.jsonl", "-n", 256, "--max-tokens", 16, "--sample-tokens", 1]
    for number in (signal.SIGTERM, signal.SIGKILL):
        pid = background([*many, "-o", outputs / "rollouts.jsonl", "--overwrite"], tmp_path)
        while not any(path.stat().st_size for path in outputs.glob(".s2d-*.tmp")):
            time.sleep(0.02)
        os.kill(pid, number)
        wait(pid)
        assert {name: content for name, content in contents(outputs).items() if number == signal.SIGTERM or name[0] != "."} == before
    short = ["rollout", "-m", toy / "student", toy / "problems" / "test.jsonl", "-n", 1, "--max-tokens", 2]
    assert s2d(*short, "-o", outputs / "rollouts.jsonl", "--overwrite").code == 0
    assert s2d(*short, "-o", outputs / "rollouts.jsonl", "--resume").err.endswith("is complete already\n")
    assert list(outputs.glob(".*")) == []


def test_a_run_is_replaced_at_the_first_whole_step_of_the_new_one(s2d, outputs, made, toy, few, tmp_path):
    slow = ["grpo", "-m", toy / "teacher", few, *SAMPLING, "--steps", 200, "--problems-per-step", 2, "--reward", "exact", "--lr", 1e-3]
    overwrite = [*slow, "--save-every", 100, "-o", outputs / "run", "--overwrite"]
    pid = background(overwrite, tmp_path)
    while not (outputs / "run" / ".s2d-new" / "metrics.jsonl").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    assert differing(made / "run", outputs / "run") == [".lock", ".s2d-new/metrics.jsonl", ".s2d-new/problems.jsonl", ".s2d-new/s2d.json"]
    pid = background([*overwrite, "--save-every", 1], tmp_path)
    latest = outputs / "run" / "latest"
    while (latest.read_text() if latest.exists() else "") < "step-000003":
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    wait(pid)
    assert {row["lr"] for row in read_jsonl(outputs / "run" / "metrics.jsonl")} == {1e-3}
    assert list((outputs / "run").glob(".*")) == []


def test_a_command_replaces_its_own_kind_only(s2d, outputs, toy, few):
    (outputs / "eval" / "notes.txt").write_text("mine")
    before = contents(outputs)
    evaluate = ["eval", "-m", toy / "student", few, "--max-tokens", 8]
    for command, message in (
        ([*evaluate, "-o", outputs / "run"], "run: was written by s2d grpo: s2d eval --overwrite leaves it alone"),
        ([*evaluate, "-o", outputs / "eval"], "eval: s2d did not write notes.txt in there: --overwrite leaves it all alone"),
        (["verify", outputs / "graded.jsonl", "-o", outputs / "rollouts.jsonl"], "rollouts.jsonl: was written by s2d rollout"),
        (["opd", "--teacher", toy / "teacher", "--student", toy / "student", few, "-o", outputs / "run"], "was written by s2d grpo"),
        (["rollout", "-m", toy / "student", few, "-o", outputs / "problems.jsonl"], "problems.jsonl: was written by s2d prepare"),
    ):
        result = s2d(*command, "--overwrite")
        assert (result.code, result.out) == (2, b"")
        assert message in result.err
        assert result.err.count("\n") == 1
        assert contents(outputs) == before


@pytest.mark.parametrize("kind", ["same", "symbolic link", "hard link"])
def test_an_input_is_never_an_output(s2d, outputs, toy, few, tmp_path, kind):
    def called(name: str) -> Path:
        path = tmp_path / f"{name}.jsonl"
        if kind == "symbolic link":
            path.symlink_to(outputs / f"{name}.jsonl")
        elif kind == "hard link":
            path.hardlink_to(outputs / f"{name}.jsonl")
        else:
            return outputs / path.name
        return path

    shutil.copy(few, outputs / "mine.jsonl")
    mine, graded = map(called, ("mine", "graded"))
    before = contents(outputs)
    model = ["-m", toy / "student"]
    commands = [
        ["prepare", outputs / "mine.jsonl", "-o", mine],
        ["prepare", few, "--exclude", outputs / "mine.jsonl", "-o", mine],
        ["rollout", *model, outputs / "mine.jsonl", *SAMPLING, "-o", mine],
        ["verify", outputs / "graded.jsonl", "-o", graded],
        ["verify", outputs / "rollouts.jsonl", "--diff", outputs / "graded.jsonl", "-o", graded],
    ]
    if kind == "same":
        run = ["-o", outputs / "run", "--steps", 1, "--max-tokens", 16]
        stored = outputs / "run" / "problems.jsonl"
        commands += [
            ["prepare", outputs, "-o", mine],
            ["eval", "--rollouts", outputs / "eval" / "rollouts.jsonl", "-o", outputs / "eval"],
            ["grpo", "-m", outputs / "run", few, *run],
            ["grpo", *model, stored, *run],
            ["grpo", *model, few, "--eval-problems", stored, *run],
        ]
    for command in commands:
        result = s2d(*command, "--overwrite")
        assert result.code == 2, command
        assert "are the same" in result.err or "holds the input" in result.err or "is a file of the input" in result.err
        assert contents(outputs) == before, command


def test_what_a_model_folder_does_not_read_may_lie_in_it(s2d, outputs, few):
    run, again = outputs / "run", []
    for how in ([], ["--overwrite"]):
        again.append(s2d("eval", "-m", run, few, "-k", 1, "--max-tokens", 4, "--reward", "exact", "-o", run / "eval", *how).code)
        again.append(s2d("rollout", "-m", run, few, "-n", 1, "--max-tokens", 4, "-o", run / "rollouts.jsonl", *how).code)
    assert again == [0, 0, 0, 0]


def test_a_run_that_is_ended_at_once_leaves_the_log_that_others_write_there(s2d, toy, few, tmp_path):
    run = tmp_path / "run"
    command = ["grpo", "-m", toy / "teacher", few, *SAMPLING, "--steps", 1, "--problems-per-step", 2, "--reward", "exact", "-o", run]
    pid = background([*command, "-n", 512], tmp_path)
    while not (run / "s2d.json").exists():
        time.sleep(0.01)
    (run / "slurm-1.log").write_text("log")
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 143
    assert (run / "slurm-1.log").read_text() == "log"
    failed = s2d(*command, "-n", 512, "--engine", "vlm", "--resume")
    assert failed.code == 2
    assert (run / "slurm-1.log").read_text() == "log"
    assert s2d(*command, "-n", 512, "--resume").code == 0


def test_an_unfinished_file_is_no_input(s2d, outputs, toy, few, tmp_path):
    for name in ("problems", "rollouts", "graded"):
        path = sidecar(outputs / f"{name}.jsonl")
        path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    path = outputs / "eval" / "s2d.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    rollouts, graded = outputs / "rollouts.jsonl", outputs / "graded.jsonl"
    student = ["--student", toy / "student", "-o", tmp_path / "run"]
    for command, hint in (
        (["verify", rollouts], f"s2d rollout ... -o {rollouts} --resume completes it"),
        (["compare", graded, graded], f"s2d verify ... -o {graded} --resume completes it"),
        (["report", outputs / "eval"], f"s2d eval ... -o {outputs / 'eval'} --resume completes it"),
        (["eval", "--rollouts", graded], f"s2d verify ... -o {graded} --resume completes it"),
        (["rollout", "-m", toy / "student", outputs / "problems.jsonl"], f"-o {outputs / 'problems.jsonl'} --overwrite completes it"),
        (["fkl-warmup", *student, "--rollouts", rollouts, "--hard-labels"], "--resume completes it"),
        (["grpo", "-m", toy / "teacher", "--rollouts", graded, "-o", tmp_path / "run"], "--resume completes it"),
        (["opd", "--teacher", toy / "teacher", *student, "--max-tokens", 16, outputs / "problems.jsonl"], "--overwrite completes it"),
    ):
        result = s2d(*command)
        assert (result.code, result.out) == (1, b"")
        assert "is not complete: the command that writes it was stopped or still runs" in result.err
        assert hint in result.err
    assert not (tmp_path / "run").exists()


def test_an_output_that_was_edited_is_not_taken_for_finished(s2d, outputs, toy, few):
    graded, rollouts = outputs / "graded.jsonl", outputs / "rollouts.jsonl"
    for path, command in (
        (graded, ["verify", rollouts, "-o", graded, "--reward", "exact"]),
        (rollouts, ["rollout", "-m", toy / "student", few, *SAMPLING, "-o", rollouts]),
    ):
        assert s2d(*command, "--resume").err.endswith("is complete already\n")
        rows = read_jsonl(path)
        write_jsonl(path, [{**rows[0], "answer": "0"}, *rows[1:]])
        before = path.read_bytes(), sidecar(path).read_bytes()
        result = s2d(*command, "--resume")
        assert result.code == 2
        assert "was changed after it was finished (another sha256); --overwrite restarts" in result.err
        assert (path.read_bytes(), sidecar(path).read_bytes()) == before
        shutil.copy(path, path.with_name("kept"))
        assert s2d(*command, "--overwrite").code == 0


def test_locks_follow_no_links(s2d, outputs, toy, few, tmp_path):
    mine = tmp_path / "precious"
    mine.write_text("precious")
    (outputs / ".new.jsonl.lock").symlink_to(mine)
    (outputs / "run" / ".lock").symlink_to(mine)
    resumed = [
        "grpo",
        "-m",
        toy / "teacher",
        few,
        *SAMPLING,
        "--steps",
        2,
        "--problems-per-step",
        2,
        "--save-every",
        1,
        "--reward",
        "exact",
    ]
    for command in (["verify", outputs / "rollouts.jsonl", "-o", outputs / "new.jsonl"], [*resumed, "-o", outputs / "run", "--resume"]):
        result = s2d(*command)
        assert result.code == 2
        assert "is taken by what s2d did not write" in result.err
        assert mine.read_text() == "precious"


@pytest.mark.parametrize("field", ["versions", "counts", "labels", "inputs", "parents", "complete", "command", "commit"])
def test_manifests_without_a_field_or_with_another_type_are_one_line(s2d, outputs, field):
    path = sidecar(outputs / "graded.jsonl")
    manifest = json.loads(path.read_text())
    for content in ({name: value for name, value in manifest.items() if name != field}, {**manifest, field: 1.5}):
        path.write_text(json.dumps(content))
        result = s2d("lineage", outputs / "graded.jsonl")
        assert (result.code, result.out) == (1, b"")
        assert f"graded.jsonl.s2d.json: not a manifest of this version of s2d: no '{field}' in it" in result.err
        assert result.err.count("\n") == 1


@pytest.mark.parametrize(("field", "value"), [("top_k", "no"), ("ungraded", [1]), ("k", "4"), ("se", "x"), ("name", 3)])
def test_results_with_wrong_types_are_one_line(s2d, outputs, field, value):
    path = outputs / "eval" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    result = s2d("report", outputs / "eval")
    assert (result.code, result.out) == (1, b"")
    assert f"results.json: field '{field}' is " in result.err
    assert result.err.count("\n") == 1
