"""Trainers that are killed and go on end where an undisturbed run does, to the byte; times are exempt."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import start, wait
from faults import COLD_KILLS, WARM_KILLS, differing, kill_and_resume

STEPS = 5
TRAINERS = ["grpo", "opd", "fkl-warmup"]
OUT = ["-o", "run"]  # in the folder where a command is started: runs name themselves in what they write


def begin(args: list[str], cwd: Path) -> int:
    """Start a command in a child of this process, its output in cwd/log. Returns its pid."""
    with open(os.devnull, "rb") as null, open(cwd / "log", "ab") as log:
        return start([*args, *OUT], null.fileno(), log.fileno(), log.fileno(), cwd)


def kill(pid: int) -> bool:
    """Kill a child and those of its group; returns whether it was still running."""
    os.killpg(pid, signal.SIGKILL)
    return wait(pid) == -signal.SIGKILL


def kill_at_step(args: list[str], cwd: Path, step: int) -> None:
    """Start a command and kill it once it has saved a step."""
    latest, pid = cwd / "run" / "latest", begin(args, cwd)
    while not (latest.exists() and latest.read_text() >= f"step-{step:06d}"):
        assert not os.waitpid(pid, os.WNOHANG)[0], (cwd / "log").read_text()
        time.sleep(0.002)
    assert kill(pid), "the run was over before it could be killed"


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Have the imports of this module's commands behind us, too."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401


@pytest.fixture(scope="module")
def graded(s2d, toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("graded") / "graded.jsonl"
    rows = s2d("rollout", "-m", toy / "teacher", toy / "problems" / "validation.jsonl", "-n", 4, "--max-tokens", 16)
    result = s2d("verify", "-o", path, stdin=rows.out)
    assert result.code == 0, result.err
    return path


@pytest.fixture(scope="module")
def half(toy, tmp_path_factory):
    """The toy student in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("half")
    AutoModelForCausalLM.from_pretrained(toy / "student", dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy / "student").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def command(toy, few, graded, half):
    """Commands of each trainer, by what they are to try. Eight problems, three a step: passes end within steps."""
    few_steps = ["--steps", STEPS, "--lr", "1e-3", "--schedule", "cosine", "--warmup-steps", 2, "--save-every", 1]
    sampling = [few, *few_steps, "--problems-per-step", 3, "-n", 4, "--max-tokens", 16]
    measured = ["--eval-problems", few, "--eval-every", 2, "--eval-samples", 1]
    grpo = ["grpo", "--model", toy / "teacher"]
    opd = ["opd", "--teacher", toy / "teacher", "--student"]
    warmup = ["fkl-warmup", "--student", half, "--rollouts", graded, *few_steps, "--mini-batch-size", 96]
    commands = {
        "grpo": [*grpo, *sampling, *measured, "--reward", "exact", "--keep-rollouts", "--resample-flat", 1, "--kl-coef", 0.01],
        "grpo, several updates": [*grpo, *sampling, "--reward", "exact", "--mini-batch-size", 4, "--keep-states", 2, "--loss", "dapo"],
        "grpo from disk": [*grpo, "--rollouts", graded, *few_steps, "--problems-per-step", 90, "--reward", "exact"],
        "opd": [*opd, toy / "student", *sampling, "--keep-rollouts", "--lora-rank", 4],
        "opd in bfloat16": [*opd, half, *sampling, "--weights", "bfloat16", "--keep-last", 2],
        "fkl-warmup": [*warmup, "--teacher", toy / "teacher"],
        "fkl-warmup in 8 bits": [*warmup, "--teacher", toy / "teacher", "--optimizer", "adamw-8bit", *measured, "--max-tokens", 16],
        "sft": [*warmup, "--hard-labels", "--only-correct", "--lora-rank", 2],
    }
    del commands["grpo from disk"][-2:]  # grading is done
    return {name: [str(arg) for arg in args] for name, args in commands.items()}


@pytest.fixture(scope="module")
def undisturbed(s2d, command, tmp_path_factory):
    """Run a command to its end, once; returns the result and the run folder."""
    done = {}

    def run(name: str):
        if name not in done:
            cwd = tmp_path_factory.mktemp("undisturbed")
            done[name] = s2d(*command[name], *OUT, cwd=cwd).result, cwd / "run"
        return done[name]

    return run


VARIANTS = ["grpo", "grpo, several updates", "grpo from disk", "opd", "opd in bfloat16", "fkl-warmup", "fkl-warmup in 8 bits", "sft"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_killed_run_that_goes_on_equals_an_undisturbed_one(s2d, command, undisturbed, tmp_path, name):
    kill_at_step(command[name], tmp_path, 2)
    result = s2d(*command[name], *OUT, "--resume", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "run: goes on after step" in result.err
    expected, folder = undisturbed(name)
    assert differing(folder, tmp_path / "run") == []
    timeless = [{key: value for key, value in row.items() if "second" not in key} for row in (result.result, expected)]
    assert timeless[0] == timeless[1]


def longer(args: list[str]) -> list[str]:
    """The same run of four times as many steps, so that a cold process can be killed within them."""
    return [*args, "--steps", str(4 * STEPS)]


def num_rows(run: Path) -> int:
    """Steps that a run has told of."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def finish(s2d, args: list[str], cwd: Path) -> None:
    result = s2d(*args, *OUT, "--resume", cwd=cwd)
    assert result.code == 0, result.err


@pytest.mark.parametrize("name", TRAINERS)
def test_kills_at_random_moments_lose_nothing(command, tmp_path, record_property, name):
    outcome = kill_and_resume(command[name], tmp_path, kills=WARM_KILLS, seed=WARM_KILLS)
    record_property("faults", (f"{name} (warm)", outcome.kills, outcome.runs, len(outcome.mismatches)))
    assert outcome.mismatches == []


def test_cold_processes_may_be_killed_too(s2d, command, tmp_path, record_property):
    """All trainers at a time: each is killed, goes on in a new process, is killed again, ..., and ends like an undisturbed run."""
    draw = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    kills = dict.fromkeys(TRAINERS, 0)
    for name in TRAINERS:
        (tmp_path / name).mkdir()
    for _ in range(COLD_KILLS):
        running = {}
        for name in TRAINERS:
            log = open(tmp_path / name / "log", "ab")  # noqa: SIM115 - the child's
            running[name] = subprocess.Popen(
                [sys.executable, "-m", "s2dcli", *longer(command[name]), *OUT, "--resume"],
                cwd=tmp_path / name,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        begun = {name: num_rows(tmp_path / name / "run") for name in TRAINERS}
        moments: dict[str, float] = {}
        while running:
            for name, process in list(running.items()):
                assert process.poll() is None, (tmp_path / name / "log").read_text()
                if name not in moments and num_rows(tmp_path / name / "run") > begun[name]:
                    moments[name] = time.monotonic() + draw.uniform(0.0, 0.3)
                if time.monotonic() >= moments.get(name, float("inf")):
                    os.killpg(process.pid, signal.SIGKILL)
                    kills[name] += process.wait() == -signal.SIGKILL
                    del running[name]
            time.sleep(0.002)
    for name in TRAINERS:
        finish(s2d, longer(command[name]), tmp_path / name)
        (tmp_path / name / "whole").mkdir()
        assert s2d(*longer(command[name]), *OUT, cwd=tmp_path / name / "whole").code == 0
        mismatches = differing(tmp_path / name / "whole" / "run", tmp_path / name / "run")
        record_property("faults", (f"{name} (cold)", kills[name], 1, len(mismatches)))
        assert mismatches == []
        assert kills[name] == COLD_KILLS
