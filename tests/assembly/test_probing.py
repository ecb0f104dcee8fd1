"""What a teacher says of a student's tokens, against dense log-probs in float64."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from tiny import VOCABULARY, ragged_rows, tiny

from s2dcli.assembly.pair_figures import Samples, TokenFigures, figures_of, require_same_problems
from s2dcli.assembly.probing import LiveWatcher, Pair, ServedWatcher, look_at
from s2dcli.engines.base import Scores
from s2dcli.errors import DataError, ModelError, UsageError
from s2dcli.models.checkpoints import resolve
from s2dcli.models.policy import Policy, freeze
from s2dcli.options import EngineOptions, ModelOptions

K = 5
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def pair():
    return [tiny(family, seed=seed) for family, seed in (("qwen3", 0), ("llama", 1))]


def dense(model, row, temperature):
    """Log-probs [T, V] of a row's completion tokens, in float64."""
    ids = torch.tensor([[*row.prompt_ids.tolist(), *row.completion_ids.tolist()]])
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1, :VOCABULARY]
    return (logits / temperature).log_softmax(-1).numpy()


def expected(student, teacher, row, temperature, *, exact):
    ours, theirs = (dense(model, row, temperature) for model in (student, teacher))
    figures = []
    for p, q, token in zip(ours, theirs, row.completion_ids, strict=True):
        top_p, top_q = (set(np.argsort(-logs)[:K].tolist()) for logs in (p, q))
        both = sorted(top_p & top_q)
        kl = sum(np.exp(p) * (p - q))
        if not exact:  # over the teacher's ids and one bucket for the others
            ids, rest = sorted(top_q), sorted(set(range(len(p))) - top_q)
            tails = [np.log(np.exp(logs[rest]).sum()) for logs in (p, q)]
            kl = sum(np.exp(p[ids]) * (p[ids] - q[ids])) + np.exp(tails[0]) * (tails[0] - tails[1])
        figures.append((kl, len(both), np.exp(p[both]).sum(), np.exp(q[both]).sum(), q[token]))
    return np.array(figures).T


def check(found, rows, student, teacher, temperature, *, exact):
    assert set(found) == set(rows)
    for row, figures in found.items():
        wanted = expected(student, teacher, row, temperature, exact=exact)
        for name, values, right in zip(TokenFigures._fields, figures, wanted, strict=True):
            assert np.abs(values - right).max() < 2e-4, name  # float32 against float64


def test_a_teacher_in_memory_is_compared_over_the_whole_vocabulary(pair):
    student, teacher = pair
    rows = ragged_rows(8, group=2)
    watcher = LiveWatcher(freeze(Policy(teacher, VOCABULARY)), K, TEMPERATURE)
    policy = freeze(Policy(student, VOCABULARY))
    found = dict(look_at(policy, watcher, rows, K, TEMPERATURE, tokens_per_batch=64, pad_id=0))
    check(found, rows, student, teacher, TEMPERATURE, exact=True)
    same = dict(look_at(policy, LiveWatcher(policy, K, TEMPERATURE), rows, K, TEMPERATURE, tokens_per_batch=64, pad_id=0))
    for figures in same.values():
        assert np.abs(figures.kl).max() < 1e-5
        assert (figures.shared_ids == K).all()


def test_a_teacher_on_a_server_is_compared_over_its_top_k_and_a_bucket(pair):
    student, teacher = pair
    rows = ragged_rows(8, group=2)

    def scores(row):
        logs = dense(teacher, row, 1.0)
        ids = np.argsort(-logs, axis=1)[:, :K]
        sampled = np.take_along_axis(logs, row.completion_ids[:, None].astype(int), axis=1)[:, 0]
        return Scores(sampled.astype(np.float32), ids.astype(np.int32), np.take_along_axis(logs, ids, axis=1).astype(np.float32))

    watcher = ServedWatcher({row: scores(row) for row in rows})
    found = dict(look_at(freeze(Policy(student, VOCABULARY)), watcher, rows, K, 1.0, tokens_per_batch=64, pad_id=0))
    check(found, rows, student, teacher, 1.0, exact=False)


