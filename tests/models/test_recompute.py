"""Layers that run again in the backward pass: the same gradients, less memory, no dropout."""

import pytest
import torch
from memory import peak_bytes
from tiny import tiny

from s2dcli.errors import ModelError
from s2dcli.models.recompute import recompute_layers

IDS = torch.arange(3, 39).reshape(2, 18)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, use_cache=False).logits.log_softmax(-1)[..., 7].sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma2", "cohere"])
def test_gradients_are_the_same(family, autocast):
    model = tiny(family)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = gradients(model)
        recompute_layers(model)
        again = gradients(model)
    assert again.keys() == kept.keys() == dict(model.named_parameters()).keys()
    for name in kept:
        assert (again[name] - kept[name]).norm() <= 1e-5 * kept[name].norm(), name


def test_dropout_stays_off():
    model = tiny("gpt2")
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    before = model(IDS).logits
    recompute_layers(model)
    assert torch.equal(model(IDS, use_cache=False).logits, before)
    assert not any(module.training for module in model.modules())


def test_sampling_keeps_its_cache():
    model = tiny("qwen3")
    plain = model.generate(IDS, max_new_tokens=8, do_sample=False)
    recompute_layers(model)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    assert cache.get_seq_length() == 18
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), plain)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ModelError, match="--gradient-checkpointing"):
        recompute_layers(torch.nn.Linear(2, 2))


def test_a_deep_narrow_model_takes_a_fraction_of_the_memory():
    """24 layers of 64, 4096 tokens: measured 566 MB without and 56 MB with, of which 25 MB are the layers' inputs."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=192, num_hidden_layers=24, num_attention_heads=2, num_key_value_heads=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 40, (8, 512))

    def peak() -> int:
        step = lambda batch: model.base_model(batch, use_cache=False).last_hidden_state.sum().backward()  # noqa: E731
        return peak_bytes(lambda: step(ids[:1, :8]), lambda: step(ids))

    kept = peak()
    recompute_layers(model)
    again = peak()
    assert kept > 500e6
    assert again < 0.2 * kept
