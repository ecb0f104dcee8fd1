"""Trainers that are killed and go on end where an undisturbed run does, to the byte; times are exempt."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import read_jsonl, start, wait, write_jsonl

STEPS = 5
# Kills of each trainer: in children of this process, which has the imports behind it, and of cold processes.
WARM_KILLS = int(os.environ.get("S2D_KILLS", "7"))
COLD_KILLS = 3


def settled(run: Path) -> dict[str, object]:
    """All files of a run folder by name, without the figures that are times."""
    contents: dict[str, object] = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.name == "metrics.jsonl":
            contents[name] = [
                {key: value for key, value in row.items() if not key.endswith(("seconds", "per_second"))} for row in read_jsonl(path)
            ]
        elif path.name == "s2d.json":
            manifest = json.loads(path.read_text())
            assert manifest["counts"].pop("seconds") > 0
            contents[name] = manifest
        elif path.is_file():
            contents[name] = path.read_bytes()
    return contents


def assert_same(run: Path, undisturbed: Path) -> None:
    got, wanted = settled(run), settled(undisturbed)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if got[name] != wanted[name]] == []


def begin(args: list[str], cwd: Path) -> int:
    """Start a command in a child of this process, its output in cwd/log. Returns its pid."""
    with open(os.devnull, "rb") as null, open(cwd / "log", "ab") as log:
        return start(args, null.fileno(), log.fileno(), log.fileno(), cwd)


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
    """Commands of each trainer, by what they are to try; all write to `run`. Eight problems, three a step: passes end within steps."""
    few_steps = ["--steps", STEPS, "--lr", "1e-3", "--schedule", "cosine", "--warmup-steps", 2, "--save-every", 1, "-o", "run"]
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
            done[name] = s2d(*command[name], cwd=cwd).result, cwd / "run"
        return done[name]

    return run


VARIANTS = ["grpo", "grpo, several updates", "grpo from disk", "opd", "opd in bfloat16", "fkl-warmup", "fkl-warmup in 8 bits", "sft"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_killed_run_that_goes_on_equals_an_undisturbed_one(s2d, command, undisturbed, tmp_path, name):
    kill_at_step(command[name], tmp_path, 2)
    result = s2d(*command[name], "--resume", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "run: goes on after step" in result.err
    expected, folder = undisturbed(name)
    assert_same(tmp_path / "run", folder)
    timeless = [{key: value for key, value in row.items() if "second" not in key} for row in (result.result, expected)]
    assert timeless[0] == timeless[1]


def is_complete(run: Path) -> bool:
    return (run / "s2d.json").exists() and json.loads((run / "s2d.json").read_text())["complete"]


def num_rows(run: Path) -> int:
    """Steps that a run has told of."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def finish(s2d, args: list[str], cwd: Path) -> None:
    result = s2d(*args, "--resume", cwd=cwd)
    assert result.code == 0, result.err


@pytest.mark.parametrize("name", ["grpo", "opd", "fkl-warmup"])
def test_kills_at_random_moments_lose_nothing(s2d, command, undisturbed, tmp_path, name, capsys):
    """Each kill hits a run that went on after the one before, until one comes to its end; then another run begins."""
    _, folder = undisturbed(name)
    started = time.monotonic()
    s2d(*command[name], cwd=tmp_path)
    duration, rng = time.monotonic() - started, random.Random(name)
    kills, runs, cwd = 0, 1, tmp_path
    while kills < WARM_KILLS:
        if is_complete(cwd / "run"):
            assert_same(cwd / "run", folder)
            cwd = tmp_path / str(runs)
            cwd.mkdir()
            runs += 1
        pid = begin([*command[name], "--resume"], cwd)
        time.sleep(rng.uniform(0.1, 1.0) * duration)
        kills += kill(pid)
    finish(s2d, command[name], cwd)
    assert_same(cwd / "run", folder)
    with capsys.disabled():
        print(f"\n{name:<12} warm kills {kills:>4}   runs {runs:>4}   mismatches 0")


def test_cold_processes_may_be_killed_too(s2d, command, undisturbed, tmp_path, capsys):
    """All trainers at a time: each is killed, goes on in a new process, is killed again, ..., and ends like an undisturbed run."""
    names, rng = ["grpo", "opd", "fkl-warmup"], random.Random(0)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    kills = dict.fromkeys(names, 0)
    for name in names:
        (tmp_path / name).mkdir()
    for _ in range(COLD_KILLS):
        running = {}
        for name in names:
            log = open(tmp_path / name / "log", "ab")  # noqa: SIM115 - the child's
            running[name] = subprocess.Popen(
                [sys.executable, "-m", "s2dcli", *command[name], "--steps", str(4 * STEPS), "--resume"],
                cwd=tmp_path / name,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        begun = {name: num_rows(tmp_path / name / "run") for name in names}
        moments: dict[str, float] = {}
        while running:
            for name, process in list(running.items()):
                assert process.poll() is None, (tmp_path / name / "log").read_text()
                if name not in moments and num_rows(tmp_path / name / "run") > begun[name]:
                    moments[name] = time.monotonic() + rng.uniform(0.0, 0.3)
                if time.monotonic() >= moments.get(name, float("inf")):
                    os.killpg(process.pid, signal.SIGKILL)
                    kills[name] += process.wait() == -signal.SIGKILL
                    del running[name]
            time.sleep(0.002)
    for name in names:
        longer = [*command[name], "--steps", str(4 * STEPS)]
        finish(s2d, longer, tmp_path / name)
        (tmp_path / name / "whole").mkdir()
        assert s2d(*longer, cwd=tmp_path / name / "whole").code == 0
        assert_same(tmp_path / name / "run", tmp_path / name / "whole" / "run")
        with capsys.disabled():
            print(f"\n{name:<12} cold kills {kills[name]:>4}   mismatches 0")
    assert set(kills.values()) == {COLD_KILLS}

