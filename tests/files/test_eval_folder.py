"""The folder of an evaluation: resumed row by row, replaced when the new one is finished."""

import json

import pytest

from s2dcli.errors import DataError
from s2dcli.files.eval_folder import EvalFolder, graded_path, results_path
from s2dcli.files.manifest import describe

ROWS = [{"number": number} for number in range(4)]


def evaluate(out, rows, *, finish=True, done=0, **how):
    with EvalFolder(out, describe("eval", {}), **how) as folder:
        with folder.open_rollouts(done) as writer:
            for row in rows:
                writer.write(row)
                folder.keep = True
        if not finish:
            raise KeyboardInterrupt
        folder.finish({"rows": len(rows)}, counts={"rollouts": len(rows)}, measured=["m"])


def test_an_evaluation_is_resumed_after_its_complete_lines(tmp_path):
    out = tmp_path / "eval"
    with pytest.raises(KeyboardInterrupt):
        evaluate(out, ROWS[:2], finish=False)
    with open(out / "rollouts.jsonl", "ab") as file:
        file.write(b'{"torn')
    with EvalFolder(out, describe("eval", {}), resume=True) as folder:
        assert not folder.finished
        assert [line.record for line in folder.lines()] == ROWS[:2]
    evaluate(out, ROWS[1:], done=1, resume=True)
    assert [json.loads(line) for line in (out / "rollouts.jsonl").read_bytes().splitlines()] == ROWS
    with EvalFolder(out, describe("eval", {}), resume=True) as folder:
        assert folder.finished
        assert folder.result() == {"rows": 3}
    manifest = json.loads((out / "s2d.json").read_text())
    assert (manifest["complete"], manifest["counts"], manifest["measured"]) == (True, {"rollouts": 3}, ["m"])


def test_the_old_evaluation_stays_until_the_new_one_is_finished(tmp_path):
    out = tmp_path / "eval"
    evaluate(out, ROWS)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        evaluate(out, ROWS[:1], finish=False, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    evaluate(out, ROWS[:1], overwrite=True)
    assert {path.name for path in out.iterdir()} == before.keys()
    assert json.loads((out / "results.json").read_text()) == {"rows": 1}


def test_nothing_is_left_of_an_evaluation_that_fails_before_its_first_row(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "eval", [], finish=False)
    assert list(tmp_path.iterdir()) == []


def test_folders_and_files_stand_for_results_and_rows(tmp_path):
    assert graded_path(str(tmp_path)) == str(tmp_path / "rollouts.jsonl")
    assert graded_path("graded.jsonl") == "graded.jsonl"
    with pytest.raises(DataError, match=r"no results\.json in this folder; s2d eval"):
        results_path(str(tmp_path))
    assert str(results_path("r.json")) == "r.json"
