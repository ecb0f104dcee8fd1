"""Loading what the trainers work with, as their options say: the model in training, its reference, a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from s2dcli import console, world
from s2dcli.errors import UsageError
from s2dcli.models.adapters import Adapter
from s2dcli.models.batching import MicroBatch
from s2dcli.models.checkpoints import Checkpoint, LoadedModel, load, pick_device
from s2dcli.models.policy import Policy, freeze
from s2dcli.models.recompute import recompute_layers
from s2dcli.models.rows import Row
from s2dcli.models.scoring import score
from s2dcli.models.selftest import fast_paths, note_fast_paths
from s2dcli.models.sharding import Replica, shard
from s2dcli.options import Dtype, ModelOptions, Optimizer, TrainingOptions, Weights
from s2dcli.train.optimizer import import_bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def require_shardable(training: TrainingOptions, *, offload: bool) -> None:
    """Raise UsageError for options that whole models need: several processes are to hold parts of them."""
    if training.optimizer is Optimizer.adamw_8bit:
        raise UsageError("--optimizer adamw-8bit keeps moments in blocks, which FSDP2 would cut", hint="leave it out: moments are split")
    if offload:
        raise UsageError("--offload moves a whole frozen model, and FSDP2 splits it over the processes", hint="leave it out")


def load_trained(
    checkpoint: Checkpoint,
    loading: ModelOptions,
    training: TrainingOptions,
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[LoadedModel, Policy]:
    """Load the model to be trained; sampler and policy share its weights. `seed` initialises an adapter.

    Raises ModelError or UsageError.
    """
    if training.optimizer is Optimizer.adamw_8bit:
        import_bitsandbytes()  # before the time that loading takes
    narrow = training.weights is Weights.bfloat16
    loaded = load(
        checkpoint,
        **{**loading.of_load(), "dtype": compute_dtype(loading, training)},
        masters=not (narrow and training.lora_rank),  # weights that stay as they are need no masters
        tokenizer=tokenizer,
        to_shard=world.shards(),
    )
    if narrow:  # weights compute in their own type, float32 adapters beside them are cast to it
        loaded = replace(loaded, autocast=torch.bfloat16 if training.lora_rank else None)
    adapter = adapter_of(loaded.model, training, seed)
    if training.gradient_checkpointing:
        recompute_layers(loaded.model)
    policy = Policy(loaded.model, loaded.vocabulary, loaded.autocast, adapter)
    if world.size() > 1:
        console.info(f"{world.size()} processes, each with {'its part of the weights (FSDP2)' if world.shards() else 'all weights'}")
    if world.shards():
        replica = Replica(loaded.model)
        note_fast_paths(replica.model, fast_paths(loaded.model))
        loaded = replace(loaded, replica=replica)
        shard(policy, pick_device(loading.device), narrow=narrow and adapter is None)
    return loaded, policy


def adapter_of(model: PreTrainedModel, training: TrainingOptions, seed: int) -> Adapter | None:
    """Put the adapter into a model that the options ask for, if any. Raises ModelError or UsageError."""
    if training.lora_rank is None:
        if training.lora_alpha is not None or training.lora_targets is not None:
            raise UsageError("--lora-alpha and --lora-targets shape an adapter", hint="give its --lora-rank too")
        return None
    return Adapter(model, training.lora_rank, training.lora_alpha, training.lora_targets, seed)


def load_reference(policy: Policy, trained: LoadedModel, loading: ModelOptions, training: TrainingOptions, *, offload: bool) -> Policy:
    """Return the policy as it was when loaded: loaded a second time, or `policy` with its adapter off.

    The latter shares the policy's weights, so no second model is held. Raises ModelError or UsageError.
    """
    if policy.adapter:
        if offload:
            raise UsageError("--offload needs a reference model; with --lora-rank the reference is the policy itself", hint="leave it out")
        return WithoutAdapter(policy)
    # As the policy computes, so that their KL is exactly 0 before the first update.
    return load_frozen(trained.checkpoint, trained, loading, training, offload=offload, masters=policy.autocast is not None)


def load_frozen(
    checkpoint: Checkpoint,
    trained: LoadedModel,
    loading: ModelOptions,
    training: TrainingOptions,
    *,
    offload: bool = False,
    masters: bool = False,
) -> Policy:
    """Load a reference or teacher of `trained`, whose tokenizer it shares. Raises ModelError or UsageError."""
    if offload and trained.model.device.type == "cpu":
        raise UsageError("--offload moves a frozen model off the GPU, and this run is on the CPU", hint="leave it out")
    loaded = load(
        checkpoint,
        **{**loading.of_load(), "dtype": compute_dtype(loading, training)},
        masters=masters,
        tokenizer=trained.tokenizer,
        to_shard=world.shards(),
    )
    if offload:
        loaded.model.to("cpu")
    policy = freeze(Policy(loaded.model, trained.vocabulary, loaded.autocast))
    return shard(policy, pick_device(loading.device)) if world.shards() else policy


class WithoutAdapter(Policy):
    """The model that a policy's adapter was put into, for passes without gradient."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.model, policy.vocabulary, policy.autocast, policy.adapter)
        self.sharded = policy.sharded
        self._states_of = policy.states  # what is sharded is the policy
        if policy.sharded:
            self.reshard = policy.reshard

    @torch.no_grad()
    def states(self, batch: MicroBatch) -> torch.Tensor:
        with self.adapter.off():
            return self._states_of(batch)


def load_scorer(checkpoint: Checkpoint, loading: ModelOptions) -> Callable[[Sequence[Row], float], Iterator[tuple[Row, np.ndarray]]]:
    """Load a checkpoint and return what scores rows with it: (rows, temperature) -> rows with log-probs.

    Raises ModelError or UsageError.
    """
    loaded = load(checkpoint, **loading.of_load())
    policy = freeze(Policy(loaded.model, loaded.vocabulary))
    return lambda rows, temperature: score(
        policy, rows, tokens_per_batch=TrainingOptions.tokens_per_batch, pad_id=loaded.pad_id, temperature=temperature
    )


def compute_dtype(loading: ModelOptions, training: TrainingOptions) -> Dtype:
    """Type of the forward computation (--dtype), which weights in bfloat16 (--weights) settle. Raises UsageError."""
    if training.weights is not Weights.bfloat16:
        return loading.dtype
    if loading.dtype is Dtype.float32:
        raise UsageError("--weights bfloat16 computes in bfloat16, which --dtype float32 excludes", hint="leave one of them out")
    return Dtype.bfloat16
