"""`s2d opd` through the command line."""

import json

import pytest
import torch
from conftest import read_jsonl, swap_two_tokens, write_jsonl

SHORT = ["--steps", 3, "--problems-per-step", 4, "-n", 4, "--max-tokens", 16, "--lr", "1e-3"]


@pytest.fixture(scope="module")
def distilled(s2d, toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("opd") / "run"
    checksum = (toy / "teacher" / "model.safetensors").read_bytes()
    held_out = ["--eval-problems", toy / "problems" / "validation.jsonl", "--eval-every", 3, "--eval-samples", 1, "--keep-rollouts"]
    result = s2d(
        "opd", "--teacher", toy / "teacher", "--student", toy / "student", toy / "problems" / "1H.jsonl", "-o", out, *SHORT, *held_out
    )
    assert (toy / "teacher" / "model.safetensors").read_bytes() == checksum
    return out, result.result


def test_run_folder(distilled):
    out, result = distilled
    assert result["checkpoint"] == str(out / "step-000003")
    assert [parent["name"].split("/")[-1] for parent in json.loads((out / "s2d.json").read_text())["parents"]] == ["student", "teacher"]
    assert json.loads((out / "s2d.json").read_text())["labels"] == []
    assert [row["step"] for row in read_jsonl(out / "evals.jsonl")] == [0, 3]
    assert len(read_jsonl(out / "rollouts" / "step-000003.jsonl")) == 16


def test_metrics(distilled):
    rows = read_jsonl(distilled[0] / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["kl"] > 0 and row["labels"] == 0 and row["loss"] == pytest.approx(row["kl"], rel=1e-5) for row in rows)


def test_the_first_kl_equals_a_dense_float64_one(distilled, toy):
    from transformers import AutoModelForCausalLM

    student, teacher = (AutoModelForCausalLM.from_pretrained(toy / name, dtype=torch.float64) for name in ("student", "teacher"))
    total, tokens = 0.0, 0
    for row in read_jsonl(distilled[0] / "rollouts" / "step-000001.jsonl"):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            q, p = (model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1) for model in (student, teacher))
        total += (q.exp() * (q - p)).sum().item()
        tokens += len(row["completion_ids"])
    (first, *_) = read_jsonl(distilled[0] / "metrics.jsonl")
    assert first["kl"] == pytest.approx(total / tokens, rel=1e-4)


def test_answers_are_not_needed(s2d, toy, tmp_path):
    problems = [{**row, "answer": ""} for row in read_jsonl(toy / "problems" / "1H.jsonl")[:8]]
    lines = "".join(json.dumps(row) + "\n" for row in problems).encode()
    result = s2d("opd", "--teacher", toy / "teacher", "--student", toy / "student", "-o", tmp_path / "run", *SHORT, stdin=lines)
    assert result.code == 0, result.err


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(s2d, toy, few, tmp_path):
    result = s2d("opd", "--teacher", toy / "student", "--student", toy / "student", few, "-o", tmp_path / "run", *SHORT, "--steps", 1)
    assert result.result["kl"] == pytest.approx(0.0, abs=1e-6)


def test_mini_batches_and_temperature(s2d, toy, few, tmp_path):
    result = s2d(
        "opd",
        "--teacher",
        toy / "teacher",
        "--student",
        toy / "student",
        few,
        "-o",
        tmp_path / "run",
        *SHORT,
        "--mini-batch-size",
        6,
        "--temperature",
        0.7,
    )
    assert result.result["updates"] == 3  # 6 + 6 + 4 rollouts


def test_another_tokenizer_is_refused_naming_the_first_id_that_differs(s2d, toy, few, tmp_path):
    other = swap_two_tokens(toy / "teacher", tmp_path / "other")
    result = s2d("opd", "--teacher", other, "--student", toy / "student", few, "-o", tmp_path / "run", *SHORT)
    assert result.code == 1
    assert "different tokenizers: id 9 is '-' in the teacher and '+' in the student" in result.err
    assert not (tmp_path / "run").exists()


def test_a_missing_teacher_is_a_usage_error(s2d, toy, few, tmp_path):
    result = s2d("opd", "--teacher", toy / "nobody", "--student", toy / "student", few, "-o", tmp_path / "run")
    assert result.code == 2
    assert "nobody: no such checkpoint folder" in result.err


