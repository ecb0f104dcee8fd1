"""A model with its head, and the loss inside one forward.

Called past its wrapper, a sharded or data-parallel backbone trains on wrong gradients without any
error; so whatever wraps a model wraps this module, and the loss is computed within `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from s2dcli.models.batching import MicroBatch
from s2dcli.models.forward import Head, head_of, hidden_states, shared_prompt_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from s2dcli.models.adapters import Adapter


class Objective(Protocol):
    """What a model is trained on; train/objectives.py has them all.

    `others`: further models that are given its micro-batches; `sources`: those whose rows must not share one, none where all may.
    """

    others: Sequence[Policy]
    sources: Sequence[str]

    def loss(self, batch: MicroBatch, hidden_ND: torch.Tensor, head: Head) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, a sum over completion tokens, and figures per token, [N] each, for the metrics."""


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
        self.sharded = self.narrow = False  # over processes; float32 parts that compute in bfloat16: see models/sharding.py
        self._gradient_of: Callable[[torch.nn.Parameter], torch.Tensor] | None = None
        self._gathered: list[torch.nn.Parameter] = []  # of a sharded model: weights whose gradients are collected

    def states(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states [N, D] that predict the completion tokens. Raises ValueError for tokens beyond the vocabulary."""
        return self._states(batch)  # of a sharded policy this method gathers weights before and after, and so does `forward`

    def _states(self, batch: MicroBatch) -> torch.Tensor:
        if batch.largest_target >= self.vocabulary:
            raise ValueError(f"token id {batch.largest_target} lies outside the tokenizer's {self.vocabulary} ids")
        device = batch.input_ids_BT.device
        # Casts of gathered weights would stay after the weights themselves are given up.
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=not self.sharded):
            if batch.prompts is None:
                hidden_BTD = hidden_states(self.model, batch.input_ids_BT, batch.position_ids_BT)
            else:
                shared = batch.prompts
                hidden_BTD = shared_prompt_states(self.model, shared, batch.input_ids_BT)
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.states_N]
        # The final norm's float32 weight lifts the states to float32; the head computes in the type asked for, as in sampling.
        return hidden_ND if self.autocast is None else hidden_ND.to(self.autocast)

    def head(self) -> Head:
        return head_of(self.model, self.vocabulary, self._gradient_of)

    def collect_gradients(self, gradient_of: Callable[[torch.nn.Parameter], torch.Tensor]) -> None:
        """Hold a large vocabulary's gradient once, where a trainer has it: it is as large as the head.

        The losses add the head's to the tensor that `gradient_of` returns for a parameter; the embedding's comes
        sparse, as the rows of the tokens that were read. To be called once, when the trained parameters are final.
        """
        self._gradient_of = gradient_of
        embedding = self.model.get_input_embeddings()
        if embedding.weight.requires_grad:
            embedding.sparse = True
            if not self.sharded:
                embedding.weight.register_post_accumulate_grad_hook(_make_dense)

    def _collect_gathered(self) -> None:
        """Add the gradient of a sharded model's embedding to what `gradient_of` returns, once the embedding is gathered."""
        weight = self.model.get_input_embeddings().weight
        if weight.requires_grad and not any(weight is known for known in self._gathered):
            self._gathered.append(weight)

            def move(parameter: torch.nn.Parameter) -> None:
                self._gradient_of(parameter).add_(parameter.grad.float())
                parameter.grad = None

            weight.register_post_accumulate_grad_hook(move)

    def forward(self, batch: MicroBatch, objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.sharded and self._gradient_of:
            self._collect_gathered()
        return objective.loss(batch, self._states(batch), self.head())


def freeze(policy: Policy) -> Policy:
    """Make a reference or teacher: no gradient ever reaches it."""
    return policy.requires_grad_(False).eval()


@contextmanager
def on_device(*policies: Policy, device: torch.device, offload: bool) -> Iterator[None]:
    """Keep frozen policies on the device within the block; with `offload` they stay on the CPU otherwise."""
    for policy in policies if offload else ():
        policy.to(device)
    try:
        yield
    finally:
        for policy in policies if offload else ():
            policy.to("cpu")


def _make_dense(parameter: torch.Tensor) -> None:
    """Leave a gradient that sparse ones can be added to in place."""
    if parameter.grad is not None:
        parameter.grad = parameter.grad.to_dense()
