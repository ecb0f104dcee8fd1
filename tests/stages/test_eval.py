"""`s2d eval` through the command line."""

import json
import math

import pytest
from conftest import read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def measured(s2d, toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "teacher"
    result = s2d("eval", "--model", toy / "teacher", toy / "problems" / "validation.jsonl", "-k", 4, "--max-tokens", 16, "-o", out)
    return out, result.result


TIMES = {"seconds": None}


def test_figures_follow_from_the_graded_rollouts(measured):
    out, result = measured
    assert json.loads((out / "results.json").read_text()) == result
    scores: dict[str, list[float]] = {}
    rows = read_jsonl(out / "rollouts.jsonl")
    for row in rows:
        scores.setdefault(row["problem_id"], []).append(row["reward"])
    means = [sum(values) / 4 for values in scores.values()]
    average = sum(means) / len(means)
    deviation = math.sqrt(sum((mean - average) ** 2 for mean in means) / (len(means) - 1))
    assert (result["problems"], result["k"]) == (200, 4)
    assert result["avg_at_k"] == pytest.approx(average)
    assert result["se"] == pytest.approx(deviation / math.sqrt(len(means)))
    assert result["pass_at_k"] == pytest.approx(sum(any(values) for values in scores.values()) / 200)
    assert result["truncated"] == pytest.approx(sum(row["finish_reason"] == "length" for row in rows) / 800)
    assert result["dataset"] == "toy-arithmetic/validation"


def test_a_pipe_gives_the_same_figures(s2d, toy, measured):
    rolled = s2d("rollout", "-m", toy / "teacher", toy / "problems" / "validation.jsonl", "-n", 4, "--max-tokens", 16)
    verified = s2d("verify", stdin=rolled.out)
    piped = s2d("eval", "--rollouts", "-", stdin=verified.out).result
    assert {**piped, "name": ""} == {**measured[1], "name": "", **TIMES}


def test_greedy_takes_one_sample(s2d, toy, few):
    assert s2d("eval", "-m", toy / "teacher", few, "--temperature", 0, "--max-tokens", 16).result["k"] == 1
    refused = s2d("eval", "-m", toy / "teacher", few, "--temperature", 0, "-k", 4)
    assert refused.code == 2
    assert "greedy samples are all equal" in refused.err


def test_null_rewards_count_as_wrong_and_are_told(s2d, measured, tmp_path):
    rows = read_jsonl(measured[0] / "rollouts.jsonl")
    right = next(i for i, row in enumerate(rows) if row["reward"] == 1.0)
    rows[right] |= {"reward": None, "label": None}
    result = s2d("eval", "--rollouts", write_jsonl(tmp_path / "nulls.jsonl", rows))
    assert result.result["ungraded"] == 1
    assert result.result["avg_at_k"] == pytest.approx(measured[1]["avg_at_k"] - 1 / 800)
    assert "1 answers could not be graded" in result.err


def test_bad_input(s2d, toy, few, measured, tmp_path):
    rows = read_jsonl(measured[0] / "rollouts.jsonl")
    ungraded = [{key: value for key, value in row.items() if key != "reward"} for row in rows]
    uneven = rows[:-1]
    other = [*rows[:4], *[{**row, "sampler": {**row["sampler"], "checkpoint": "f" * 64}} for row in rows[4:]]]
    for name, content, message in (
        ("ungraded", ungraded, "ungraded.jsonl:1: no field 'reward'"),
        ("uneven", uneven, "has 3 samples"),
        ("other", other, "rollouts of different samplers"),
        ("twice", [rows[0], rows[0]], "has sample 0 twice"),
    ):
        result = s2d("eval", "--rollouts", write_jsonl(tmp_path / f"{name}.jsonl", content))
        assert result.code == 1
        assert message in result.err
        assert result.out == b""
    (tmp_path / "half.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1])[:200])
    assert "half.jsonl:2: not a line of JSON" in s2d("eval", "--rollouts", tmp_path / "half.jsonl").err
    for arguments in ([], ["-m", toy / "teacher", "--rollouts", "-"], ["--rollouts", "-", "-k", 3], ["--rollouts", "-", few]):
        assert s2d("eval", *arguments).code == 2
    assert s2d("eval", "-m", toy / "teacher", few, "-o", measured[0]).code == 2


def test_inputs_survive_overwriting_and_options_of_the_other_mode_are_refused(s2d, toy, few, measured, tmp_path):
    out, _ = measured
    before = (out / "rollouts.jsonl").read_bytes()
    result = s2d("eval", "--rollouts", out / "rollouts.jsonl", "-o", out, "--overwrite")
    assert result.code == 2
    assert (out / "rollouts.jsonl").read_bytes() == before
    for option in (["--temperature", 0.5], ["--reward", "exact"], ["-k", 3], ["--seed", 3]):
        refused = s2d("eval", "--rollouts", out / "rollouts.jsonl", *option)
        assert refused.code == 2
        assert f"{option[0]} goes with --model" in refused.err


def test_missing_files_folders_and_bad_rewards(s2d, toy, few, tmp_path):
    assert "cannot read graded rollouts: No such file" in s2d("eval", "--rollouts", tmp_path / "none.jsonl").err
    assert "is a folder" in s2d("eval", "--rollouts", tmp_path).err
    result = s2d("eval", "-m", toy / "student", few, "-k", 1, "--max-tokens", 4, "--reward", "python:nowhere:f")
    assert result.code == 2
    assert "nowhere" in result.err


def test_rollouts_from_a_named_pipe(s2d, measured, tmp_path):
    import os
    import threading

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = (measured[0] / "rollouts.jsonl").read_bytes()
    writer = threading.Thread(target=lambda: pipe.write_bytes(content))
    writer.start()
    result = s2d("eval", "--rollouts", pipe)
    writer.join()
    assert result.result["avg_at_k"] == measured[1]["avg_at_k"]


@pytest.fixture(scope="module")
def undisturbed(s2d, toy, few, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "eval"
    result = s2d("eval", "-m", toy / "student", few, *RESUMED, "-o", out)
    return out, result.result


RESUMED = ["-k", 2, "--max-tokens", 8, "--sample-tokens", 120, "--reward", "exact"]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_a_resumed_evaluation_is_an_undisturbed_one(s2d, toy, few, tmp_path, undisturbed, share):
    whole, figures = undisturbed
    out = tmp_path / "eval"
    out.mkdir()
    rows = (whole / "rollouts.jsonl").read_bytes()
    (out / "rollouts.jsonl").write_bytes(rows[: int(share * len(rows))])
    manifest = json.loads((whole / "s2d.json").read_text())
    (out / "s2d.json").write_text(json.dumps({**manifest, "complete": False, "counts": {}}))
    result = s2d("eval", "-m", toy / "student", few, *RESUMED, "-o", out, "--resume")
    assert {**result.result, **TIMES} == {**figures, **TIMES}
    assert json.loads((out / "results.json").read_text()) == result.result
    for name in ("rollouts.jsonl", "problems.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    again = json.loads((out / "s2d.json").read_text())
    assert again["measured"] == manifest["measured"] == sorted(problem["problem_sha256"] for problem in read_jsonl(few))
    assert {**again["counts"], "seconds": 0} == {**manifest["counts"], "seconds": 0}


def test_a_finished_evaluation_prints_its_result_again(s2d, toy, few, undisturbed):
    out, figures = undisturbed
    result = s2d("eval", "-m", toy / "student", few, *RESUMED, "-o", out, "--resume")
    assert result.result == figures
    assert result.err == f"{out} is complete already\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--resume"], "--seed was 0, is 1"), (["--resume", "--overwrite"], "give one of them"), ([], "output exists")],
)
def test_other_work_is_not_mixed_in(s2d, toy, few, undisturbed, more, message):
    result = s2d("eval", "-m", toy / "student", few, *RESUMED, "--seed", 1, "-o", undisturbed[0], *more)
    assert result.code == 2
    assert message in result.err


