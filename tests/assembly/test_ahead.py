"""--async-depth 1: sampling one step ahead, from weights of which it is said how old they are, with the bytes of an undisturbed run."""

import json
import os
import signal
import threading
import time

import pytest
from conftest import read_jsonl, start, wait
from faults import contents, differing
from model_server import ModelServer

STEPS, TOKENS = 4, 12
OUT = ["-o", "run"]


@pytest.fixture(scope="module")
def server(toy):
    with ModelServer(toy / "teacher") as server:
        yield server


@pytest.fixture
def command(toy, few, server):
    sampling = [few, "--steps", STEPS, "--problems-per-step", 3, "-n", 3, "--max-tokens", TOKENS]
    more = [*sampling, "--engine", server.url, "--parity-rows", 2, "--async-depth", 1, "--lr", "1e-2", "--save-every", 2, "--keep-rollouts"]
    graded = ["--reward", "exact", "--workers", 1, "--eval-problems", few, "--eval-every", 3, "--eval-samples", 1]
    commands = {
        "grpo": ["grpo", "-m", toy / "teacher", *more, *graded],
        "opd": ["opd", "--student", toy / "teacher", "--teacher", toy / "student", *more, "--lora-rank", 2, "--estimator", "sampled"],
    }
    return {name: [str(arg) for arg in args] for name, args in commands.items()}


def test_a_killed_run_that_goes_on_equals_an_undisturbed_one(s2d, command, tmp_path):
    """Also in what its first steps sample, which are those of weights that are gone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert s2d(*command["grpo"], *OUT, cwd=whole).code == 0
    with open(os.devnull, "r+b") as null, open(killed / "log", "wb") as log:
        pid = start([*command["grpo"], *OUT], null.fileno(), log.fileno(), log.fileno(), killed)
        while not (killed / "run" / "step-000002").exists():
            assert not os.waitpid(pid, os.WNOHANG)[0], (killed / "log").read_text()
            time.sleep(0.005)
        os.killpg(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
    assert (killed / "run" / "phases" / "step-000003" / "rollouts.jsonl").exists()
    resumed = s2d(*command["grpo"], *OUT, "--resume", cwd=killed)
    assert resumed.code == 0, resumed.err
    assert differing(whole / "run", killed / "run") == []
    assert contents(whole / "run")
    rows = read_jsonl(whole / "run" / "metrics.jsonl")
    updates = [row["updates"] for row in rows]  # none where no group of a step has rewards that differ
    assert sum(updates[:-1]) >= 2
    assert [row["off_policy_steps"] for row in rows] == [0, *updates[:-1]]
    assert json.loads((whole / "run" / "s2d.json").read_text())["options"]["correction"] == "mask"


def test_rollouts_name_the_weights_that_have_sampled_them(s2d, command, server, toy, tmp_path):
    """Their log-probs are those of the checkpoint of that step, and not of the step that learns from them."""
    from s2dcli.models.checkpoints import load, resolve
    from s2dcli.models.policy import Policy
    from s2dcli.models.rows import Row
    from s2dcli.models.scoring import score

    result = s2d(*command["opd"], "--mini-batch-size", 5, "--save-every", 1, *OUT, cwd=tmp_path)
    assert result.code == 0, result.err
    run = tmp_path / "run"
    assert [row["off_policy_steps"] for row in read_jsonl(run / "metrics.jsonl")] == [0, 2, 2, 2]  # two updates a step
    for step, sampled_by in enumerate([0, 0, 1, 2], 1):
        rows = read_jsonl(run / "rollouts" / f"step-{step:06d}.jsonl")
        [sampler] = {(row["sampler"]["model"], row["sampler"]["step"]) for row in rows}
        assert sampler == (("run", sampled_by) if sampled_by else (str(toy / "teacher"), rows[0]["sampler"]["step"]))
        gaps = []
        for at in (sampled_by, step - 1):
            loaded = load(resolve(str(run / f"step-{at:06d}" if at else toy / "teacher")), announce=False)
            policy = Policy(loaded.model, loaded.vocabulary)
            asked = {Row(row["prompt_ids"], row["completion_ids"]): row["completion_logprobs"] for row in rows}
            found = score(policy, list(asked), tokens_per_batch=1000, pad_id=0, temperature=1.0)
            gaps.append(max(abs(ours - theirs).max() for row, ours in found for theirs in [asked[row]] if len(ours)))
        assert gaps[0] < 1e-4
        assert step < 2 or gaps[1] > 1e-2


def test_a_step_does_not_wait_for_the_samples_of_the_next(s2d, command, server, tmp_path, monkeypatch):
    """The server holds what is asked for during step 2 until that step is over. (Seeds of the parity gate are small.)"""
    loads, held = server.loads, threading.Event()

    def hold(body):
        metrics = tmp_path / "run" / "metrics.jsonl"
        end = time.monotonic() + 60
        while server.loads == loads + 2 and body["seed"] > 1 and time.monotonic() < end:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= 2:
                held.set()
                break
            time.sleep(0.02)
        return server.complete(body)

    monkeypatch.setattr(server, "answer", hold)
    result = s2d(*command["opd"], "--save-every", STEPS, *OUT, cwd=tmp_path)
    assert result.code == 0, result.err
    assert held.is_set()
    assert "server is handed merged weights, " in result.err


def test_a_batch_whose_server_was_interrupted_is_sampled_again(s2d, command, server, tmp_path, monkeypatch):
    loads, failures = server.loads, []

    def fail_once(body):
        if server.loads == loads + 2 and body["seed"] > 1 and not failures:
            failures.append(body)
            return 503, b"{}"
        return server.complete(body)

    monkeypatch.setattr(server, "answer", fail_once)
    result = s2d(*command["opd"], *OUT, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "interrupted while it sampled ahead" in result.err
    assert [row["off_policy_steps"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("grpo", ["--engine", "transformers"], "samples from the very weights that are updated"),
        ("opd", ["--engine", "auto", "--device", "cpu"], "samples from the very weights that are updated"),
        ("grpo", ["--correction", "none"], "biased without an importance correction"),
        ("grpo", ["--dynamic-sampling", 1], "--dynamic-sampling samples when a step's rewards are known"),
        ("opd", ["--phases", "on"], "--phases on lets them take turns"),
        ("grpo", ["--async-depth", 2], "--async-depth"),
    ],
)
def test_what_cannot_run_ahead_is_refused_with_its_reason(s2d, command, tmp_path, stage, more, message):
    arguments = command[stage]
    arguments.remove("--parity-rows")  # which the transformers engine has not
    arguments.remove("2")
    result = s2d(*arguments, *more, "-o", tmp_path / "run")
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "run").exists()


def test_stored_rollouts_are_not_sampled_ahead(s2d, toy, tmp_path):
    (tmp_path / "graded.jsonl").write_text("{}\n")
    for stage in (["grpo", "-m"], ["opd", "--teacher", toy / "teacher", "--student"]):
        result = s2d(*stage, toy / "student", "--rollouts", tmp_path / "graded.jsonl", "--async-depth", 1, "-o", tmp_path / "run")
        assert (result.code, "--async-depth applies to sampling" in result.err) == (2, True), result.err
