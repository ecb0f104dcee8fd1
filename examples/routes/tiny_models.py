"""Make a random teacher and a random student of an architecture, in tiny width, with the tokenizer of another model.

python tiny_models.py qwen3|llama TOKENIZER OUT
"""

import sys
from pathlib import Path

import torch
import transformers

HIDDEN = {"teacher": 64, "student": 32}
ARCHITECTURES = {"qwen3": "Qwen3", "llama": "Llama"}


def main(architecture: str, tokenizer_folder: str, out: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    name = ARCHITECTURES[architecture]
    for role, hidden in HIDDEN.items():
        config = getattr(transformers, f"{name}Config")(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        model.save_pretrained(Path(out) / role)
        tokenizer.save_pretrained(Path(out) / role)


if __name__ == "__main__":
    main(*sys.argv[1:])