def test_graded_rollouts_name_who_sampled_them(s2d, toy, undisturbed, tmp_path):
    rows = (undisturbed[0] / "rollouts.jsonl").read_bytes()
    assert s2d("eval", "--rollouts", "-", "-o", tmp_path / "eval", stdin=rows).code == 0
    (parent,) = json.loads((tmp_path / "eval" / "s2d.json").read_text())["parents"]
    assert (parent["role"], parent["name"], parent["record"]) == ("sampler", str(toy / "student"), "")
    (tmp_path / "rows.jsonl").write_bytes(rows)
    again = ["eval", "--rollouts", tmp_path / "rows.jsonl", "-o", tmp_path / "again", "--resume"]
    assert s2d(*again).result == s2d(*again).result == {**undisturbed[1], **TIMES}


REWARDS = """
def always(completion, answer, record):
    return -7.5

def shaped(completion, answer, record):
    return 2.0 if answer in completion else -7.5

def verdict(completion, answer, record):
    if record["sample_index"] == 3:
        raise KeyError("no verdict")
    return answer in completion
"""


@pytest.fixture(scope="module")
def rolled(s2d, toy, few):
    """The teacher's rollouts of eight problems, some of them right."""
    return s2d("rollout", "-m", toy / "teacher", few, "-n", 4, "--max-tokens", 16).out


