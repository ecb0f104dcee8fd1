"""`--dry-run`: what a training run would do and need, from the files' headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import safe_open

from s2dcli.models.checkpoints import Checkpoint

FLOAT32_BYTES = 4
# Per trained parameter, all float32: weight, gradient, AdamW's two moments.
BYTES_PER_TRAINED = 4 * FLOAT32_BYTES


def num_parameters(checkpoint: Checkpoint) -> int:
    """Count the parameters of a checkpoint from its safetensors headers; nothing is loaded."""
    total = 0
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not a dict
    return total


def dry_run_plan(
    settings: Mapping[str, Any], *, steps: int, rollouts_per_step: int, student: Checkpoint, frozen: Sequence[Checkpoint]
) -> dict[str, Any]:
    """Return steps, rollouts, the largest number of tokens to be sampled, and bytes for weights and optimizer.

    Activations and the cache of the sampler come on top; `--tokens-per-batch` and `--sample-tokens` bound them.
    """
    trained = num_parameters(student)
    return {
        "steps": steps,
        "rollouts_per_step": rollouts_per_step,
        "rollouts": steps * rollouts_per_step,
        "completion_tokens_at_most": steps * rollouts_per_step * settings.get("max_tokens", 0),
        "parameters": trained,
        "trained_bytes": trained * BYTES_PER_TRAINED,
        "frozen_bytes": sum(num_parameters(checkpoint) for checkpoint in frozen) * FLOAT32_BYTES,
        "out": str(settings["out"]),
    }
