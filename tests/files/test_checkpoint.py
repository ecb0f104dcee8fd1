"""A step folder is whole or not there."""

import pytest
import torch
from tiny import tiny

from s2dcli.errors import DataError, UsageError
from s2dcli.files import checkpoint
from s2dcli.files.checkpoint import create_folder, save_step


def test_a_failed_save_leaves_the_previous_step_and_no_litter(toy, tmp_path, monkeypatch):
    model = tiny("llama")
    save_step(tmp_path, 1, model, toy / "student", torch.float32, {})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", fail)
    with pytest.raises(DataError, match="No space left on device"):
        save_step(tmp_path, 2, model, toy / "student", torch.float32, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]
    assert (tmp_path / "latest").read_text() == "step-000001\n"


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma2"])
def test_saved_models_load_with_the_same_logits(family, toy, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny(family)
    folder = save_step(tmp_path, 1, model, toy / "student", torch.float32, {})
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_only_folders_of_s2d_are_replaced(tmp_path):
    mine = tmp_path / "run"
    create_folder(mine, overwrite=False)
    create_folder(mine, overwrite=False)  # empty
    (mine / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="--overwrite replaces it"):
        create_folder(mine, overwrite=False)
    with pytest.raises(UsageError, match="was not made by s2d"):
        create_folder(mine, overwrite=True)
    (mine / "s2d.json").write_text("{}")
    create_folder(mine, overwrite=True)
    assert list(mine.iterdir()) == []
