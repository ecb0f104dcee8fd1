"""Adapters: what they add, what they leave alone, and that their merged weights compute the same."""

import sys

import pytest
import torch
from families import FAMILIES as ALL_FAMILIES
from families import family
from tiny import VOCABULARY, scores, tiny

from s2dcli.errors import UsageError
from s2dcli.files.checkpoint import save_weights
from s2dcli.models.adapters import Adapter
from s2dcli.models.batching import Row
from s2dcli.models.policy import Policy

FAMILIES = ["qwen3", "llama", "gpt2", "gemma2", "cohere"]
IDS = torch.arange(3, 20)[None]


def adapted(family: str, **changed):
    """A model with an adapter that has learnt something, and what the model said before."""
    model = tiny(family)
    before = model(IDS).logits.detach()
    adapter = Adapter(model, **{"rank": 4, "alpha": None, "targets": None, "seed": 0, **changed})
    assert torch.equal(model(IDS).logits, before)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, adapter, before


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_the_model_as_it_was_and_leaves_the_adapter_trainable(family):
    model, adapter, before = adapted(family)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    now = model(IDS).logits
    assert (now - before).abs().max() > 1e-2
    with adapter.off(), torch.no_grad():
        assert torch.equal(model(IDS).logits, before)
    assert torch.equal(model(IDS).logits, now)
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_hidden_states_are_those_of_the_adapted_model(family):
    model, _, _ = adapted(family)
    row = Row(IDS[0, :5].tolist(), IDS[0, 5:].tolist())
    (found,) = scores(Policy(model, VOCABULARY), [row], tokens_per_batch=100, pad_id=0)
    exact = model(IDS).logits[0, 4:-1].log_softmax(-1).gather(1, IDS[0, 5:, None])[:, 0]
    assert found == pytest.approx(exact.tolist(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_compute_the_same_in_a_plain_model(family, dtype):
    model, adapter, _ = adapted(family)
    now = model(IDS).logits
    state = adapter.merged(dtype)
    assert torch.equal(model(IDS).logits, now)
    plain = tiny(family, seed=5)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    if dtype == torch.float32:
        assert (plain(IDS).logits - now).abs().max() < 1e-4
    else:
        assert dtype in {tensor.dtype for tensor in state.values()}
        assert (plain(IDS).logits - now).norm() < 0.05 * now.norm()


@pytest.mark.parametrize("name", sorted(set(ALL_FAMILIES) - {"modernbert-decoder"}))
def test_a_saved_checkpoint_of_any_family_says_what_the_adapted_model_says(tmp_path, name):
    import transformers

    model = family(name)
    adapter = Adapter(model, rank=2, alpha=None, targets=None, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        before = model(IDS, use_cache=False).logits.log_softmax(-1)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.02)
        now = model(IDS, use_cache=False).logits.log_softmax(-1)
        save_weights(tmp_path / "saved", model, adapter.merged(torch.float32), torch.float32)
        saved, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
        again = saved.eval()(IDS, use_cache=False).logits.log_softmax(-1)
    assert not any(report.values())
    assert (now - before).abs().max() > 1e-3
    torch.testing.assert_close(again, now, atol=1e-5, rtol=3e-5)


def test_experts_are_adapted():
    model = family("qwen3_moe")
    Adapter(model, rank=2, alpha=None, targets=None, seed=0)
    assert any("experts" in name for name, weight in model.named_parameters() if weight.requires_grad)
    with pytest.raises(UsageError, match="does not run 'dt_proj' as a linear layer"):
        Adapter(family("jamba"), rank=2, alpha=None, targets="q_proj,dt_proj", seed=0)


def test_saved_adapters_load_with_peft(tmp_path):
    from peft import PeftModel

    model, adapter, _ = adapted("qwen3", alpha=3.0, targets="q_proj,v_proj,down_proj")
    adapter.save(tmp_path / "adapter", adapter.state())
    again = PeftModel.from_pretrained(tiny("qwen3"), tmp_path / "adapter")
    assert again.peft_config["default"].r == 4
    assert again.peft_config["default"].lora_alpha == 3.0
    assert (again(IDS).logits - model(IDS).logits).abs().max() < 1e-6


def test_targets_and_scale():
    model, _, _ = adapted("llama", targets="q_proj, model.layers.1.mlp.up_proj")
    names = {name.split(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    small, _, before = adapted("llama", alpha=0.0)
    assert torch.equal(small(IDS).logits, before)
    everything = {name.split(".")[-2] for name in adapted("llama")[1]._layers}
    assert everything == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_seed_alone_draws_the_adapter():
    first, again, other = (adapted("llama", seed=seed)[1].merged(torch.float32) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_an_adapter_beside_bfloat16_weights_is_float32():
    model = tiny("qwen3").bfloat16()
    Adapter(model, rank=2, alpha=None, targets=None, seed=0)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj,lm_head", "'lm_head' is the head"),
        ("q_porj", "no layer 'q_porj'.*did you mean 'q_proj'"),
        ("embed_tokens", "'embed_tokens' is no linear layer"),
        ("mlp", "'mlp' is no linear layer"),
        ("q_proj,", "no layer ''"),
    ],
)
def test_targets_that_are_refused(targets, message):
    with pytest.raises(UsageError, match=message):
        Adapter(tiny("llama"), rank=2, alpha=None, targets=targets, seed=0)


def test_without_peft_the_command_that_brings_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 's2d\[lora\]'"):
        Adapter(tiny("llama"), rank=2, alpha=None, targets=None, seed=0)
