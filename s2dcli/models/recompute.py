"""Gradient checkpointing: a layer keeps its input only, and runs once more in the backward pass.

transformers' own switch works in train mode alone, which would turn dropout on, and takes the cache
away from a model that also samples. Here each layer decides by whether a gradient is wanted.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from s2dcli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


def recompute_layers(model: PreTrainedModel) -> None:
    """Make the layers of a model recompute their activations in the backward pass.

    Passes without gradient stay as they are. Passes with gradient must be without a cache: a layer that
    ran twice would fill it twice. Raises ModelError for a model without layers that can.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layers that could be run again", hint="train without --gradient-checkpointing")
    for layer in layers:
        layer.forward = partial(_run, layer.forward)


def _run(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    import torch
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    assert kwargs.get("past_key_values") is None, "a cache would be filled twice"
    # No layer draws random numbers: models stay in eval mode.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
