"""What an evaluation reports beside its average, by hand."""

import pytest

from s2dcli import stats


def row(problem, extracted="", label=False, **fields):
    base = {"problem_id": problem, "problem_sha256": f"sha {problem}", "reward": float(label is True), "label": label, "answer": "3"}
    error = "" if extracted else "no answer: no box"
    return {**base, "extracted": extracted, "verify_error": error, "finish_reason": "stop", "completion_ids": [1] * 4, **fields}


def report(rows, **how):
    summary = stats.Summary(**how)
    for one in rows:
        summary.add(one)
    return summary.report(), list(summary.rows())


def test_the_majority_of_the_answers_counts_and_ties_are_split():
    clear = [row("a", "3", True), row("a", "3.0", True), row("a", "5"), row("a")]  # right ones are one answer
    tied = [row("b", "3", True), row("b", "5"), row("b", "6"), row("b")]  # one of three that have one vote
    lost = [row("c", "3", True), row("c", "5"), row("c", "5"), row("c", "6")]
    silent = [row("d")] * 4
    found, rows = report([*clear, *tied, *lost, *silent])
    assert [one["majority"] for one in rows] == [1.0, pytest.approx(1 / 3), 0.0, 0.0]
    assert found["maj_at_k"] == pytest.approx((1 + 1 / 3) / 4)
    assert found["maj_at_k_se"] == pytest.approx(stats.standard_error([1, 1 / 3, 0, 0]))
    assert found["no_answer_rate"] == 6 / 16


def test_wrong_answers_are_one_if_their_normal_forms_are():
    rows = [row("a", "3", True), row("a", "5 "), row("a", "\\text{5}")]
    assert report(rows)[0]["maj_at_k"] == pytest.approx(1 / 3)
    assert report(rows, canonical=lambda text: text.strip().removeprefix("\\text{").removesuffix("}"))[0]["maj_at_k"] == 0.0
    never = [row("a", label=True, verify_error=""), row("a", verify_error="")]  # a reward that extracts nothing
    assert report(never)[0]["maj_at_k"] is None


def test_truncated_samples_can_be_left_out():
    cut = {"finish_reason": "length"}
    rows = [row("a", "3", True), row("a", **cut), row("b", **cut), row("b", **cut), row("c", "3", True, **cut), row("c", "4")]
    found, per_problem = report(rows)
    assert (found["avg_at_k"], found["truncated"]) == (pytest.approx(1 / 3), pytest.approx(4 / 6))
    assert found["untruncated"] == {"avg_at_k": 0.5, "se": 0.5, "problems": 2, "samples": 2}  # a: 1 of 1, c: 0 of 1
    assert [one["truncated"] for one in per_problem] == [1, 2, 1]
    assert report([row("a", **cut)])[0]["untruncated"] == {"avg_at_k": None, "se": None, "problems": 0, "samples": 0}


def test_lengths_rates_and_rows():
    rows = [row(problem, "3", True, completion_ids=[0] * length) for length, problem in zip(range(1, 101), "ab" * 50, strict=True)]
    rows[0] |= {"label": None, "reward": None}
    found, (a, b) = report(rows)
    assert found["tokens"] == 5050
    assert found["length"] == {"0.05": 5, "0.25": 25, "0.5": 50, "0.75": 75, "0.95": 95, "1": 100}
    assert (found["ungraded"], found["ungraded_rate"], found["se_over"]) == (1, 0.01, "problems")
    assert (a["problem_id"], a["problem_sha256"], a["samples"], a["right"], a["score"], a["ungraded"]) == ("a", "sha a", 50, 49, 0.98, 1)
    assert (b["right"], b["mean_tokens"], b["mean_reward"]) == (50, 51.0, 1.0)
    assert list(found["pass"]) == ["1", "2", "4", "8", "16", "32", "50"]
    assert found["pass"]["1"] == {"value": found["avg_at_k"], "se": found["se"]}


def test_the_two_parts_make_up_the_error_and_say_what_helps():
    scores = {f"p{i}": i % 5 for i in range(20)}  # right ones of 4
    found, _ = report([row(name, "3" if sample < right else "7", sample < right) for name, right in scores.items() for sample in range(4)])
    assert found["se"] ** 2 == pytest.approx(found["se_problems"] ** 2 + found["se_decoding"] ** 2)
    advice = stats.problems_or_samples(found)
    assert advice.startswith("more problems or more k: more problems. ")
    assert f"the error of {found['se']:.1%} would be {found['se'] / 2**0.5:.1%} with twice the problems" in advice
    assert f"{found['se_problems']:.1%} with any k; on exactly these problems it is {found['se_decoding']:.1%}" in advice
    alike, _ = report([row(f"p{i}", "3" if sample % 2 else "7", sample % 2 == 1) for i in range(20) for sample in range(4)])
    assert stats.problems_or_samples(alike).startswith("more problems or more k: either. 100%")
    single, _ = report([row(f"p{i}", "3", i % 2 == 0) for i in range(4)])
    assert (single["se_problems"], single["se_decoding"], stats.problems_or_samples(single)) == (None, None, "")
