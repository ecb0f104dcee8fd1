"""`s2d score` through the command line, and the caches that it makes."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import read_jsonl, write_jsonl
from faults import differing, kill_and_resume
from safetensors import safe_open

from s2dcli.assembly.pairs import open_cache
from s2dcli.errors import DataError, ModelError
from s2dcli.models.checkpoints import resolve
from s2dcli.models.prompts import load_tokenizer

KILLS = 3


@pytest.fixture(scope="module")
def rollouts(s2d, toy, few, tmp_path_factory):
    """16 rollouts of the teacher."""
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    result = s2d("rollout", "-m", toy / "teacher", few, "-n", 2, "--max-tokens", 16, "-o", path)
    assert result.code == 0, result.err
    return path


def score(s2d, toy, rollouts, out, *more):
    return s2d("score", "-m", toy / "teacher", rollouts, "-o", out, *more)


@pytest.fixture(scope="module")
def cache(s2d, toy, rollouts, tmp_path_factory):
    """Top 5 in float32, in several shards."""
    out = tmp_path_factory.mktemp("cache") / "cache"
    result = score(s2d, toy, rollouts, out, "--top-k", 5, "--cache-dtype", "float32", "--shard-tokens", 40)
    assert result.code == 0, result.err
    return out


@functools.cache
def in_float64(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def dense(toy, row) -> torch.Tensor:
    """Log-probs [T, V] of a row's completion tokens, in float64."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    with torch.no_grad():
        return in_float64(toy / "teacher")(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)


def test_a_cache_holds_the_teachers_top_k_of_every_token(toy, rollouts, cache):
    """Read by safetensors alone, as another tool would."""
    rows, seen = {(row["group_id"], row["sample_index"]): row for row in read_jsonl(rollouts)}, 0
    shards = sorted(cache.glob("shard-*.safetensors"))
    assert len(shards) > 2
    for path in shards:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        for number, key in enumerate(json.loads(tensors["rows"].tobytes())):
            row, at = rows[tuple(key)], slice(*tensors["offsets"][number : number + 2])
            exact = dense(toy, row)
            values, ids = exact.topk(5, dim=-1)
            assert tensors["ids"][at].tolist() == ids.tolist()
            assert np.abs(tensors["logprobs"][at] - values.numpy()).max() < 1e-4
            tail = exact.scatter(1, ids, -torch.inf).logsumexp(-1)
            assert np.abs(tensors["tails"][at] - tail.numpy()).max() < 1e-4
            assert np.abs(tensors["sampled"][at] - exact.gather(1, torch.tensor(row["completion_ids"])[:, None])[:, 0].numpy()).max() < 1e-4
            seen += 1
    assert seen == len(rows)
    meta = json.loads((cache / "meta.json").read_text())
    assert (meta["keep"], meta["k"], meta["rows"], meta["vocabulary"]) == ("top-k", 5, len(rows), 33)
    assert meta["rounding"] == {"mean": 0.0, "max": 0.0}
    assert meta["teacher"]["weights_sha256"] == json.loads((cache / "s2d.json").read_text())["parents"][0]["weights_sha256"]


def test_the_bytes_of_a_token_and_the_rounding_are_told(s2d, toy, rollouts, tmp_path):
    """128 ids in float16 take 776 bytes a token; the toy has 33, with 4 + 2 bytes for each and 8 beside them."""
    found = score(s2d, toy, rollouts, tmp_path / "cache").result
    with safe_open(tmp_path / "cache" / "shard-00000.safetensors", framework="np") as file:
        size = sum(file.get_tensor(name).nbytes for name in ("ids", "logprobs", "tails", "sampled"))
    assert size == found["tokens"] * (33 * 6 + 8)
    assert 0 < found["rounding"]["mean"] < found["rounding"]["max"] <= 2**-6  # of log-probs beyond -32, 11 bits
    assert found["mass"] == pytest.approx(1.0)


