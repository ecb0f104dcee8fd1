"""From token ids to the hidden states that predict completions, and the head that reads them.

Shapes: B rows, P distinct prompts, T positions, N completion tokens of a micro-batch, D hidden width,
V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from s2dcli.errors import ModelError

if TYPE_CHECKING:
    from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedModel

    from s2dcli.models.batching import SharedPrompts
# Finite, so that products with a probability of 0 stay 0; its exponential is 0 at any temperature in use.
UNUSED_LOGIT = -1e5
_UNUSED = "s2d_unused"
# Rows of the head that a product on a CPU takes at a time: they and their logits stay in the cache, which is a tenth to a quarter faster.
HEAD_ROWS = 1024
# What families call the cap on their logits: Gemma, RecurrentGemma, xLSTM.
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """The output projection: logits = cap(scale * (hidden @ weight.T + bias)) over the tokenizer's V ids.

    Rows of `weight` beyond the tokenizer are cut off, which gives padded columns probability 0; `unused_U`, ids
    below that no token has, get it by their logits (see UNUSED_LOGIT).
    `gradient_VD`, float32, is where losses add the weight's gradient up; without it autograd carries one.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    scale: float = 1.0
    soft_cap: float | None = None
    gradient_VD: torch.Tensor | None = None
    unused_U: torch.Tensor | None = None

    def logits(self, hidden_ND: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return float32 logits [N, V]; the matrix product runs in the dtype of the hidden states.

        Without gradient they may be written to the first rows of `out`, float32: see readers.room.
        """
        weight_VD = self.weight_VD.to(hidden_ND.dtype)
        bias_V = None if self.bias_V is None else self.bias_V.to(hidden_ND.dtype)
        if out is None:
            return self._shape(torch.nn.functional.linear(hidden_ND, weight_VD, bias_V))
        out = out[: len(hidden_ND)]
        if hidden_ND.dtype != out.dtype:
            out.copy_(torch.nn.functional.linear(hidden_ND, weight_VD, bias_V))
            return self._shape(out)
        size = HEAD_ROWS if out.device.type == "cpu" else len(weight_VD)
        for start in range(0, len(weight_VD), size):
            some = slice(start, start + size)
            if bias_V is None:
                torch.mm(hidden_ND, weight_VD[some].T, out=out[:, some])
            else:
                torch.addmm(bias_V[some], hidden_ND, weight_VD[some].T, out=out[:, some])
        return self._shape(out)

    def _shape(self, raw_NV: torch.Tensor) -> torch.Tensor:
        """Apply scale and soft cap to raw products, in float32 and where they stand."""
        logits_NV = raw_NV.float()
        if self.scale != 1.0:
            logits_NV.mul_(self.scale)
        if self.soft_cap is not None:
            logits_NV.div_(self.soft_cap).tanh_()
            logits_NV = logits_NV * self.soft_cap if logits_NV.requires_grad else logits_NV.mul_(self.soft_cap)
        return logits_NV if self.unused_U is None else logits_NV.index_fill_(1, self.unused_U, UNUSED_LOGIT)

    def slope(self, logits_NV: torch.Tensor) -> torch.Tensor | None:
        """Derivative of the logits with respect to the raw products: scale * (1 - (logits / cap)^2); None where it is 1."""
        if self.soft_cap is not None:
            return (logits_NV / self.soft_cap).square_().neg_().add_(1.0).mul_(self.scale)
        return None if self.scale == 1.0 else torch.full_like(logits_NV[:1, :1], self.scale)


def head_of(model: PreTrainedModel, vocabulary: int, gradient_of: Callable[[torch.nn.Parameter], torch.Tensor] | None = None) -> Head:
    """Return the model's head over the first `vocabulary` ids. Raises ModelError if it has none.

    `gradient_of` gives the tensor in which a trained weight's gradient is added up.
    """
    layer = model.get_output_embeddings()
    if layer is None or getattr(layer, "weight", None) is None:
        raise ModelError(f"{type(model).__name__} has no output projection that s2d can use")
    if layer.weight.shape[0] < vocabulary:
        raise ModelError(f"the tokenizer knows {vocabulary} ids, the model only {layer.weight.shape[0]}")
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None):  # Granite
        scale = 1.0 / float(config.logits_scaling)
    bias = getattr(layer, "bias", None)
    caps = (getattr(config, name, None) for name in _SOFT_CAPS)
    collects = gradient_of is not None and layer.weight.requires_grad and torch.is_grad_enabled()
    return Head(
        weight_VD=_first(layer.weight, vocabulary),
        bias_V=None if bias is None else _first(bias, vocabulary),
        scale=scale,
        soft_cap=next(filter(None, caps), None),
        gradient_VD=gradient_of(layer.weight)[:vocabulary] if collects else None,
        unused_U=getattr(layer, _UNUSED, None),
    )


def mask_unused(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Give ids that no token has probability 0, in every head that `head_of` returns from now on."""
    if ids:  # a buffer moves with the model, and is not saved with it
        model.get_output_embeddings().register_buffer(_UNUSED, torch.tensor(ids, device=model.device), persistent=False)


def _first(parameter: torch.Tensor, rows: int) -> torch.Tensor:
    """Cut a parameter to its first rows; as it is where there are no more, so that its gradient needs no second buffer."""
    return parameter if parameter.shape[0] == rows else parameter[:rows]


def hidden_states(model: PreTrainedModel, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Run the backbone on right-padded rows; returns hidden states [B, T, D] after the final norm.

    No mask is needed: a causal model never looks at what stands to the right, and states of padding are
    never read. Positions that restart at 0 within a row mark sequences packed into it, which do not
    see each other; transformers takes that from the positions as long as there is neither mask nor cache.
    """
    return _run(model, input_ids_BT, position_ids_BT=position_ids_BT)


def _run(
    model: PreTrainedModel,
    input_ids_BT: torch.Tensor,
    *,
    mask_BT: torch.Tensor | None = None,
    position_ids_BT: torch.Tensor | None = None,
    cache: Cache | None = None,
) -> torch.Tensor:
    """Run the backbone under the names that its family gives its inputs; returns hidden states [B, T, D].

    Families that place tokens by the cache or the mask take no position_ids. Losses that mixture-of-experts
    families add to balance their experts are no part of this, and dropout is off: models are in eval mode.
    """
    backbone = model.base_model
    if backbone is model:  # Llama-4's text model looks for it under the name that its multimodal one has
        backbone = model.model
    known = _inputs(type(backbone))
    given: dict[str, object] = {}
    if mask_BT is not None:
        given["attention_mask"] = mask_BT
    if position_ids_BT is not None and "position_ids" in known:
        given["position_ids"] = position_ids_BT
    if "use_cache" in known:
        given["use_cache"] = cache is not None
    if cache is not None:
        given["cache_params" if "past_key_values" not in known and "cache_params" in known else "past_key_values"] = cache
    return backbone(input_ids=input_ids_BT, **given).last_hidden_state


@functools.cache
def _inputs(backbone: type[torch.nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(backbone.forward).parameters)


def shared_prompt_states(model: PreTrainedModel, shared: SharedPrompts, completion_ids_BT: torch.Tensor) -> torch.Tensor:
    """States that predict completions [B, T, D], each distinct prompt P run through the backbone once.

    Prompts and completions are right-padded. The completions attend to the keys and values of their
    prompt, through which gradients flow back as they would through copies of the prompt.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    prompt_PTD = _run(model, shared.ids_PT, cache=cache)
    prompts = torch.arange(len(shared.ids_PT), device=shared.ids_PT.device)
    first_BD = prompt_PTD[prompts, shared.lengths_P - 1][shared.of_B]
    rows, length = completion_ids_BT.shape
    if length == 1:  # the one token is predicted by its prompt's last state
        return first_BD[:, None]
    lengths_B1 = shared.lengths_P[shared.of_B, None]
    width = shared.ids_PT.shape[1]
    positions = torch.arange(length - 1, device=lengths_B1.device)
    mask_BT = None
    if shared.padded:
        seen_BT = torch.arange(width, device=lengths_B1.device) < lengths_B1
        mask_BT = torch.cat([seen_BT, seen_BT.new_ones(rows, length - 1)], dim=1).long()
    cache.reorder_cache(shared.of_B)
    rest_BTD = _run(model, completion_ids_BT[:, :-1], mask_BT=mask_BT, position_ids_BT=lengths_B1 + positions, cache=cache)
    return torch.cat([first_BD[:, None], rest_BTD], dim=1)


# Positions that a full cache grows by, at least, and as a share of those it holds: each growth copies all of it.
GROWTH, GROWTH_SHARE = 32, 1 / 8


@functools.cache
def _growing_layer() -> type[DynamicLayer]:
    """Return a cache layer that writes each token into room that is there, where transformers' copies all tokens before it."""
    from transformers import DynamicLayer

    class GrowingLayer(DynamicLayer):
        room: tuple[torch.Tensor, torch.Tensor] | None = None  # whose first positions are `keys` and `values`

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
            start = self.get_seq_length()
            if not start:  # prompts, whose rows are chosen next
                self.lazy_initialization(key_states, value_states)
                self.keys, self.values = key_states, value_states
                return key_states, value_states
            end = start + key_states.shape[-2]
            if self.room is None or end > self.room[0].shape[-2]:
                held, size = (self.keys, self.values), end + max(GROWTH, int(end * GROWTH_SHARE))
                self.room = tuple(states.new_empty(*states.shape[:-2], size, states.shape[-1]) for states in held)
                for room, states in zip(self.room, held, strict=True):
                    room[..., :start, :] = states
            for room, states in zip(self.room, (key_states, value_states), strict=True):
                room[..., start:end, :] = states
            self.keys, self.values = (room[..., :end, :] for room in self.room)
            return self.keys, self.values

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.room = None

    return GrowingLayer


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache for decoding without gradient; layers other than those of full attention are transformers' own."""
    from transformers import DynamicCache, DynamicLayer

    cache = DynamicCache(config=model.config)
    cache.layers = [_growing_layer()() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class CachedDecoder:
    """Rows that grow token by token, what was computed of them kept in a cache. Each distinct prompt is run once, left-padded."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], prompt_of_B: torch.Tensor, pad_id: int) -> None:
        """`states_BD` predict the first token of each row."""
        device = prompt_of_B.device
        longest = max(map(len, prompts))
        ids_PT = torch.tensor([[pad_id] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
        lengths_P = torch.tensor([len(ids) for ids in prompts], device=device)
        mask_PT = (torch.arange(longest, device=device) >= (longest - lengths_P)[:, None]).long()
        unpadded = min(map(len, prompts)) == longest
        self.model = model
        self.cache = growing_cache(model)
        states_PTD = _run(
            model,
            ids_PT,
            mask_BT=None if unpadded else mask_PT,
            position_ids_BT=(mask_PT.cumsum(1) - 1).clamp(min=0),
            cache=self.cache,
        )
        if len(prompts) < len(prompt_of_B):
            self.cache.reorder_cache(prompt_of_B)
        self.states_BD = states_PTD[:, -1][prompt_of_B]
        self._mask_BT = None if unpadded else mask_PT[prompt_of_B]
        self._position_B = lengths_P[prompt_of_B]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all other rows."""
        self.cache.reorder_cache(rows)  # the one selection of rows that every layer's cache has
        self._position_B = self._position_B[rows]
        self._mask_BT = None if self._mask_BT is None else self._mask_BT[rows]

    def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Append a token to each row; returns the states [B, D] that predict the next ones."""
        if self._mask_BT is not None:
            self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(tokens_B), 1)], dim=1)
        states_B1D = _run(self.model, tokens_B[:, None], mask_BT=self._mask_BT, position_ids_BT=self._position_B[:, None], cache=self.cache)
        self._position_B = self._position_B + 1
        return states_B1D[:, -1]


class PlainDecoder:
    """What CachedDecoder does, every row run whole for each of its tokens: for families whose cache is missing or wrong."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], prompt_of_B: torch.Tensor, pad_id: int) -> None:
        self.model = model
        self.pad_id = pad_id
        longest = max(map(len, prompts))
        ids_PT = torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in prompts], device=prompt_of_B.device)
        lengths_P = torch.tensor([len(ids) for ids in prompts], device=prompt_of_B.device)
        self.states_BD = self._last(ids_PT, lengths_P)[prompt_of_B]
        self._ids_BT, self._lengths_B, self._longest = ids_PT[prompt_of_B], lengths_P[prompt_of_B], longest

    def _last(self, ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        return hidden_states(self.model, ids_BT)[torch.arange(len(ids_BT), device=ids_BT.device), lengths_B - 1]

    def keep(self, rows: torch.Tensor) -> None:
        self._ids_BT, self._lengths_B = self._ids_BT[rows], self._lengths_B[rows]
        self._longest = int(self._lengths_B.max())

    def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
        if self._longest == self._ids_BT.shape[1]:
            self._ids_BT = torch.nn.functional.pad(self._ids_BT, (0, 1), value=self.pad_id)
        self._ids_BT = self._ids_BT.scatter(1, self._lengths_B[:, None], tokens_B[:, None])
        self._lengths_B, self._longest = self._lengths_B + 1, self._longest + 1
        return self._last(self._ids_BT, self._lengths_B)
