"""What is in a checkpoint, and which folders are written to."""

import pytest
import torch
from tiny import tiny

from s2dcli.errors import UsageError
from s2dcli.files.checkpoint import empty_folder, refuse_folder, write_checkpoint


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma2"])
def test_saved_models_load_with_the_same_logits(family, toy, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny(family)
    write_checkpoint(tmp_path, model, toy / "student", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_only_folders_of_s2d_are_replaced(tmp_path):
    mine = tmp_path / "run"
    refuse_folder(mine, overwrite=False)
    mine.mkdir()
    refuse_folder(mine, overwrite=False)  # empty
    (mine / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="--overwrite replaces it"):
        refuse_folder(mine, overwrite=False)
    with pytest.raises(UsageError, match="was not made by s2d"):
        refuse_folder(mine, overwrite=True)
    (mine / "s2d.json").write_text("{}")
    refuse_folder(mine, overwrite=True)
    empty_folder(mine)
    assert list(mine.iterdir()) == []