def test_dry_run(s2d, toy, few, tmp_path):
    plan = s2d(
        "opd", "--teacher", toy / "teacher", "--student", toy / "student", few, "-o", tmp_path / "run", "--dry-run", "--max-tokens", 16
    ).result
    assert (plan["steps"], plan["rollouts_per_step"], plan["parameters"]) == (1, 64, 36160)
    assert plan["frozen_bytes"] == 4 * 109056
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("estimator", [["top-k", "--top-k", 4], ["top-k"], ["sampled"]])
def test_estimators_of_the_kl_agree_at_the_start(s2d, toy, few, tmp_path, estimator):
    arguments = ["opd", "--teacher", toy / "teacher", "--student", toy / "student", few, *SHORT, "--steps", 1]
    exact = s2d(*arguments, "-o", tmp_path / "full").result
    found = s2d(*arguments, "-o", tmp_path / "other", "--estimator", *estimator).result
    assert found["entropy"] == pytest.approx(exact["entropy"], rel=1e-4)
    if estimator == ["top-k", "--top-k", 4]:
        assert 0 < found["kl"] < exact["kl"]
    else:  # all ids of the toy; one sample a position
        assert found["kl"] == pytest.approx(exact["kl"], rel=1e-3 if estimator == ["top-k"] else 0.5)


def test_top_k_without_its_estimator_is_refused(s2d, toy, few, tmp_path):
    result = s2d("opd", "--teacher", toy / "teacher", "--student", toy / "student", few, "-o", tmp_path / "run", "--top-k", 4)
    assert result.code == 2
    assert "--top-k requires --estimator top-k" in result.err


def test_offload_is_refused_without_a_gpu(s2d, toy, few, tmp_path):
    arguments = ["--teacher", toy / "teacher", "--student", toy / "student", few, "-o", tmp_path / "run", "--device", "cpu"]
    result = s2d("opd", *arguments, "--offload", "--max-tokens", 16)
    assert result.code == 2
    assert "this run is on the CPU" in result.err


def test_eval_problems_without_answers_are_refused_before_training(s2d, toy, few, tmp_path):
    unlabelled = write_jsonl(tmp_path / "unlabelled.jsonl", [{**problem, "answer": ""} for problem in read_jsonl(few)])
    models = ["--teacher", toy / "teacher", "--student", toy / "student"]
    result = s2d("opd", *models, unlabelled, "-o", tmp_path / "run", "--eval-problems", unlabelled)
    assert (result.code, result.out) == (1, b"")
    assert "8 of 8 problems have no answer to grade against" in result.err
    assert "--eval-problems must be labelled" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("estimator", [["full"], ["top-k", "--top-k", 5], ["sampled"]])
def test_phases_learn_what_models_side_by_side_do(s2d, toy, few, tmp_path, estimator):
    models = ["--teacher", toy / "teacher", "--student", toy / "student"]
    arguments = ["opd", *models, few, *SHORT, "--estimator", *estimator, "--save-every", 2]
    for turns in ("on", "off"):
        result = s2d(*arguments, "--phases", turns, "-o", tmp_path / turns, "--mini-batch-size", 8)
        assert result.code == 0, result.err
    for found, expected in zip(*(read_jsonl(tmp_path / turns / "metrics.jsonl") for turns in ("on", "off")), strict=True):
        assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3, abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    assert not (tmp_path / "on" / "phases").exists()  # all steps are saved


def test_phases_are_taken_where_the_models_do_not_fit(s2d, toy, few, tmp_path, monkeypatch):
    how = ["opd", "--teacher", toy / "teacher", "--student", toy / "student", few, "--max-tokens", 16, "-o", tmp_path / "run", "--dry-run"]
    fitting, turns = s2d(*how).result, s2d(*how, "--phases", "on").result
    assert (fitting["phases"], turns["phases"]) == (False, True)
    assert (fitting["frozen_bytes"], turns["frozen_bytes"]) == (4 * 109056, 0)
    huge = s2d(*how, "--tokens-per-batch", 10**12)
    assert huge.result["phases"] is True
    assert "sampling, scoring and learning take turns" in huge.err
