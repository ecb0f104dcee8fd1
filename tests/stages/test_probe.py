"""`s2d probe` through the command line: what it reports against its own files, what it refuses, and a teacher on a server."""

import functools
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import read_jsonl, write_jsonl
from fake_vllm import FakeVllm, completion

from s2dcli import console, stats

SAMPLING = ["--max-tokens", 16, "--reward", "exact", "--workers", 1]
K = 5  # --top-k
HOW = ["-n", 4, "--top-k", K, "--sample-tokens", 500]  # in four batches


@pytest.fixture(scope="module")
def base(toy, tmp_path_factory):
    """A model with the teacher's tokenizer and other weights: the teacher before RL."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(toy / "teacher", tmp_path_factory.mktemp("base") / "base")
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    noisy = {name: value + 0.1 * value.std() * torch.randn_like(value) if value.dim() > 1 else value for name, value in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def problems(toy, tmp_path_factory):
    """16 toy problems."""
    lines = (toy / "problems" / "validation.jsonl").read_bytes().splitlines(keepends=True)
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_bytes(b"".join(lines[:16]))
    return path


def probe(s2d, toy, *more, **how):
    """The last of an option that is given twice counts."""
    return s2d("probe", "--teacher", toy / "teacher", "--student", toy / "student", *more, **how)


@pytest.fixture(scope="module")
def probed(s2d, toy, base, problems, tmp_path_factory):
    """A probe's folder, and what it printed."""
    out = tmp_path_factory.mktemp("probe") / "out"
    result = probe(s2d, toy, problems, *SAMPLING, *HOW, "--base-teacher", base, "-o", out)
    return out, result.result


