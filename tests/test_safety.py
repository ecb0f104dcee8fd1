"""What others wrote, weights, code, text and paths, does nothing on this machine but be read."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from s2dcli import console
from s2dcli.errors import ModelError
from s2dcli.models.checkpoints import load, resolve

SOURCES = sorted((Path(__file__).parents[1] / "s2dcli").rglob("*.py"))


def test_nothing_in_the_package_reads_a_pickle():
    found = [
        path.name
        for path in SOURCES
        if re.search(r"^\s*(import|from) (pickle|dill|joblib|shelve|marshal)\b|torch\.load\(", path.read_text(), re.M)
    ]
    assert not found


def test_loading_a_checkpoint_never_unpickles(toy, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    assert load(resolve(str(toy / "student"))).vocabulary == 33


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(toy, tmp_path, name):
    (tmp_path / "config.json").write_text((toy / "student" / "config.json").read_text())
    torch.save({}, tmp_path / name)
    with pytest.raises(ModelError, match=r"holds no \*.safetensors.*python -c .*save_pretrained.* converts it, if you trust"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("kind", ["toy_code", "qwen3"])
def test_code_that_a_checkpoint_brings_is_not_run_unless_asked_for(s2d, toy, few, tmp_path, kind):
    ran = tmp_path / "ran"
    folder = tmp_path / "model"
    shutil.copytree(toy / "student", folder)
    code = f"open({str(ran)!r}, 'a').close()\nfrom transformers import Qwen3Config, Qwen3ForCausalLM\n"
    code += "class Config(Qwen3Config):\n    model_type = 'toy_code'\nclass Model(Qwen3ForCausalLM):\n    config_class = Config\n"
    (folder / "code.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    result = s2d("rollout", "-m", folder, few, "-n", 1, "--max-tokens", 2)
    assert not ran.exists()
    assert result.code == (0 if kind == "qwen3" else 1)  # a model that transformers knows needs no code
    assert kind == "qwen3" or "--trust-remote-code" in result.err
    trusted = s2d("rollout", "-m", folder, few, "-n", 1, "--max-tokens", 2, "--trust-remote-code")
    assert trusted.code == 0, trusted.err
    assert ran.exists()


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[2J",
        "\x1b]0;title\x07",
        "\x9b31m",
        "\x00\x08\x7f",
        "\r",
        "\u202eabc",
        "\u2066x\u2069",
        "\u200f",
        "\u2028",
        "\udc80",
        "\U000e0041",
    ],
)
def test_what_drives_a_terminal_is_made_visible(text):
    shown = console.printable(f"a{text}b")
    assert not re.search("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]", shown)
    assert shown.startswith("a\\")
    assert console.printable("é√日本 🙂\tx\n") == "é√日本 🙂\tx\n"


HOSTILE = "\x1b]0;owned\x07\x9b2J\u202e\r"


def test_model_output_never_reaches_a_terminal_as_it_is(s2d, tmp_path, monkeypatch):
    """Through verify's messages, --diff, report, compare, an error that quotes a field, and a traceback."""
    monkeypatch.setenv("FORCE_COLOR", "")
    row = {"problem_sha256": HOSTILE, "answer": HOSTILE, "completion": f"\\boxed{{{HOSTILE}}}", "reward": 1.0, "label": True}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({**row, HOSTILE: 1}) + "\n" + HOSTILE + "\n")
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"name": HOSTILE, "dataset": HOSTILE, "model": HOSTILE, "checkpoint": HOSTILE, **FIGURES}))
    monkeypatch.setenv("S2D_DEBUG", "1")
    for command in (
        ["verify", "--diff", rows, "-v"],
        ["report", results],
        ["report", results, "--csv"],
        ["eval", "--rollouts", rows],
        ["compare", rows, rows],
        ["prepare", rows],
        ["lineage", f"{HOSTILE}.jsonl"],
    ):
        result = s2d(*command)
        for stream in (result.out.decode(), result.err):
            assert not re.search("[\x00-\x08\x0b-\x1f\x80-\x9f\u202e]", stream), command


FIGURES = {
    "k": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_tokens": 8,
    "problems": 1,
    "avg_at_k": 1.0,
    "se": 0.0,
    "pass_at_k": 1.0,
    "truncated": 0.0,
}
