"""vLLM itself, in this process: it samples what transformers would, and from the weights that it was given last."""

import importlib.util
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny import VOCABULARY, small, tiny
from transformers import AutoModelForCausalLM

from s2dcli.engines.base import LENGTH, STOP, Request, SamplingParams
from s2dcli.engines.transformers import TransformersEngine
from s2dcli.engines.weights import ParityGate, WeightSync
from s2dcli.errors import EngineError, UsageError
from s2dcli.files.checkpoint import ADAPTER, save_weights
from s2dcli.models.adapters import Adapter
from s2dcli.models.policy import Policy
from s2dcli.models.rows import Row
from s2dcli.models.scoring import score

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

# Longer than a block of vLLM's cache on a CPU (128 positions), so that their states are kept and found again.
PROMPTS = [[5 + (i * step) % 30 for i in range(150)] for step in (1, 7, 11)]
EOS = (2, 17)
UNUSED = (0, 1, 5, 6, 7, 11, 12, 19)
AT_1 = SamplingParams(1.0, 1.0, 0, 12)


@contextmanager
def engine_of(folder, vocabulary=VOCABULARY, unused=(), adapter=None):
    from s2dcli.engines.vllm import VllmEngine

    how = {"vocabulary": vocabulary, "unused": unused, "dtype": torch.float32, "gpu_memory_utilization": 0.02, "adapter": adapter}
    engine = VllmEngine(folder, eos_ids=EOS, **how)
    yield engine
    engine.close()


class Trained:
    """A model whose adapter is in training, as an engine follows it."""

    def __init__(self, folder, out, targets=None):
        self.out, self.updates = out, 0
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.adapter = Adapter(self.model, rank=4, alpha=None, targets=targets, seed=0)
        self.score = scorer(self.model)

    def update(self):
        self.updates += 1
        torch.manual_seed(self.updates)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))

    def adapter_bytes(self):
        return sum(tensor.nbytes for tensor in self.adapter.state().values())

    def weights_bytes(self, dtype):
        return 1

    def write_adapter(self, folder):
        self.adapter.save(folder / ADAPTER, self.adapter.state())

    def write_weights(self, folder, dtype):
        save_weights(folder, self.model, self.adapter.merged(dtype), dtype)


def test_an_adapter_is_handed_over_alone_and_followed(tmp_path, monkeypatch):
    """Before any other engine of this process: at first by layers that vLLM has put into one, then with an adapter that it refuses."""
    small("qwen3").save_pretrained(tmp_path / "base")
    trained = Trained(tmp_path / "base", tmp_path)
    with engine_of(tmp_path / "base", adapter=trained.adapter) as engine:
        sync = WeightSync(engine, gate(), trained)
        written = []
        monkeypatch.setattr(trained, "write_weights", lambda *_: written.append("merged"))
        told = []
        for _ in range(3):
            sync.begin(PROMPTS, AT_1)  # with the gate's check
            assert largest_gap(engine, trained.model) < 1e-4
            told.append(sample(engine)[1][0].logprobs)
            trained.update()
            assert largest_gap(engine, trained.model) > 0.1  # and so the gate has something to see
        assert told[0] != told[1] != told[2]
        assert (sync.alone, written) == (True, [])
        assert engine.llm.llm_engine.list_loras() == {3}  # the newest alone

        engine._adapters -= 1  # under a number that vLLM knows it keeps the adapter that it has
        with pytest.raises(EngineError, match="does not sample from the weights that it should"):
            sync.begin(PROMPTS, AT_1)
        sync.begin(PROMPTS, AT_1)
        assert largest_gap(engine, trained.model) < 1e-4

        state = trained.adapter.state()
        for name, message in (("layers.1", "layers.7"), "would not compute with"), (("q_proj", "x_proj"), "cannot load the adapter"):
            folder = tmp_path / name[1]
            trained.adapter.save(folder, {key.replace(*name): value for key, value in state.items()})
            with pytest.raises(EngineError, match=message):
                engine.load_adapter(folder)
        monkeypatch.undo()
        strange = WeightSync(engine, gate(), trained)
        monkeypatch.setattr(
            trained, "write_adapter", lambda folder: trained.adapter.save(folder / ADAPTER, {"x_proj.lora_A.weight": state.popitem()[1]})
        )
        strange.begin(PROMPTS, AT_1)
        assert strange.alone is False
        assert largest_gap(engine, trained.model) < 1e-4  # merged
        assert not engine.llm.llm_engine.list_loras()