@functools.cache
def in_float64(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def dense(folder, prompt_ids, completion_ids):
    """Log-probs [T, V] of a completion's tokens, in float64."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    with torch.no_grad():
        return in_float64(folder)(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)


def clustered(totals):
    """Mean over tokens and its error over problems, of (sum, tokens) by problem."""
    sums, counts = np.array(list(totals.values())).T
    value = sums.sum() / counts.sum()
    return value, math.sqrt(len(sums) / (len(sums) - 1) * ((sums - value * counts) ** 2).sum()) / counts.sum()


def test_the_files_hold_what_models_in_float64_say(probed, toy, base):
    out, _ = probed
    rollouts = {(row["group_id"], row["sample_index"]): row for row in read_jsonl(out / "student.jsonl")}
    tokens = read_jsonl(out / "tokens.jsonl")
    assert [(row["group_id"], row["sample_index"]) for row in tokens] == list(rollouts)
    for row in tokens[:8]:
        rollout = rollouts[row["group_id"], row["sample_index"]]
        ids = rollout["prompt_ids"], rollout["completion_ids"]
        p, q, before = (dense(folder, *ids) for folder in (toy / "student", toy / "teacher", base))
        at = torch.tensor(rollout["completion_ids"])[:, None]
        assert row["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-4)
        assert row["log_ratio"] == pytest.approx((q - before).gather(1, at)[:, 0].tolist(), abs=1e-4)
        shared = [sorted(set(ours) & set(theirs)) for ours, theirs in zip(*(x.topk(K).indices.tolist() for x in (p, q)), strict=True)]
        assert row["shared_ids"] == [len(ids) for ids in shared]
        assert row["student_mass"] == pytest.approx([float(x[ids].exp().sum()) for x, ids in zip(p, shared, strict=True)], abs=1e-4)
        assert row["teacher_mass"] == pytest.approx([float(x[ids].exp().sum()) for x, ids in zip(q, shared, strict=True)], abs=1e-4)
        assert row["label"] == rollout["label"]


def test_the_figures_can_be_computed_again_from_the_files(probed):
    out, result = probed
    assert result == json.loads((out / "results.json").read_text())
    tokens, rollouts = read_jsonl(out / "tokens.jsonl"), {role: read_jsonl(out / f"{role}.jsonl") for role in ("student", "teacher")}
    right = {role: {} for role in rollouts}
    for role, rows in rollouts.items():
        for row in rows:
            right[role].setdefault(row["problem_id"], []).append(float(row["label"]))
        average, error = stats.avg_at_k(right[role])
        assert (result[role]["avg_at_k"], result[role]["se"]) == pytest.approx((average, error))
        assert result[role]["pass_at_k"] == pytest.approx(np.mean([max(scores) for scores in right[role].values()]))
        assert result[role]["mixed_groups"]["value"] == pytest.approx(np.mean([0 < sum(scores) < 4 for scores in right[role].values()]))
    paired = stats.paired_difference(right["student"], right["teacher"])
    assert (result["lead"]["value"], result["lead"]["se"], result["lead"]["p"]) == pytest.approx(
        (paired["difference"], paired["se"], paired["p"])
    )
    best = np.array([max(scores) for scores in right["teacher"].values()]) - [np.mean(scores) for scores in right["teacher"].values()]
    assert result["headroom"]["value"] == pytest.approx(best.mean())

    c2 = result["c2"]
    assert (c2["estimator"], c2["top_k"], result["k"], result["problems"], result["se_over"]) == ("full", K, 4, 16, "problems")
    every = sorted(value for row in tokens for value in row["kl"])
    assert c2["tokens"] == len(every) == sum(len(row["completion_ids"]) for row in rollouts["student"])
    assert c2["kl_quantiles"]["1"] == pytest.approx(every[-1], abs=1e-5)
    assert c2["kl_quantiles"]["0.5"] == pytest.approx(every[math.ceil(len(every) / 2) - 1], abs=1e-5)
    for name, part in (("kl", c2["kl"]), ("student_mass", c2["shared_mass"]["student"]), ("teacher_mass", c2["shared_mass"]["teacher"])):
        totals = {}
        for row in tokens:
            total, count = totals.get(row["problem_id"], (0.0, 0))
            totals[row["problem_id"]] = (total + sum(row[name]), count + len(row[name]))
        assert (part["value"], part["se"]) == pytest.approx(clustered(totals), abs=1e-5), name
        assert part["ci95"][0] <= part["value"] <= part["ci95"][1]
    assert c2["overlap"]["value"] == pytest.approx(np.mean([value for row in tokens for value in row["shared_ids"]]) / K)
    thirds = [[], [], []]
    for row in tokens:
        for position, value in enumerate(row["kl"]):
            thirds[3 * position // len(row["kl"])].append(value)
    assert [part["value"] for part in c2["kl_by_position"].values()] == pytest.approx([np.mean(values) for values in thirds], abs=1e-5)

    scores = [(sum(row["log_ratio"]), row["label"], row["problem_id"]) for row in tokens]
    won = [(x > y, a == b) for (x, right, a), (y, wrong, b) in itertools.product(scores, scores) if right and not wrong]
    assert result["c1"]["auc"]["value"] == pytest.approx(np.mean([win for win, _ in won]), abs=1e-3)  # of rounded numbers
    rows = {row["problem_id"]: row for row in read_jsonl(out / "problems.jsonl")}
    aucs = [row["auc"] for row in rows.values() if row["auc"] is not None]
    assert result["c1"]["within_groups"]["value"] == pytest.approx(np.mean(aucs))
    assert result["c1"]["within_groups"]["groups"] == len(aucs) == sum(row["mixed"] for row in rows.values())
    assert {problem: row["student_right"] for problem, row in rows.items()} == {p: sum(s) for p, s in right["student"].items()}


def test_labels_are_measured_with_and_not_spent(probed):
    out, result = probed
    manifest = json.loads((out / "s2d.json").read_text())
    assert manifest["labels"] == []
    assert len(manifest["measured"]) == 16
    assert result["labels"] == {"measured": 16, "spent": 0}
    assert [parent["role"] for parent in manifest["parents"]] == ["student", "teacher", "base teacher"]


def test_stored_rollouts_give_the_same_figures(s2d, toy, base, probed, tmp_path):
    out, result = probed
    stored = ["--rollouts", out / "student.jsonl", "--teacher-rollouts", out / "teacher.jsonl"]
    again = probe(s2d, toy, *stored, "--top-k", K, "--base-teacher", base, "-o", tmp_path / "out").result
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    assert not (tmp_path / "out" / "student.jsonl").exists()
    evaluated = s2d("eval", "--rollouts", out / "teacher.jsonl").result
    assert (evaluated["avg_at_k"], evaluated["se"]) == (result["teacher"]["avg_at_k"], result["teacher"]["se"])


def test_a_kill_while_sampling_is_resumed_to_the_same_files(s2d, toy, base, problems, probed, tmp_path):
    """What a kill leaves: rows of some batches, the last one torn, and nothing that is computed of them."""
    whole, result = probed
    out = shutil.copytree(whole, tmp_path / "out")
    manifest = json.loads((out / "s2d.json").read_text())
    (out / "s2d.json").write_text(json.dumps({**manifest, "complete": False}))
    for name in ("results.json", "tokens.jsonl", "problems.jsonl", "teacher.jsonl"):
        (out / name).unlink()
    lines = (out / "student.jsonl").read_bytes().splitlines(keepends=True)
    (out / "student.jsonl").write_bytes(b"".join(lines[:19]) + lines[19][:40])
    command = [problems, *SAMPLING, *HOW, "--base-teacher", base, "-o", out, "--resume"]
    assert "-n was 4, is 3" in probe(s2d, toy, *command, "-n", 3).err
    resumed = probe(s2d, toy, *command)
    assert resumed.code == 0, resumed.err
    for name in ("student.jsonl", "teacher.jsonl", "tokens.jsonl", "problems.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert {**resumed.result, "seconds": 0} == {**result, "seconds": 0}
    finished = probe(s2d, toy, *command)
    assert finished.result == resumed.result
    assert "complete already" in finished.err


def test_dry_run_checks_the_pair_and_loads_nothing(s2d, toy, problems, tmp_path):
    result = probe(s2d, toy, problems, *SAMPLING, "-n", 4, "-o", tmp_path / "out", "--dry-run")
    assert result.result == {
        "problems": 16,
        "rollouts": 128,
        "completion_tokens_at_most": 128 * 16,
        "models": {"student": str(toy / "student"), "teacher": str(toy / "teacher")},
        "out": str(tmp_path / "out"),
    }
    assert "loading" not in result.err
    assert not (tmp_path / "out").exists()


def test_a_student_without_right_answers_has_no_auc(s2d, toy, base, problems, tmp_path):
    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{**row, "answer": "1000"} for row in read_jsonl(problems)[:6]])
    result = probe(s2d, toy, wrong, *SAMPLING, "-n", 2, "--base-teacher", base).result
    assert result["c1"]["auc"]["value"] is None
    assert result["c1"]["auc"]["reason"] == "no right answer among 12"
    assert result["c1"]["within_groups"]["reason"] == "no group has both right and wrong answers"
    assert result["verdict"]["route"] == "neither"
    assert any("easier problems" in reason for reason in result["verdict"]["why"])


def test_options_that_contradict_each_other_are_refused_in_one_line(s2d, toy, probed, problems):
    out, _ = probed
    student, teacher = ["--rollouts", out / "student.jsonl"], ["--teacher-rollouts", out / "teacher.jsonl"]
    url = "http://localhost:8000"
    for arguments, message in (
        ([problems, "-n", 1], "-n 1: whether a group of rollouts is mixed shows from two on"),
        ([problems, "--base-teacher", toy / "teacher"], "--base-teacher is the teacher itself: their log-ratio is 0 everywhere"),
        ([problems, *student], "both PROBLEMS and --rollouts were given"),
        ([*student, "-n", 3], "-n is that of the rollouts that are given"),
        ([*student, *teacher, "--max-tokens", 8], "--max-tokens applies to sampling, and nothing is sampled"),
        ([*student, *teacher, "--resume"], "--resume and --overwrite need a folder"),
        (["--rollouts", "-", "--teacher-rollouts", "-"], "standard input can be read once only"),
        ([problems, "--engine", url], "--engine URL is a server of one model, and two are sampled"),
        ([problems, "--teacher", url, "--temperature", 0.5], "a server scores at temperature 1"),
        ([problems, "--base-teacher", "http://nowhere"], "--base-teacher 'http://nowhere': URL names no port"),
        ([problems, "--student", url], "--student must be a checkpoint"),
        ([problems, "-o", out], "output exists"),
    ):
        result = probe(s2d, toy, *arguments)
        assert (result.code, message in result.err, result.out) == (2, True, b""), (arguments, result.err)
        assert len(result.err.splitlines()) == 1
    unlabelled = "".join(json.dumps({**row, "answer": ""}) + "\n" for row in read_jsonl(problems))
    result = probe(s2d, toy, stdin=unlabelled.encode())
    assert (result.code, "16 of 16 problems have no answer to grade against" in result.err) == (1, True), result.err


class Served(FakeVllm):
    """Serves the toy teacher: completes by one right-looking answer, and scores with a float64 model's log-probs."""

    def __init__(self, folder):
        super().__init__(self.answered, model="teacher")
        self.folder = folder

    def answered(self, body):
        if "prompt_logprobs" not in body:
            return completion(body)
        ids = body["prompt"]
        logs = dense(self.folder, ids[:1], ids[1:])
        positions = [None]
        for token, row in zip(ids[1:], logs, strict=True):
            best = row.topk(body["prompt_logprobs"]).indices.tolist()
            positions.append({str(index): {"logprob": float(row[index])} for index in dict.fromkeys([token, *best])})
        return completion(body, prompt_logprobs=positions)


def test_a_teacher_on_a_server_is_compared_by_its_top_k(s2d, toy, base, problems, probed):
    out, exact = probed
    dense(toy / "teacher", [4], [5])  # loads it here, not in the server's threads
    dense(base, [4], [5])
    with Served(toy / "teacher") as teacher, Served(base) as before:
        asking = ["--teacher", teacher.url, "--base-teacher", before.url, "--top-k", K]
        served = probe(s2d, toy, "--rollouts", out / "student.jsonl", *SAMPLING, *asking)
        assert served.code == 0, served.err
        asked = [body for path, _, body in teacher.seen if path == "/v1/completions"]
    result = served.result
    assert result["c2"]["estimator"] == "top-k"
    assert {body["prompt_logprobs"] for body in asked if "prompt_logprobs" in body} == {K}
    assert len([body for body in asked if "prompt_logprobs" not in body]) == 16 * 4  # the teacher's own answers
    assert result["models"]["teacher"] == teacher.url
    # A KL over K ids and a bucket is at most the exact one; the sets, and the log-ratios, are the same
    assert 0.3 * exact["c2"]["kl"]["value"] < result["c2"]["kl"]["value"] <= exact["c2"]["kl"]["value"] + 1e-5
    assert result["c2"]["overlap"]["value"] == pytest.approx(exact["c2"]["overlap"]["value"], abs=1e-3)
    assert result["c2"]["shared_mass"]["teacher"]["value"] == pytest.approx(exact["c2"]["shared_mass"]["teacher"]["value"], abs=1e-4)
    assert result["c1"]["auc"]["value"] == pytest.approx(exact["c1"]["auc"]["value"], abs=0.01)


def test_verdicts_of_toy_pairs_are_what_happened(s2d, toy, tmp_path):
    """A teacher that has learnt to be careful is five times farther from the student than the one at the start, and the one to distil."""

    def run(*arguments, stdin=b""):
        result = s2d(*arguments, stdin=stdin)
        assert result.code == 0, result.err
        return result

    def verdict(teacher, student, number, n):
        held_out = b"".join((toy / "problems" / "validation.jsonl").read_bytes().splitlines(keepends=True)[:number])
        found = run("probe", "--teacher", teacher, "--student", student, "-n", n, *SAMPLING, stdin=held_out)
        return found.result, found.result["verdict"]["route"], found.result["verdict"]["resolved"]

    lines = (toy / "problems" / "1H.jsonl").read_bytes().splitlines(keepends=True)[:256]
    (tmp_path / "problems.jsonl").write_bytes(b"".join(lines))
    sampling = [tmp_path / "problems.jsonl", "--max-tokens", 16, "-o"]
    run("rollout", "-m", toy / "teacher", "-n", 4, *sampling, tmp_path / "all.jsonl")
    stepwise = [row for row in read_jsonl(tmp_path / "all.jsonl") if row["completion"][0]["content"].startswith("=")]
    training = ["--mini-batch-size", 64, "--rollouts", write_jsonl(tmp_path / "stepwise.jsonl", stepwise)]
    careful, warmed = tmp_path / "careful", tmp_path / "warmed"
    run("fkl-warmup", "--hard-labels", "--student", toy / "teacher", "--steps", 20, "--lr", 1e-3, *training, "-o", careful)
    run("rollout", "-m", careful, "-n", 2, *sampling, tmp_path / "careful.jsonl")
    training = ["--teacher", careful, "--rollouts", tmp_path / "careful.jsonl", "--mini-batch-size", 64]
    run("fkl-warmup", "--student", toy / "student", "--steps", 40, "--lr", 2e-3, *training, "-o", warmed)

    start, route, resolved = verdict(toy / "teacher", toy / "student", 60, 8)
    assert (route, resolved) == ("rl-teacher", True)
    far, route, resolved = verdict(careful, toy / "student", 40, 4)
    assert (route, resolved) == ("warm-up", True)
    assert far["c2"]["kl"]["value"] > 4 * start["c2"]["kl"]["value"]
    near, route, resolved = verdict(careful, warmed, 40, 4)
    assert route in ("distil", "warm-up")
    assert resolved
    assert near["c2"]["kl"]["value"] < far["c2"]["kl"]["value"] / 3
    assert near["student"]["avg_at_k"] > far["student"]["avg_at_k"] + 0.2  # the warm-up brought what it was to bring
    _, route, resolved = verdict(toy / "teacher", warmed, 40, 4)
    assert (route, resolved) == ("rl-student", True)  # though the first teacher is near, it is now the worse of the two


def test_a_terminal_is_shown_the_verdict_with_its_reasons(probed):
    _, result = probed
    shown = dict(console.probe_table(result))
    assert shown["student"].startswith(f"{result['models']['student']}: avg@4 ")
    assert " ± " in shown["C2 KL"]
    assert "within groups" in shown["C1 AUC"]
    assert shown["verdict"].startswith(result["verdict"]["route"])
    nothing = {"value": None, "se": None, "ci95": None, "groups": 0, "reason": "no right answer among 12"}
    shown = dict(console.probe_table({**result, "c1": {"auc": nothing, "within_groups": nothing}}))
    assert "no right answer among 12" in shown["C1 AUC"]
