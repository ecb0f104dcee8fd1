"""`--dry-run`: what a training run would do and need, from config.json and the files' headers alone."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from s2dcli.assembly.loading import adapter_of, compute_dtype
from s2dcli.models.checkpoints import Checkpoint, empty_model, num_parameters, pick_device, pick_dtype
from s2dcli.models.forward import GROWTH_SHARE
from s2dcli.models.readers import CHUNK_BYTES, CHUNK_TENSORS
from s2dcli.options import ModelOptions, Optimizer, TrainingOptions, Weights
from s2dcli.train.optimizer import BLOCK_SIZE, MIN_8BIT_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT32_BYTES = 4
NARROW_BYTES = 2  # bfloat16


def device_bytes(name: str) -> int:
    """Memory of the device that `--device` names, whoever uses it now; on a CPU the machine's."""
    device = pick_device(name)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_plan(
    student: Checkpoint,
    frozen: Sequence[Checkpoint],
    loading: ModelOptions,
    training: TrainingOptions,
    *,
    sample_tokens: int,
) -> dict[str, int]:
    """Estimate the bytes that a trainer holds at its peak, without loading weights. Raises ModelError or UsageError.

    There all the time: the weights, float32 `masters` of weights in bfloat16, AdamW's two moments, and
    the frozen models. While updating: gradients in float32, bfloat16 `casts` of float32 weights that
    compute in bfloat16, activations of one full micro-batch (see `activation_bytes`), and `logits`, the
    chunks of the loss. While sampling instead: the `cache` of
    `sample_tokens` positions (0 if nothing is sampled) and its room to grow, 2 * layers * key-value heads * head size numbers
    each. The `total` is what is
    always there and the larger of the two phases. Python, torch and CUDA themselves come on top.

    Against the measured peak of one update of a full micro-batch of 2048 tokens on a CPU, a model of 25
    million parameters in 8 layers: 15 % too much in float32, 21 % with gradient checkpointing, 14 % with
    weights in bfloat16 and under autocast, 22 % with LoRA; the toy: 44 MB planned, 31 MB taken. That counts
    what tensors occupy: glibc keeps freed memory by default, with which the process takes from 5 % (float32)
    to 41 % (checkpointing, LoRA) more than planned.
    """
    trained_model = empty_model(student, loading.trust_remote_code)
    narrow = training.weights is Weights.bfloat16
    weight_bytes = NARROW_BYTES if narrow else FLOAT32_BYTES
    compute_bytes = pick_dtype(compute_dtype(loading, training), pick_device(loading.device)).itemsize
    autocast = compute_bytes < weight_bytes
    base = num_parameters(student, loading.trust_remote_code)
    adapter = adapter_of(trained_model, training, seed=0)
    sizes = [parameter.numel() for parameter in trained_model.parameters() if parameter.requires_grad]
    trained = sum(sizes)
    head = trained_model.get_output_embeddings().weight
    # A reference is the policy with its adapter off, else it computes as the policy does; a teacher is in the compute type.
    copies = [checkpoint for checkpoint in frozen if not (adapter and checkpoint.folder == student.folder)]
    tokens = training.tokens_per_batch
    shape = _Shape(trained_model)
    always = {
        "weights_bytes": base * weight_bytes + (trained * FLOAT32_BYTES if adapter else 0),
        "masters_bytes": base * FLOAT32_BYTES if narrow and not adapter else 0,
        "optimizer_bytes": moment_bytes(sizes, training.optimizer),
        "frozen_bytes": sum(
            num_parameters(copy, loading.trust_remote_code) * (weight_bytes if copy.folder == student.folder else compute_bytes)
            for copy in copies
        ),
    }
    updating = {
        "gradients_bytes": trained * FLOAT32_BYTES,
        "casts_bytes": base * NARROW_BYTES if autocast else 0,
        "activations_bytes": activation_bytes(shape, tokens, compute_bytes, autocast, training.gradient_checkpointing),
        "logits_bytes": CHUNK_TENSORS * min(CHUNK_BYTES, tokens * head.shape[0] * FLOAT32_BYTES),
    }
    cache = {"cache_bytes": int(2 * shape.layers * shape.keys * sample_tokens * (1 + GROWTH_SHARE) * compute_bytes)}
    total = sum(always.values()) + max(sum(updating.values()), sum(cache.values()))
    return {"parameters": base, "trained_parameters": trained, **always, **updating, **cache, "total_bytes": total}


def moment_bytes(sizes: Sequence[int], optimizer: Optimizer) -> int:
    """Bytes of AdamW's two moments of tensors with `sizes` numbers."""
    if optimizer is Optimizer.adamw:
        return 2 * FLOAT32_BYTES * sum(sizes)
    small, large = ([size for size in sizes if (size >= MIN_8BIT_SIZE) is wanted] for wanted in (False, True))
    return 2 * (FLOAT32_BYTES * sum(small) + sum(large) + FLOAT32_BYTES * sum(math.ceil(size / BLOCK_SIZE) for size in large))


class _Shape:
    """Sizes of a model's layers: D hidden width, F of the feed-forward part, A of all heads, K of all key-value heads."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.layers: int = config.num_hidden_layers
        self.hidden: int = config.hidden_size
        self.inner: int = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
        self.queries: int = heads * head_size
        self.keys: int = (getattr(config, "num_key_value_heads", None) or heads) * head_size
        first = [name for name, module in model.named_modules() if "Norm" in type(module).__name__ and ".0." in name]
        self.head_norms = any("q_norm" in name for name in first)
        self.norms = len([name for name in first if "q_norm" not in name and "k_norm" not in name])


def activation_bytes(shape: _Shape, tokens: int, compute_bytes: int, autocast: bool, checkpointing: bool) -> int:
    """Estimate what the layers keep of `tokens` positions for the backward pass, and what that pass works with.

    Per token and layer, with c bytes of the compute type, n norms, and widths D hidden, F feed-forward,
    A of all heads, K of all key-value heads:

        norms      2nD numbers, float32 or, with weights in bfloat16, half of them float32
        products   2cD of inputs (5cD under autocast, which casts them for each product)
        attention  2c(A + K): queries, keys, values, output
        MLP        4cF: gate, activated gate, up, their product
        q/k norms  2(A + K) numbers, where the family has them, half of them float32

    The backward pass works with about one layer more. With gradient checkpointing a layer keeps its
    input (D), and one layer at a time is there in full.
    """
    residual_bytes = FLOAT32_BYTES if autocast else compute_bytes
    norms = shape.norms * shape.hidden * (2 * FLOAT32_BYTES if residual_bytes == FLOAT32_BYTES else FLOAT32_BYTES + compute_bytes)
    inputs = (5 if autocast else 2) * shape.hidden * compute_bytes
    attention = 2 * (shape.queries + shape.keys) * compute_bytes
    inner = 4 * shape.inner * compute_bytes
    head_norms = (shape.queries + shape.keys) * (FLOAT32_BYTES + compute_bytes) if shape.head_norms else 0
    layer = norms + inputs + attention + inner + head_norms
    kept = shape.layers * shape.hidden * residual_bytes + layer if checkpointing else shape.layers * layer
    return tokens * (kept + layer)
