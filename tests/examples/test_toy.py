"""The toy family: what pretrain.py would make, and what is shipped."""

import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from s2dcli.files.records import problem_sha256, read_problems

TOY = Path(__file__).parents[2] / "examples" / "toy"
CHECKPOINTS = {"teacher": 109_056, "student": 36_160}


@pytest.fixture(scope="module")
def pretrain():
    spec = importlib.util.spec_from_file_location("toy_pretrain", TOY / "pretrain.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pretraining(pretrain):
    return sys.modules["pretraining"]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def tokenizer(request):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOY / request.param)


@pytest.fixture(scope="module")
def splits():
    return {path.stem: read_problems(path) for path in sorted((TOY / "problems").glob("*.jsonl"))}


def reference_answer(problem: str) -> int:
    """Read a problem from left to right by another way than the script does."""
    total = 0
    for term in problem.rstrip("=").replace("-", " -").replace("+", " +").split():
        value = int(term)
        total = total + value if value > 0 else max(total, -value) - min(total, -value)
    return total


def test_shipped_problems_have_the_right_answers(splits):
    assert {split: len(problems) for split, problems in splits.items()} == {"1H": 512, "2H": 512, "validation": 200, "test": 320}
    for split, problems in splits.items():
        for index, problem in enumerate(problems):
            [message] = problem.prompt
            assert message["role"] == "user"
            assert problem.answer == str(reference_answer(message["content"]))
            assert problem.problem_sha256 == problem_sha256(message["content"])
            assert problem.source == {"dataset": "toy-arithmetic", "split": split, "index": index}


def test_no_problem_is_in_two_splits(splits):
    texts = [problem.prompt[0]["content"] for problems in splits.values() for problem in problems]
    ids = [problem.id for problems in splits.values() for problem in problems]
    assert len(set(texts)) == len(set(ids)) == len(texts) == 1544


def test_script_makes_the_shipped_problems(pretrain, pretraining, splits):
    assert pretraining.make_splits(pretrain.TASK) == splits


def test_script_makes_the_shipped_tokenizer(pretrain, pretraining, tmp_path):
    pretraining.make_tokenizer(pretrain.TASK).save_pretrained(tmp_path)
    for name in CHECKPOINTS:
        for file in tmp_path.iterdir():
            assert file.read_text() == (TOY / name / file.name).read_text()


def test_pretraining_draws_no_problem_of_a_split(pretrain, pretraining, splits):
    drawn = iter([splits["test"][0].prompt[0]["content"], splits["1H"][5].prompt[0]["content"]])
    task = replace(pretrain.TASK, draw_problem=lambda rng: next(drawn, None) or pretrain.draw_problem(rng))
    held_out = {problem.prompt[0]["content"] for problems in splits.values() for problem in problems}
    tokenizer = pretraining.make_tokenizer(task)
    ids, weights = pretraining.draw_batch(task, random.Random(0), tokenizer, held_out)
    problems = [text.split("<|assistant|>")[0].removeprefix("<|user|>") for text in tokenizer.batch_decode(ids)]
    assert len(problems) == pretraining.BATCH_SIZE
    assert not held_out & set(problems)
    assert (weights[:, : pretrain.PROMPT_TOKENS] == 0).all()
    assert ((weights > 0).sum(1) == (ids != tokenizer.pad_token_id).sum(1) - pretrain.PROMPT_TOKENS).all()


def test_solutions_are_correct_without_noise(pretrain):
    assert pretrain.running_totals("7-1-5-6+4-5=") == [6, 1, 5, 9, 4]
    totals = [6, 1, 5, 9, 4]
    assert pretrain.write_solution(totals, "direct") == "\\boxed{4}"
    assert pretrain.write_solution(totals, "terse") == ",1,9,4\n\\boxed{4}"
    assert pretrain.write_solution(totals, "careful") == "=6=1=5=9=4\n\\boxed{4}"
    rng = random.Random(1)
    for _ in range(200):
        problem = pretrain.draw_problem(rng)
        assert pretrain.running_totals(problem)[-1] == reference_answer(problem)


def test_noise_stays_within_the_vocabulary(pretrain):
    rng = random.Random(2)
    noisy = [pretrain.running_totals(pretrain.draw_problem(rng), noise=rng) for _ in range(2000)]
    assert all(0 <= total < pretrain.TOTAL_LIMIT for totals in noisy for total in totals)


def test_a_prompt_has_14_tokens(tokenizer, splits):
    for problems in splits.values():
        for problem in problems:
            ids = tokenizer.apply_chat_template(problem.prompt, add_generation_prompt=True, return_dict=False)
            assert len(ids) == 14
            assert tokenizer.decode(ids) == f"<|user|>{problem.prompt[0]['content']}<|assistant|>"


def test_completions_round_trip(tokenizer, pretrain):
    rng = random.Random(3)
    for _ in range(300):
        totals = pretrain.running_totals(pretrain.draw_problem(rng))
        for style, first_token in pretrain.STYLES.items():
            text = pretrain.write_solution(totals, style)
            ids = tokenizer(text + tokenizer.eos_token)["input_ids"]
            assert len(ids) <= pretrain.MAX_RESPONSE_TOKENS
            assert ids[0] == tokenizer.convert_tokens_to_ids(first_token)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids


def test_every_token_keeps_its_id(tokenizer, pretrain):
    assert len(tokenizer) == len(pretrain.TOKENS) == 33
    for index, token in enumerate(pretrain.TOKENS):
        assert tokenizer(token)["input_ids"] == [index]
        assert tokenizer.decode([index]) == token


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shipped_checkpoints_load(name):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TOY / name)
    tokenizer = AutoTokenizer.from_pretrained(TOY / name)
    assert model.num_parameters() == CHECKPOINTS[name]
    assert model.dtype == torch.float32
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 3)
    inputs = tokenizer("<|user|>7-1-5-6+4-5=<|assistant|>=", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, do_sample=False, max_new_tokens=15)[0])
    assert text.endswith("}<|im_end|>")
    if name == "teacher":
        assert text.endswith("=6=1=5=9=4\n\\boxed{4}<|im_end|>")


def test_checkpoints_are_small_and_hold_no_code():
    files = [file for name in CHECKPOINTS for file in (TOY / name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 1_000_000
    assert {file.suffix for file in files} == {".json", ".jinja", ".safetensors"}
    for name in CHECKPOINTS:
        assert "auto_map" not in json.loads((TOY / name / "config.json").read_text())


def test_script_refuses_an_existing_folder(pretrain, pretraining, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        pretraining.main(pretrain.TASK)
    assert stopped.value.code == 2
    assert "exists" in capsys.readouterr().err
