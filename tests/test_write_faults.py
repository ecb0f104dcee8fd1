"""Disks that are full, over quota, read-only or broken: nothing is lost, the error is one line, and --resume goes on."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults import LONG, differing

TESTS = Path(__file__).parent
EVERY = 1 if LONG else 20  # of the calls of a whole run; those of a save fail one and all


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_any_call_that_writes_may_fail_or_be_the_last(tmp_path, record_property):
    library = tmp_path / "write_faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, TESTS / "write_faults.c", "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, TESTS / "write_faults.py", tmp_path, str(EVERY)],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert all(calls > 40 for calls in seen["saves"].values())
    for error, calls in seen["saves"].items():
        record_property("faults", (f"a save, {error}", calls, calls, 0))
    record_property("faults", ("a run, all of these", seen["faults"], seen["faults"], len(seen["mismatches"])))
    assert seen["faults"] >= 5
    assert seen["mismatches"] == []


@pytest.fixture
def command(toy, few):
    sampling = ["-n", 2, "--max-tokens", 8, "--problems-per-step", 2, "--steps", 2, "--save-every", 1]
    return ["opd", "--teacher", toy / "teacher", "--student", toy / "student", few, *sampling, "-o", "run"]


def test_a_file_that_may_grow_no_further_fails_the_save_and_nothing_else(s2d, command, tmp_path):
    assert s2d(*command, cwd=tmp_path).code == 0
    (tmp_path / "run").rename(tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # room for the weights, not for the optimizer's state
    try:
        result = s2d(*command, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.code == 1
    assert "error: run/step-000001: cannot save the checkpoint: File too large\n" in result.err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "problems.jsonl", "s2d.json"]
    assert s2d(*command, "--resume", cwd=tmp_path).code == 0
    assert differing(tmp_path / "whole", tmp_path / "run") == []


def test_a_full_disk_leaves_the_step_before_and_more_room_is_all_it_takes(s2d, command, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1000k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        result = s2d(*command, cwd=disk)  # a step takes 610 kB with its state
        assert result.code == 1
        assert "error: run/step-000002: cannot save the checkpoint: No space left on device\n" in result.err
        assert (disk / "run" / "latest").read_text() == "step-000001\n"
        assert [path.name for path in (disk / "run").iterdir() if path.name.startswith(".")] == []
        subprocess.run(["mount", "-o", "remount,size=4000k", str(disk)], check=True)
        result = s2d(*command, "--resume", cwd=disk)
        assert result.code == 0, result.err
        assert s2d(*command, cwd=tmp_path).code == 0
        assert differing(tmp_path / "run", disk / "run") == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_may_not_be_written_to_is_named(s2d, command, tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        result = s2d(*command, cwd=tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert result.code == 1
    assert result.err.splitlines()[-1] == "error: run: cannot make the folder: Read-only file system"
