"""What a teacher says of a student's tokens, against dense log-probs in float64."""

import copy

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, ragged_rows, tiny

from s2dcli.assembly.pair_figures import TokenFigures
from s2dcli.assembly.probing import LiveWatcher, ServedWatcher, look_at
from s2dcli.engines.base import Scores
from s2dcli.models.policy import Policy, freeze

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
