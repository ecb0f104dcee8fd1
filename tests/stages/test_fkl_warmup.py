"""`s2d fkl-warmup` through the command line."""

import json

import pytest
import torch
from conftest import read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def graded(s2d, toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("graded") / "graded.jsonl"
    rolled = s2d("rollout", "-m", toy / "teacher", toy / "problems" / "validation.jsonl", "-n", 2, "--max-tokens", 16)
    assert s2d("verify", "-", "-o", path, stdin=rolled.out).code == 0
    return path


def warm(s2d, toy, graded, out, *more):
    return s2d("fkl-warmup", "--student", toy / "student", "--rollouts", graded, "-o", out, "--lr", "1e-3", *more)


def dense(toy, rows, teacher=None) -> float:
    """Mean per token of KL(teacher || student), or without a teacher of the cross-entropy, in float64."""
    from transformers import AutoModelForCausalLM

    load = lambda name: AutoModelForCausalLM.from_pretrained(toy / name, dtype=torch.float64)  # noqa: E731
    student, guide = load("student"), load(teacher) if teacher else None
    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        states = slice(len(row["prompt_ids"]) - 1, -1)
        with torch.no_grad():
            q = student(input_ids=ids).logits[0, states].log_softmax(-1)
            if guide:
                p = guide(input_ids=ids).logits[0, states].log_softmax(-1)
                total += (p.exp() * (p - q)).sum().item()
            else:
                total -= q.gather(1, torch.tensor(row["completion_ids"])[:, None]).sum().item()
        tokens += len(row["completion_ids"])
    return total / tokens


def test_forward_kl_equals_a_dense_float64_one(s2d, toy, graded, tmp_path):
    result = warm(s2d, toy, graded, tmp_path / "run", "--teacher", toy / "teacher", "--mini-batch-size", 400)
    assert result.code == 0, result.err
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["kl"] == pytest.approx(dense(toy, read_jsonl(graded), "teacher"), rel=1e-4)
    assert "cross_entropy" not in row
    assert row["labels"] == 0


def test_hard_labels_are_cross_entropy_and_not_called_kl(s2d, toy, graded, tmp_path):
    result = warm(s2d, toy, graded, tmp_path / "run", "--hard-labels", "--mini-batch-size", 400)
    assert result.code == 0, result.err
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["cross_entropy"] == pytest.approx(dense(toy, read_jsonl(graded)), rel=1e-4)
    assert "kl" not in row


def test_only_correct_goes_by_the_label_and_not_by_the_reward(s2d, toy, graded, tmp_path):
    rows = [{**row, "reward": 7.5} for row in read_jsonl(graded)[:64]]
    right = sum(row["label"] for row in rows)
    assert 0 < right < 64
    result = warm(s2d, toy, write_jsonl(tmp_path / "r.jsonl", rows), tmp_path / "run", "--hard-labels", "--only-correct", "--steps", 1)
    assert f"--only-correct keeps {right} of 64 rollouts" in result.err


def test_only_correct_keeps_the_right_rows_and_spends_the_labels_of_all(s2d, toy, graded, tmp_path):
    rows = read_jsonl(graded)
    right = [row for row in rows if row["reward"] == 1.0]
    result = warm(s2d, toy, graded, tmp_path / "run", "--hard-labels", "--only-correct", "--mini-batch-size", len(rows))
    assert result.code == 0, result.err
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["rollouts"] == len(right) < len(rows)
    assert row["cross_entropy"] == pytest.approx(dense(toy, right), rel=1e-4)
    assert row["labels"] == 200
    for manifest in (tmp_path / "run" / "s2d.json", tmp_path / "run" / "step-000001" / "s2d.json"):
        assert json.loads(manifest.read_text())["labels"] == sorted({record["problem_sha256"] for record in rows})
    assert f"keeps {len(right)} of {len(rows)} rollouts" in result.err


def test_it_learns(s2d, toy, graded, tmp_path):
    more = ["--teacher", toy / "teacher", "--mini-batch-size", 64, "--epochs", 4, "--schedule", "cosine", "--warmup-steps", 2]
    assert warm(s2d, toy, graded, tmp_path / "run", *more).code == 0
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 25  # four passes over 400 rollouts
    assert rows[-1]["kl"] < 0.9 * rows[0]["kl"]
    rates = [row["lr"] for row in rows]
    assert rates[0] == pytest.approx(5e-4)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_evaluation_while_training(s2d, toy, graded, few, tmp_path):
    more = ["--hard-labels", "--steps", 2, "--eval-problems", few, "--eval-every", 1, "--max-tokens", 16]
    result = warm(s2d, toy, graded, tmp_path / "run", *more)
    assert result.code == 0, result.err
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "evals.jsonl")] == [0, 1, 2]
    assert result.result["eval_problems"] == 8


def test_rollouts_of_another_tokenizer_are_refused(s2d, toy, graded, tmp_path):
    rows = read_jsonl(graded)[:4]
    rows[0]["completion_ids"][0] += 1
    result = warm(s2d, toy, write_jsonl(tmp_path / "other.jsonl", rows), tmp_path / "run", "--hard-labels")
    assert result.code == 1
    assert "was made with another tokenizer" in result.err


def test_text_that_does_not_round_trip_trains_on_its_ids(s2d, toy, graded, tmp_path):
    # `1` `2` decodes like the one token `12`: only the stored ids tell them apart.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy / "student")
    row = read_jsonl(graded)[0]
    ids = [*tokenizer.convert_tokens_to_ids(["1", "2"]), tokenizer.eos_token_id]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] != ids[:-1]
    row.update(completion_ids=ids, completion=[{"role": "assistant", "content": text}], completion_logprobs=[-1.0] * 3)
    result = warm(s2d, toy, write_jsonl(tmp_path / "odd.jsonl", [row]), tmp_path / "run", "--hard-labels")
    assert result.code == 0, result.err
    assert result.result["cross_entropy"] == pytest.approx(dense(toy, [row]), rel=1e-4)
    assert result.result["tokens"] == 3


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ([], 2, "choose a target"),
        (["--teacher", "{toy}/teacher", "--hard-labels"], 2, "choose a target"),
        (["--hard-labels", "--temperature", "0.5"], 2, "has none"),
        (["--hard-labels", "--rollouts", "{tmp}/none.jsonl"], 1, "cannot read rollouts"),
        (["--hard-labels", "--rollouts", "{tmp}/short.jsonl"], 1, "short.jsonl:1: "),
        (["--hard-labels", "--only-correct", "--rollouts", "{tmp}/ungraded.jsonl"], 1, "s2d verify"),
    ],
)
def test_refusals(s2d, toy, graded, tmp_path, more, code, message):
    row = read_jsonl(graded)[0]
    write_jsonl(tmp_path / "short.jsonl", [{**row, "completion_logprobs": row["completion_logprobs"][:-1]}])
    write_jsonl(tmp_path / "ungraded.jsonl", [{key: value for key, value in row.items() if key != "reward"}])
    result = warm(s2d, toy, graded, tmp_path / "run", *[str(part).format(toy=toy, tmp=tmp_path) for part in more])
    assert result.code == code, result.err
    assert message in result.err
    assert not (tmp_path / "run").exists()


def test_manifest_names_the_inputs(s2d, toy, graded, tmp_path):
    assert warm(s2d, toy, graded, tmp_path / "run", "--hard-labels", "--steps", 1).code == 0
    manifest = json.loads((tmp_path / "run" / "s2d.json").read_text())
    assert manifest["inputs"][0]["path"] == str(graded)
    assert len(manifest["inputs"][0]["sha256"]) == 64
    assert manifest["options"]["hard_labels"] is True
