"""Where a run stands, what is cut when it goes on, what is kept, and who may write."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import read_jsonl, write_jsonl

from s2dcli.errors import DataError, UsageError
from s2dcli.files.manifest import describe
from s2dcli.files.run_folder import RunFolder
from s2dcli.options import MAY_CHANGE_ON_RESUME


def folder(out: Path, steps: int = 9, schedule: str = "constant", **more) -> RunFolder:
    manifest = describe("grpo", {"steps": steps, "schedule": schedule, "lr": more.pop("lr", 1e-6), "workers": more.pop("workers", 1)})
    return RunFolder(out, manifest, steps=steps, may_change=MAY_CHANGE_ON_RESUME, may_extend=schedule == "constant", **more)


def advance(run: RunFolder, upto: int, save: bool = True) -> None:
    def fill(draft: Path) -> None:
        (draft / "training_state").mkdir()
        (draft / "model").write_text(str(step))

    for step in range(run.step + 1, upto + 1):
        run.write_rollouts(step, [{"step": step}])
        run.add_row({"step": step, "loss": step / 3})
        if step % 2 == 0:
            run.add_eval({"step": step, "avg_at_k": 0.5})
        if save:
            run.save(step, {"steps": step}, {f"label {number}" for number in range(step)}, fill)


def steps_in(out: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(out / "metrics.jsonl")]


def test_a_run_goes_on_after_its_last_whole_step(tmp_path):
    out = tmp_path / "run"
    with folder(out) as run:
        advance(run, 3)
    with folder(out, resume=True) as run:
        advance(run, 4)
        for step in (5, 6):
            run.write_rollouts(step, [])
            run.add_row({"step": step})
        run.add_eval({"step": 6})
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "los')
    (out / ".s2d-123-step-000005.tmp").mkdir()
    (out / "step-000004" / ".s2d-123-training_state.tmp").mkdir()
    (out / "rollouts" / ".s2d-123-step-000007.jsonl.tmp").touch()
    with folder(out, resume=True) as run:
        assert (run.step, run.counts, run.labels) == (4, {"steps": 4}, {"label 0", "label 1", "label 2", "label 3"})
        assert run.last_row == {"step": 4, "loss": 4 / 3}
        assert run.last_eval == {"step": 4, "avg_at_k": 0.5}
        assert steps_in(out) == [1, 2, 3, 4]
        assert [row["step"] for row in read_jsonl(out / "evals.jsonl")] == [2, 4]
        assert len(list((out / "rollouts").iterdir())) == 4
        assert [path.name for path in out.rglob(".*")] == [".lock"]
        assert run.result() == {"checkpoint": str(out / "step-000004"), "step": 4, "loss": 4 / 3, "eval_avg_at_k": 0.5}
    assert list(out.rglob(".*")) == []


def test_a_step_is_whole_before_latest_names_it(tmp_path):
    with folder(tmp_path) as run:
        advance(run, 2)
    (tmp_path / "latest").write_text("step-000001\n")
    with folder(tmp_path, resume=True) as run:
        assert run.step == 2
    assert (tmp_path / "latest").read_text() == "step-000002\n"


def test_without_a_whole_step_a_run_begins_anew(tmp_path):
    for out, prepare in (("missing", None), ("empty", Path.mkdir), ("begun", Path.mkdir)):
        out = tmp_path / out
        if prepare:
            prepare(out)
        if out.name == "begun":
            with folder(out, problems=[{"id": "old"}]) as run:
                advance(run, 2, save=False)
            (out / ".s2d-99-step-000002.tmp").mkdir()
        with folder(out, problems=[{"id": "a"}], resume=True) as run:
            assert (run.step, run.labels, run.last_row) == (0, set(), {})
            assert {path.name for path in out.iterdir()} <= {"s2d.json", "problems.jsonl", "rollouts", ".lock"}
            assert list(out.glob("rollouts/*")) == []
            assert read_jsonl(out / "problems.jsonl") == [{"id": "a"}]
            assert json.loads((out / "s2d.json").read_text())["complete"] is False


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_what_fails_before_the_first_step_leaves_nothing_behind(tmp_path, how):
    out = tmp_path / "run"
    for error in (DataError, KeyboardInterrupt):
        with pytest.raises(error), folder(out, problems=[{"id": "a"}], **how):
            raise error("no such model")
        assert not out.exists()


def test_rows_that_a_whole_step_needs_must_be_there(tmp_path):
    with folder(tmp_path) as run:
        advance(run, 3)
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1}])
    with pytest.raises(DataError, match=r"metrics\.jsonl: lacks the row of step 3"), folder(tmp_path, resume=True):
        pass


def test_checkpoints_without_any_training_state_cannot_be_resumed(tmp_path):
    with folder(tmp_path) as run:
        advance(run, 1)
    (tmp_path / "step-000001" / "training_state").rmdir()
    with pytest.raises(DataError, match="no training_state to resume from; --overwrite restarts"), folder(tmp_path, resume=True):
        pass


@pytest.mark.parametrize(("keep_last", "keep_states", "steps", "states"), [(None, 1, 5, 1), (None, 3, 5, 3), (2, 1, 2, 1), (2, 4, 2, 2)])
def test_as_many_checkpoints_and_states_are_kept_as_asked_for(tmp_path, keep_last, keep_states, steps, states):
    with folder(tmp_path, keep_last=keep_last, keep_states=keep_states) as run:
        advance(run, 5)
    assert len(list(tmp_path.glob("step-*"))) == steps
    kept = sorted(path.parent.name for path in tmp_path.glob("step-*/training_state"))
    assert kept == [f"step-{step:06d}" for step in range(6 - states, 6)]


def test_other_settings_are_refused_and_what_may_change_is_not(tmp_path):
    with folder(tmp_path) as run:
        advance(run, 1)
    with pytest.raises(UsageError, match=r"--lr was 1e-06, is 0\.1") as caught, folder(tmp_path, lr=0.1, schedule="linear", resume=True):
        pass
    assert '--schedule was "constant", is "linear"' in str(caught.value)
    assert "--workers" in str(caught.value)  # among those that may change
    with folder(tmp_path, workers=2, resume=True) as run:
        assert run.step == 1


def test_more_steps_are_possible_only_where_none_so_far_depends_on_their_number(tmp_path):
    for schedule in ("constant", "cosine"):
        with folder(tmp_path / schedule, steps=3, schedule=schedule) as run:
            advance(run, 3)
            assert run.finished
    with folder(tmp_path / "constant", steps=5, resume=True) as run:
        assert not run.finished
        advance(run, 5)
    for name, steps in (("cosine", 5), ("constant", 4)):  # four are fewer than were made
        with pytest.raises(UsageError, match="--steps was"), folder(tmp_path / name, steps=steps, schedule=name, resume=True):
            pass


def test_overwriting_begins_anew_and_leaves_other_folders_alone(tmp_path):
    with folder(tmp_path / "run") as run:
        advance(run, 2)
    with pytest.raises(UsageError, match="output exists; --resume resumes it, --overwrite replaces it"), folder(tmp_path / "run"):
        pass
    with pytest.raises(UsageError, match="give one of them"), folder(tmp_path / "run", overwrite=True, resume=True):
        pass
    with folder(tmp_path / "run", overwrite=True) as run:
        assert {path.name for path in (tmp_path / "run" / ".s2d-new").iterdir()} == {"s2d.json"}
        assert run.step == 0
        assert (tmp_path / "run" / "latest").read_text() == "step-000002\n"
        advance(run, 1)
        names = {"s2d.json", ".lock", "latest", "metrics.jsonl", "rollouts", "step-000001"}
        assert {path.name for path in (tmp_path / "run").iterdir()} == names
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    for how in ("overwrite", "resume"):
        with pytest.raises(UsageError, match="was not made by s2d"), folder(tmp_path / "mine", **{how: True}):
            pass
    assert (tmp_path / "mine" / "notes").exists()


HOLD = """
import sys, time
from pathlib import Path
from s2dcli.files.lock import locked
with locked(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(99)
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_one_process_at_a_time_writes_and_a_dead_one_is_in_nobodys_way(tmp_path, kind):
    from s2dcli.files.lock import lock_of, locked

    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(UsageError, match=rf"out: is in use by process {holder.pid} on .* since 20"), locked(out):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    left = json.loads(lock_of(out).read_text())
    assert left["pid"] == holder.pid
    lock_of(out).write_text(json.dumps({**left, "pid": os.getppid()}))  # a pid that was given out again
    with locked(out):
        assert json.loads(lock_of(out).read_text())["pid"] == os.getpid()
    assert not lock_of(out).exists()
