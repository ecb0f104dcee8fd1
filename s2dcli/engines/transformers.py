"""Sampling with plain transformers: one loop over positions, a KV cache, noise that each row owns.

A row's noise is one uniform number per position, drawn from the row's seed; tokens are chosen by
inverting the cumulative distribution. What a row says therefore does not depend on its neighbours.
(Log-probs still change in the sixth decimal with the shape of the batch, as matrix products do.)

Shapes: P distinct prompts, B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from s2dcli.engines.base import LENGTH, STOP, Request, Sample, SamplingParams
from s2dcli.models.forward import CachedDecoder, PlainDecoder, head_of
from s2dcli.models.readers import log_normaliser, parts
from s2dcli.models.selftest import fast_paths, max_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Finished rows are dropped from the batch once they are this share of it: each drop copies the
# cache, so halving costs at most log2(B) copies and never carries more dead rows than live ones.
DROP_SHARE = 0.5
# Tokens after which the rows that go on are counted: a count waits for all that a GPU was asked before it.
COUNT_EVERY, CPU_COUNT_EVERY = 8, 1
# Tokens per block of the two-level search in a cumulative distribution; near the square root of today's
# largest vocabularies, where both levels are equally long.
BLOCK = 512


class TransformersEngine:
    """Samples from a transformers model that may also be in training: it always uses its current weights."""

    name = "transformers"
    whole_batches = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        vocabulary: int,
        autocast: torch.dtype | None = None,
        batch_tokens: int,
    ) -> None:
        """`batch_tokens`: cache positions (rows x (prompt + max_tokens)) of one batch."""
        self.model = model
        self.eos_ids = sorted(set(eos_ids))
        self.pad_id = pad_id
        self.vocabulary = vocabulary
        self.autocast = autocast
        self.batch_tokens = batch_tokens
        self.paths = fast_paths(model)
        self.max_length = max_length(model.config)

    def close(self) -> None:
        """Nothing to release: the model belongs to the caller."""

    def generate(self, requests: Iterable[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        """Yield (index, sample) batch by batch, in the order of the requests; by prompt length where left padding is wrong."""
        requests = list(requests)
        padded = self.paths.left_padding or not self.paths.cache
        order = range(len(requests)) if padded else sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids))
        start = 0
        while start < len(requests):
            end, longest = start, 0
            while end < len(requests):
                length = len(requests[order[end]].prompt_ids)
                if end > start and not padded and length != longest:
                    break
                longest = max(longest, length)
                if end > start and (end - start + 1) * (longest + params.max_tokens) > self.batch_tokens:
                    break
                end += 1
            batch = [requests[index] for index in order[start:end]]
            yield from zip(order[start:end], self._sample_batch(batch, params), strict=True)
            start = end

    @torch.inference_mode()
    def _sample_batch(self, requests: Sequence[Request], params: SamplingParams) -> list[Sample]:
        device = self.model.device
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            ids_BT, logprobs_BT, lengths_B = self._decode(requests, params, device)
        samples = []
        for ids_T, logprobs_T, length in zip(ids_BT.tolist(), logprobs_BT.tolist(), lengths_B.tolist(), strict=True):
            stopped = length <= params.max_tokens
            length = min(length, params.max_tokens)
            samples.append(Sample(ids_T[:length], logprobs_T[:length], STOP if stopped else LENGTH))
        return samples

    def _decode(
        self, requests: Sequence[Request], params: SamplingParams, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids [B, T], log-probs [B, T] and lengths [B]; length max_tokens + 1 means unfinished."""
        count = len(requests)
        distinct: dict[tuple[int, ...], int] = {}
        prompt_of_B = torch.tensor([distinct.setdefault(tuple(r.prompt_ids), len(distinct)) for r in requests], device=device)
        decoder = (CachedDecoder if self.paths.cache else PlainDecoder)(self.model, list(distinct), prompt_of_B, self.pad_id)
        head = head_of(self.model, self.vocabulary)
        if self.autocast is not None:  # once, not for every token
            head = replace(head, weight_VD=head.weight_VD.to(self.autocast))
        states_BD = decoder.states_BD
        room_BV = torch.empty(count, self.vocabulary, device=device)  # for each token's logits in turn
        eos_ids_E = torch.tensor(self.eos_ids, device=device)
        noise_BT = None if params.temperature == 0 else row_noise(requests, params.max_tokens).to(device)
        ids_BT = torch.full((count, params.max_tokens), self.pad_id, device=device)
        logprobs_BT = torch.zeros(count, params.max_tokens, device=device)
        lengths_B = torch.full((count,), params.max_tokens + 1, device=device)
        rows_B = torch.arange(count, device=device)  # row of the batch -> row of the result
        live_B = torch.ones(count, dtype=torch.bool, device=device)
        every = CPU_COUNT_EVERY if device.type == "cpu" else COUNT_EVERY
        for t in range(params.max_tokens):
            uniforms_B = None if noise_BT is None else noise_BT[rows_B, t]
            # The final norm's float32 weight lifts states to float32; the head computes in the type asked for, as in training.
            logits_BV = head.logits(states_BD if self.autocast is None else states_BD.to(self.autocast), room_BV)
            tokens_B, chosen_B = choose(logits_BV, uniforms_B, params)
            ids_BT[rows_B, t] = torch.where(live_B, tokens_B, self.pad_id)
            logprobs_BT[rows_B, t] = chosen_B
            ends_B = live_B & torch.isin(tokens_B, eos_ids_E)
            lengths_B[rows_B] = torch.where(ends_B, t + 1, lengths_B[rows_B])
            live_B = live_B & ~ends_B
            if t == params.max_tokens - 1:
                break
            num_live = int(live_B.sum()) if (t + 1) % every == 0 else len(rows_B)
            if num_live == 0:
                break
            if num_live <= len(rows_B) * DROP_SHARE:
                keep = live_B.nonzero()[:, 0]
                decoder.keep(keep)
                rows_B, live_B, tokens_B = rows_B[keep], live_B[keep], tokens_B[keep]
            states_BD = decoder.step(tokens_B)
        return ids_BT, logprobs_BT, lengths_B