PROMPT_IDS, COMPLETION_IDS, QUESTION = [1, 19, 2], [7, 8, 3], "5"


def rows(problems=3, k=2, *, right=(True, False), temperature=1.0, checkpoint="", **others):
    """Graded rollouts, as `s2d verify` writes them."""
    sampler = {"model": "m", "revision": "", "step": 3, "checkpoint": checkpoint, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    return [
        {
            "problem_id": f"p{problem}", "problem_sha256": f"sha{problem}", "group_id": f"p{problem}", "sample_index": index,
            "prompt": [{"role": "user", "content": "?"}], "completion": [{"role": "assistant", "content": "!"}], "answer": "1",
            "prompt_ids": PROMPT_IDS, "completion_ids": COMPLETION_IDS, "completion_logprobs": [-1.0] * 3, "finish_reason": "stop",
            "seed": 1, "source": {}, "sampler": {**sampler, "max_tokens": 16}, "template_sha256": "",
            "reward": float(right[index % len(right)]), "label": right[index % len(right)], **others,
        }
        for problem in range(problems)
        for index in range(k)
    ]  # fmt: skip


def pair_of(toy, teacher=None, base=None):
    return Pair(str(toy / "student"), str(teacher or toy / "teacher"), base and str(base), EngineOptions(), ModelOptions())


def test_rollouts_of_another_model_or_temperature_are_refused(toy, tmp_path):
    found, path = pair_of(toy), tmp_path / "rows.jsonl"
    read = {"student": found.read_student, "teacher": found.read_teacher}
    for role, take in read.items():
        with pytest.raises(DataError, match=f"sampled by m \\(step 3\\), whose weights are not those of the {role}"):
            take(str(write_jsonl(path, rows(checkpoint="f" * 64))), 1.0)
    with pytest.raises(DataError, match=r"do not belong to the policy at --temperature 0\.5"):
        found.read_student(str(write_jsonl(path, rows())), 0.5)
    with pytest.raises(DataError, match=r"sampled at temperature 1\.0, the student at 0\.5"):
        found.read_teacher(str(path), 0.5)
    with pytest.raises(DataError, match="grade it first"):
        found.read_student(str(write_jsonl(path, [{name: row[name] for name in row if name != "reward"} for row in rows()])), 1.0)
    with pytest.raises(ModelError, match="made with another tokenizer"):
        found.read_student(str(write_jsonl(path, rows())), 1.0)
    known = rows(checkpoint=resolve(str(toy / "teacher")).weights_sha256)
    assert figures_of(found.read_teacher(str(write_jsonl(path, known)), 1.0), "x")["avg_at_k"] == 0.5


def test_another_tokenizer_and_a_base_with_the_teachers_weights_are_refused(toy, tmp_path):
    folder = shutil.copytree(toy / "teacher", tmp_path / "teacher")
    with pytest.raises(UsageError, match="--base-teacher has the teacher's weights"):
        pair_of(toy, base=folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for roles in ({"teacher": folder}, {"base": folder}):
        with pytest.raises(ModelError, match="'8' in the teacher and '7' in the student"):
            pair_of(toy, **roles)


def counted(found):
    samples = Samples()
    for row in found:
        samples.count(row)
    return samples


def test_samples_that_cannot_be_paired_are_refused():
    require_same_problems(counted(rows()), counted(rows(right=(False,))))
    with pytest.raises(DataError, match="2 samples a problem of the student and 3 of the teacher; sample both with -n 2"):
        require_same_problems(counted(rows()), counted(rows(k=3)))
    with pytest.raises(DataError, match="'p2' has rollouts of the student only"):
        require_same_problems(counted(rows()), counted(rows(problems=2)))
    with pytest.raises(DataError, match="one sample of each problem"):
        figures_of(counted(rows(k=1)), "x")
    with pytest.raises(DataError, match="no notion of right"):
        figures_of(counted(rows(label=None, reward=0.5)), "x")
    with pytest.raises(DataError, match="cannot be counted"):
        figures_of(counted(rows()[:-1]), "x")
