"""What saving costs: the checkpoint that was written against the weights that were trained.

A checkpoint is saved in its parent's type. In bfloat16 numbers are 2^-8 apart, relatively: an update that is smaller
than that is rounded away, and a mistake in merging or naming weights would show in no other way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from s2dcli.errors import ModelError
from s2dcli.models.batching import MicroBatch
from s2dcli.models.checkpoints import LoadedModel, load
from s2dcli.models.forward import Head
from s2dcli.models.policy import Policy, freeze
from s2dcli.models.rows import Row
from s2dcli.models.scoring import read

CHECKED_ROWS, CHECKED_TOKENS = 4, 64  # rows, and completion tokens of each, that are compared
# Largest KL in nats, on average over these tokens, between two forward passes of the same weights in these types.
# Experts saved under wrong names were 0.45 to 1.3 away.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# What is worth a warning: the share of what was learnt that rounding took, and the saved policy's distance in nats.
MUCH_LOST, MUCH_KL = 0.5, 1e-2


def rounding_loss(state: Mapping[str, torch.Tensor], parent: Path, dtype: torch.dtype) -> float | None:
    """Return |saved - live| / |live - parent| over all weights, at most 1: what rounding to `dtype` takes of the way from the parent.

    None where most weights have other names in the parent's files, so that the way is not known.
    """
    if dtype.itemsize >= 4:
        return 0.0
    lost = moved = 0.0
    compared = 0
    for path in sorted(parent.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in state.keys() & set(file.keys()):
                live = state[name].detach().cpu().float()
                lost += (live.to(dtype).float() - live).square().sum().item()
                moved += (live - file.get_tensor(name).float()).square().sum().item()
                compared += live.numel()
    if 2 * compared < sum(tensor.numel() for tensor in state.values()):
        return None
    return min(1.0, (lost / moved) ** 0.5) if moved else 0.0


def saved_kl(
    folder: Path | None, policy: Policy, loaded: LoadedModel, rows: Sequence[Row], state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> float:
    """Load a checkpoint as it was saved, on the CPU, and return KL(live || saved), the mean over the rows' tokens.

    `state` are the live weights before they were rounded to `dtype`. Raises ModelError if rounding does not explain the
    difference: a saved weight is not the live one rounded, or the live weights do not give the live policy. Without a folder
    only the live policy is run, of which another process may hold a part.
    """
    rows = [Row(row.prompt_ids, row.completion_ids[:CHECKED_TOKENS]) for row in rows[:CHECKED_ROWS]]

    def logprobs(policy: Policy) -> list[np.ndarray]:
        return [_logprobs(policy, row, loaded.pad_id) for row in rows]

    live = logprobs(policy)
    if not folder:
        return 0.0
    checkpoint = replace(loaded.checkpoint, folder=folder, name=str(folder))
    how = {"device": "cpu", "dtype": "float32", "trust_remote_code": loaded.trust_remote_code, "tokenizer": loaded.tokenizer}
    saved = freeze(Policy(load(checkpoint, **how, announce=False).model, policy.vocabulary))
    kl, tolerance = _mean_kl(live, logprobs(saved)), TOLERANCES[loaded.compute_dtype]
    if not kl <= tolerance:  # also if it is not a number
        told = {
            "where": str(folder.parent),
            "hint": "it was not kept; train without --lora-rank, or with other --lora-targets, and report the family",
        }
        if wrong := _restore(saved.model, state, dtype):
            raise ModelError(
                f"the checkpoint as saved is {kl:.2g} nats from the model in training: {wrong} is not what was trained", **told
            )
        exact = logprobs(saved)
        saved.autocast = policy.autocast  # how much of the difference is that of the live model's narrow computations
        unexplained, computed = _mean_kl(live, exact), _mean_kl(logprobs(saved), exact)
        if not unexplained <= max(tolerance, 2 * computed):
            raise ModelError(f"the weights to be saved give a model {unexplained:.2g} nats from the one in training", **told)
    return kl


def _restore(model: torch.nn.Module, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> str:
    """Undo rounding to `dtype`: put `state` into a model that was loaded from what was saved of it.

    Returns the name of the first weight that is not the rounded one; empty if there is none.
    """
    own = model.state_dict()
    for name, live in state.items():
        live = live.detach().cpu()
        if name not in own or not torch.equal(own[name], live.to(dtype).to(own[name].dtype)):
            return name
    for name, live in state.items():  # not before: tied weights have two names
        own[name].copy_(live)
    return ""


def _mean_kl(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """Return KL(one || other) in nats, the mean over the tokens of rows of log-probs [T, V]; 0 without tokens."""
    kls = [(np.exp(p_TV) * (p_TV - q_TV)).sum(-1) for p_TV, q_TV in zip(one, other, strict=True)]
    return float(np.concatenate(kls).mean()) if any(map(len, kls)) else 0.0


def _logprobs(policy: Policy, row: Row, pad_id: int) -> np.ndarray:
    """Log-probs [T, V] of all ids at each completion token of a row, float64."""

    def reader(hidden_ND: torch.Tensor, head: Head, _: MicroBatch) -> tuple[torch.Tensor]:
        return (head.logits(hidden_ND).log_softmax(-1),)

    found = list(read(policy, [row], reader, tokens_per_batch=len(row), pad_id=pad_id))
    return found[0][1][0].astype(np.float64) if found else np.empty((0, policy.vocabulary))
