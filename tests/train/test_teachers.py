"""Targets from a cache against those of the live teacher: loss and gradient of every encoding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, LiveAround, close, learn, ragged_rows, tiny

from s2dcli.assembly.scoring import CacheForm, LiveScorer, score_portion
from s2dcli.errors import UsageError
from s2dcli.files.teacher_cache import HEAD, CacheFolder, Meta, TeacherCache
from s2dcli.models.batching import micro_batches
from s2dcli.models.policy import Policy, freeze
from s2dcli.options import Estimator, Keep, ValueType
from s2dcli.train.objectives import Distillation, SampledDistillation
from s2dcli.train.rows import cut
from s2dcli.train.teachers import CachedTeacher, LiveTeacher, MixedTeacher, ScoredRows, TeacherBySource
from s2dcli.train.vocab import forward_kl, reverse_kl

CPU = torch.device("cpu")
WIDTH = 32


@pytest.fixture(scope="module")
def teacher():
    return freeze(Policy(tiny("llama", seed=7), VOCABULARY))


@pytest.fixture(scope="module")
def student():
    return Policy(tiny("qwen3"), VOCABULARY)


@pytest.fixture(scope="module")
def rows():
    rows = ragged_rows(8)
    for index, row in enumerate(rows):
        row.sample_index, row.logprobs = index, np.full(len(row.completion_ids), -1.0, np.float32)
    return rows


def cached(out: Path, teacher: Policy, rows, form: CacheForm) -> TeacherCache:
    """Score rows into a cache of two shards; what a manifest tells is left out."""
    manifest = {"command": "score", "inputs": [], "parents": []}
    scorer = LiveScorer.__new__(LiveScorer)
    scorer.policy, scorer.layout = teacher, {"tokens_per_batch": 40, "pad_id": 0}
    width = WIDTH if form.keep is Keep.hidden else 0
    with CacheFolder(out, manifest) as folder:
        for number, part in enumerate((rows[:3], rows[3:])):
            folder.write_shard(number, part, *score_portion(scorer, part, form, width))
        if form.keep is Keep.hidden:
            folder.write_tensors(out / HEAD, {"weight": teacher.head().weight_VD.contiguous()})
        told = {"scale": 1.0, "soft_cap": None, "unused": []}
        numbers = {"rows": len(rows), "tokens": 0, "mass": 1.0, "rounding": {}, "temperature": form.temperature, "eos_ids": [2]}
        shape = {"keep": form.keep, "k": form.k, "width": width, "dtype": form.dtype, "vocabulary": VOCABULARY}
        folder.finish(Meta(teacher={}, tokenizer_sha256="", compute_dtype="float32", head=told, **shape, **numbers), {})
        (out / "s2d.json").unlink()
    return TeacherCache(out)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(ValueType.float32, 2e-5), (ValueType.float16, 5e-3)])
@pytest.mark.parametrize(("keep", "k"), [(Keep.hidden, 0), (Keep.top_k, VOCABULARY), (Keep.top_k, 5)])
def test_loss_and_gradient_from_a_cache_are_those_of_the_live_teacher(
    tmp_path, teacher, student, rows, keep, k, dtype, tolerance, temperature, divergence
):
    cache = cached(tmp_path / "cache", teacher, rows, CacheForm(keep, k, dtype, temperature))
    exact = k in (0, VOCABULARY)
    from_disk = CachedTeacher(cache, rows, CPU, Estimator.full if exact else Estimator.top_k, None if exact else k, temperature)
    live = LiveTeacher(policy=teacher, temperature=temperature, top_k=None if exact else k)
    found, expected = (
        learn(student, rows, Distillation(teacher=source, divergence=divergence, temperature=temperature)) for source in (from_disk, live)
    )
    close(found, expected, tolerance)


@pytest.mark.parametrize(("keep", "k"), [(Keep.hidden, 0), (Keep.top_k, 9)])
def test_fewer_ids_than_a_cache_holds_leave_the_rest_to_the_tail(tmp_path, teacher, student, rows, keep, k):
    cache = cached(tmp_path / "cache", teacher, rows, CacheForm(keep, k, ValueType.float32))
    sources = CachedTeacher(cache, rows, CPU, Estimator.top_k, 4, 1.0), LiveTeacher(policy=teacher, top_k=4)
    found, expected = (learn(student, rows, Distillation(teacher=source, divergence=forward_kl, temperature=1.0)) for source in sources)
    close(found, expected, 2e-5)


@pytest.mark.parametrize(("keep", "k"), [(Keep.hidden, 0), (Keep.top_k, 3), (Keep.sampled, 0)])
def test_every_encoding_has_the_sampled_tokens(tmp_path, teacher, student, rows, keep, k):
    from s2dcli.models.scoring import score

    cache = cached(tmp_path / "cache", teacher, rows, CacheForm(keep, k, ValueType.float32))
    for row, logprobs in score(teacher, rows, tokens_per_batch=100, pad_id=0):
        row.teacher_logprobs = logprobs
    sources = CachedTeacher(cache, rows, CPU, Estimator.sampled, None, 1.0), ScoredRows()
    found, expected = (learn(student, rows, SampledDistillation(teacher=source, temperature=1.0)) for source in sources)
    close(found, expected, 2e-5)


def test_a_few_rows_in_another_order_are_found_too(tmp_path, teacher, student, rows):
    cache = cached(tmp_path / "cache", teacher, rows, CacheForm(Keep.top_k, 5, ValueType.float32))
    some = [rows[6], rows[1], rows[4]]
    sources = CachedTeacher(cache, some, CPU, Estimator.top_k, None, 1.0), LiveTeacher(policy=teacher, top_k=5)
    found, expected = (learn(student, some, Distillation(teacher=source, divergence=forward_kl, temperature=1.0)) for source in sources)
    close(found, expected, 2e-5)


@pytest.mark.parametrize(("keep", "k"), [(Keep.hidden, 0), (Keep.top_k, 5)])
def test_the_beginnings_of_rows_are_found_and_read_alone(tmp_path, teacher, student, rows, keep, k):
    cache = cached(tmp_path / "cache", teacher, rows, CacheForm(keep, k, ValueType.float32))
    shorter = cut(rows, 4)
    assert max(len(row.completion_ids) for row in shorter) == 4
    twice = cut([rows[0], rows[0]], 1)
    assert twice[0] is twice[1]
    estimator = Estimator.top_k if k else Estimator.full
    sources = CachedTeacher(cache, rows, CPU, estimator, None, 1.0), LiveTeacher(policy=teacher, top_k=k or None)
    found, expected = (learn(student, shorter, Distillation(teacher=source, divergence=forward_kl, temperature=1.0)) for source in sources)
    close(found, expected, 2e-5)


@pytest.mark.parametrize(("keep", "k"), [(Keep.hidden, 0), (Keep.top_k, VOCABULARY), (Keep.top_k, 5)])
def test_a_baseline_from_a_cache_is_that_of_the_live_teacher(tmp_path, teacher, student, rows, keep, k):
    """Of k ids and a bucket for the rest, where the cache holds no more."""
    cache = cached(tmp_path / "cache", teacher, rows, CacheForm(keep, k, ValueType.float32))
    from_disk = CachedTeacher(cache, rows, CPU, Estimator.sampled, None, 1.0, baseline=True)
    live = LiveTeacher(policy=teacher, sampled=True, baseline=True) if k != 5 else LiveAround(teacher, k)
    found, expected = (
        learn(student, rows, SampledDistillation(teacher=source, temperature=1.0, baseline=True)) for source in (from_disk, live)
    )
    close(found, expected, 5e-5)


def test_a_cached_teacher_is_mixed_with_a_live_reference(tmp_path, teacher, student, rows):
    cache = cached(tmp_path / "cache", teacher, rows, CacheForm(Keep.hidden, 0, ValueType.float32))
    reference = LiveTeacher(policy=freeze(Policy(tiny("llama", seed=8), VOCABULARY)))
    sources = CachedTeacher(cache, rows, CPU, Estimator.full, None, 1.0), LiveTeacher(policy=teacher)
    mixed = [MixedTeacher(source, reference, 1.5) for source in sources]
    assert mixed[1].others == [teacher, reference.policy]
    found, expected = (learn(student, rows, Distillation(teacher=source, divergence=reverse_kl, temperature=1.0)) for source in mixed)
    close(found, expected, 2e-5)


def test_each_source_has_its_teacher(teacher, student, rows):
    live = {name: LiveTeacher(policy=freeze(Policy(tiny("llama", seed=seed), VOCABULARY))) for name, seed in (("a", 7), ("b", 8))}
    halves = {"a": rows[:3], "b": rows[3:]}
    for name, half in halves.items():
        for row in half:
            row.dataset = name
    several = Distillation(teacher=TeacherBySource(live), divergence=reverse_kl, temperature=1.0)
    assert several.sources == ["a", "b"]
    for name, half in halves.items():
        alone = Distillation(teacher=live[name], divergence=reverse_kl, temperature=1.0)
        close(learn(student, half, several), learn(student, half, alone), 1e-6)
    for row in rows:
        row.dataset = ""


def test_rounded_distributions_never_have_a_negative_kl(tmp_path, teacher, rows):
    """A student that is the teacher, against the teacher in 11 bits."""
    cache = cached(tmp_path / "cache", teacher, rows, CacheForm(Keep.top_k, 5, ValueType.float16))
    from_disk = CachedTeacher(cache, rows, CPU, Estimator.top_k, None, 1.0)
    objective = Distillation(teacher=from_disk, divergence=forward_kl, temperature=1.0)
    twin = Policy(tiny("llama", seed=7), VOCABULARY)
    for batch in micro_batches(rows, 60, 0, CPU, share_prompts=False):
        _, figures = twin(batch, objective)
        assert (figures["kl"] >= -1e-6).all()
        assert (figures["kl"] < 1e-4).all()


@pytest.mark.parametrize(
    ("form", "wanted", "message"),
    [
        ((Keep.top_k, 5), (Estimator.full, None, 1.0), "the whole distribution is needed, the cache holds the 5 most likely ids"),
        ((Keep.sampled, 0), (Estimator.full, None, 1.0), "the cache holds the sampled tokens' log-probs"),
        ((Keep.sampled, 0), (Estimator.top_k, None, 1.0), "the cache holds the sampled tokens' log-probs; s2d score --keep top-k"),
        ((Keep.top_k, 5), (Estimator.top_k, 8, 1.0), "--top-k 8: the cache holds 5 ids a token; --top-k 5"),
        ((Keep.top_k, 5), (Estimator.top_k, None, 0.5), "at temperature 1, 0.5 is needed; --teacher-temperature 1"),
        ((Keep.sampled, 0), (Estimator.sampled, None, 1.0), "--baseline kl is the KL at each token, and the cache holds the sampled"),
    ],
)
def test_what_a_cache_does_not_hold_is_refused(tmp_path, teacher, rows, form, wanted, message):
    cache = cached(tmp_path / "cache", teacher, rows, CacheForm(*form, ValueType.float32))
    with pytest.raises(UsageError, match=message):
        CachedTeacher(cache, rows, CPU, *wanted, baseline=wanted[0] is Estimator.sampled)
