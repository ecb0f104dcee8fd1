"""Following a run from its files: what is said of one that has not begun, runs, is cut, is killed, and has finished."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from conftest import read_jsonl, start, wait, write_jsonl

from s2dcli.errors import DataError, UsageError
from s2dcli.files.lock import locked
from s2dcli.files.manifest import SCHEMA, write_json
from s2dcli.report import watch
from s2dcli.report.watch import State, Tail, Watched, picture, shortened, sparkline, stretched

ROW = {"seconds": 2.0, "save_seconds": 0.5, "tokens": 100, "reward": 0.5, "kl": None, "sample_seconds": 1.0}


def rows(*steps, **more):
    return [{"step": step, **ROW, **more} for step in steps]


def make(out, *, steps=10, complete=False, command="grpo", done=(), **more):
    out.mkdir(exist_ok=True)
    record = {"command": command, "options": {}, "given": [], "versions": {}, "commit": "", "inputs": [], "parents": [], "labels": []}
    write_json(out / "s2d.json", {"schema": SCHEMA, "complete": complete, **record, "counts": {}, "ancestors": {}, "planned_steps": steps})
    write_jsonl(out / "metrics.jsonl", rows(*done, **more))


def looked(out, times=1):
    run = Watched(out)
    for _ in range(times):
        run.look()
    return run


def test_rows_come_whole_and_are_read_again_when_the_file_is_cut(tmp_path):
    path, tail = tmp_path / "metrics.jsonl", Tail()
    tail.look(path)
    assert tail.rows == []
    lines = [json.dumps(row) + "\n" for row in rows(1, 2, 3)]
    path.write_text(lines[0] + lines[1][:9])
    tail.look(path)
    assert [row["step"] for row in tail.rows] == [1]
    path.write_text("".join(lines))
    tail.look(path)
    assert tail.rows == rows(1, 2, 3)
    with path.open("r+") as file:
        file.truncate(len(lines[0]))
    tail.look(path)
    assert tail.rows == rows(1)
    for longer in ("", "x" * 7):  # cut and grown beyond what was read between two looks, with rows of the same length or not
        path.write_text("".join(lines))
        tail.look(path)
        with path.open("r+") as file:
            file.truncate(len(lines[0]))
            file.seek(0, os.SEEK_END)
            file.writelines(json.dumps(row) + "\n" for row in rows(2, 3, 4, note=longer))
        tail.look(path)
        assert [row["step"] for row in tail.rows] == [1, 2, 3, 4]
    first = tail.file
    path.rename(tmp_path / "old")
    path.write_text(lines[0])
    tail.look(path)
    assert (len(tail.rows), tail.file == first) == (1, False)
    path.unlink()
    tail.look(path)
    assert tail.rows == []
    path.write_text(lines[0] + "{\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        tail.look(path)


def test_what_is_known_of_the_process(tmp_path):
    out = tmp_path / "run"
    assert looked(out).state is State.absent
    assert "no run yet" in picture(looked(out), 80, plain=False)
    out.mkdir()
    assert looked(out).state is State.absent
    make(out, done=[1, 2])
    assert looked(out).state is State.unknown  # not at the first look: files may come late
    run = looked(out, watch.GONE_LOOKS)
    assert run.state is State.stopped
    assert "waiting for --resume" in picture(run, 80, plain=False)

    child = os.fork()
    if not child:
        with locked(out):
            time.sleep(60)
    while not (out / ".lock").exists() or not (out / ".lock").read_text():
        time.sleep(0.01)
    run = looked(out, watch.GONE_LOOKS)
    assert run.state is State.running
    assert f"process {child} on {os.uname().nodename} is running" in picture(run, 80, plain=False)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (out / ".lock").exists()
    assert looked(out, watch.GONE_LOOKS).state is State.stopped
    for _ in range(watch.GONE_LOOKS):
        run.look()
    assert run.state is State.stopped
    (out / ".lock").write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": ""}))
    run = looked(out, watch.GONE_LOOKS)
    assert run.state is State.unknown
    run._changed -= 300
    assert "no new step for 0:05:00; steps take 2.5 s; whether process 7 on elsewhere is still running cannot be seen from here" in picture(
        run, 80, plain=False
    )
    make(out, complete=True, done=range(1, 11))
    assert looked(out).state is State.finished


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    make(tmp_path / "eval", command="eval")
    for name, reason in (("file", "is not a folder"), ("other", "was not made by s2d"), ("eval", "was written by s2d eval")):
        with pytest.raises(UsageError, match=reason):
            looked(tmp_path / name)


def test_the_time_left_is_that_of_the_planned_steps(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    out = tmp_path / "run"
    make(out, steps=40, done=[1])
    (out / ".lock").write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": ""}))
    run = looked(out)
    assert run.seconds_left() == pytest.approx(39 * 2.5)
    for step in range(2, 10):  # 7 seconds each here, with evaluations
        now[0] += 7
        write_jsonl(out / "metrics.jsonl", rows(*range(1, step + 1)))
        run.look()
    assert run.seconds_left() == pytest.approx(31 * 7)
    assert "step 9 of 40 (22%), about 0:03:37 left" in picture(run, 100, plain=False)
    write_jsonl(out / "metrics.jsonl", rows(1, 2))  # resumed from step 2
    now[0] += 100
    run.look()
    assert run.seconds_left() == pytest.approx(38 * 2.5)
    make(out, steps=None, done=[1])
    assert looked(out).seconds_left() is None


def test_a_run_that_is_overwritten_is_followed_where_it_is_written(tmp_path):
    out = tmp_path / "run"
    make(out, complete=True, done=range(1, 11))
    make(out / ".s2d-new", done=[1, 2])
    run = looked(out)
    assert (run.step, run.state) == (2, State.unknown)
    for name in ("metrics.jsonl", "s2d.json"):
        (out / ".s2d-new" / name).rename(out / name)
    file = run.metrics.file
    run.look()
    assert (run.step, run.metrics.file) == (2, file)  # the same rows


def test_curves():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, None, 1], 9) == "▁ ▁"
    assert sparkline([0, 0, 1, 1], 2, "ab") == "ab"
    assert shortened([1, 3, None, None, 5, None], 3) == [2, None, 5]
    assert stretched([0, 1, None, 4], 7) == [0, 0.5, 1, None, None, None, 4]
    assert stretched([], 3) == []


@pytest.mark.parametrize("plain", [False, True])
def test_the_picture_fits_and_shows_the_figures(tmp_path, plain):
    out = tmp_path / "run\x1b[31m"
    make(out, done=range(1, 200), steps=400)
    data = [{"step": step, **ROW, "reward": step / 200, "kl": None if step < 9 else -step} for step in range(1, 200)]
    write_jsonl(out / "metrics.jsonl", data)
    evals = [{"step": step, "k": 4, "avg_at_k": 0.1 + step / 1000, "se": 0.01, "mean_reward": None} for step in (0, 50, 100)]
    write_jsonl(out / "evals.jsonl", evals)
    text = picture(looked(out), 100, plain=plain)
    reward = re.search(r"^reward +(.*)$", text, re.M)[1].split()
    assert reward[:3] == ["0.995", "0.005", "0.995"]
    assert len(reward[3]) == 100 - 14 - 31
    assert re.search(r"^KL +-199 +-199 +-9 ", text, re.M)
    assert "avg@4         10.0% ± 1.0% at step 0, 20.0% ± 1.0% at step 100" in text
    assert "2.5 s/step, 50 tokens/s trained" in text
    assert max(len(line) for line in text.splitlines()[2:]) <= 100
    assert text.isascii() == plain or "±" in text
    chart = [line for line in text.splitlines() if any(0x2800 <= ord(char) < 0x2900 for char in line)]
    assert (len(chart) == 5) != plain
    if not plain:
        assert float(chart[0].split()[0]) == pytest.approx(0.995, abs=0.01)  # of neighbours the mean is drawn
        assert ord(chart[-1][14]) & 0x40  # the first value, at the bottom left


def test_steps_of_a_run_come_as_json_lines_until_it_ends_or_is_killed(s2d, toy, few, tmp_path):
    train = ["grpo", "--model", toy / "teacher", few, "--max-tokens", 8, "-n", 2, "--reward", "exact", "--epochs", 3, "-o", "run", "-q"]
    train = [str(arg) for arg in [*train, "--problems-per-step", 4, "--save-every", 1]]
    with open(os.devnull, "r+b") as null, open(tmp_path / "rows", "w+b") as out, open(tmp_path / "err", "w+b") as err:
        watcher = start(["report", "--watch", "run"], null.fileno(), out.fileno(), err.fileno(), tmp_path)
        trainer = start([*train, "--steps", "500"], null.fileno(), null.fileno(), err.fileno(), tmp_path)
        while not (tmp_path / "run" / "latest").exists():
            time.sleep(0.01)
        os.killpg(trainer, signal.SIGKILL)
        wait(trainer)
        assert wait(watcher) == 1
        err.seek(0)
        assert re.search(r"error: run: stopped after step \d+ of 500, before it was finished; the same s2d grpo", err.read().decode())
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    told = read_jsonl(tmp_path / "rows")
    assert [row["step"] for row in told] == [row["step"] for row in metrics]
    assert s2d(*train, "--overwrite", cwd=tmp_path).code == 0
    manifests = [json.loads((tmp_path / "run" / name / "s2d.json").read_text()) for name in (".", "step-000006")]
    assert [manifest["planned_steps"] for manifest in manifests] == [6, 6]  # of --epochs 3
    result = s2d("report", "--watch", "run", cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.rows[-1] == {"state": "finished", "step": 6, "steps": 6}
    assert [{**row, "steps": 6} for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [
        {name: value for name, value in row.items() if name != "seconds_left"} for row in result.rows[:-1]
    ]
    for args in (["a", "b"], ["-"], ["run", "--columns", "all"]):
        assert s2d("report", "--watch", *args, cwd=tmp_path).code == 2


def test_ctrl_c_on_a_terminal_ends_it(tmp_path):
    import pty

    make(tmp_path / "run", done=[1, 2, 3])
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "s2dcli", "report", "--watch", tmp_path / "run"]
    watcher = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env={**os.environ, "TERM": "xterm"})
    os.close(terminal)
    shown = b""
    while b"step 3 of 10" not in shown:
        shown += os.read(controller, 4096)
    watcher.send_signal(signal.SIGINT)
    with suppress(OSError):  # once nothing is left
        while more := os.read(controller, 4096):
            shown += more
    assert watcher.wait() == 130
    assert b"interrupted" in shown
    assert b"\x1b[?25h" in shown  # the cursor is back
