"""The stages with vLLM in their own process, and what `--engine` refuses."""

import importlib.util

import pytest
from conftest import ZYGOTE, read_jsonl, runner
from zygote import Zygote

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
SAMPLING = ["-n", 2, "--max-tokens", 16]
# A small cache: more of main memory is not needed for models of this size.
VLLM = ["--engine", "vllm", "--gpu-memory-utilization", 0.02, "-v"]
TRAINING = ["--steps", 3, "--lr", 1e-2, "--problems-per-step", 8, "-n", 4, "--max-tokens", 16, *VLLM]


@pytest.fixture(scope="module")
def s2d():
    """Commands that have vLLM in memory already: importing it takes ten seconds."""
    if importlib.util.find_spec("vllm") is None:
        return runner(ZYGOTE)
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    return runner(Zygote("vllm", environment=environment))


@needs_vllm
def test_rollout_in_shards_is_the_whole_with_log_probs_of_transformers(s2d, toy, few):
    sampling = ["-m", toy / "student", few, *SAMPLING, "--sample-tokens", 200]
    whole = s2d("rollout", *sampling, *VLLM, "--parity-rows", 4)
    assert whole.code == 0, whole.err
    assert "vllm: log-probs differ by" in whole.err
    part = s2d("rollout", *sampling, *VLLM, "--shard", "2/3")
    other = s2d("rollout", *sampling, "--engine", "transformers")
    identity = ("group_id", "sample_index", "prompt_ids", "seed")
    assert [[row[name] for name in identity] for row in whole.rows] == [[row[name] for name in identity] for row in other.rows]
    assert whole.rows[0]["sampler"] == {**other.rows[0]["sampler"], "engine": "vllm"}
    ours = {(row["group_id"], row["sample_index"]): row["completion_ids"] for row in whole.rows}
    assert part.rows
    for row in part.rows:
        assert row["completion_ids"] == ours[row["group_id"], row["sample_index"]]


@needs_vllm
def test_eval_measures_what_the_transformers_engine_does(s2d, toy, few):
    greedy = ["-m", toy / "teacher", few, "--temperature", 0, "--max-tokens", 16]
    ours, theirs = s2d("eval", *greedy, *VLLM), s2d("eval", *greedy)
    assert {**ours.result, "seconds": 0} == {**theirs.result, "seconds": 0}


@needs_vllm
@pytest.mark.parametrize("memory", [[], ["--lora-rank", 4], ["--weights", "bfloat16"]], ids=["float32", "lora", "bfloat16"])
def test_grpo_samples_from_the_weights_that_it_trains(s2d, toy, few, tmp_path, memory):
    """Sampler and trainer agree in every step, although the weights move by much more than the tolerance."""
    graded = ["--reward", "exact", "--workers", 1]
    result = s2d(
        "grpo", "-m", toy / "student", few, *TRAINING, *memory, *graded, "--eval-problems", few, "--eval-every", 3, "-o", tmp_path / "run"
    )
    assert result.result["eval_problems"] == 8
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert sum(row["updates"] for row in rows) >= 2
    gap = 0.1 if "bfloat16" in memory else 1e-4
    assert all(row["logprob_mismatch"] < gap for row in rows)
    assert not list((tmp_path / "run").glob(".weights"))
    assert ("vllm is handed the adapter alone, " in result.err) == ("--lora-rank" in memory)


@needs_vllm
def test_opd_and_the_warm_up_follow_too(s2d, toy, few, tmp_path):
    run = tmp_path / "opd"
    opd = s2d("opd", "--teacher", toy / "teacher", "--student", toy / "student", few, *TRAINING, "--keep-rollouts", "-o", run)
    assert opd.result["step"] == 3
    assert opd.err.count("log-probs differ by") == 3
    rolled = s2d("rollout", "-m", toy / "teacher", few, *SAMPLING)
    (tmp_path / "teacher.jsonl").write_bytes(rolled.out)
    learning = [
        "--rollouts",
        tmp_path / "teacher.jsonl",
        "--hard-labels",
        "--steps",
        2,
        "--lr",
        1e-2,
        "--eval-problems",
        few,
        "--max-tokens",
        16,
    ]
    warmup = s2d("fkl-warmup", "--student", toy / "student", *learning, *VLLM, "-o", tmp_path / "warmup")
    assert warmup.result["eval_problems"] == 8
    assert warmup.err.count("log-probs differ by") == 2  # before the first step and after the last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vlm"], "no such engine: 'vlm' (did you mean 'vllm'?)"),
        (["--engine", "transformers", "--parity-rows", 2], "the transformers engine has no --parity-rows"),
        (["--engine", "http://127.0.0.1:9", "--tensor-parallel-size", 2], "the server engine has no --tensor-parallel-size"),
    ],
)
def test_engines_and_their_options_are_told_apart(s2d, toy, few, arguments, message):
    result = s2d("rollout", "-m", toy / "student", few, *SAMPLING, *arguments)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1


def test_auto_says_whom_it_takes(s2d, toy, few):
    assert "sampling with transformers" in s2d("rollout", "-m", toy / "student", few, *SAMPLING).err


def test_an_engine_for_a_run_that_samples_nothing_is_refused(s2d, toy, few, tmp_path):
    rolled = tmp_path / "rollouts.jsonl"
    rolled.write_bytes(s2d("rollout", "-m", toy / "student", few, *SAMPLING).out)
    given = ["--rollouts", rolled, "--engine", "vllm", "-o", tmp_path / "run"]
    for command in (["grpo", "-m", toy / "student"], ["fkl-warmup", "--hard-labels", "--student", toy / "student"]):
        result = s2d(*command, *given)
        assert result.code == 2
        assert "--engine" in result.err
        assert "--eval-problems" in result.err


@needs_vllm
def test_a_trainer_may_not_leave_its_sampler_unproved(s2d, toy, few, tmp_path):
    result = s2d("grpo", "-m", toy / "student", few, *TRAINING, "--parity-rows", 0, "-o", tmp_path / "run")
    assert result.code == 2
    assert "does not sample from weights without proof" in result.err
