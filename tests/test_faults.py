"""Stages that write rows are killed at random moments; what they leave after --resume is what an undisturbed run leaves."""

import pytest
from conftest import write_jsonl
from faults import COLD_KILLS, WARM_KILLS, kill_and_resume

SAMPLING = ["--max-tokens", 8, "--sample-tokens", 120]  # two problems to a batch


@pytest.fixture(scope="module")
def arguments(s2d, toy, few, tmp_path_factory):
    rolled = s2d("rollout", "-m", toy / "student", few, "-n", 4, "--max-tokens", 16)
    assert rolled.code == 0, rolled.err
    rollouts = write_jsonl(tmp_path_factory.mktemp("rolled") / "rollouts.jsonl", rolled.rows * 20)
    return {
        "rollout": ["rollout", "-m", toy / "student", few, "-n", 2, *SAMPLING],
        "verify": ["verify", rollouts, "--workers", 1, "--reward", "exact"],
        "eval": ["eval", "-m", toy / "student", few, "-k", 2, *SAMPLING, "--workers", 1, "--reward", "exact"],
    }


@pytest.mark.parametrize("stage", ["rollout", "verify", "eval"])
@pytest.mark.parametrize(("start", "kills"), [("warm", WARM_KILLS), ("cold", COLD_KILLS)])
def test_a_killed_stage_leaves_the_bytes_of_an_undisturbed_one(arguments, tmp_path, record_property, stage, start, kills):
    outcome = kill_and_resume(arguments[stage], tmp_path, kills=kills, seed=kills, cold=start == "cold")
    record_property("faults", (f"{stage} ({start})", outcome.kills, outcome.runs, len(outcome.mismatches)))
    assert outcome.mismatches == []
