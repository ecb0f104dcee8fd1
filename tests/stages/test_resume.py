"""Trainers that are killed and go on end where an undisturbed run does, to the byte; times are exempt."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import start, wait
from faults import COLD_KILLS, LONG, WARM_KILLS, contents, differing, kill_and_resume, without_times

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
    swapped = ["--student", toy / "teacher", "--teacher", toy / "student"]  # whose matrices are large enough for 8 bits
    commands = {
        "grpo": [*grpo, *sampling, *measured, "--reward", "exact", "--keep-rollouts", "--dynamic-sampling", 1, "--kl-coef", 0.01],
        "grpo, several updates": [*grpo, *sampling, "--reward", "exact", "--mini-batch-size", 4, "--keep-states", 2, "--loss", "dapo"],
        "grpo from disk": [*grpo, "--rollouts", graded, *few_steps, "--problems-per-step", 90, "--reward", "exact"],
        "opd": [*opd, toy / "student", *sampling, "--keep-rollouts", "--lora-rank", 4],
        "opd in phases": [*opd, toy / "student", *sampling, "--phases", "on", "--save-every", 2],
        "opd in bfloat16": [*opd, half, *sampling, "--weights", "bfloat16", "--keep-last", 2],
        "fkl-warmup": [*warmup, "--teacher", toy / "teacher"],
        "fkl-warmup in 8 bits": [*warmup, *swapped, "--optimizer", "adamw-8bit", *measured, "--max-tokens", 16],
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


VARIANTS = [
    "grpo",
    "grpo, several updates",
    "grpo from disk",
    "opd",
    "opd in phases",
    "opd in bfloat16",
    "fkl-warmup",
    "fkl-warmup in 8 bits",
    "sft",
]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_killed_run_that_goes_on_equals_an_undisturbed_one(s2d, command, undisturbed, tmp_path, name):
    kill_at_step(command[name], tmp_path, 2)
    result = s2d(*command[name], *OUT, "--resume", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "run: resumes after step" in result.err
    expected, folder = undisturbed(name)
    assert differing(folder, tmp_path / "run") == []
    assert without_times(result.result) == without_times(expected)


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


@pytest.mark.parametrize("name", [*TRAINERS, "opd in phases"])
def test_kills_at_random_moments_lose_nothing(command, tmp_path, record_property, name):
    kills = WARM_KILLS if name in TRAINERS else LONG or 3
    outcome = kill_and_resume(command[name], tmp_path, kills=kills, seed=WARM_KILLS)
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


def test_a_finished_run_is_said_to_be_and_gives_the_same_result(s2d, command, undisturbed):
    expected, folder = undisturbed("grpo")
    before = contents(folder)
    result = s2d(*command["grpo"], *OUT, "--resume", cwd=folder.parent)
    assert result.result == expected
    assert f"run: was finished after step {STEPS} of {STEPS}" in result.err
    assert contents(folder) == before


def test_what_another_run_would_be_is_refused_with_all_that_differs(s2d, command, undisturbed, toy, few, tmp_path):
    _, folder = undisturbed("grpo, several updates")
    other = tmp_path / "other.jsonl"
    other.write_bytes(few.read_bytes() + b"\n")
    args = [{str(few): str(other), str(toy / "teacher"): str(toy / "student")}.get(arg, arg) for arg in command["grpo, several updates"]]
    result = s2d(*args, *OUT, "--resume", "--lr", "1e-2", "--seed", 3, "--tokens-per-batch", 99, cwd=folder.parent)
    assert result.code == 2
    for phrase in (
        "run: cannot be resumed, 4 things differ",
        "--lr was 0.001, is 0.01",
        "--seed was 0, is 3",
        "other.jsonl",
        "other weights",
    ):
        assert phrase in result.err
    assert "--tokens-per-batch was" not in result.err


def test_a_micro_batch_may_be_of_another_size(s2d, command, undisturbed, tmp_path):
    from safetensors.torch import load_file

    kill_at_step(command["opd"], tmp_path, 2)
    result = s2d(*command["opd"], *OUT, "--resume", "--tokens-per-batch", 64, "--save-every", "100m", "--keep-states", 3, cwd=tmp_path)
    assert result.code == 0, result.err
    _, folder = undisturbed("opd")
    one, other = (load_file(run / f"step-{STEPS:06d}" / "model.safetensors") for run in (folder, tmp_path / "run"))
    assert all((one[name] - other[name]).abs().max() < 1e-4 for name in one)


def test_what_comes_through_a_pipe_must_be_the_same_too(s2d, command, few, tmp_path):
    args = [arg for arg in command["opd"] if arg != str(few)]
    lines = few.read_bytes().splitlines(keepends=True)
    assert s2d(*args, *OUT, stdin=b"".join(lines), cwd=tmp_path).code == 0
    assert s2d(*args, *OUT, "--resume", stdin=b"".join(lines), cwd=tmp_path).code == 0
    result = s2d(*args, *OUT, "--resume", stdin=b"".join(lines[::-1]), cwd=tmp_path)
    assert result.code == 2
    assert "input - is not what - was" in result.err


def test_checkpoints_can_be_minutes_apart(s2d, command, tmp_path):
    for cadence, folders in (("1e-9m", STEPS), ("60m", 1)):
        assert s2d(*command["sft"], "--save-every", cadence, "-o", tmp_path / cadence).code == 0
        assert len(list((tmp_path / cadence).glob("step-*"))) == folders
    result = s2d(*command["sft"], "--save-every", "often", "-o", tmp_path / "no")
    assert result.code == 2
    assert "neither a number of steps" in result.err


def test_a_second_run_is_kept_out_of_the_folder(s2d, command, tmp_path):
    pid = begin([*command["grpo"], "--steps", "500"], tmp_path)
    while not (tmp_path / "run" / "latest").exists():
        time.sleep(0.01)
    for how in ("--resume", "--overwrite"):
        result = s2d(*command["grpo"], "--steps", 500, *OUT, how, cwd=tmp_path)
        assert result.code == 2
        assert f"run: is in use by process {pid} on " in result.err
    assert kill(pid)
    assert s2d(*command["grpo"], *OUT, "--overwrite", cwd=tmp_path).code == 0


def supervisors(pid: int) -> list[int]:
    """The grading processes that a command has started."""
    lines = [(int(path.name), path / "cmdline") for path in Path("/proc").iterdir() if path.name.isdigit()]
    found = []
    for number, path in lines:
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if b"s2dcli.grade.supervisor" in words and str(pid).encode() in words:
            found.append(number)
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_the_last_whole_step_and_no_grader(s2d, command, undisturbed, tmp_path, number, code):
    pid = begin(command["grpo"], tmp_path)
    while not (tmp_path / "run" / "latest").exists():
        time.sleep(0.01)
    assert supervisors(pid)
    os.kill(pid, number)
    assert wait(pid) == code
    assert supervisors(pid) == []
    assert list((tmp_path / "run").rglob(".*")) == []
    finish(s2d, command["grpo"], tmp_path)
    assert differing(undisturbed("grpo")[1], tmp_path / "run") == []


def test_a_second_ctrl_c_waits_for_nothing(command, tmp_path):
    pid = begin([*command["grpo"], "--steps", "500"], tmp_path)
    while not (tmp_path / "run" / "latest").exists():
        time.sleep(0.01)
    graders = supervisors(pid)
    for grader in graders:
        os.kill(grader, signal.SIGSTOP)  # so that the first one has something to wait for
    try:
        os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
        os.kill(pid, signal.SIGINT)
        assert wait(pid) == 130
        assert "error: interrupted" not in (tmp_path / "log").read_text()
    finally:
        for grader in graders:
            with suppress(ProcessLookupError):
                os.kill(grader, signal.SIGCONT)