def judged(s2d, rolled, folder, *rewards):
    """Return (what verify makes of the rollouts, what eval makes of that)."""
    (folder / "mine.py").write_text(REWARDS)
    graded = s2d("verify", *(word for reward in rewards for word in ("--reward", reward)), stdin=rolled, cwd=folder)
    assert graded.code == 0, graded.err
    return graded, s2d("eval", "--rollouts", "-", stdin=graded.out)


@pytest.mark.parametrize(
    "rewards",
    [("math", "exact"), ("math", "python:mine:shaped"), ("math=0.5",), ("python:mine:always", "math=0"), ("math=-2", "exact=7.5")],
)
def test_avg_at_k_is_the_share_of_right_answers_whatever_the_rewards(s2d, rolled, tmp_path, rewards):
    _, plain = judged(s2d, rolled, tmp_path, "math")
    graded, found = judged(s2d, rolled, tmp_path, *rewards)
    rows = graded.rows
    right = sum(row["label"] for row in rows) / len(rows)
    assert 0 < right < 1
    assert found.result["avg_at_k"] == plain.result["avg_at_k"] == pytest.approx(right)
    assert (found.result["se"], found.result["pass_at_k"]) == (plain.result["se"], plain.result["pass_at_k"])
    assert plain.result["mean_reward"] == plain.result["avg_at_k"]
    reward = sum(row["reward"] for row in rows) / len(rows)
    assert found.result["mean_reward"] == pytest.approx(reward)
    assert f"avg@4 {right:.1%}" in found.err
    assert f"mean reward {reward:.4g}" in found.err
    assert "mean reward" not in plain.err


@pytest.mark.parametrize("reward", ["always", "shaped"])
def test_rewards_without_a_notion_of_right_have_a_mean_and_no_avg_at_k(s2d, rolled, tmp_path, reward):
    verified, found = judged(s2d, rolled, tmp_path, f"python:mine:{reward}")
    rows = verified.rows
    assert "32 rows graded: 0 right, 0 wrong, 0 without a verdict" in verified.err
    assert "32 rows have a reward but no label" in verified.err
    assert {row["label"] for row in rows} == {None}
    assert [found.result[name] for name in ("problems", "k", "avg_at_k", "se", "pass_at_k", "ungraded")] == [8, 4, None, None, None, 0]
    mean = sum(row["reward"] for row in rows) / len(rows)
    assert found.result["mean_reward"] == pytest.approx(mean)
    warning, line = found.err.splitlines()
    assert "the rewards have no notion of right" in warning
    assert "--reward math=0" in warning
    assert line.startswith(f"mean reward {mean:.4g} ± ")
    graded = write_jsonl(tmp_path / "graded.jsonl", rows)
    refused = s2d("compare", graded, graded)
    assert (refused.code, refused.out) == (1, b"")
    assert "graded.jsonl: cannot be compared: the rewards have no notion of right" in refused.err


