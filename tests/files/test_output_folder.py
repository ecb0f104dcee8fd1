"""Folders that commands write: what is replaced and when, what is never removed, and what a kill leaves."""

import json
import os
import shutil
from pathlib import Path

import pytest

from s2dcli.errors import UsageError
from s2dcli.files.manifest import describe
from s2dcli.files.run_folder import RunFolder


def folder(out: Path, command: str = "grpo", steps: int = 9, **more) -> RunFolder:
    return RunFolder(out, describe(command, {"steps": steps}), steps=steps, **more)


def advance(run: RunFolder, upto: int, text: str = "", save: bool = True) -> None:
    def fill(draft: Path) -> None:
        (draft / "training_state").mkdir()
        (draft / "training_state" / "0.safetensors").write_text(text)
        (draft / "config.json").write_text(text)

    for step in range(run.step + 1, upto + 1):
        run.write_rollouts(step, [{"text": text}])
        run.add_row({"step": step, "text": text})
        if save:
            run.save(step, {"steps": step}, set(), fill)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture
def old(tmp_path):
    out = tmp_path / "run"
    with folder(out) as run:
        advance(run, 3, "old")
    return out


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_what_is_overwritten_stays_until_the_first_whole_step(old, error):
    def overwrite(whole: int) -> None:
        with folder(old, overwrite=True) as run:
            advance(run, whole, "new")
            assert not whole or run.checkpoint == old / "step-000001"
            advance(run, 2, "new", save=False)
            raise error

    before = contents(old)
    with pytest.raises(error):
        overwrite(0)
    assert contents(old) == before
    with pytest.raises(error):
        overwrite(1)
    assert {path.name for path in old.iterdir()} == {"s2d.json", "metrics.jsonl", "rollouts", "latest", "step-000001"}
    with folder(old, resume=True) as run:
        assert run.step == 1
        assert [row["text"] for row in map(json.loads, (old / "metrics.jsonl").read_text().splitlines())] == ["new"]


class Killed(BaseException):
    """The process is gone: nothing of it runs any more."""


def test_a_kill_while_one_run_takes_the_place_of_another_loses_nothing_of_the_new_one(old, tmp_path, monkeypatch):
    with folder(tmp_path / "whole") as run:
        advance(run, 1, "new")
    whole, nth, calls = {**contents(tmp_path / "whole"), "s2d.json": b""}, 0, 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise Killed
            return function(*args, **kwargs)

        return call

    shutil.copytree(old, tmp_path / "before")
    while True:
        nth, calls = nth + 1, 0
        shutil.rmtree(old)
        shutil.copytree(tmp_path / "before", old)
        run = folder(old, overwrite=True).__enter__()
        take_place = run.replace

        def replace(take_place=take_place):
            with monkeypatch.context() as patch:
                for name in ("rename", "unlink", "rmdir"):
                    patch.setattr(os, name, counted(getattr(os, name)))
                take_place()

        monkeypatch.setattr(run, "replace", replace)
        try:
            advance(run, 1, "new")
        except Killed:
            with pytest.raises(UsageError, match="output exists"):
                RunFolder.check(old, "grpo")
            RunFolder.check(old, "grpo", overwrite=True)
            with folder(old, resume=True) as again:
                pass
            if again.step == 3:  # nothing had been removed yet: the old run was resumed
                assert nth == 1
            else:
                assert {**contents(old), "s2d.json": b""} == whole
        else:
            break
    assert nth > 8


def test_what_s2d_did_not_write_is_named_and_left_alone(old):
    for name in ("notes.txt", "step-000002/mine/results.json", "rollouts/readme", "step-000003/training_state/x"):
        path = old / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        before = contents(old)
        with pytest.raises(UsageError, match=f"run: s2d did not write {name} in there: --overwrite leaves it all alone"):
            RunFolder.check(old, "grpo", overwrite=True)
        with pytest.raises(UsageError, match="did not write"), folder(old, overwrite=True):
            pass
        assert contents(old) == before
        path.unlink()
    (old / "step-000002" / "mine" / "results.json").write_text("mine")
    with folder(old, resume=True, keep_last=1) as run:
        advance(run, 4)
    assert [path.name for path in sorted(old.glob("step-*"))] == ["step-000002", "step-000004"]
    assert contents(old / "step-000002") == {"mine/results.json": b"mine"}
    with folder(old, resume=True) as run:
        assert run.step == 4


@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_only_the_command_that_wrote_a_folder_replaces_or_resumes_it(old, how):
    before = contents(old)
    with pytest.raises(UsageError, match=f"run: was written by s2d grpo: s2d opd --{how} leaves it alone"):
        folder(old, "opd", **{how: True}).__enter__()
    assert contents(old) == before


@pytest.mark.parametrize("how", [{}, {"resume": True}])
def test_a_run_that_fails_at_once_leaves_files_of_others(tmp_path, how):
    out = tmp_path / "run"

    def fail() -> None:
        with folder(out, problems=[{"id": "a"}], **how):
            (out / "slurm-1.log").write_text("log")
            raise SystemExit

    with pytest.raises(SystemExit):
        fail()
    assert (out / "slurm-1.log").read_text() == "log"
    with folder(out, problems=[{"id": "a"}], resume=True) as run:  # as a requeued job does
        advance(run, 1)
    assert (out / "slurm-1.log").exists()


def test_a_log_that_comes_about_while_a_run_is_overwritten_stays(old):
    with folder(old, overwrite=True) as run:
        (old / "slurm-1.log").write_text("log")
        advance(run, 1)
    assert {path.name for path in old.iterdir()} == {"s2d.json", "metrics.jsonl", "rollouts", "latest", "step-000001", "slurm-1.log"}


def test_files_named_like_older_temporary_files_belong_to_the_user(tmp_path):
    for name in (".keep.1", ".s2d-draft.tmp", ".step-000001.77"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match="output exists"), folder(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".keep.1", ".s2d-draft.tmp", ".step-000001.77"}
