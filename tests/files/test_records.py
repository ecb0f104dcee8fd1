"""Problems and rollouts: identities, seeds, and errors that name file, line and field."""

import pytest
from conftest import read_jsonl, write_jsonl

from s2dcli.errors import DataError
from s2dcli.files.records import Problem, problem_sha256, read_graded, read_problems, read_rollouts, take


def test_problem_hash_ignores_white_space_and_composition_only():
    assert problem_sha256(" What is\n  1\u00a0+ 1? ") == problem_sha256("What is 1 + 1?")
    assert problem_sha256("Poincare\u0301") == problem_sha256("Poincar\u00e9")
    assert problem_sha256("what is 1 + 1?") != problem_sha256("What is 1 + 1?")


@pytest.mark.parametrize(("one", "other"), [("2\u00b2 + 1", "22 + 1"), ("x\u2081", "x1"), ("\u00bd", "1\u20442"), ("\uff11+1", "1+1")])
def test_problem_hash_tells_different_mathematics_apart(one, other):
    assert problem_sha256(one) != problem_sha256(other)


def test_shipped_problems_carry_the_hash_of_their_text(toy):
    for path in (toy / "problems").iterdir():
        for row in read_jsonl(path):
            assert row["problem_sha256"] == problem_sha256(row["prompt"][0]["content"]), path


def test_problems_round_trip(toy):
    path = toy / "problems" / "test.jsonl"
    assert [problem.to_record() for problem in read_problems(path)] == read_jsonl(path)


def problem(**changes) -> dict:
    return {**Problem("a", [{"role": "user", "content": "1+1"}], "2", "f" * 64, {"dataset": "d"}).to_record(), **changes}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (problem(answer=2), "field 'answer' is integer, text was expected"),
        (problem(answer=None), "field 'answer' is null, text was expected"),
        (problem(prompt="1+1"), "field 'prompt' is text, list was expected"),
        (problem(prompt=[{"role": "user"}]), "objects with role and content"),
        (problem(prompt=[]), "field 'prompt' holds no message"),
        (problem(source={"dataset": 5}), r"field 'source\.dataset' is integer, text was expected"),
        (problem(source={"index": "0"}), r"field 'source\.index' is text, integer was expected"),
        ({key: value for key, value in problem(problem_sha="f").items() if key != "problem_sha256"}, "did you mean 'problem_sha'"),
    ],
)
def test_bad_problems(tmp_path, row, message):
    with pytest.raises(DataError, match=message) as caught:
        read_problems(write_jsonl(tmp_path / "p.jsonl", [problem(id="b"), row]))
    assert caught.value.where == f"{tmp_path}/p.jsonl:2"


def test_a_boolean_is_no_number():
    with pytest.raises(DataError, match="boolean"):
        take({"reward": True}, "reward", (float, int), "x:1")


def test_rollouts_are_checked(s2d, toy, few, tmp_path):
    rows = s2d("rollout", "-m", toy / "student", few, "-n", 1, "--max-tokens", 8).rows
    assert [row.to_record() for _, row in read_rollouts(write_jsonl(tmp_path / "r.jsonl", rows))] == rows
    for change, message in (
        ({"completion_ids": ["1"]}, "must be a list of token ids"),
        ({"completion_ids": [-1]}, "must be a list of token ids"),
        ({"completion_logprobs": []}, "completion_ids but 0 completion_logprobs"),
        ({"sample_index": "0"}, "field 'sample_index' is text"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_rollouts(write_jsonl(tmp_path / "bad.jsonl", [{**rows[0], **change}])))


@pytest.fixture
def graded_row(s2d, toy, few):
    rolled = s2d("rollout", "-m", toy / "student", few, "-n", 1, "--max-tokens", 8)
    return s2d("verify", "--reward", "exact", stdin=rolled.out).rows[0]


def test_graded_rows_come_back_as_they_were_with_unknown_columns(graded_row, tmp_path):
    row = {**graded_row, "note": {"mine": 1}}
    ((where, graded),) = read_graded(write_jsonl(tmp_path / "g.jsonl", [row]))
    assert graded.to_record() == row
    assert (graded.reward, graded.label, graded.extra) == (row["reward"], row["label"], {"note": {"mine": 1}})
    assert where == f"{tmp_path}/g.jsonl:1"
    ((_, rollout),) = read_rollouts(tmp_path / "g.jsonl")
    assert rollout.to_record() == row


def test_what_grading_and_sampling_left_out_or_spoiled_is_named(graded_row, tmp_path):
    ids = len(graded_row["completion_ids"])
    sampler = graded_row["sampler"]
    for change, message in (
        ({"reward": float("nan")}, "field 'reward' is nan, a finite number was expected"),
        ({"reward": 1e308}, "field 'reward' is 1e\\+308, a finite number"),
        ({"reward": 10**400}, "field 'reward' is 10000000000000000000, a finite number"),
        ({"reward": "1.0"}, "field 'reward' is text"),
        ({"reward": True}, "field 'reward' is boolean"),
        ({"rewards": {"math": float("inf")}}, "field 'rewards.math' is inf"),
        ({"label": 1}, "field 'label' is integer, boolean or null was expected"),
        ({"completion_logprobs": [-1.0] * (ids - 1) + ["-1.0"]}, f"field 'completion_logprobs\\[{ids - 1}\\]' is text"),
        ({"completion_logprobs": [float("nan")] * ids}, "field 'completion_logprobs\\[0\\]' is nan"),
        ({"completion_logprobs": [None] * ids}, "field 'completion_logprobs\\[0\\]' is null"),
        ({"sampler": {name: value for name, value in sampler.items() if name != "max_tokens"}}, "no field 'sampler.max_tokens'"),
        ({"sampler": {**sampler, "max_tokens": "8"}}, "field 'sampler.max_tokens' is text"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            list(read_graded(write_jsonl(tmp_path / "bad.jsonl", [{**graded_row, **change}])))
        assert caught.value.where == f"{tmp_path}/bad.jsonl:1"
    del graded_row["reward"]
    with pytest.raises(DataError, match=r"no field 'reward'; grade it first: s2d verify .*bad.jsonl -o graded.jsonl"):
        list(read_graded(write_jsonl(tmp_path / "bad.jsonl", [graded_row])))