def test_adapters_that_vllm_does_not_take_are_known_before_it_starts(tmp_path):
    from s2dcli.engines.vllm import _merged_only

    def reason(model, rank=4):
        model.save_pretrained(tmp_path / type(model).__name__)
        return _merged_only(Adapter(model, rank, None, None, 0), tmp_path / type(model).__name__, False)

    assert reason(small("llama")) == ""
    assert "ranks up to 512" in reason(small("llama"), 513)
    assert "is not the weight of a linear layer" in reason(tiny("gpt2"))


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def models(request, tmp_path_factory):
    """Two models of one shape with other weights, and their folders."""
    made = []
    for seed in range(2):
        model = small(request.param, seed)
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        made.append((model, folder))
    return made


@pytest.fixture(scope="module")
def others(models):
    """What other engines sample: of the second model, and of the first over 12 of 20 ids. A process holds one engine at a time."""
    with engine_of(models[1][1]) as engine:
        second = sample(engine)[1]
    with engine_of(models[0][1], vocabulary=20, unused=UNUSED) as engine:
        narrow = [sample(engine, SamplingParams(temperature, 1.0, 0, 12), rows=16)[1] for temperature in (1.0, 0.0)]
    return SimpleNamespace(second=second, narrow=narrow)


@pytest.fixture(scope="module")
def engine(models, others):
    with engine_of(models[0][1]) as engine:
        yield engine


@pytest.fixture
def fresh(engine, models):
    """The engine with the first model's weights, whatever the test before has done."""
    yield engine
    engine.load_weights(models[0][1])


def sample(engine, how=AT_1, rows=8):
    requests = [Request(PROMPTS[row % len(PROMPTS)], row) for row in range(rows)]
    results = dict(engine.generate(requests, how))
    assert sorted(results) == list(range(rows))
    return requests, [results[row] for row in range(rows)]


def scorer(model):
    return lambda rows, temperature: score(Policy(model, VOCABULARY), rows, tokens_per_batch=2048, pad_id=0, temperature=temperature)


