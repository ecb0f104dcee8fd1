"""Loading what the trainers work with, as their options say: the model in training, its reference, a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from s2dcli.errors import UsageError
from s2dcli.models.adapters import Adapter
from s2dcli.models.batching import MicroBatch, Row
from s2dcli.models.checkpoints import Checkpoint, LoadedModel, load
from s2dcli.models.policy import Policy, freeze, score
from s2dcli.models.recompute import recompute_layers
from s2dcli.options import Dtype, ModelOptions, Optimizer, TrainingOptions, Weights
from s2dcli.train.optimizer import import_bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_trained(
    checkpoint: Checkpoint, settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[LoadedModel, Policy]:
    """Load the model to be trained as the trainers' options say; sampler and policy share its weights.

    `settings`: device, dtype, trust_remote_code, weights, optimizer, gradient_checkpointing, lora_rank, lora_alpha, lora_targets, seed.
    Raises ModelError or UsageError.
    """
    if settings["optimizer"] is Optimizer.adamw_8bit:
        import_bitsandbytes()  # before the time that loading takes
    narrow, rank = settings["weights"] is Weights.bfloat16, settings["lora_rank"]
    loaded = load(
        checkpoint,
        device=settings["device"],
        dtype=compute_dtype(settings),
        masters=not (narrow and rank),  # weights that stay as they are need no masters
        trust_remote_code=settings["trust_remote_code"],
        attention=settings["attention"],
        tokenizer=tokenizer,
    )
    if narrow:  # weights compute in their own type, float32 adapters beside them are cast to it
        loaded = replace(loaded, autocast=torch.bfloat16 if rank else None)
    adapter = adapter_of(loaded.model, settings)
    if settings["gradient_checkpointing"]:
        recompute_layers(loaded.model)
    return loaded, Policy(loaded.model, loaded.vocabulary, loaded.autocast, adapter)


def adapter_of(model: PreTrainedModel, settings: Mapping[str, Any]) -> Adapter | None:
    """Put the adapter into a model that `settings` ask for, if any. Raises ModelError or UsageError."""
    rank, alpha, targets = settings["lora_rank"], settings["lora_alpha"], settings["lora_targets"]
    if rank is None:
        if alpha is not None or targets is not None:
            raise UsageError("--lora-alpha and --lora-targets shape an adapter", hint="give its --lora-rank too")
        return None
    return Adapter(model, rank, alpha, targets, settings["seed"])


def load_reference(policy: Policy, loaded: LoadedModel, settings: Mapping[str, Any]) -> Policy:
    """Return the policy as it was when loaded: loaded a second time, or `policy` with its adapter off.

    The latter shares the policy's weights, so no second model is held. Raises ModelError or UsageError.
    """
    if policy.adapter:
        if settings["offload"]:
            raise UsageError("--offload moves a reference of its own; with --lora-rank it is the policy itself", hint="leave it out")
        return WithoutAdapter(policy)
    # As the policy computes, so that their KL is exactly 0 before the first update.
    return load_frozen(loaded.checkpoint, settings, loaded, masters=policy.autocast is not None)


def load_frozen(checkpoint: Checkpoint, settings: Mapping[str, Any], trained: LoadedModel, masters: bool = False) -> Policy:
    """Load a reference or teacher of `trained`, whose tokenizer it shares. Raises ModelError or UsageError."""
    if settings.get("offload") and trained.model.device.type == "cpu":
        raise UsageError("--offload moves a frozen model off the GPU, and this run is on the CPU", hint="leave it out")
    loaded = load(
        checkpoint,
        device=settings["device"],
        dtype=compute_dtype(settings),
        masters=masters,
        trust_remote_code=settings["trust_remote_code"],
        attention=settings["attention"],
        tokenizer=trained.tokenizer,
    )
    if settings.get("offload"):
        loaded.model.to("cpu")
    return freeze(Policy(loaded.model, trained.vocabulary, loaded.autocast))


class WithoutAdapter(Policy):
    """The model that a policy's adapter was put into, for passes without gradient."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.model, policy.vocabulary, policy.autocast, policy.adapter)

    @torch.no_grad()
    def states(self, batch: MicroBatch) -> torch.Tensor:
        with self.adapter.off():
            return super().states(batch)


def load_scorer(
    checkpoint: Checkpoint, loading: ModelOptions
) -> Callable[[Sequence[tuple[list[int], list[int]]], float], list[list[float]]]:
    """Load a checkpoint and return what scores completions with it: (rows of prompt and completion ids, temperature) -> log-probs.

    Raises ModelError or UsageError.
    """
    loaded = load(checkpoint, **loading.of_load())
    policy = freeze(Policy(loaded.model, loaded.vocabulary))
    return lambda rows, temperature: score(
        policy,
        [Row(*row) for row in rows],
        tokens_per_batch=TrainingOptions.tokens_per_batch,
        pad_id=loaded.pad_id,
        temperature=temperature,
    )


def compute_dtype(settings: Mapping[str, Any]) -> Dtype:
    """Type of the forward computation (--dtype), which weights in bfloat16 (--weights) settle. Raises UsageError."""
    if settings["weights"] is not Weights.bfloat16:
        return settings["dtype"]
    if settings["dtype"] is Dtype.float32:
        raise UsageError("--weights bfloat16 computes in bfloat16, which --dtype float32 forbids", hint="leave one of them out")
    return Dtype.bfloat16