def test_a_function_of_zero_and_one_says_what_is_right_where_it_does_not_fail(s2d, rolled, tmp_path):
    graded, found = judged(s2d, rolled, tmp_path, "python:mine:verdict")
    rows = graded.rows
    assert [row["label"] for row in rows] == [None if row["sample_index"] == 3 else row["reward"] == 1.0 for row in rows]
    assert found.result["avg_at_k"] == pytest.approx(sum(row["label"] is True for row in rows) / 32)
    assert found.result["ungraded"] == 8
    assert "warning: 8 answers could not be graded as right or wrong and count as wrong" in found.err


def test_problems_without_an_answer_cannot_be_measured(s2d, toy, few, rolled, tmp_path):
    problems = read_jsonl(few)
    unlabelled = write_jsonl(tmp_path / "unlabelled.jsonl", [*problems[:3], *({**problem, "answer": ""} for problem in problems[3:])])
    message = f"5 of 8 problems have no answer to grade against, the first is {problems[3]['id']!r}; "
    sampled = s2d("eval", "-m", toy / "teacher", unlabelled, "-k", 1, "--max-tokens", 8, "-o", tmp_path / "eval")
    assert (sampled.code, sampled.out) == (1, b"")
    assert message in sampled.err
    assert not (tmp_path / "eval").exists()
    answers = {problem["id"]: problem["answer"] for problem in read_jsonl(unlabelled)}
    rows = [{**json.loads(line), "answer": answers[json.loads(line)["problem_id"]]} for line in rolled.splitlines()]
    graded = s2d("verify", write_jsonl(tmp_path / "rolled.jsonl", rows)).out
    read = s2d("eval", "--rollouts", "-", stdin=graded)
    assert (read.code, read.out) == (1, b"")
    assert message in read.err
    assert "--reward python:MODULE:FUNCTION" in read.err


TWO = ["-k", 2, "--max-tokens", 8, "--reward", "exact"]


