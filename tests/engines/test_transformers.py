"""Sampling: noise that belongs to the row, exact distributions, and log-probs that agree with the trainer's."""

import math

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, scores, tiny
from transformers import DynamicCache

from s2dcli.engines.base import LENGTH, STOP, Request, SamplingParams
from s2dcli.engines.transformers import TransformersEngine, choose, row_noise
from s2dcli.models import forward
from s2dcli.models.batching import Row
from s2dcli.models.policy import Policy

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16], [5, 6, 7, 8, 9, 10]]


def params(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(temperature, top_p, top_k, max_tokens)


def sample(model, requests, how, *, batch_tokens: int = 10_000, eos: tuple[int, ...] = (2,), vocabulary: int = VOCABULARY):
    engine = TransformersEngine(model, eos_ids=eos, pad_id=0, vocabulary=vocabulary, batch_tokens=batch_tokens)
    results = dict(engine.generate(requests, how))
    return [results[index] for index in range(len(requests))]


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
def test_rows_do_not_depend_on_their_batch(family):
    model = tiny(family)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS * 4)]
    together = sample(model, requests, params())
    alone = sample(model, requests, params(), batch_tokens=1)
    for first, second in zip(together, alone, strict=True):
        assert first.completion_ids == second.completion_ids
        assert first.logprobs == pytest.approx(second.logprobs, abs=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2", "cohere"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_the_trainers(family, temperature):
    model = tiny(family)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    samples = sample(model, requests, params(temperature))
    rows = [Row(request.prompt_ids, result.completion_ids) for request, result in zip(requests, samples, strict=True)]
    found = scores(Policy(model, VOCABULARY), rows, tokens_per_batch=64, pad_id=0, temperature=temperature)
    for result, ours in zip(samples, found, strict=True):
        assert result.logprobs == pytest.approx(ours, abs=1e-5)


def test_greedy_equals_generate():
    model = tiny("qwen3")
    samples = sample(model, [Request(prompt, 0) for prompt in PROMPTS], params(temperature=0.0))
    for prompt, result in zip(PROMPTS, samples, strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0)[0, len(prompt) :].tolist()
        assert result.completion_ids == expected


def test_eos_is_kept_and_ends_the_row():
    model = tiny("qwen3")
    requests = [Request(PROMPTS[0], seed) for seed in range(64)]
    samples = sample(model, requests, params(), eos=(2, 17))
    reasons = {result.finish_reason for result in samples}
    assert reasons == {STOP, LENGTH}
    for result in samples:
        assert len(result.logprobs) == len(result.completion_ids)
        if result.finish_reason == STOP:
            assert result.completion_ids[-1] in (2, 17)
        else:
            assert len(result.completion_ids) == 12
        assert not {2, 17} & set(result.completion_ids[:-1])


def test_an_eos_at_the_last_position_is_a_stop():
    model = tiny("qwen3")
    long = sample(model, [Request(PROMPTS[0], seed) for seed in range(64)], params(), eos=(2, 17))
    seed, length = next((s, len(r.completion_ids)) for s, r in enumerate(long) if r.finish_reason == STOP)
    (short,) = sample(model, [Request(PROMPTS[0], seed)], params(max_tokens=length), eos=(2, 17))
    assert short.finish_reason == STOP


def test_noise_is_that_of_a_generator_of_each_rows_seed():
    requests = [Request(PROMPTS[0], seed) for seed in (0, 1, 2**53 - 1, 2**64 - 1, 2**64 + 5)]
    expected = [np.random.Generator(np.random.Philox(key=request.seed)).random(7) for request in requests]
    assert np.array_equal(row_noise(requests, 7).numpy(), np.stack(expected))


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_cache_that_grows_in_steps_gives_the_states_of_one_that_is_copied_for_each_token(family, monkeypatch):
    model, of_B = tiny(family), torch.tensor([0, 0, 1])
    found = []
    for cache in (forward.growing_cache, lambda model: DynamicCache(config=model.config)):
        monkeypatch.setattr(forward, "growing_cache", cache)
        with torch.inference_mode():
            decoder = forward.CachedDecoder(model, [PROMPTS[0], PROMPTS[2]], of_B, 0)
            states = [decoder.step(torch.tensor([5 + t % 7, 6, 7])) for t in range(forward.GROWTH + 3)]
            decoder.keep(torch.tensor([0, 2]))
            states += [decoder.step(torch.tensor([5, 6 + t % 7])) for t in range(forward.GROWTH + 3)]
        found.append(states)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


def test_seeds_differ_repeat_and_change():
    model = tiny("qwen3")
    first, again, other = (sample(model, [Request(PROMPTS[0], seed)], params())[0] for seed in (1, 1, 2))
    assert first.completion_ids == again.completion_ids
    assert first.completion_ids != other.completion_ids


def test_ids_beyond_the_tokenizer_are_never_sampled():
    model = tiny("qwen3")
    samples = sample(model, [Request(PROMPTS[0], seed) for seed in range(32)], params(), vocabulary=20)
    assert max(max(result.completion_ids) for result in samples) < 20


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        (params(), [0.5, 0.25, 0.15, 0.1]),
        (params(top_k=2), [0.5, 0.25]),
        (params(top_p=0.6), [0.5, 0.25]),  # 0.5 alone does not reach 0.6
        (params(top_p=0.5), [0.5]),
        (params(temperature=0.5), [0.25, 0.0625, 0.0225, 0.01]),
        (params(top_k=3, top_p=0.8), [0.5, 0.25]),  # of 0.9: 0.56, 0.83
    ],
)
def test_tokens_are_drawn_by_inverting_the_cumulative_distribution(how, kept):
    order = [2, 0, 3, 1]  # the likeliest token is not the first
    probabilities = torch.zeros(4)
    probabilities[order] = torch.tensor([0.5, 0.25, 0.15, 0.1])
    expected = torch.zeros(4, dtype=torch.double)
    expected[order[: len(kept)]] = torch.tensor(kept, dtype=torch.double)
    expected /= expected.sum()
    count = 10_000
    uniforms = (torch.arange(count, dtype=torch.double) + 0.5) / count
    tokens, logprobs = choose(probabilities.log().expand(count, 4), uniforms, how)
    shares = torch.bincount(tokens, minlength=4).double() / count
    assert (shares - expected).abs().max() <= 2 / count
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-5, rtol=0)


