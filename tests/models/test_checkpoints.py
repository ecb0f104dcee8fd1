"""What a CKPT argument may be, and the check of heads that s2d does not know."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny

from s2dcli.engines.base import Request, SamplingParams
from s2dcli.engines.transformers import TransformersEngine
from s2dcli.errors import ModelError, UsageError
from s2dcli.models.batching import Row, micro_batches
from s2dcli.models.checkpoints import load, pick_device, require_same_eos, resolve, saved_dtype
from s2dcli.models.policy import Policy
from s2dcli.models.prompts import load_tokenizer
from s2dcli.models.selftest import self_test
from s2dcli.train.targets import ExactTargets
from s2dcli.train.vocab import divergence_loss, forward_kl, jsd, reverse_kl


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
    self_test(model, VOCABULARY, "llama")
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) * 1.3
    with pytest.raises(ModelError, match="transforms its logits in a way s2d does not know"):
        self_test(model, VOCABULARY, "odd")


def test_a_model_narrower_than_its_tokenizer_is_refused():
    with pytest.raises(ModelError, match="the tokenizer knows 41 ids, the model only 40"):
        self_test(tiny("llama"), VOCABULARY + 1, "narrow")


def changed(toy, folder, edit) -> str:
    """A copy of the toy teacher whose tensors `edit` has changed."""
    shutil.copytree(toy / "teacher", folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


ROLES = {
    "eval": ["eval", "--model", "BAD", "PROBLEMS", "-k", 1, "--max-tokens", 4],
    "trained": ["grpo", "--model", "BAD", "PROBLEMS", "-o", "OUT", "--steps", 1, "--max-tokens", 4],
    "lora parent": ["grpo", "--model", "BAD", "PROBLEMS", "-o", "OUT", "--steps", 1, "--max-tokens", 4, "--lora-rank", 2],
    "teacher": ["opd", "--teacher", "BAD", "--student", "GOOD", "PROBLEMS", "-o", "OUT", "--steps", 1, "--max-tokens", 4],
    "rollout": ["rollout", "--model", "BAD", "PROBLEMS", "-n", 1, "--max-tokens", 4],
}


@pytest.mark.parametrize("role", ROLES)
def test_a_missing_weight_is_refused_by_name_in_every_role(s2d, toy, few, tmp_path, role):
    bad = changed(toy, tmp_path / "bad", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    names = {"BAD": bad, "GOOD": toy / "student", "PROBLEMS": few, "OUT": tmp_path / "out"}
    result = s2d(*(names.get(word, word) for word in ROLES[role]))
    assert result.code == 1
    assert result.out == b""
    assert "lacks weights of Qwen3ForCausalLM: model.layers.1.mlp.up_proj.weight" in result.err


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "holds weights that Qwen3ForCausalLM does not have: extra"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
            r"another shape than config.json gives Qwen3ForCausalLM: model.norm.weight \(\[3\] in place of",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.0" in name],
            "lacks weights of Qwen3ForCausalLM: .* and 8 more",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(toy, tmp_path, edit, message):
    with pytest.raises(ModelError, match=message):
        load(resolve(changed(toy, tmp_path / "bad", edit)), device="cpu")


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma2", "cohere"])
def test_tied_weights_and_buffers_may_be_left_out(toy, tmp_path, family):
    """What transformers itself writes of a family loads, with the buffers of older versions beside it."""
    model = tiny(family)
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(toy / "teacher" / name, tmp_path / "model" / name)
    if family == "gpt2":
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    loaded = load(resolve(str(tmp_path / "model")), device="cpu")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)


def sharded(toy, folder):
    """The toy teacher in two shards with an index."""
    shutil.copytree(toy / "teacher", folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_weights_outside_the_folder_are_refused(toy, tmp_path):
    folder = sharded(toy, tmp_path / "sharded")
    before = resolve(str(folder)).weights_sha256
    load(resolve(str(folder)), device="cpu")
    tensors = load_file(folder / "two.safetensors")
    tensors["model.norm.weight"] = tensors.get("model.norm.weight", torch.ones(1)) + 1
    save_file(tensors, folder / "two.safetensors", metadata={"format": "pt"})
    assert resolve(str(folder)).weights_sha256 != before
    (tmp_path / "other").mkdir()
    shutil.move(folder / "two.safetensors", tmp_path / "other" / "two.safetensors")
    index = folder / "model.safetensors.index.json"
    for name, message in (
        ("../other/two.safetensors", "names weights outside the checkpoint's folder"),
        ("two.safetensors", "which is not there"),
    ):
        index.write_text(
            index.read_text().replace('"two.safetensors"', json.dumps(name)).replace('"../other/two.safetensors"', json.dumps(name))
        )
        with pytest.raises(ModelError, match=message):
            resolve(str(folder))


def test_a_folder_with_an_adapter_does_not_load_its_base_from_elsewhere(toy, tmp_path):
    shutil.copytree(toy / "student", tmp_path / "bad")
    (tmp_path / "bad" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(toy / "teacher"), "peft_type": "LORA"})
    )
    with pytest.raises(ModelError, match="holds an adapter"):
        resolve(str(tmp_path / "bad"))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DAMAGES = {
    "cut weights": ("model.safetensors", lambda data: data[:-100], "model.safetensors: is damaged or cut off"),
    "cut header": ("model.safetensors", lambda data: data[:20], "model.safetensors: is damaged or cut off"),
    "empty weights": ("model.safetensors", lambda data: b"", "model.safetensors: is empty"),
    "pointer": ("model.safetensors", lambda data: LFS, "is a Git LFS pointer in place of the weights; git lfs pull"),
    "html": ("model.safetensors", lambda data: b"<html>" * 9, "model.safetensors: is damaged or cut off"),
    "config cut": ("config.json", lambda data: data[:-30], "config.json: is not JSON"),
    "config BOM": ("config.json", lambda data: b"\xef\xbb\xbf" + data, "config.json: begins with a byte order mark"),
    "config UTF-16": ("config.json", lambda data: data.decode().encode("utf-16"), "config.json: is not UTF-8"),
    "config list": ("config.json", lambda data: b"[]", "config.json: must hold one JSON object"),
    "tokenizer config": ("tokenizer_config.json", lambda data: b"{", "tokenizer_config.json: is not JSON"),
    "tokenizer": ("tokenizer.json", lambda data: data[:50], "cannot load the tokenizer"),
    "eos text": (
        "generation_config.json",
        lambda data: b'{"eos_token_id": "3"}',
        'eos_token_id must be a token id or a list of them, not "3"',
    ),
    "eos list": (
        "config.json",
        lambda data: data.replace(b'"eos_token_id": 3', b'"eos_token_id": [3, null, true]'),
        "eos_token_id must be a token id",
    ),
    "layers": (
        "config.json",
        lambda data: data.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 3'),
        r"cannot load|lacks weights",
    ),
    "fewer layers": (
        "config.json",
        lambda data: data.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 1'),
        r"cannot load|does not have",
    ),
    "text as size": ("config.json", lambda data: data.replace(b'"hidden_size": 32', b'"hidden_size": "32"'), "cannot load .*hidden_size"),
    "no family": ("config.json", lambda data: b"{}", "cannot load config.json|cannot load the model|cannot load the tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_named_in_one_line(s2d, toy, few, tmp_path, damage):
    name, edit, message = DAMAGES[damage]
    shutil.copytree(toy / "student", tmp_path / "bad")
    path = tmp_path / "bad" / name
    path.write_bytes(edit(path.read_bytes() if path.exists() else b""))
    result = s2d("rollout", "--model", tmp_path / "bad", few, "-n", 1, "--max-tokens", 4)
    assert result.code == 1
    assert re.search(message, result.err), result.err
    lines = [line for line in result.err.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")


def test_different_ends_of_a_pair_are_refused_with_both_named(toy, tmp_path):
    teacher = resolve(str(toy / "teacher"))
    tokenizer = load_tokenizer(toy / "student")
    require_same_eos(teacher, resolve(str(toy / "student")), tokenizer)
    shutil.copytree(toy / "student", tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    with pytest.raises(ModelError, match=r"end a completion with different tokens: 3 \(.*\) in .*teacher, 3 \(.*\), 5 \(.*\) in .*other"):
        require_same_eos(teacher, resolve(str(tmp_path / "other")), tokenizer)


def test_ids_that_no_token_has_are_neither_sampled_nor_learnt(toy, tmp_path):
    """A gap in the tokenizer's ids: probability 0 in sampling, no gradient, finite losses from both sides."""
    shutil.copytree(toy / "student", tmp_path / "gap")
    path = tmp_path / "gap" / "tokenizer.json"
    described = json.loads(path.read_text())
    dropped = next(token for token, index in described["model"]["vocab"].items() if index == 20)
    del described["model"]["vocab"][dropped]
    path.write_text(json.dumps(described))
    loaded = load(resolve(str(tmp_path / "gap")), device="cpu")
    assert loaded.vocabulary == 33
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight[20] *= 50  # so that it would be sampled every second time
    engine = TransformersEngine(loaded.model, eos_ids=[3], pad_id=0, vocabulary=33, batch_tokens=10_000)
    samples = dict(engine.generate([Request([4, 5, 6], seed) for seed in range(64)], SamplingParams(1.0, 1.0, 0, 8)))
    assert all(20 not in sample.completion_ids for sample in samples.values())
    policy = Policy(loaded.model, 33)
    rows = [Row([4, 5, 6], sample.completion_ids) for sample in samples.values()]
    (batch,) = micro_batches(rows, 10**6, 0, torch.device("cpu"))
    states = policy.states(batch)
    head = policy.head()
    weights, teacher = torch.ones(len(batch.targets_N)), replace(head, weight_VD=head.weight_VD.detach())
    for divergence in (forward_kl, reverse_kl, partial(jsd, beta=0.5)):
        loss, figures = divergence_loss(states, head, ExactTargets(states.detach() * 0.9, teacher), weights, divergence)
        assert loss.isfinite()
        assert all(values.isfinite().all() for values in figures.values())
    assert (head.logits(states).softmax(-1)[:, 20] == 0).all()
    loss.backward()
    gradient = loaded.model.get_output_embeddings().weight.grad
    assert gradient.isfinite().all()
    assert 20 in [token for row in rows for token in row.prompt_ids] or (gradient[20] == 0).all()
    assert "s2d_unused" not in " ".join(loaded.model.state_dict())