def test_dry_run_tells_bytes_and_the_mass_in_the_top_k_and_writes_nothing(s2d, toy, rollouts, tmp_path):
    plan = score(s2d, toy, rollouts, tmp_path / "cache", "--top-k", 5, "--dry-run").result
    assert plan["bytes_per_token"] == {"top-k": 5 * 6 + 8, "sampled": 2, "hidden": 128}
    tokens = sum(len(row["completion_ids"]) for row in read_jsonl(rollouts))
    assert plan["bytes"] == {"top-k": 38 * tokens, "sampled": 2 * tokens, "hidden": 128 * tokens + 33 * 64 * 4}
    by_problem = {}
    for row in read_jsonl(rollouts):
        by_problem.setdefault(row["problem_sha256"], []).extend(dense(toy, row).exp().topk(16, dim=-1).values.sum(-1).tolist())
    means = [sum(values) / len(values) for values in by_problem.values()]
    assert plan["mass"]["16"] == pytest.approx(sum(means) / len(means), rel=1e-5)
    assert plan["mass_se"]["16"] > 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("keep", ["top-k", "hidden"])
def test_kills_at_random_moments_leave_the_same_bytes(toy, rollouts, tmp_path, record_property, keep):
    arguments = ["score", "-m", toy / "teacher", rollouts, "--keep", keep, "--shard-tokens", 20]
    outcome = kill_and_resume(arguments, tmp_path, kills=KILLS, seed=1)
    record_property("faults", (f"score {keep}", outcome.kills, outcome.runs, len(outcome.mismatches)))
    assert outcome.mismatches == []


