"""`--dry-run`: what a training run would do and need, from config.json and the files' headers alone.

Under several processes that is what one of them does and needs. Where each holds all weights (DDP) that is what a single one does:
gradients are added up in place. With FSDP2 (models/sharding.py) each holds its rows of every weight, master, gradient and
moment, and what is gathered at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from s2dcli import world
from s2dcli.assembly.loading import adapter_of, compute_dtype
from s2dcli.errors import UsageError
from s2dcli.models.checkpoints import Checkpoint, empty_model, num_parameters, pick_device, pick_dtype
from s2dcli.models.forward import GROWTH_SHARE
from s2dcli.models.readers import MOST_MODELS, chunk_bytes
from s2dcli.models.sharding import layers_of
from s2dcli.options import ModelOptions, Optimizer, RunOptions, Sharding, TrainingOptions, Weights
from s2dcli.train.optimizer import BLOCK_SIZE, MIN_8BIT_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT32_BYTES = 4
NARROW_BYTES = 2  # bfloat16
# Layers that FSDP2 holds whole at a time: the one at work, and the next, which is gathered meanwhile.
GATHERED_LAYERS = 2


@dataclass(frozen=True)
class Processes:
    """How many share a training. `sharded`: each holds a part of every weight (FSDP2), of which it gathers a layer at a time.

    `reshards`: a layer is given up after its forward pass and gathered again for the backward pass.
    """

    number: int = 1
    sharded: bool = False
    reshards: bool = True

    def held(self, shapes: Iterable[torch.Size]) -> int:
        """Numbers that one process holds of tensors with these shapes: FSDP2 deals out the rows, and the first gets most."""
        if not self.sharded:
            return sum(shape.numel() for shape in shapes)
        return sum(math.ceil(shape[0] / self.number) * shape[1:].numel() for shape in shapes)


def processes_of(running: RunOptions) -> Processes:
    """Return the processes that were launched, or that a plan is for. Raises UsageError if both are told."""
    if running.processes is None:
        return Processes(world.size(), world.shards(), world.reshards())
    if world.size() > 1:
        raise UsageError(f"--processes {running.processes}: {world.size()} were launched, and the plan is for these", hint="leave it out")
    return Processes(running.processes, running.processes > 1 and running.sharding is Sharding.fsdp2)


def device_bytes(name: str, processes: Processes = Processes()) -> int | None:
    """Memory that one process has of the device that `--device` names, whoever uses it now; None if the device is not here.

    On a CPU it is the machine's, which all processes share.
    """
    device = pick_device(name, here=False)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes.number


def memory_plan(
    student: Checkpoint,
    frozen: Sequence[Checkpoint],
    loading: ModelOptions,
    training: TrainingOptions,
    *,
    sample_tokens: int,
    sampler_bytes: int = 0,
    ahead: bool = False,
    longest: int = 0,
    processes: Processes = Processes(),
) -> dict[str, int]:
    """Estimate the bytes that a trainer's process holds at its peak, without loading weights. Raises ModelError or UsageError.

    There all the time: the weights, float32 `masters` of weights in bfloat16, AdamW's two moments, and
    the frozen models. While updating: gradients in float32, bfloat16 `casts` of float32 weights that
    compute in bfloat16, activations of one full micro-batch (see `activation_bytes`), or of one row of `longest` tokens where
    that is more, and `logits`, the chunks of the loss. While sampling instead: the `cache` of
    `sample_tokens` positions (0 if nothing is sampled here) and its room to grow, 2 * layers * key-value heads * head size numbers
    each; or the `sampler_bytes` of an engine with weights of its own. The `total` is what is
    always there and the larger of the two phases, or both where sampling runs `ahead`. Python, torch and CUDA themselves come on top.

    With FSDP2 a process holds its rows of weights, gradients, moments and frozen models, or of masters in the weights' place,
    from which bfloat16 is gathered; what it has `gathered` while updating is told at `gathered_bytes`, and the transformers engine
    samples from a whole `replica`.

    Against the measured peak of one update of a full micro-batch of 2048 tokens on a CPU, a model of 25
    million parameters in 8 layers: 15 % too much in float32, 21 % with gradient checkpointing, 14 % with
    weights in bfloat16 and under autocast, 22 % with LoRA; the toy: 44 MB planned, 31 MB taken. That counts
    what tensors occupy: glibc keeps freed memory by default, with which the process takes from 5 % (float32)
    to 41 % (checkpointing, LoRA) more than planned. Of several processes: tests/bench/bench_plan.py, examples/PLANNING.md.
    """
    trained_model = empty_model(student, loading.trust_remote_code)
    narrow = training.weights is Weights.bfloat16
    weight_bytes = NARROW_BYTES if narrow else FLOAT32_BYTES
    device = pick_device(loading.device, here=False)
    compute_bytes = pick_dtype(compute_dtype(loading, training), device).itemsize
    autocast = compute_bytes < weight_bytes
    whole = [parameter.shape for parameter in trained_model.parameters()]
    adapter = adapter_of(trained_model, training, seed=0)
    shapes = [parameter.shape for parameter in trained_model.parameters() if parameter.requires_grad]
    base, trained = processes.held(whole), processes.held(shapes)
    masters = narrow and not adapter
    # A reference is the policy with its adapter off, else it computes as the policy does; a teacher is in the compute type.
    copies = [
        (empty_model(copy, loading.trust_remote_code), weight_bytes if copy.folder == student.folder else compute_bytes)
        for copy in frozen
        if not (adapter and copy.folder == student.folder)
    ]
    tokens = max(training.tokens_per_batch, longest)
    shape = _Shape(trained_model)
    always = {
        "weights_bytes": 0 if masters and processes.sharded else base * weight_bytes + (trained * FLOAT32_BYTES if adapter else 0),
        "masters_bytes": base * FLOAT32_BYTES if masters else 0,
        "optimizer_bytes": moment_bytes([processes.held([size]) for size in shapes], training.optimizer),
        "frozen_bytes": sum(processes.held(weight.shape for weight in copy.parameters()) * size for copy, size in copies),
    }
    updating = {
        "gradients_bytes": trained * FLOAT32_BYTES,
        "casts_bytes": cast_numbers(trained_model, processes, training.gradient_checkpointing) * NARROW_BYTES if autocast else 0,
        "gathered_bytes": gathered_bytes(trained_model, weight_bytes, copies, processes) if processes.sharded else 0,
        "activations_bytes": activation_bytes(shape, tokens, compute_bytes, autocast, training.gradient_checkpointing),
    }
    there = device_bytes(loading.device, processes)
    free = math.inf if there is None else there - sum(always.values()) - sum(updating.values())
    updating["logits_bytes"] = logits_bytes(trained_model, tokens, device, free)
    sampling = {
        "cache_bytes": int(2 * shape.layers * shape.keys * sample_tokens * (1 + GROWTH_SHARE) * compute_bytes),
        "replica_bytes": sum(size.numel() for size in whole) * weight_bytes if processes.sharded and sample_tokens else 0,
        "sampler_bytes": sampler_bytes,
    }
    phases = sum(updating.values()), sum(sampling.values())
    total = sum(always.values()) + (sum(phases) if ahead else max(phases))
    counted = {"parameters": num_parameters(student, loading.trust_remote_code), "trained_parameters": sum(size.numel() for size in shapes)}
    return {**counted, **always, **updating, **sampling, "total_bytes": total}


def logits_bytes(model: PreTrainedModel, tokens: int, device: torch.device, free: float) -> int:
    """Bytes of the logits that a loss over `tokens` positions holds at once on a device with `free` bytes left."""
    logits = tokens * model.get_output_embeddings().weight.shape[0] * FLOAT32_BYTES
    return MOST_MODELS * min(chunk_bytes(device, MOST_MODELS, free), logits)


def moment_bytes(sizes: Sequence[int], optimizer: Optimizer) -> int:
    """Bytes of AdamW's two moments of tensors with `sizes` numbers."""
    if optimizer is Optimizer.adamw:
        return 2 * FLOAT32_BYTES * sum(sizes)
    small, large = ([size for size in sizes if (size >= MIN_8BIT_SIZE) is wanted] for wanted in (False, True))
    return 2 * (FLOAT32_BYTES * sum(small) + sum(large) + FLOAT32_BYTES * sum(math.ceil(size / BLOCK_SIZE) for size in large))


