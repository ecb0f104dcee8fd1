"""What a model is given at load: a few tokens along every fast path, against plain forward passes of one row each.

Families differ in what they make of padding, caches and positions, and what they get wrong raises no
error. So every model is asked itself. A fast path that changes its probabilities is not used; a model that
is wrong even without them is refused.
"""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from s2dcli import console
from s2dcli.errors import ModelError, UsageError
from s2dcli.models.batching import SharedPrompts
from s2dcli.models.forward import CachedDecoder, PlainDecoder, head_of, hidden_states, shared_prompt_states

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from s2dcli.models.batching import Row

# How far log-probs may be off by rounding alone, as a share of their spread over the vocabulary. On SmolLM2-135M the
# paths differ by 5e-6 in float32, 9e-3 in float16 and 6e-2 in bfloat16, and positions off by one by 0.7.
TOLERANCES = {torch.float32: 2e-4, torch.float16: 5e-2, torch.bfloat16: 0.2}
# Tokens of two rows, and how many of them are their prompt; three rows go through a path, two of them of one prompt.
LENGTHS, PROMPT_LENGTHS = (8, 5), (4, 2)
ROW_PROMPTS = (0, 0, 1)
# Ids that are compared, spread over the vocabulary: reading a whole head takes as long as several layers.
COMPARED_IDS = 4096


@dataclass(frozen=True)
class FastPaths:
    """Which shortcuts compute the same as plain forward passes of one row each.

    `left_padding`: prompts of several lengths in one batch of the sampler. `cache`: the sampler computes each
    token once. `share_prompts`: a prompt is run once for all of its rows in training. `pack`: rows stand one
    behind the other without padding. Micro-batches that several models see use what all of them can:
    `student & teacher`.
    """

    left_padding: bool
    cache: bool
    share_prompts: bool
    pack: bool

    def __and__(self, other: FastPaths) -> FastPaths:
        return FastPaths(**{name: value and getattr(other, name) for name, value in asdict(self).items()})


# Names under which families keep how many positions they have
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")

# What was found, and with which attention
_known: WeakKeyDictionary[PreTrainedModel, tuple[str, FastPaths]] = WeakKeyDictionary()


def fast_paths(model: PreTrainedModel) -> FastPaths:
    """Return what the self-test of a model has found; it runs now if it has not. Raises ModelError."""
    attention, paths = _known.get(model, ("", None))
    if paths is None or attention != _attention(model):
        return self_test(model, model.get_output_embeddings().weight.shape[0], type(model).__name__)
    return paths


def common_fast_paths(models: Sequence[PreTrainedModel]) -> FastPaths:
    """Return the shortcuts that all of some models, which are given the same micro-batches, can take. Raises ModelError."""
    return functools.reduce(operator.and_, map(fast_paths, models))


def note_fast_paths(model: PreTrainedModel, paths: FastPaths) -> None:
    """Note what the self-test of the same model has found elsewhere."""
    _known[model] = (_attention(model), paths)


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether micro-batches may run each prompt once for all of its rows."""
    return fast_paths(model).share_prompts


def can_pack(model: PreTrainedModel) -> bool:
    """Whether micro-batches should put rows one behind the other."""
    return fast_paths(model).pack


@torch.no_grad()
def self_test(model: PreTrainedModel, vocabulary: int, name: str, autocast: torch.dtype | None = None) -> FastPaths:
    """Find the fast paths of a model over the first `vocabulary` ids. Raises ModelError for one that is wrong without them.

    Masters are tested in float32 even where the forward pass is cast to `autocast`: rounding hides less there.
    """
    flash = _attention(model).startswith("flash")  # kernels that know no float32
    with torch.autocast(model.device.type, dtype=autocast, enabled=flash and autocast is not None):
        test = _Test(model, vocabulary, name)
        test.require_right()
        padded = test.passes("left padding", lambda: test.decoding(CachedDecoder, PROMPT_LENGTHS))
        cache = padded or test.passes("the cache", lambda: test.decoding(CachedDecoder, PROMPT_LENGTHS[-1:] * 2))
        if not cache and not test.passes("decoding", lambda: test.decoding(PlainDecoder, PROMPT_LENGTHS)):
            raise ModelError(f"{type(model).__name__} computes other probabilities for the start of a row than for the whole", where=name)
        paths = FastPaths(
            left_padding=padded,
            cache=cache,
            share_prompts=_full_attention(model) and test.passes("sharing prompts", test.sharing),
            # Without kernels of variable length a packed row costs what its length squared does.
            pack=_attention(model).startswith(("flash", "flex")) and test.passes("packing", test.packing),
        )
    used = [path.replace("_", " ") for path, right in asdict(paths).items() if right]
    console.detail(f"{name}: fast paths of {type(model).__name__}: {', '.join(used) or 'none'}")
    _known[model] = (_attention(model), paths)
    return paths


@torch.no_grad()
def packs(model: PreTrainedModel, vocabulary: int) -> bool:
    """Whether rows that are packed do not see each other, whatever packing costs with the model's attention."""
    test = _Test(model, vocabulary, type(model).__name__)
    test.require_right()
    return test.passes("packing", test.packing)


