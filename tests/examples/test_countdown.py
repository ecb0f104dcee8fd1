"""The countdown family: its verifier, what pretrain.py would make, and what is shipped."""

import importlib.util
import json
import random
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from conftest import ZYGOTE, read_jsonl
from warm import warm_commands

from s2dcli.files.records import read_problems

COUNTDOWN = Path(__file__).parents[2] / "examples" / "countdown"
SPLITS = {"1H": 512, "2H": 512, "validation": 200, "test": 320}


@pytest.fixture(scope="module")
def pretrain():
    sys.path.insert(0, str(COUNTDOWN))
    spec = importlib.util.spec_from_file_location("countdown_pretrain", COUNTDOWN / "pretrain.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(COUNTDOWN))
    return module


@pytest.fixture(scope="module")
def verify(pretrain):
    """The verdict on a completion of 3,5,2:16, or of another problem."""
    return lambda text, problem="3,5,2:16": pretrain.countdown.verify(text, "", {"prompt": [{"role": "user", "content": problem}]})


@pytest.fixture(scope="module")
def splits():
    return {name: read_problems(COUNTDOWN / "problems" / f"{name}.jsonl") for name in SPLITS}


@pytest.mark.parametrize(
    "right",
    [
        r"\boxed{(3+5)*2}",
        r"\boxed{2*(5+3)}",
        r"\boxed{ 2 * ( (3) + 5 ) }",
        r"\boxed{3} no: \boxed{2*3+2*5} no: \boxed{2*5+3*2} so \boxed{2*(3+5)} as I said",
    ],
)
def test_every_expression_that_reaches_the_target_is_right(verify, right):
    assert verify(right) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "16",
        "(3+5)*2",
        r"\boxed{}",
        r"\boxed{(3+5)*2",  # not closed
        r"\boxed{16}",  # the target itself
        r"\boxed{(3+5)*2=16}",
        r"\boxed{(3+5)*2} \boxed{3+5}",  # the last one counts
        r"\boxed{3+5*2}",  # 13
        r"\boxed{3*5+2-1}",  # a number that is not given
        r"\boxed{(3+5)*2*1}",
        r"\boxed{(3+5)*2+2-2}",  # one that is given once
        r"\boxed{(3+5)+(3+5)}",
        r"\boxed{2*8}",
        r"\boxed{2**(5+3)/2**4}",
        r"\boxed{9**9**9**9}",
        r"\boxed{3//5+2*8}",
        r"\boxed{35-2}",
        r"\boxed{(3+5)*0x2}",
        r"\boxed{(3+5)*2.0}",
        r"\boxed{(3+5)*02}",
        r"\boxed{-(-3-5)*2}",
        r"\boxed{(+3+5)*2}",
        r"\boxed{(3+5)*2,}",
        r"\boxed{(3+5)2}",
        r"\boxed{(3+5)(2)}",
        "\\boxed{(\uff13+5)*2}",  # a digit, but not of ASCII
        "\\boxed{(3+5)\n*2}",
        "\\boxed{(3+5)*2#}",
        "\\boxed{(3+5)*2\0}",
        r"\boxed{5/(3-3)*2}",
        r"\boxed{__import__('os').getpid()}",
        r"\boxed{" + "(" * 5000 + "3" + ")" * 5000 + "+5*2}",
        r"\boxed{" + "3+" * 100_000 + "5}",
        r"\boxed{" + "1" * 100_000 + "}",
    ],
)
def test_all_else_is_wrong_and_no_failure(verify, wrong):
    assert verify(wrong) == 0.0


def test_division_is_exact(verify):
    assert verify(r"\boxed{(3/7)*14}", "3,7,14:6") == 1.0
    assert verify(r"\boxed{7/2}", "7,2:3") == 0.0


def test_other_problems_get_no_verdict(verify):
    for other in ("What is 2 + 2?", "", "3,5,2:16\n", "3,5,2"):
        assert verify(r"\boxed{4}", other) is None


def test_the_verifier_agrees_with_python(pretrain):
    """On all expressions of three numbers, in both bracketings, whatever their value."""
    for one, other, swapped in product("+-*/", "+-*/", (False, True)):
        text = f"7{one}(4{other}9)" if swapped else f"(7{one}4){other}9"
        value, used = pretrain.countdown.evaluate(text)
        assert float(value) == pytest.approx(eval(text))
        assert used == [7, 4, 9]


def test_script_makes_the_shipped_problems(pretrain, splits):
    from pretraining import make_splits

    assert make_splits(pretrain.TASK) == splits
    assert {name: len(problems) for name, problems in splits.items()} == SPLITS


def test_no_problem_is_in_two_splits_in_another_order_of_its_numbers(splits):
    seen = set()
    for problem in (problem for problems in splits.values() for problem in problems):
        numbers, target = problem.prompt[0]["content"].split(":")
        seen.add((*sorted(map(int, numbers.split(","))), target))
    assert len(seen) == sum(SPLITS.values())


def test_answers_and_solutions_are_right_and_fit(pretrain, splits):
    from pretraining import EOS, make_tokenizer

    task, rng = pretrain.TASK, random.Random(0)
    tokenizer = make_tokenizer(task)
    for problem in splits["test"] + splits["validation"]:
        assert task.is_right(f"\\boxed{{{problem.answer}}}", problem)
        prompt = tokenizer.apply_chat_template(problem.prompt, add_generation_prompt=True, return_dict=False)
        assert len(prompt) == task.prompt_tokens
        for style, first_token in task.styles.items():
            text = task.solve(problem.prompt[0]["content"], style, rng)
            ids = tokenizer(text + EOS)["input_ids"]
            assert task.is_right(text, problem)
            assert ids[0] == tokenizer.convert_tokens_to_ids(first_token)
            assert len(ids) <= task.max_response_tokens
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_settings_name_the_verifier(tmp_path):
    """A dry run of their RL, which grades a made-up rollout, in a folder from which Python would not find it."""
    command = """
        set -euo pipefail
        out=$PWD/out
        source "$0"
        s2d grpo -m "$teacher" "$both" "${sampling[@]}" "${grading[@]}" "${reward[@]}" "${grpo[@]}" "${teacher_rl[@]}" --dry-run
    """
    with warm_commands(tmp_path / "bin", ZYGOTE) as environment:
        done = subprocess.run(
            ["bash", "-c", command, COUNTDOWN / "settings.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completion_tokens_at_most"] == 60 * 32 * 8 * 42


def test_shipped_models_answer_and_are_graded_by_the_verifier(s2d, splits, tmp_path):
    found = {}
    for name in ("teacher", "student"):
        out = tmp_path / name
        arguments = ["--model", COUNTDOWN / name, COUNTDOWN / "problems" / "test.jsonl", "-k", 1, "--max-tokens", 42, "--workers", 1]
        found[name] = s2d("eval", *arguments, "--reward", "python:countdown:verify", "-o", out, cwd=COUNTDOWN).result
        assert found[name]["problems"] == SPLITS["test"]
    assert found["teacher"]["avg_at_k"] > found["student"]["avg_at_k"] > 0.02
    graded = read_jsonl(tmp_path / "teacher" / "rollouts.jsonl")
    others = [row for row in graded if row["label"] and f"\\boxed{{{row['answer']}}}" not in row["completion"][0]["content"]]
    assert others  # right, and not what the file of problems gives