def largest_gap(engine, model, how=AT_1):
    requests, samples = sample(engine, how)
    rows = [(request.prompt_ids, result.completion_ids) for request, result in zip(requests, samples, strict=True)]
    rows = [Row(*row) for row in rows]
    found = dict(scorer(model)(rows, how.temperature or 1.0))
    scores = [found[row].tolist() for row in rows]
    return max(abs(a - b) for ours, result in zip(scores, samples, strict=True) for a, b in zip(ours, result.logprobs, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_log_probs_are_those_of_transformers(engine, models, temperature):
    assert largest_gap(engine, models[0][0], SamplingParams(temperature, 1.0, 0, 12)) < 1e-4


def gaps_of_scores(engine, model, rows, k=7):
    """How far an engine's scores of rows are from a model's: of the tokens' own log-probs, and of those of the k likeliest ids."""
    found = dict(engine.score(rows, k))
    assert sorted(found) == list(range(len(rows)))
    gaps = []
    for index, row in enumerate(rows):
        with torch.no_grad():
            whole = torch.tensor([row.prompt_ids.tolist() + row.completion_ids.tolist()])
            exact = model(whole).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        scores = found[index]
        own = exact.gather(1, torch.tensor(row.completion_ids.tolist())[:, None])[:, 0]
        gaps.append((torch.from_numpy(scores.sampled_T) - own).abs().max())
        gaps.append((torch.from_numpy(scores.logprobs_TK) - exact.topk(k, dim=-1).values).abs().max())
        gaps.append((exact.gather(1, torch.from_numpy(scores.ids_TK).long()) - torch.from_numpy(scores.logprobs_TK)).abs().max())
    return max(gap.item() for gap in gaps)


def test_scores_are_those_of_transformers_whatever_prefix_is_cached(engine, fresh, models):
    """Twice in a row, with another row of the same prefix between; and of the weights that were loaded last."""
    rows = [Row(prompt, [5 + (index * 3) % 30 for index in range(12)]) for prompt in PROMPTS]
    between = [Row(prompt, [6, 9, 2]) for prompt in PROMPTS]
    for given in (rows, between, rows):
        assert gaps_of_scores(engine, models[0][0], given) < 1e-4
    engine.load_weights(models[1][1])
    assert gaps_of_scores(engine, models[1][0], rows) < 1e-4
    with pytest.raises(EngineError, match="does not score with the weights that it should"):
        ParityGate(torch.float32).check_scores(engine, scorer(models[0][0]), rows)


def test_greedy_takes_the_tokens_of_transformers(engine, models):
    how = SamplingParams(0.0, 1.0, 0, 12)
    other = TransformersEngine(models[0][0], eos_ids=EOS, pad_id=0, vocabulary=VOCABULARY, batch_tokens=10_000)
    assert [s.completion_ids for s in sample(engine, how)[1]] == [s.completion_ids for s in sample(other, how)[1]]


def test_top_k_and_top_p_cut_the_distribution_that_log_probs_belong_to(engine, models):
    """One position, many draws: only kept tokens appear, with their renormalised log-probs."""
    with torch.no_grad():
        probs_V = models[0][0](torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    order = probs_V.argsort(descending=True).tolist()
    kept = next(n for n in range(1, VOCABULARY) if probs_V[order[:n]].sum() >= 0.7)
    for how, count in ((SamplingParams(1.0, 1.0, 3, 1), 3), (SamplingParams(1.0, 0.7, 0, 1), kept)):
        expected = {token: (probs_V[token] / probs_V[order[:count]].sum()).log().item() for token in order[:count]}
        drawn = [result for _, result in engine.generate([Request(PROMPTS[0], seed) for seed in range(64)], how)]
        assert len({result.completion_ids[0] for result in drawn}) > 1
        for result in drawn:
            assert result.logprobs[0] == pytest.approx(expected[result.completion_ids[0]], abs=1e-4)


def test_a_row_depends_on_its_seed_and_not_on_its_neighbours(engine):
    _, together = sample(engine)
    alone = dict(engine.generate([Request(PROMPTS[5 % len(PROMPTS)], 5)], AT_1))[0]
    assert together[5].completion_ids == alone.completion_ids
    assert together[0].completion_ids != together[3].completion_ids  # the same prompt


def test_every_eos_ends_a_row_and_is_kept(engine):
    _, samples = sample(engine, SamplingParams(1.0, 1.0, 0, 40), rows=64)
    assert {result.finish_reason for result in samples} == {STOP, LENGTH}
    assert {result.completion_ids[-1] for result in samples if result.finish_reason == STOP} == set(EOS)
    for result in samples:
        assert len(result.logprobs) == len(result.completion_ids)
        assert not set(EOS) & set(result.completion_ids[:-1])
        assert result.finish_reason == STOP or len(result.completion_ids) == 40


def test_it_takes_more_rows_than_it_runs_at_once_and_a_caller_may_leave(engine):
    asked = []

    def requests():
        for seed in range(10 * engine.window):
            asked.append(seed)
            yield Request([5, 6, 7], seed)

    results = engine.generate(requests(), SamplingParams(1.0, 1.0, 0, 2))
    for _ in range(engine.window):
        next(results)
    assert len(asked) <= 3 * engine.window  # the rest waits outside
    results.close()
    assert len(sample(engine)[1]) == 8


def test_reloaded_weights_are_those_of_a_fresh_engine_and_of_transformers(fresh, models, others):
    (old, _), (new, folder) = models
    assert largest_gap(fresh, old) < 1e-4
    fresh.load_weights(folder)
    assert largest_gap(fresh, new) < 1e-4
    assert [result.completion_ids for result in sample(fresh)[1]] == [result.completion_ids for result in others.second]


def gate():
    return ParityGate(torch.float32)


def test_the_gate_lets_the_right_weights_pass(fresh, models):
    (old, _), (new, folder) = models
    assert gate().check(fresh, scorer(old), PROMPTS, AT_1) < 1e-4
    fresh.load_weights(folder)
    assert gate().check(fresh, scorer(new), PROMPTS, AT_1) < 1e-4


def test_the_gate_stops_old_weights(fresh, models):
    with pytest.raises(EngineError, match=r"nats off on average.*the tolerance is 0\.001; usual causes"):
        gate().check(fresh, scorer(models[1][0]), PROMPTS, AT_1)


def test_the_gate_stops_what_vllms_own_reload_leaves_behind(fresh, models):
    (_, _), (new, folder) = models
    fresh.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    fresh.llm.reset_prefix_cache()
    if new.config.tie_word_embeddings:  # the packed copy of the head
        with pytest.raises(EngineError):
            gate().check(fresh, scorer(new), PROMPTS, AT_1)
    else:
        gate().check(fresh, scorer(new), PROMPTS, AT_1)


def test_the_gate_stops_a_prefix_cache_of_old_weights(fresh, models):
    sample(fresh)
    fresh.llm.collective_rpc("s2d_load_weights", args=(str(models[1][1]),))
    with pytest.raises(EngineError):
        gate().check(fresh, scorer(models[1][0]), PROMPTS, AT_1)


class Changed:
    """An engine that is asked for something else than the gate thinks."""

    name = "changed"

    def __init__(self, engine, request=lambda request: request, params=lambda params: params):
        self.engine, self.request, self.params = engine, request, params

    def generate(self, requests, params):
        yield from self.engine.generate(map(self.request, requests), self.params(params))


def test_the_gate_stops_a_second_bos_and_another_temperature(engine, models):
    score_with = scorer(models[0][0])
    with pytest.raises(EngineError):
        gate().check(Changed(engine, request=lambda r: Request([1, *r.prompt_ids], r.seed)), score_with, PROMPTS, AT_1)
    with pytest.raises(EngineError):
        gate().check(Changed(engine, params=lambda p: SamplingParams(0.9, p.top_p, p.top_k, p.max_tokens)), score_with, PROMPTS, AT_1)


def test_temperatures_that_vllm_would_raise_are_refused(engine):
    with pytest.raises(UsageError, match=r"at least 0\.01"):
        next(engine.generate([Request([5], 0)], SamplingParams(0.001, 1.0, 0, 1)))


def test_ids_that_no_token_has_are_never_sampled(others, models):
    """Neither beyond the tokenizer nor below its highest id, and the log-probs are those of the ids that are left."""
    allowed = [index for index in range(20) if index not in UNUSED]
    for samples in others.narrow:
        assert {index for result in samples for index in result.completion_ids} <= set(allowed)
    with torch.no_grad():
        first_V = models[0][0](torch.tensor([PROMPTS[0]])).logits[0, -1]
    drawn = others.narrow[0][0]
    expected = first_V[drawn.completion_ids[0]] - first_V[allowed].logsumexp(0)
    assert drawn.logprobs[0] == pytest.approx(expected.item(), abs=1e-4)


def test_weights_that_are_not_there_are_one_line(fresh, tmp_path):
    with pytest.raises(EngineError, match="cannot load the weights"):
        fresh.load_weights(tmp_path / "nowhere")
