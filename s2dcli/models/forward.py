"""From token ids to the hidden states that predict completions, and the head that reads them.

Shapes: B rows, P distinct prompts, T positions, N completion tokens of a micro-batch, D hidden width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from s2dcli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Log-probs from our head and from the model's own forward must agree to this many nats (float32).
HEAD_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Head:
    """The output projection: logits = cap(scale * (hidden @ weight.T + bias)) over the tokenizer's V ids.

    Rows of `weight` beyond the tokenizer are cut off, which gives padded columns probability 0.
    `gradient_VD`, float32, is where losses add the weight's gradient up; without it autograd carries one.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    scale: float = 1.0
    soft_cap: float | None = None
    gradient_VD: torch.Tensor | None = None

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [N, V]; the matrix product runs in the dtype of the hidden states."""
        weight_VD = self.weight_VD.to(hidden_ND.dtype)
        bias_V = None if self.bias_V is None else self.bias_V.to(hidden_ND.dtype)
        return self.shape_logits(torch.nn.functional.linear(hidden_ND, weight_VD, bias_V))

    def shape_logits(self, raw_NV: torch.Tensor) -> torch.Tensor:
        """Apply scale and soft cap to raw products, in float32."""
        logits_NV = raw_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.soft_cap is not None:
            logits_NV = self.soft_cap * torch.tanh(logits_NV / self.soft_cap)
        return logits_NV

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
    collects = gradient_of is not None and layer.weight.requires_grad and torch.is_grad_enabled()
    return Head(
        weight_VD=_first(layer.weight, vocabulary),
        bias_V=None if bias is None else _first(bias, vocabulary),
        scale=scale,
        soft_cap=getattr(config, "final_logit_softcapping", None),  # Gemma
        gradient_VD=gradient_of(layer.weight)[:vocabulary] if collects else None,
    )


def _first(parameter: torch.Tensor, rows: int) -> torch.Tensor:
    """Cut a parameter to its first rows; as it is where there are no more, so that its gradient needs no second buffer."""
    return parameter if parameter.shape[0] == rows else parameter[:rows]


def hidden_states(model: PreTrainedModel, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Run the backbone on right-padded rows; returns hidden states [B, T, D] after the final norm.

    No mask is needed: a causal model never looks at what stands to the right, and states of padding are
    never read. Positions that start anew at 0 within a row mark sequences packed into it, which do not
    see each other; transformers takes that from the positions as long as there is neither mask nor cache.
    """
    return model.base_model(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False).last_hidden_state


def can_pack(model: PreTrainedModel) -> bool:
    """Whether sequences packed into one row cost what they would alone: kernels of variable length, no T x T mask."""
    return str(model.config.get_text_config()._attn_implementation).startswith(("flash", "flex"))


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether `shared_prompt_states` is right for a model: full attention in every layer.

    A sliding window is counted in cache positions, which the padding behind a short prompt would use up.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    return not (any(cache.is_sliding) or any(cache.is_linear))


def shared_prompt_states(
    model: PreTrainedModel,
    prompt_ids_PT: torch.Tensor,
    prompt_lengths_P: torch.Tensor,
    prompt_of_B: torch.Tensor,
    completion_ids_BT: torch.Tensor,
) -> torch.Tensor:
    """States that predict completions [B, T, D], each distinct prompt P run through the backbone once.

    Prompts and completions are right-padded. The completions attend to the keys and values of their
    prompt, through which gradients flow back as they would through copies of the prompt.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    prompt_PTD = model.base_model(input_ids=prompt_ids_PT, past_key_values=cache, use_cache=True).last_hidden_state
    prompts = torch.arange(len(prompt_ids_PT), device=prompt_ids_PT.device)
    first_BD = prompt_PTD[prompts, prompt_lengths_P - 1][prompt_of_B]
    rows, length = completion_ids_BT.shape
    if length == 1:  # the one token is predicted by its prompt's last state
        return first_BD[:, None]
    lengths_B1 = prompt_lengths_P[prompt_of_B, None]
    width = prompt_ids_PT.shape[1]
    positions = torch.arange(length - 1, device=lengths_B1.device)
    mask_BT = None
    if int(prompt_lengths_P.min()) < width:
        seen_BT = torch.arange(width, device=lengths_B1.device) < lengths_B1
        mask_BT = torch.cat([seen_BT, seen_BT.new_ones(rows, length - 1)], dim=1).long()
    cache.batch_select_indices(prompt_of_B)
    rest_BTD = model.base_model(
        input_ids=completion_ids_BT[:, :-1],
        attention_mask=mask_BT,
        position_ids=lengths_B1 + positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([first_BD[:, None], rest_BTD], dim=1)


@torch.no_grad()
def require_known_head(model: PreTrainedModel, vocabulary: int, name: str) -> None:
    """Compare our head with the model's own logits on a few tokens.

    A family with a logit transformation that is unknown here would train on wrong probabilities
    without any other sign. Raises ModelError beyond HEAD_TOLERANCE.
    """
    ids_BT = torch.arange(min(8, vocabulary), device=model.device)[None]
    own = model(input_ids=ids_BT, use_cache=False).logits[..., :vocabulary].float().log_softmax(-1)
    ours = head_of(model, vocabulary).logits(hidden_states(model, ids_BT)).log_softmax(-1)
    tolerance = HEAD_TOLERANCE * (1 if own.dtype == model.dtype else 50)  # bfloat16 rounds at 2^-8
    difference = (own - ours).abs()[own > -20].max().item()
    if not difference <= tolerance:
        raise ModelError(
            f"{type(model).__name__} transforms its logits in a way s2d does not know (log-probs differ by {difference:.2g} nats)",
            where=name,
        )
