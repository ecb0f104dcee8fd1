"""What a CKPT argument may be, and the check of heads that s2d does not know."""

import shutil

import pytest
import torch
from tiny import VOCABULARY, tiny

from s2dcli.errors import ModelError, UsageError
from s2dcli.models.checkpoints import load, pick_device, resolve, saved_dtype
from s2dcli.models.forward import require_known_head


def test_a_run_folder_means_its_latest_step(toy, tmp_path):
    for step in ("step-000010", "step-000020"):
        shutil.copytree(toy / "student", tmp_path / step)
    (tmp_path / "latest").write_text("step-000010\n")
    found = resolve(str(tmp_path))
    assert (found.folder, found.step, found.revision) == (tmp_path / "step-000010", 10, "")
    assert resolve(str(tmp_path / "step-000020")).step == 20
    assert found.weights_sha256 == resolve(str(toy / "student")).weights_sha256 != resolve(str(toy / "teacher")).weights_sha256


@pytest.mark.parametrize("named", ["step-000099", "../elsewhere", "/etc", "..", ".", "step-000001/../../elsewhere", ""])
def test_latest_cannot_lead_out_of_the_run_folder(tmp_path, named):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "latest").write_text(named)
    with pytest.raises(ModelError, match="which is no step in there"):
        resolve(str(tmp_path / "run"))


def test_pickled_weights_are_not_read(toy, tmp_path):
    (tmp_path / "config.json").write_text((toy / "student" / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        resolve(str(tmp_path))


def test_a_hub_id_that_cannot_be_had_says_so():
    with pytest.raises(ModelError, match="the hub did not give it"):
        resolve("nobody/no-such-model")
    with pytest.raises(UsageError, match="no such checkpoint folder"):
        resolve("./nobody")


def test_masters_are_float32_and_everything_else_is_as_asked(toy):
    checkpoint = resolve(str(toy / "student"))
    masters = load(checkpoint, device="cpu", dtype="bfloat16", masters=True)
    assert (masters.model.dtype, masters.autocast) == (torch.float32, torch.bfloat16)
    plain = load(checkpoint, device="cpu", dtype="bfloat16")
    assert (plain.model.dtype, plain.autocast) == (torch.bfloat16, None)
    assert not plain.model.training
    assert (plain.vocabulary, plain.eos_ids, plain.pad_id) == (33, (3,), 0)
    assert saved_dtype(checkpoint) == torch.float32


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="no such device"):
        pick_device("tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="sees no GPU"):
            pick_device("cuda")


def test_an_unknown_logit_transformation_is_refused():
    model = tiny("llama")
    require_known_head(model, VOCABULARY, "llama")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) * 1.3
    with pytest.raises(ModelError, match="transforms its logits in a way s2d does not know"):
        require_known_head(model, VOCABULARY, "odd")


def test_a_model_narrower_than_its_tokenizer_is_refused():
    with pytest.raises(ModelError, match="the tokenizer knows 41 ids, the model only 40"):
        require_known_head(tiny("llama"), VOCABULARY + 1, "narrow")
