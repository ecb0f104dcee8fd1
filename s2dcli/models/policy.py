"""A model with its head, and the loss inside one forward.

Called past its wrapper, a sharded or data-parallel backbone trains on wrong gradients without any
error; so whatever wraps a model wraps this module, and the loss is computed within `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from s2dcli.models.batching import MicroBatch, Row, micro_batches
from s2dcli.models.forward import Head, head_of, hidden_states, shared_prompt_states
from s2dcli.models.readers import token_logprobs
from s2dcli.models.selftest import can_pack, can_share_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from s2dcli.models.adapters import Adapter

# (hidden states [N, D] of the completion tokens, head) -> (loss, sums over tokens for the metrics)
Loss = Callable[[torch.Tensor, Head], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class Policy(torch.nn.Module):
    """A causal language model as the trainers see it: over the tokenizer's ids, completions only."""

    def __init__(
        self, model: PreTrainedModel, vocabulary: int, autocast: torch.dtype | None = None, adapter: Adapter | None = None
    ) -> None:
        """`adapter`: what is trained in the model's place, which it is already part of."""
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.autocast = autocast
        self.adapter = adapter
        # Where the gradient of a parameter is added up, from the optimizer: a head's is as large as the head.
        self.gradient_of: Callable[[torch.nn.Parameter], torch.Tensor] | None = None

    def states(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states [N, D] that predict the completion tokens."""
        device = batch.input_ids_BT.device
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if batch.prompts is None:
                hidden_BTD = hidden_states(self.model, batch.input_ids_BT, batch.position_ids_BT)
            else:
                shared = batch.prompts
                hidden_BTD = shared_prompt_states(self.model, shared.ids_PT, shared.lengths_P, shared.of_B, batch.input_ids_BT)
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.states_N]
        # The final norm's float32 weight lifts the states to float32; the head computes in the type asked for, as in sampling.
        return hidden_ND if self.autocast is None else hidden_ND.to(self.autocast)

    def head(self) -> Head:
        return head_of(self.model, self.vocabulary, self.gradient_of)

    def forward(self, batch: MicroBatch, loss: Loss) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return loss(self.states(batch), self.head())


def freeze(policy: Policy) -> Policy:
    """Make a reference or teacher: no gradient ever reaches it."""
    return policy.requires_grad_(False).eval()


@contextmanager
def at_work(policy: Policy, device: torch.device, *, offload: bool) -> Iterator[None]:
    """Have a frozen policy on the device for a while; with `offload` it waits in main memory otherwise."""
    if offload:
        policy.to(device)
    try:
        yield
    finally:
        if offload:
            policy.to("cpu")


@torch.no_grad()
def score(policy: Policy, rows: Sequence[Row], *, tokens_per_batch: int, pad_id: int, temperature: float = 1.0) -> list[list[float]]:
    """Log-probs (nats) of the completion tokens of every row, under softmax(logits / temperature)."""
    device = next(policy.parameters()).device
    scores: list[list[float]] = [[] for _ in rows]
    layout = {"share_prompts": can_share_prompts(policy.model), "pack": can_pack(policy.model)}
    for batch in micro_batches(rows, range(len(rows)), tokens_per_batch, pad_id, device, **layout):
        logprobs_N = token_logprobs(policy.states(batch), policy.head(), batch.targets_N, temperature)
        for row, values in zip(batch.rows, logprobs_N.split(batch.lengths_B), strict=True):
            scores[row] = values.tolist()
    return scores
