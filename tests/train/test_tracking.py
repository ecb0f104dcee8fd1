"""Trackers are given the rows of metrics.jsonl and evals.jsonl, and a resumed run continues theirs."""

import json
import struct
from pathlib import Path

import pytest
from conftest import read_jsonl

from s2dcli.errors import UsageError
from s2dcli.train import tracking
from s2dcli.train.tracking import parse_trackers

BLOCK = 32768  # bytes, of LevelDB's log format, in which wandb writes
HEAD = 7  # bytes before the first record, and of each record's header


def wandb_records(path: Path):
    """Yield the records of a .wandb file; none of them reaches across blocks here, or is cut off."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), HEAD, b""
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEAD])
        whole += data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.fixture(scope="module")
def tracked(s2d, toy, few, tmp_path_factory):
    """A run of three steps that was stopped after two, and one that --overwrite has replaced another by."""
    folder = tmp_path_factory.mktemp("tracked")
    command = ["grpo", "--model", toy / "teacher", few, "--max-tokens", 8, "-n", 4, "--reward", "exact", "--save-every", 2, "-q"]
    command += ["--eval-problems", few, "--eval-every", 2, "--eval-samples", 1, "-o", "run", "--lr", "1e-4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for more in (["--steps", 2], ["--steps", 3, "--resume"]):
            result = s2d(*command, "--track", "tensorboard,wandb", *more, cwd=folder)
            assert (result.code, result.err) == (0, "")
    return folder, command


def test_tensorboard_has_every_step_once(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = tracked
    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    metrics, evals = (read_jsonl(folder / "run" / name) for name in ("metrics.jsonl", "evals.jsonl"))
    for name in ("loss", "reward", "seconds"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([row[name] for row in metrics])
    assert [event.value for event in events.Scalars("eval/avg_at_k")] == pytest.approx([row["avg_at_k"] for row in evals])
    assert [event.value for event in events.Scalars("grader_errors/timeout")] == [0, 0, 0]
    assert "kl" not in events.Tags()["scalars"]  # null in every row


def test_wandb_offline_has_both_parts_under_one_name(tracked):
    folder, _ = tracked
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    name = json.loads((folder / "run" / "track.json").read_text())["wandb"]
    found: dict[int, dict] = {}
    for path in files:
        records = list(wandb_records(path))
        assert {record.run.run_id for record in records if record.HasField("run")} == {name}
        for record in records:
            if record.HasField("history"):
                values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
                found.setdefault(int(values["_step"]), {}).update(values)
    metrics, evals = (read_jsonl(folder / "run" / name) for name in ("metrics.jsonl", "evals.jsonl"))
    assert [found[row["step"]]["reward"] for row in metrics] == [row["reward"] for row in metrics]
    assert [found[row["step"]]["eval/avg_at_k"] for row in evals] == [row["avg_at_k"] for row in evals]


def test_a_tracked_run_may_be_replaced_and_lives_without_its_tracker(s2d, tracked):
    folder, command = tracked
    result = s2d(*command, "--steps", 2, "--track", "tensorboard", "--overwrite", cwd=folder)
    assert (result.code, result.err) == (0, "")
    assert len(list((folder / "run" / "tensorboard").glob("events.*"))) == 1
    assert not (folder / "run" / "track.json").exists()
    assert s2d(*command, "--steps", 1, "--overwrite", cwd=folder).code == 0
    (folder / "run" / "tensorboard").touch()  # a file in the way
    result = s2d(*command, "--steps", 2, "--resume", "--track", "tensorboard", cwd=folder)
    assert result.code == 0
    assert "warning: --track tensorboard: not tracked: " in result.err


def test_a_tracker_that_is_unknown_or_missing_is_refused(s2d, toy, few, tmp_path, monkeypatch):
    result = s2d("grpo", "--model", toy / "teacher", few, "--track", "tensorbord", "-o", tmp_path / "run")
    assert result.code == 2
    assert "--track: unknown tracker 'tensorbord'; there are tensorboard, wandb, trackio" in result.err
    assert "loading" not in result.err
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs trackio, which is not installed; pip install 'trackio'"):
        parse_trackers(["trackio"])
    with pytest.raises(UsageError, match=r"pip install 's2d\[track\]'"):
        parse_trackers(["wandb,tensorboard"])
    assert parse_trackers(None) == []