def test_what_is_there_is_not_scored_again(s2d, toy, rollouts, cache, tmp_path):
    half = tmp_path / "cache"
    shutil.copytree(cache, half)
    manifest = json.loads((half / "s2d.json").read_text())
    (half / "s2d.json").write_text(json.dumps({**manifest, "complete": False}))
    (half / "meta.json").unlink()
    (half / "shard-00002.safetensors").unlink()
    kept = (half / "shard-00000.safetensors").stat().st_mtime_ns
    again = ["--top-k", 5, "--cache-dtype", "float32", "--shard-tokens", 40, "--resume"]
    assert score(s2d, toy, rollouts, half, *again).code == 0
    assert (half / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert differing(cache, half) == []
    other = score(s2d, toy, rollouts, half, "--top-k", 6, *again[2:])
    assert other.code == 2
    assert "--top-k was 5, is 6" in other.err


def test_piped_rollouts_and_refusals(s2d, toy, rollouts, tmp_path):
    piped = s2d("score", "-m", toy / "teacher", "-o", tmp_path / "cache", "--keep", "sampled", stdin=rollouts.read_bytes())
    assert piped.result["k"] == 0
    for more, message in (
        (["--keep", "hidden", "--top-k", 4], "--top-k requires --keep top-k"),
        (["--chat-template", "plain"], "stored token ids are scored as they are"),
        (["--keep", "hidden", "--engine", "http://127.0.0.1:9"], "a server gives log-probs only, no hidden states"),
        (["--temperature", 0.5, "--engine", "http://127.0.0.1:9"], "a server scores at temperature 1"),
    ):
        refused = score(s2d, toy, rollouts, tmp_path / "other", *more)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert message in refused.err
    assert not (tmp_path / "other").exists()


# What learns from a cache


def warm(s2d, toy, rollouts, cache, out, *more):
    return s2d("fkl-warmup", "--student", toy / "student", "--rollouts", rollouts, "--cache", cache, "-o", out, "--lr", "1e-3", *more)


def test_warmup_from_hidden_states_is_that_with_the_teacher_in_memory(s2d, toy, rollouts, tmp_path):
    assert score(s2d, toy, rollouts, tmp_path / "cache", "--keep", "hidden", "--cache-dtype", "float32").code == 0
    how = ["--mini-batch-size", 8]
    assert warm(s2d, toy, rollouts, tmp_path / "cache", tmp_path / "cached", *how).code == 0
    models = ["--student", toy / "student", "--teacher", toy / "teacher"]
    assert s2d("fkl-warmup", *models, "--rollouts", rollouts, "-o", tmp_path / "live", "--lr", "1e-3", *how).code == 0
    for found, expected in zip(*(read_jsonl(tmp_path / run / "metrics.jsonl") for run in ("cached", "live")), strict=True):
        assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_graded_filtered_and_reordered_rollouts_are_those_of_the_cache(s2d, toy, rollouts, cache, tmp_path):
    rows = [{**row, "note": "read"} for row in read_jsonl(rollouts)[::-2]]
    result = warm(s2d, toy, write_jsonl(tmp_path / "some.jsonl", rows), cache, tmp_path / "run")
    assert result.code == 0, result.err
    lineage = s2d("lineage", tmp_path / "run")
    assert f"input {cache}: score" in lineage.out.decode()


def test_caches_of_something_else_are_refused_naming_what_differs(s2d, toy, rollouts, cache, tmp_path):
    rows = read_jsonl(rollouts)
    changed = [
        *rows[:3],
        {**rows[3], "completion_ids": rows[3]["completion_ids"][:-1], "completion_logprobs": rows[3]["completion_logprobs"][:-1]},
    ]
    more = [*rows, {**rows[0], "group_id": "another"}]
    for number, (given, message) in enumerate(
        (
            (changed, f"the ids of sample 1 of group {rows[3]['group_id']!r} are others than those that were scored"),
            (more, f"holds no scores of 1 of {len(more)} rollouts, the first is sample 0 of group 'another'"),
        )
    ):
        for how in ([], ["--dry-run"]):
            result = warm(s2d, toy, write_jsonl(tmp_path / f"{number}.jsonl", given), cache, tmp_path / "run", *how)
            assert result.code == 1
            assert message in result.err
    assert not (tmp_path / "run").exists()


def damage(cache, tmp_path, change):
    copy = tmp_path / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cache, copy)
    change(copy)
    return copy


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def other_token(folder):
    """A cache that is whole, of a tokenizer with two tokens exchanged."""
    import hashlib

    tokens = json.loads((folder / "tokens.json").read_text())
    tokens["tokens"][9], tokens["tokens"][10] = tokens["tokens"][10], tokens["tokens"][9]
    (folder / "tokens.json").write_text(json.dumps(tokens))
    meta = json.loads((folder / "meta.json").read_text())
    content = (folder / "tokens.json").read_bytes()
    meta["files"]["tokens.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


def edit_meta(**changes):
    def change(folder):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: flip(folder / "shard-00001.safetensors"), "shard-00001.safetensors: is damaged (another sha256"),
        (lambda folder: (folder / "shard-00001.safetensors").write_bytes(b"x"), "is damaged: 1 bytes"),
        (lambda folder: (folder / "shard-00001.safetensors").unlink(), "lacks shard-00001.safetensors"),
        (lambda folder: (folder / "meta.json").unlink(), "no meta.json"),
        (edit_meta(schema="s2d.teacher-cache/0"), "not a teacher cache of this version"),
        (edit_meta(eos_ids=[4]), "end a completion with different tokens: 4"),
        (other_token, "different tokenizers: id 9 is '-' in the teacher and '+' in the student"),
        (lambda folder: shutil.rmtree(folder), "no such teacher cache"),
    ],
)
def test_damaged_caches_and_those_of_another_tokenizer_are_refused(toy, cache, tmp_path, change, message):
    student = resolve(str(toy / "student"))
    with pytest.raises((DataError, ModelError)) as caught:
        open_cache(damage(cache, tmp_path, change), student, load_tokenizer(student.folder), False)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_cache_ends_a_warmup_before_it_begins(s2d, toy, rollouts, cache, tmp_path):
    broken = damage(cache, tmp_path, lambda folder: flip(folder / "shard-00001.safetensors"))
    result = warm(s2d, toy, rollouts, broken, tmp_path / "run")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "shard-00001.safetensors: is damaged" in result.err
    assert not (tmp_path / "run").exists()