def max_length(config: PreTrainedConfig) -> int | None:
    """Return the most tokens, prompt and completion together, of which a model computes each the same whatever follows; None: no limit.

    That is how many positions it was made for; with LongRoPE, where its rotary frequencies switch. Beyond that (and
    with dynamic NTK) every token of a row changes with the row's length, so what was sampled is not what is scored.
    """
    config = config.get_text_config()
    limits = [getattr(config, name, None) for name in _POSITIONS]
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one for all layers, or one for each of their types
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None))
    return min((limit for limit in limits if limit), default=None)


def require_rows_fit(config: PreTrainedConfig, rows: Sequence[Row], where: str) -> None:
    """Raise UsageError if a row to train on or to score is longer than `max_length`. `where`: what the rows came from."""
    limit = max_length(config)
    longest = max(rows, key=len, default=None)
    if limit is not None and longest is not None and len(longest) > limit:
        raise UsageError(
            f"a row of {len(longest.prompt_ids)} prompt tokens and {len(longest.completion_ids)} completion tokens exceeds the {limit} "
            f"positions of {config.model_type}",
            where=where,
            hint=f"leave out rows of more than {limit} tokens, or take a model with more positions",
        )


def _attention(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config()._attn_implementation)


def _full_attention(model: PreTrainedModel) -> bool:
    """Whether every layer attends to everything before. A few tokens do not show what lies beyond a window.

    Windows are counted in positions of the cache, which the padding behind a short prompt would use up.
    """
    from transformers import DynamicCache, DynamicLayer

    local = "local" in (getattr(model.config.get_text_config(), "attention_layers", None) or ())  # GPT-Neo
    return not local and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