def test_samples_follow_the_models_distribution():
    model = tiny("qwen3")
    count = 4000
    samples = sample(model, [Request(PROMPTS[1], seed) for seed in range(count)], params(max_tokens=1))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].softmax(-1)
    shares = torch.bincount(torch.tensor([result.completion_ids[0] for result in samples]), minlength=VOCABULARY) / count
    # Five standard deviations of a binomial share.
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-3).all()
    assert math.isclose(float(shares.sum()), 1.0, abs_tol=1e-6)


def test_a_wide_vocabulary_is_searched_in_two_levels_to_the_same_tokens():
    rows, vocabulary = 64, 3000
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator) * 4
    uniforms = torch.rand(rows, generator=generator, dtype=torch.double)
    uniforms[:2] = torch.tensor([0.0, 1.0 - 2**-53])
    tokens, logprobs = choose(logits, uniforms, params())
    cumulative = logits.double().softmax(-1).cumsum(-1)
    before = torch.where(tokens > 0, cumulative[torch.arange(rows), tokens - 1], 0.0)
    after = cumulative[torch.arange(rows), tokens]
    assert ((before - 1e-6 <= uniforms) & (uniforms <= after + 1e-6)).all()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[torch.arange(rows), tokens], atol=1e-5, rtol=0)


def test_masked_tokens_at_the_end_of_a_wide_vocabulary_are_never_drawn():
    logits = torch.full((1000, 1300), -torch.inf)
    logits[:, 600:610] = 0.0
    uniforms = torch.linspace(0, 1 - 2**-53, 1000, dtype=torch.double)
    tokens, _ = choose(logits, uniforms, params())
    assert set(tokens.tolist()) == set(range(600, 610))