def test_a_target_is_chosen_once(s2d, toy, rollouts, cache, tmp_path):
    for more in (["--hard-labels"], ["--teacher", toy / "teacher"]):
        result = warm(s2d, toy, rollouts, cache, tmp_path / "run", *more)
        assert result.code == 2
        assert "choose a target" in result.err
    result = warm(s2d, toy, rollouts, cache, tmp_path / "run", "--top-k", 8)
    assert result.code == 2
    assert "--top-k 8: the cache holds 5 ids a token" in result.err


@pytest.fixture(scope="module")
def sampled(s2d, toy, few, tmp_path_factory):
    """16 rollouts of the student, and a cache of the teacher's hidden states on them."""
    path = tmp_path_factory.mktemp("sampled") / "student.jsonl"
    assert s2d("rollout", "-m", toy / "student", few, "-n", 2, "--max-tokens", 16, "-o", path).code == 0
    cache = path.parent / "cache"
    assert score(s2d, toy, path, cache, "--keep", "hidden", "--cache-dtype", "float32").code == 0
    return path, cache


def distil(s2d, toy, rollouts, out, *more):
    how = ["--problems-per-step", 4, "--lr", "1e-3", "--steps", 2]
    return s2d("opd", "--student", toy / "student", "--rollouts", rollouts, "-o", out, *how, *more)


@pytest.mark.parametrize("estimator", [["full"], ["top-k", "--top-k", 5], ["sampled"]])
def test_opd_from_disk_is_that_with_the_teacher_in_memory(s2d, toy, sampled, tmp_path, estimator):
    rollouts, cache = sampled
    how = ["--mini-batch-size", 4, "--estimator", *estimator]
    runs = {"cached": ["--cache", cache], "live": ["--teacher", toy / "teacher"]}
    for name, source in runs.items():
        result = distil(s2d, toy, rollouts, tmp_path / name, *source, *how)
        assert result.code == 0, result.err
    for found, expected in zip(*(read_jsonl(tmp_path / name / "metrics.jsonl") for name in runs), strict=True):
        assert found["updates"] == 2
        assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4, abs=1e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_a_cache_of_another_teacher_than_that_of_the_warmup_is_told_of(s2d, toy, few, rollouts, sampled, tmp_path):
    on_disk, cache = sampled
    models = ["--student", toy / "student", "--teacher", toy / "student"]
    assert s2d("fkl-warmup", *models, "--rollouts", rollouts, "-o", tmp_path / "warm", "--steps", 1).code == 0
    result = s2d("opd", "--student", tmp_path / "warm", "--rollouts", on_disk, "--cache", cache, "-o", tmp_path / "run", "--steps", 1)
    assert result.code == 0, result.err
    assert f"warm was warmed up by {toy / 'student'}, and {cache} holds {toy / 'teacher'}" in result.err


def test_what_opd_cannot_learn_from_is_refused(s2d, toy, few, cache, sampled, tmp_path):
    rollouts, hidden = sampled
    teacher = ["--teacher", toy / "teacher"]
    for more, code, message in (
        ([], 2, "choose one teacher"),
        (["--cache", hidden, *teacher], 2, "choose one teacher"),
        (["--cache", hidden, few], 2, "both PROBLEMS and --rollouts"),
        (["--cache", hidden, "-n", 2], 2, "-n applies to sampling"),
        (["--cache", hidden, "--offload"], 2, "--offload applies to a teacher in memory"),
        (["--cache", cache], 1, "are others than those that were scored"),
        (["--teacher", "http://127.0.0.1:9"], 2, "the teacher's whole distribution is needed"),
        (["--teacher", "http://127.0.0.1", "--estimator", "top-k"], 2, "--teacher 'http://127.0.0.1': URL names no port"),
        (["--teacher", "http://127.0.0.1:9", "--estimator", "top-k", "--temperature", 0.5], 2, "a server scores at temperature 1"),
    ):
        result = distil(s2d, toy, rollouts, tmp_path / "run", *more)
        assert (result.code, result.err.count("\n")) == (code, 1), result.err
        assert message in result.err
    result = s2d("opd", "--student", toy / "student", few, "--cache", hidden, "-o", tmp_path / "run")
    assert "--cache has scores of stored rollouts" in result.err
    assert not (tmp_path / "run").exists()