class _Test:
    """Three rows of random tokens, two of one prompt and one of another, and the log-probs that a path has to give them.

    The first row is run alone; the second is its start, so its log-probs are known too. Those of the third are what the
    plain batch of the three gives, once that is right for the other two, one with padding and one without: each pass
    over a large model costs a tenth of a second. Every check returns, for each row, how far off a path's log-probs are.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int, name: str) -> None:
        self.model, self.name = model, name
        self.ids_C = torch.linspace(0, vocabulary - 1, min(vocabulary, COMPARED_IDS), device=model.device).long()
        head = head_of(model, vocabulary)
        self.head = replace(  # the model's own logits have no mask
            head, weight_VD=head.weight_VD[self.ids_C], bias_V=None if head.bias_V is None else head.bias_V[self.ids_C], unused_U=None
        )
        draw = random.Random(0)
        first, second = ([draw.randrange(vocabulary) for _ in range(length)] for length in LENGTHS)
        self.whole = [first, first[: PROMPT_LENGTHS[0] + 2], second]
        try:
            alone_TV = model(input_ids=self._tensor([first]), use_cache=False).logits[0, :, :vocabulary]
        except Exception as error:  # whatever a family's code or a config's numbers make it raise
            raise ModelError(f"{type(model).__name__} cannot compute a few tokens ({_in_words(error)})", where=name) from None
        self.finite = bool(alone_TV.isfinite().all())
        self.narrow = alone_TV.dtype != torch.float32
        self.tolerance = TOLERANCES[alone_TV.dtype]
        self.known = [alone_TV[:, self.ids_C].float().log_softmax(-1)] * 2

    def _tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, rows))
        return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in rows], device=self.model.device)

    def _errors(self, states_R: Sequence[torch.Tensor], starts: Sequence[int]) -> list[torch.Tensor]:
        """Return for each row, of whose states [K, D] from position `starts` on a path has computed K, how far log-probs are off.

        As a share of their spread. A row whose log-probs are not known yet gets them, and no error.
        """
        found_R = self.head.logits(torch.cat(list(states_R))).log_softmax(-1).split(list(map(len, states_R)))
        self.known += found_R[len(self.known) :]
        errors_R = []
        for known_TC, found_KC, start in zip(self.known, found_R, starts, strict=True):
            exact_KC = known_TC[start : start + len(found_KC)]
            spread_K = exact_KC.std(-1).clamp(min=torch.finfo(torch.float32).tiny)
            errors_R.append((found_KC - exact_KC).square().mean(-1).sqrt() / spread_K)
        return errors_R

    def _worst(self, errors_R: Sequence[torch.Tensor]) -> float:
        """Return the largest error; in narrow types of the rows' medians, as rounding may choose other experts for a token."""
        return max(float(errors_K.median() if self.narrow else errors_K.max()) for errors_K in errors_R)

    def require_right(self) -> None:
        """Raise ModelError unless rows of several lengths in one batch, through our head, say what they say alone."""
        if not self.finite:
            broken = [
                name for name, weight in self.model.state_dict().items() if weight.is_floating_point() and not weight.isfinite().all()
            ]
            what = f"not a finite number: {', '.join(broken[:3])}" if broken else f"finite, yet {type(self.model).__name__} overflows"
            raise ModelError(f"has weights that are {what}", where=self.name, hint="take an earlier checkpoint or download it again")
        error = self._worst(self.batched())
        if not error <= self.tolerance:
            family = type(self.model).__name__
            self.known = self.known[:1]
            head_error = self._worst(self._errors([hidden_states(self.model, self._tensor(self.whole[:1]))[0]], [0]))
            if not head_error <= self.tolerance:
                raise ModelError(
                    f"{family} transforms its logits in a way s2d does not know (they are off by {head_error:.2g} of their spread)",
                    where=self.name,
                )
            raise ModelError(
                f"rows of different lengths in one batch change each other in {family} "
                f"(logits are off by {error:.2g} of their spread), so it can neither be trained nor sampled from",
                where=self.name,
            )

    def passes(self, path: str, check: Callable[[], list[torch.Tensor]]) -> bool:
        """Whether a path is right; says with -v what is wrong with it."""
        try:
            error = self._worst(check())
        except Exception as raised:  # whatever a family's code raises, it cannot go this way
            console.detail(f"{self.name}: {path} fails and is not used ({_in_words(raised)})")
            return False
        if not error <= self.tolerance:
            console.detail(f"{self.name}: {path} changes the logits by {error:.2g} of their spread and is not used")
        return error <= self.tolerance

    def batched(self) -> list[torch.Tensor]:
        states_BTD = hidden_states(self.model, self._tensor(self.whole))
        return self._errors([states_TD[: len(ids)] for states_TD, ids in zip(states_BTD, self.whole, strict=True)], [0, 0, 0])

    def packing(self) -> list[torch.Tensor]:
        ids_1T = self._tensor([[token for ids in self.whole for token in ids]])
        positions_1T = torch.cat([torch.arange(len(ids)) for ids in self.whole])[None].to(ids_1T.device)
        states_TD = hidden_states(self.model, ids_1T, positions_1T)[0]
        return self._errors(states_TD.split([len(ids) for ids in self.whole]), [0, 0, 0])

    def sharing(self) -> list[torch.Tensor]:
        prompts, of_B = self._prompts(PROMPT_LENGTHS)
        lengths_P = torch.tensor(PROMPT_LENGTHS, device=of_B.device)
        completions = [ids[PROMPT_LENGTHS[prompt] :] for ids, prompt in zip(self.whole, ROW_PROMPTS, strict=True)]
        shared = SharedPrompts(self._tensor(prompts), lengths_P, of_B, padded=len({*PROMPT_LENGTHS}) > 1)
        states_BTD = shared_prompt_states(self.model, shared, self._tensor(completions))
        starts = [PROMPT_LENGTHS[prompt] - 1 for prompt in ROW_PROMPTS]
        return self._errors([states_TD[: len(ids)] for states_TD, ids in zip(states_BTD, completions, strict=True)], starts)

    def decoding(self, decoder_class: type[CachedDecoder | PlainDecoder], lengths: Sequence[int]) -> list[torch.Tensor]:
        """Sample the rows' own tokens after prompts of these lengths; the second row ends early and is dropped."""
        prompts, of_B = self._prompts(lengths)
        decoder = decoder_class(self.model, prompts, of_B, pad_id=0)
        states_BD, live, states_R = decoder.states_BD, [0, 1, 2], [[] for _ in ROW_PROMPTS]
        for step in range(3):
            for place, row in enumerate(live):
                states_R[row].append(states_BD[place])
            if step == 1:
                decoder.keep(torch.tensor([0, 2], device=of_B.device))
                live = [0, 2]
            if step < 2:
                tokens = [[self.whole[row][lengths[ROW_PROMPTS[row]] + step]] for row in live]
                states_BD = decoder.step(self._tensor(tokens)[:, 0])
        return self._errors(list(map(torch.stack, states_R)), [lengths[prompt] - 1 for prompt in ROW_PROMPTS])

    def _prompts(self, lengths: Sequence[int]) -> tuple[list[list[int]], torch.Tensor]:
        """Cut the rows of the two prompts to these lengths; which row continues which."""
        of_B = torch.tensor(ROW_PROMPTS, device=self.model.device)
        return [self.whole[ROW_PROMPTS.index(prompt)][:length] for prompt, length in enumerate(lengths)], of_B


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
