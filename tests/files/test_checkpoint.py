"""What is in a checkpoint."""

import pytest
import torch
from tiny import tiny

from s2dcli.errors import DataError
from s2dcli.files import checkpoint
from s2dcli.files.checkpoint import read_training_state, write_checkpoint, write_training_state


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma2"])
def test_saved_models_load_with_the_same_logits(family, toy, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny(family)
    write_checkpoint(tmp_path, model, toy / "student", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("limit", [1, 300, 1 << 30])
def test_training_state_comes_back_as_it_was_in_files_of_any_size(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", limit)
    tensors = {
        "master/a": torch.randn(5, 7),
        "step/a": torch.tensor(3.0),
        "state1/b": torch.arange(200, dtype=torch.uint8),
        "master/c": torch.randn(6, 4).T,
        "step/b": torch.tensor(2**40),
    }
    write_training_state(tmp_path / "state", iter(tensors.items()))
    assert len(list((tmp_path / "state").iterdir())) == {1: 5, 300: 3, 1 << 30: 1}[limit]
    again = dict(read_training_state(tmp_path / "state"))
    assert again.keys() == tensors.keys()
    assert all(again[name].dtype == tensor.dtype and torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_damaged_training_state_is_an_error_of_one_line(tmp_path):
    write_training_state(tmp_path / "state", [("master/a", torch.ones(4))])
    path = tmp_path / "state" / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="state: cannot read the training state: "):
        list(read_training_state(tmp_path / "state"))