def row_noise(requests: Sequence[Request], max_tokens: int) -> torch.Tensor:
    """Return uniform numbers [B, T] in [0, 1): row b depends on the seed of request b alone."""
    noise_BT = np.empty((len(requests), max_tokens))
    source = np.random.Philox(key=0)  # one for all rows: making one takes longer than its numbers
    start, generator = source.state, np.random.Generator(source)
    for uniforms_T, request in zip(noise_BT, requests, strict=True):
        start["state"]["key"][:] = request.seed % 2**64, request.seed >> 64
        source.state = start
        generator.random(out=uniforms_T)
    return torch.from_numpy(noise_BT)


def choose(logits_BV: torch.Tensor, uniforms_B: torch.Tensor | None, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row. Returns ids [B] and their log-probs [B] under the distribution drawn from.

    `uniforms_B` None is greedy (log-probs at temperature 1). Top-k is applied before top-p.
    """
    if uniforms_B is None:
        logits_BV = logits_BV.float()
        tokens_B1 = logits_BV.argmax(-1, keepdim=True)
        return tokens_B1[:, 0], (logits_BV.gather(1, tokens_B1) - log_normaliser(logits_BV))[:, 0]
    logits_BV = logits_BV.float() if params.temperature == 1.0 else logits_BV.float() / params.temperature
    if params.top_k and params.top_k < logits_BV.shape[1]:
        smallest_B1 = logits_BV.topk(params.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if params.top_p < 1.0:
        logits_BV = _nucleus(logits_BV, params.top_p)
    tokens_B1, normaliser_B1 = _invert(logits_BV, uniforms_B[:, None])
    return tokens_B1[:, 0], (logits_BV.gather(1, tokens_B1) - normaliser_B1)[:, 0]


def _invert(logits_BV: torch.Tensor, uniforms_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first token [B, 1] at which the cumulative probability exceeds the uniform number, and the log-normalisers [B, 1].

    In two levels, blocks of tokens and tokens of one block, with running sums in float64: a float32 one
    over 150,000 tokens would lose the unlikely ones, a float64 one over all of them takes most of the time.
    What fits into one block needs one level. Probabilities are left unnormalised, so that each logit's exponential is taken once.
    """
    rows, vocabulary = logits_BV.shape
    peak_B1 = logits_BV.amax(-1, keepdim=True)
    if vocabulary <= BLOCK:
        ends_BV = (logits_BV - peak_B1).exp_().double().cumsum_(-1)
        total_B1 = ends_BV[:, -1:]
        return torch.searchsorted(ends_BV, uniforms_B1 * total_B1, right=True), peak_B1 + total_B1.log().float()
    blocks = -(-vocabulary // BLOCK)
    weights_BV, sums_BJ = logits_BV.new_empty(rows, blocks * BLOCK), logits_BV.new_empty(rows, blocks)
    for weights_RV, logits_RV, peak_R1, sums_RJ in parts(weights_BV, logits_BV, peak_B1, sums_BJ):
        weights_RV[:, vocabulary:] = 0.0
        torch.sub(logits_RV, peak_R1, out=weights_RV[:, :vocabulary]).exp_()
        torch.sum(weights_RV.view(-1, blocks, BLOCK), -1, out=sums_RJ)
    ends_BJ = sums_BJ.double().cumsum_(-1)
    total_B1 = ends_BJ[:, -1:]
    target_B1 = uniforms_B1 * total_B1
    block_B1 = torch.searchsorted(ends_BJ, target_B1, right=True).clamp_(max=blocks - 1)
    starts_B1 = torch.where(block_B1 > 0, ends_BJ.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    weights_BJK = weights_BV.view(rows, blocks, BLOCK)
    inside_BK = weights_BJK.gather(1, block_B1[:, :, None].expand(-1, 1, BLOCK))[:, 0].double().cumsum_(-1)
    # Rounding must not carry a draw past the block's last token that has any probability.
    target_B1 = torch.minimum(target_B1 - starts_B1, inside_BK[:, -1:] * (1 - torch.finfo(torch.float64).eps))
    tokens_B1 = block_B1 * BLOCK + torch.searchsorted(inside_BK, target_B1, right=True)
    return tokens_B1.clamp_(max=vocabulary - 1), peak_B1 + total_B1.log().float()


def _nucleus(logits_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches top_p (always at least one)."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probs_BV = sorted_BV.softmax(-1)
    drop_BV = probs_BV.cumsum(-1) - probs_BV >= top_p
    drop_BV[:, 0] = False
    return logits_BV.masked_fill(torch.zeros_like(drop_BV).scatter(1, order_BV, drop_BV), -torch.inf)
