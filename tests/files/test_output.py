"""Output files with their manifests: what is kept of a killed one, and what is refused."""

import json
import os
import subprocess
import sys

import pytest

from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.manifest import describe, file_sha256, sidecar
from s2dcli.files.output import check_output, complete_lines, is_finished, open_recorded, resumable, truncate_after

ROWS = [{"number": number, "text": "\n" * number} for number in range(5)]


def write(path, rows, **settings):
    manifest = describe("rollout", settings)
    with open_recorded(path, manifest) as writer:
        for row in rows:
            writer.write(row)
        manifest["counts"] = {"rollouts": len(rows)}
    return manifest


def test_the_manifest_is_there_before_the_first_row_and_complete_after_the_last(tmp_path):
    path = tmp_path / "rows.jsonl"
    manifest = describe("rollout", {"seed": 3})
    with open_recorded(path, manifest) as writer:
        assert json.loads(sidecar(path).read_text())["complete"] is False
        writer.write(ROWS[0])
        manifest["counts"] = {"rollouts": 1}
    after = json.loads(sidecar(path).read_text())
    assert (after["complete"], after["counts"], after["seeds"]) == (True, {"rollouts": 1}, {"seed": 3})
    assert after["output_sha256"] == file_sha256(path)
    assert is_finished(path, after)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"was changed after it was finished \(another sha256\); --overwrite restarts"):
        resumable(path, sidecar(path), manifest)


def test_a_failure_leaves_an_unfinished_manifest_and_whole_rows(tmp_path):
    path = tmp_path / "rows.jsonl"

    def stopped():
        with open_recorded(path, describe("rollout", {})) as writer:
            for row in ROWS:
                writer.write(row)
            raise SystemExit

    with pytest.raises(SystemExit):
        stopped()
    assert json.loads(sidecar(path).read_text())["complete"] is False
    assert [line.record for line in complete_lines(path)] == ROWS


def test_pipes_and_devices_have_no_manifest(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with open_recorded(tmp_path / "pipe", describe("rollout", {}), overwrite=True) as writer:
        writer.write(ROWS[0])
    assert json.loads(os.read(reader, 1000)) == ROWS[0]
    os.close(reader)
    assert os.listdir(tmp_path) == ["pipe"]
    with pytest.raises(UsageError, match="--resume needs a file"):
        check_output("-", overwrite=False, resume=True)


@pytest.mark.parametrize("torn", [b"", b'{"number": 3', b'{"number": 3}', b"\0\0\0\n", b"[]\n", b'{"number"\n{"number": 4}\n'])
def test_what_is_kept_are_the_whole_lines_before_the_first_that_is_none(tmp_path, torn):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(map(jsonl.dumps, ROWS[:3])) + torn)
    assert [line.record for line in complete_lines(path)] == ROWS[:3]
    assert [line.record for line in complete_lines(path, 2)] == ROWS[:2]
    truncate_after(path, 3)
    assert path.read_bytes() == b"".join(map(jsonl.dumps, ROWS[:3]))


def test_going_on_after_the_kept_lines_gives_the_bytes_of_an_undisturbed_file(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write(whole, ROWS)
    manifest = write(cut, ROWS[:3])
    cut.write_bytes(cut.read_bytes() + b'{"torn')
    with open_recorded(cut, manifest, kept=2) as writer:
        for row in ROWS[2:]:
            writer.write(row)
    assert cut.read_bytes() == whole.read_bytes()


def test_what_a_killed_command_left_of_its_manifest_is_removed(tmp_path):
    ours = (".s2d-123-rows.jsonl.s2d.json.tmp", ".s2d-123-rows.jsonl.tmp")
    left = {".s2d-123-rows.jsonl2.s2d.json.tmp", ".rows.jsonl.s2d.json.123", ".rows.jsonl.123", ".keep.1"}  # of others
    for name in (*ours, *left):
        (tmp_path / name).touch()
    write(tmp_path / "rows.jsonl", ROWS)
    assert set(os.listdir(tmp_path)) == {"rows.jsonl", "rows.jsonl.s2d.json", *left}


def test_a_second_writer_is_kept_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open_recorded(path, describe("rollout", {})):
        code = "from s2dcli.files.output import open_recorded\nfrom s2dcli.files.manifest import describe\n"
        code += f"with open_recorded({str(path)!r}, describe('rollout', {{}}), kept=0): pass"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"{path}: is in use by process {os.getpid()}" in second.stderr


def test_what_cannot_be_resumed_says_why(tmp_path):
    path = tmp_path / "rows.jsonl"
    manifest = describe("rollout", {"top_p": 1.0})
    assert resumable(path, sidecar(path), manifest) is None
    path.write_text("{}\n")
    with pytest.raises(UsageError, match=r"without rows.jsonl.s2d.json it is not known what made it; --overwrite"):
        resumable(path, sidecar(path), manifest)
    path.unlink()
    write(path, ROWS, top_p=0.5)
    with pytest.raises(UsageError, match=r"--top-p was 0.5, is 1.0"):
        resumable(path, sidecar(path), manifest)
    sidecar(path).write_text("{}")
    with pytest.raises(DataError, match="not a manifest of s2d"):
        resumable(path, sidecar(path), manifest)
    with pytest.raises(UsageError, match="give one of them"):
        check_output(path, overwrite=True, resume=True)


def test_a_full_disk_is_one_line():
    def fill():
        with jsonl.open_output("/dev/full", append=True) as writer:
            writer.write(ROWS[0])

    with pytest.raises(DataError, match=r"^/dev/full: cannot write: No space left on device$"):
        fill()