def _numbers(weights: Iterable[torch.nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights)


def _around_and_layers(model: PreTrainedModel) -> tuple[int, list[int]]:
    """Return how many numbers stand around a model's layers (embedding, last norm, head), and in each of them."""
    layers = [_numbers(layer.parameters()) for _, layer in layers_of(model)]
    return _numbers(model.parameters()) - sum(layers), layers


def cast_numbers(model: PreTrainedModel, processes: Processes, checkpointing: bool) -> int:
    """Numbers of float32 weights of which an update holds a bfloat16 copy: all, as the backward pass needs them.

    With FSDP2 and gradient checkpointing they are those of the layer at work, and what is around the layers.
    """
    around, layers = _around_and_layers(model) if processes.sharded and checkpointing else (_numbers(model.parameters()), [0])
    return around + max(layers)


def gathered_bytes(model: PreTrainedModel, weight_bytes: int, frozen: Sequence[tuple[PreTrainedModel, int]], processes: Processes) -> int:
    """Estimate what a process of FSDP2 has gathered of all processes' parts at the peak of an update.

    Of every model, for the whole pass, the weights around its layers; of the one at work GATHERED_LAYERS layers, or, where layers
    stay gathered between forward and backward pass, all of the trained model's. Of the gradients a layer's, in the type of the
    gathered weights and in float32 to be summed over the processes, and float32 sums of the embedding and head. `frozen` are models
    with the bytes of a weight.
    """
    around, layers = _around_and_layers(model)
    kept = GATHERED_LAYERS * max(layers) if processes.reshards else sum(layers)
    gathered, at_work = around * weight_bytes, kept * weight_bytes
    for copy, size in frozen:
        its_around, its_layers = _around_and_layers(copy)
        gathered += its_around * size
        at_work = max(at_work, GATHERED_LAYERS * max(its_layers) * size)
    learnt = max(_numbers(weight for weight in layer.parameters() if weight.requires_grad) for _, layer in layers_of(model))
    vocabulary = {layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer.weight.requires_grad}
    return gathered + at_work + learnt * (weight_bytes + FLOAT32_BYTES) + _numbers(vocabulary) * FLOAT32_BYTES


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