def test_several_are_measured_with_one_model_load(s2d, toy, few, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", read_jsonl(toy / "problems" / "validation.jsonl")[8:12])
    out = tmp_path / "both"
    both = s2d("eval", "-m", toy / "student", few, other, *TWO, "-o", out)
    assert both.code == 0, both.err
    first, second = both.rows
    assert both.err.count("loading ") == 1
    assert [one["problems"] for one in both.rows] == [8, 4]
    alone = s2d("eval", "-m", toy / "student", other, *TWO, "-o", tmp_path / "alone")
    assert {**alone.result, **TIMES} == {**second, **TIMES}
    assert (out / "other" / "rollouts.jsonl").read_bytes() == (tmp_path / "alone" / "rollouts.jsonl").read_bytes()
    assert json.loads((out / "problems" / "results.json").read_text()) == first
    assert json.loads((out / "other" / "s2d.json").read_text())["inputs"][0]["path"] == str(other)
    scores = read_jsonl(out / "other" / "problems.jsonl")
    assert sum(row["score"] for row in scores) / 4 == second["avg_at_k"]
    refused = s2d("eval", "-m", toy / "student", few, few, *TWO)
    assert (refused.code, "several PROBLEMS are named problems" in refused.err) == (2, True)
    # What is finished stays, what is not is done
    (out / "other" / "s2d.json").write_text(json.dumps({**json.loads((out / "other" / "s2d.json").read_text()), "complete": False}))
    resumed = s2d("eval", "-m", toy / "student", few, other, *TWO, "-o", out, "--resume")
    assert f"{out / 'problems'} is complete already" in resumed.err
    assert [{**row, **TIMES} for row in resumed.rows] == [{**row, **TIMES} for row in both.rows]


def test_benchmarks_that_are_not_there_are_said_before_the_model_is_loaded(s2d, toy, tmp_path):
    unknown = s2d("eval", "-m", toy / "student", "amie24", *TWO)
    assert (unknown.code, "no benchmark of that name (did you mean 'aime24'?)" in unknown.err) == (1, True)
    offline = s2d("eval", "-m", toy / "student", "aime24", *TWO, "-o", tmp_path / "hub")
    assert (offline.code, "HuggingFaceH4/aime_2024: no such file or folder here, and as a hub data set" in offline.err) == (1, True)
    assert not (tmp_path / "hub").exists()
    missing = s2d("eval", "-m", toy / "student", f"aime24={tmp_path / 'nothing.jsonl'}", *TWO)
    assert (missing.code, "nothing.jsonl" in missing.err) == (1, True)


def test_presets_are_recorded_and_options_beside_them_win(s2d, toy, few, tmp_path):
    plain = s2d("eval", "-m", toy / "student", few, *TWO, "--preset", "qwen3-plain", "-o", tmp_path / "plain").result
    assert [plain[name] for name in ("preset", "temperature", "top_p", "top_k")] == ["qwen3-plain", 0.7, 0.8, 20]
    assert plain["template"].endswith('{"enable_thinking": false}')
    options = json.loads((tmp_path / "plain" / "s2d.json").read_text())["options"]
    assert (options["preset"], options["temperature"], options["chat_template_kwargs"]) == (
        "qwen3-plain",
        0.7,
        '{"enable_thinking": false}',
    )
    changed = ["--preset", "qwen3-thinking", "--temperature", 1.0, "--chat-template-kwargs", '{"enable_thinking": false}']
    thinking = s2d("eval", "-m", toy / "student", few, *TWO, *changed).result
    assert [thinking[name] for name in ("preset", "temperature", "top_p", "top_k")] == ["qwen3-thinking", 1.0, 0.95, 20]
    assert thinking["template"].endswith('{"enable_thinking": false}')
    refused = s2d("eval", "--rollouts", tmp_path / "plain" / "rollouts.jsonl", "--preset", "qwen3-plain")
    assert (refused.code, "--preset goes with --model" in refused.err) == (2, True)


def test_rows_are_counted_without_their_numbers_but_checked(s2d, measured, tmp_path):
    rows = read_jsonl(measured[0] / "rollouts.jsonl")
    for change, message in (
        ({"completion_ids": "12"}, "field 'completion_ids' is text"),
        ({"completion_ids": [1, "2"]}, "field 'completion_ids' must be a list of token ids"),
        ({"completion_logprobs": [None]}, "field 'completion_logprobs[0]' is null"),
        ({"completion_ids": []}, "0 completion_ids but"),
        ({"sample_index": True}, "field 'sample_index' is boolean"),
        ({"extracted": None}, "field 'extracted' is null"),
        ({"sampler": {"max_tokens": "8"}}, "field 'sampler.max_tokens' is text"),
        ({"reward": float("inf")}, "field 'reward'"),
    ):
        bad = s2d("eval", "--rollouts", write_jsonl(tmp_path / "bad.jsonl", [{**rows[0], **change}]))
        assert (bad.code, bad.out) == (1, b"")
        assert bad.err.startswith(f"error: {tmp_path / 'bad.jsonl'}:1: ")
        assert message in bad.err
    odd = [
        {**row, "completion": [{"role": "assistant", "content": '"completion_ids": [1, 2] é'}], "mine": [1, {"a": None}]} for row in rows
    ]
    (tmp_path / "odd.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n" for row in odd)
    )
    found = s2d("eval", "--rollouts", tmp_path / "odd.jsonl", "-o", tmp_path / "odd").result
    assert (found["avg_at_k"], found["mean_tokens"]) == (measured[1]["avg_at_k"], measured[1]["mean_tokens"])
    assert read_jsonl(tmp_path / "odd" / "rollouts.jsonl") == odd  # written as they are
    assert (tmp_path / "odd" / "rollouts.jsonl").read_bytes().isascii()
