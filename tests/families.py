"""Tiny random models of many families, made from transformers' configs alone: windows and chunks of a few tokens.

python tests/families.py    writes the table of what each family may do, examples/FAMILIES.md
"""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import VOCABULARY

MAX_POSITIONS = 128
WINDOW = 8  # shorter than the rows of the tests
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": MAX_POSITIONS,
}
_EXPERTS = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
}
_LATENT = {
    "head_dim": None,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MAMBA = {"mamba_d_state": 8, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 4, "chunk_size": 4}
_DELTA = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_CONV = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
_WINDOW = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {**_WINDOW, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}


def _each(names: str, fields: dict) -> dict[str, dict]:
    return {name: fields for name in names.split()}  # noqa: C420 - never changed


# What each family's config needs beside _COMMON; None leaves a field out. `NAME+VARIANT` is another shape of NAME.
FAMILIES: dict[str, dict] = {
    **_each(
        """
        apertus arcee biogpt bitnet bloom cohere diffllama ernie4_5 gemma glm glm4 gpt2 gpt_bigcode gpt_neox granite
        helium hunyuan_v1_dense jais2 llama minicpm3 ministral3 mistral mpt nanochat nemotron olmo olmo2 openai-gpt
        opt persimmon phi phi3 qwen2 qwen3 rwkv seed_oss smollm3 stablelm starcoder2 xglm xlstm
        """,
        {},
    ),
    **_each("cohere2 exaone4 gemma2 gemma3_text ministral modernbert-decoder olmo3 vaultgemma", _WINDOW),
    **_each("flex_olmo gpt_oss granitemoe jetmoe mixtral olmoe phimoe", {**_EXPERTS, "sliding_window": None}),
    **_each("ernie4_5_moe glm4_moe minimax_m2 qwen2_moe qwen3_moe", _EXPERTS),
    **_each("deepseek_v2 deepseek_v3 deepseek_v32 dots1 glm_moe_dsa longcat_flash", {**_EXPERTS, **_LATENT}),
    **_each("qwen3_5_moe_text qwen3_5_text qwen3_next", {**_EXPERTS, **_DELTA}),
    "codegen": {"head_dim": None, "num_attention_heads": 4, "rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "longcat_flash": {**_EXPERTS, **_LATENT, "head_dim": 8},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon": {"head_dim": None},
    "falcon+alibi": {"head_dim": None, "alibi": True},
    "falcon_h1": {**_MAMBA, "head_dim": None, "mamba_d_ssm": 64},
    "falcon_mamba": {"state_size": 8},
    "gemma3n_text": {**_GEMMA, "laurel_rank": 8, "altup_num_inputs": 2},
    "gemma4_text": {**_GEMMA, "global_head_dim": 16, "num_global_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": WINDOW},
    "gpt_oss": {**_EXPERTS, "sliding_window": WINDOW},
    "granitemoehybrid": {**_MAMBA, **_EXPERTS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jamba": {
        **_EXPERTS,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": _CONV,
    "lfm2_moe": {**_EXPERTS, **_CONV, "num_dense_layers": 1},
    "llama+dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    },
    "llama4_text": {**_EXPERTS, "attention_chunk_size": WINDOW, "interleave_moe_layer_step": 1},
    "mamba": {"state_size": 8},
    "mamba2": {"chunk_size": 4, "head_dim": 16, "n_groups": 1, "num_heads": 4, "state_size": 8},
    "minimax": {**_EXPERTS, "block_size": 4, "layer_types": ["linear_attention", "full_attention"]},
    "mistral+window": {"sliding_window": WINDOW},
    "nemotron_h": {
        **_EXPERTS,
        "chunk_size": 4,
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_head_dim": 16,
        "mamba_num_heads": 4,
        "initializer_range": 0.1,  # state spaces round more the larger their weights are
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 1,
        "n_groups": 2,
        "num_hidden_layers": None,
        "ssm_state_size": 8,
        "topk_group": 1,
    },
    "phi3+longrope": {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 32,
        },
    },
    "recurrent_gemma": {"attention_window_size": WINDOW, "lru_width": 32, "num_hidden_layers": 3},
    "zamba2": {
        "chunk_size": 4,
        "initializer_range": 0.1,
        "layer_types": ["mamba", "hybrid"],
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_headdim": 32,
        "n_mamba_heads": 2,
        "num_mem_blocks": 1,
    },
}


def family(name: str, seed: int = 0) -> torch.nn.Module:
    """Make a random causal language model of a family, in eval mode."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.utils.logging.set_verbosity_error()
    fields = {key: value for key, value in {**_COMMON, **FAMILIES[name]}.items() if value is not None}
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[name.partition("+")[0]](**fields)).eval()


TABLE = Path(__file__).parents[1] / "examples" / "FAMILIES.md"
HEAD = """# Model families

What `s2d` makes of a family's checkpoints, found by the self-test that runs when a model is loaded; here on tiny random
models with windows and chunks of a few tokens. Made by `python tests/families.py`; `tests/models/test_families.py` compares
each line with what it finds, and every family's log-probs and gradients with plain forward passes of one row.

- *left padding*: the sampler puts prompts of different lengths into one batch; otherwise it batches those of one length.
- *cache*: the sampler computes each token once; otherwise it runs the whole row for every token, which is right, but slow.
- *shared prompts*: training runs a prompt once for all of its completions; otherwise once for each.
- *longest row*: tokens of prompt and completion together, where that is less than the positions config.json gives.
- *packing*: rows may stand one behind the other without padding, where flash or flex attention makes that worthwhile.

| family | left padding | cache | shared prompts | packing | longest row | verdict |
|---|---|---|---|---|---|---|
"""


def line(name: str) -> str:
    """Return the line of a family in the table."""
    from s2dcli.errors import ModelError
    from s2dcli.models.selftest import max_length, packs, self_test

    model = family(name)
    try:
        paths = self_test(model, VOCABULARY, name)
    except ModelError as error:
        return f"| {name} | | | | | | refused: {error.message.replace('|', '/')} |\n"
    cells = (paths.left_padding, paths.cache, paths.share_prompts, packs(model, VOCABULARY))
    longest = "" if max_length(model.config) == MAX_POSITIONS else f" {max_length(model.config) or 'no limit'}"
    verdict = "samples slowly, trains" if not paths.cache else "samples and trains"
    return f"| {name} | {' | '.join('yes' if cell else 'no' for cell in cells)} |{longest} | {verdict} |\n"


if __name__ == "__main__":
    TABLE.write_text(HEAD + "".join(line(name) for name in sorted(FAMILIES)))
