"""Several processes, as `accelerate launch` and torchrun start them: what one leaves, they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
from conftest import read_jsonl

BOUND = 1e-5  # relative difference that the order of float32 sums explains
SHORT = ["--problems-per-step", 4, "-n", 2, "--max-tokens", 12, "--lr", "1e-3", "-q"]


@pytest.fixture(scope="module")
def inputs(s2d, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    processes.make_inputs(folder, s2d)
    return folder


@pytest.mark.parametrize(
    ("command", "variant", "number", "sharded"),
    [
        ("grpo, all options", "tied", 2, False),
        ("grpo, all options", "untied", 2, True),
        ("fkl-warmup", "lora", 2, True),
        ("opd, cache", "tied", 2, True),
        ("opd", "bfloat16", 4, True),
        ("opd, all forms", "untied", 2, True),
    ],
)
def test_several_processes_leave_what_one_leaves(inputs, tmp_path, command, variant, number, sharded):
    """The wide table is tests/bench/bench_processes.py's."""
    arguments = processes.commands(inputs, variant)[command]
    one, several = tmp_path / "one", tmp_path / "several"
    for count, out in ((1, one), (number, several)):
        results = processes.start(count, arguments, out, sharded=sharded).wait()
        assert [(result.code, result.err) for result in results] == [(0, "")] * count
        assert [len(result.out.splitlines()) for result in results] == [1] + [0] * (count - 1)
        assert json.loads((out / "s2d.json").read_text())["processes"] == count
    found = processes.compare(one, several)
    assert max(found.gradient, found.metrics, found.weights) < BOUND, found
    names = [sorted(path.relative_to(out).as_posix() for path in out.rglob("*")) for out in (one, several)]
    assert names[0] == names[1]
    cards = [next(out.glob("step-*/README.md")).read_text().replace(f"-o {out.name}", "-o") for out in (one, several)]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("narrow", [False, True])
def test_what_a_process_holds_falls_with_their_number(toy, narrow):
    alone = processes.in_each(1, processes.held, toy / "teacher")[0]
    assert not alone.distributed
    for number in (2, 4):
        shares = processes.in_each(number, processes.held, toy / "teacher", narrow, sharded=True)
        assert all(share.distributed for share in shares)  # accelerate takes DDP on a CPU where FSDP2 was asked for
        # Float32 parts for either type of weights; rows that do not come out even make some parts a little larger.
        for kind in ("weights", "gradients", "moments"):
            held = [getattr(share, kind) for share in shares]
            assert sum(held) == getattr(alone, kind)
            assert max(held) < 1.05 * getattr(alone, kind) / number


@pytest.mark.parametrize(("number", "victim"), [(2, 1), (2, 0)])
def test_a_death_ends_the_others_with_one_error_and_fewer_resume(s2d, launch, toy, tmp_path, number, victim):
    out = tmp_path / "run"
    command = ["grpo", "--model", toy / "teacher", toy / "problems" / "1H.jsonl", "-o", out, *SHORT, "--save-every", 1, "--steps"]
    launched = launch(number, *command, 500, sharded=True)
    deadline = time.monotonic() + 120
    while not (out / "step-000001").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(launched.pids[victim], signal.SIGKILL)
    results = launched.wait()
    for rank, result in enumerate(results):
        if rank != victim:
            assert result.code == 1
            assert [line for line in result.err.splitlines() if not line.startswith("warning: step")] == [
                f"error: process {victim} of {number} (pid {launched.pids[victim]} on {os.uname().nodename}) was killed or has crashed; "
                "--resume continues after the last saved step, also with another number of processes"
            ]
    done = int((out / "latest").read_text().removeprefix("step-"))
    resumed = s2d(*command, done + 1, "--resume")
    assert resumed.result["step"] == done + 1
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == list(range(1, done + 2))


def test_errors_are_said_once(launch, toy, tmp_path):
    out = tmp_path / "run"
    grpo = ["grpo", "--model", toy / "teacher", "-o", out]
    problems = toy / "problems" / "1H.jsonl"
    absent = launch(2, *grpo, tmp_path / "absent.jsonl").wait()
    assert [result.code for result in absent] == [1, 1]
    assert [result.err.count("error:") for result in absent] == [1, 0]
    for message, command, environment in (
        ("s2d rollout is one process, and 2 were launched", ["rollout", "-m", toy / "teacher", problems], {}),
        ("DeepSpeed", [*grpo, problems], {"ACCELERATE_USE_DEEPSPEED": "true"}),
        ("--fsdp_version 2", [*grpo, problems], {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}),
        ("each of the 2 processes has one GPU", [*grpo, problems, "--engine", "vllm", "--tensor-parallel-size", 2], {}),
        ("adamw-8bit", [*grpo, problems, "--optimizer", "adamw-8bit"], {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
    ):
        results = launch(2, *command, "-q", **environment).wait()
        assert {result.code for result in results} == {2}, message
        assert message in results[0].err
        assert len(results[0].err.splitlines()) == 1, results[0].err
        assert not results[1].err
    assert not out.exists()


def test_the_main_process_reads_standard_input(launch, toy, few, tmp_path):
    out = tmp_path / "run"
    results = launch(2, "grpo", "--model", toy / "teacher", "-o", out, *SHORT, "--steps", 1, stdin=few.read_bytes()).wait()
    assert [result.code for result in results] == [0, 0], results[0].err
    assert (out / "problems.jsonl").read_bytes().count(b"\n") == 8


def test_accelerate_launches_fsdp2(toy, few, tmp_path):
    """Once as users do it; that it shards, and no process works alone, is said by the main process."""
    out = tmp_path / "run"
    launcher = ["launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "-m", "s2dcli"]
    command = ["grpo", "--model", toy / "teacher", few, "-o", out, *SHORT[:-1], "--steps", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launcher, *map(str, command)]
    ended = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("2 processes, each with its part of the weights (FSDP2)") == 1
    assert json.loads(ended.stdout)["step"] == 1
    assert json.loads((out / "s2d.json").read_text())["processes"] == 2
