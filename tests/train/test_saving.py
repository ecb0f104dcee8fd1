"""What was saved against what was trained."""

import shutil

import pytest
import torch
from tiny import training_row

from s2dcli.errors import ModelError
from s2dcli.files.checkpoint import save_weights
from s2dcli.models.checkpoints import load, resolve
from s2dcli.models.policy import Policy
from s2dcli.train.saving import TOLERANCES, rounding_loss, saved_kl

ROWS = [training_row([1, 14, 24, 14], [4, 15, 20, 3]), training_row([1, 15], [3])]


@pytest.fixture
def trained(toy):
    loaded = load(resolve(str(toy / "student")), device="cpu")
    return loaded, Policy(loaded.model, loaded.vocabulary)


def weights(loaded):
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def save(loaded, folder, dtype, change=lambda state: None):
    state = weights(loaded)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    change(state)
    save_weights(folder, loaded.model, state, dtype)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(loaded.checkpoint.folder / name, folder / name)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_that_is_the_live_policy_is_near(trained, tmp_path, dtype):
    loaded, policy = trained
    kl = saved_kl(save(loaded, tmp_path / "step", dtype), policy, loaded, ROWS, weights(loaded), dtype)
    assert 0 <= kl < 1e-9 if dtype == torch.float32 else 1e-9 < kl < 5e-2


def test_a_checkpoint_of_other_weights_stops_the_run(trained, tmp_path):
    loaded, policy = trained

    def swap(state):
        one, other = (f"model.layers.{index}.mlp.gate_proj.weight" for index in (0, 1))
        state[one], state[other] = state[other].clone(), state[one].clone()

    with pytest.raises(ModelError, match=r": model\.layers\.0\.mlp\.gate_proj\.weight is not what was trained"):
        saved_kl(save(loaded, tmp_path / "step", torch.float32, swap), policy, loaded, ROWS, weights(loaded), torch.float32)


def test_rounding_beyond_the_tolerance_is_measured_and_is_no_mistake(trained, tmp_path, monkeypatch):
    """Models with extreme weights lose more to rounding than two forward passes differ by."""
    loaded, policy = trained
    monkeypatch.setitem(TOLERANCES, torch.float32, 1e-9)
    folder = save(loaded, tmp_path / "step", torch.bfloat16)
    assert saved_kl(folder, policy, loaded, ROWS, weights(loaded), torch.bfloat16) > 1e-9


def test_weights_that_are_not_the_live_policy_stop_the_run(trained, tmp_path):
    """What an adapter merged wrongly would be: saved as given, and given wrong."""
    loaded, policy = trained

    def change(state):
        state["model.layers.0.mlp.gate_proj.weight"] *= -1

    wrong = weights(loaded)
    change(wrong)
    with pytest.raises(ModelError, match=r"the weights to be saved give a model .* nats from the one in training"):
        saved_kl(save(loaded, tmp_path / "step", torch.float32, change), policy, loaded, ROWS, wrong, torch.float32)


def test_rounding_loss_by_hand(tmp_path):
    """A step of 2^-12 from 1 vanishes in bfloat16, whose numbers are 2^-7 apart there; one of 2^-5 stays."""
    from safetensors.torch import save_file

    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "model.safetensors")
    small = {"a": torch.full((4,), 1 + 2.0**-12), "b": torch.ones(4)}
    assert rounding_loss(small, tmp_path, torch.bfloat16) == 1.0
    assert rounding_loss(small, tmp_path, torch.float32) == 0.0
    large = {"a": torch.full((4,), 1 + 2.0**-5), "b": torch.ones(4)}
    assert rounding_loss(large, tmp_path, torch.bfloat16) == 0.0
    both = {"a": small["a"], "b": large["a"]}  # 2^-12 lost of a way of (2^-5, 2^-12)
    assert rounding_loss(both, tmp_path, torch.bfloat16) == pytest.approx(2.0**-7, rel=1e-3)
    assert rounding_loss({"a": torch.ones(4)}, tmp_path, torch.bfloat16) == 0.0  # nothing has moved
