"""The options of grpo's objective, and named settings of them: a preset sets the knobs that are not given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Any

import typer

from s2dcli import options
from s2dcli.errors import UsageError


class Preset(StrEnum):
    """Named settings of the objective's knobs; see PRESETS."""

    grpo = "grpo"
    dr_grpo = "dr-grpo"
    dapo = "dapo"
    gspo = "gspo"
    cispo = "cispo"


def _preset(aggregate: str, advantage: str, importance: str, surrogate: str, clip_low: float, clip_high: float) -> dict[str, Any]:
    return {
        "aggregate": options.Aggregate(aggregate),
        "advantage": options.Advantage(advantage),
        "importance": options.Importance(importance),
        "surrogate": options.Surrogate(surrogate),
        "clip_low": clip_low,
        "clip_high": clip_high,
    }


PRESETS = {
    # DeepSeekMath, arXiv 2402.03300, Eq. 3; clip 0.2 as in the paper that s2d follows
    Preset.grpo: _preset("sequence", "group-std", "token", "ppo", 0.2, 0.2),
    # "Understanding R1-Zero-like training", arXiv 2503.20783: no deviation, no length in a denominator
    Preset.dr_grpo: _preset("constant", "group-mean", "token", "ppo", 0.2, 0.2),
    # DAPO, arXiv 2503.14476, §3 and §4.1; its dynamic sampling is --dynamic-sampling, its overlong penalty --truncated
    Preset.dapo: _preset("token", "group-std", "token", "ppo", 0.2, 0.28),
    # GSPO, arXiv 2507.18071, §5.1
    Preset.gspo: _preset("sequence", "group-std", "sequence", "ppo", 3e-4, 4e-4),
    # CISPO, MiniMax-M1, arXiv 2506.13585, Eq. 4; weights up to 5 as in ScaleRL, arXiv 2510.13786
    Preset.cispo: _preset("token", "group-std", "token", "cispo", 1.0, 4.0),
}


class KlIn(StrEnum):
    """Where the KL to the initial policy is charged."""

    loss = "loss"
    reward = "reward"


def _knob(text: str, **settings: Any) -> Any:
    return typer.Option(help=text, rich_help_panel="Objective", **settings)


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What is maximised; knobs that are None are those of the preset `loss`."""

    loss: Annotated[Preset, _knob("Preset of the options in this panel that are not given.")] = Preset.grpo
    aggregate: Annotated[
        options.Aggregate | None, _knob("Denominator of a token's loss: all tokens, its sequence's tokens, or --max-tokens.")
    ] = None
    advantage: Annotated[
        options.Advantage | None,
        _knob("Advantage: reward less the group's mean, divided by the group's deviation or not; or the reward itself."),
    ] = None
    importance: Annotated[options.Importance | None, _knob("Importance ratio: per token or per sequence.")] = None
    surrogate: Annotated[options.Surrogate | None, _knob("Clipped surrogate: PPO's minimum or CISPO's truncated weight.")] = None
    clip_low: Annotated[float | None, _knob("Lower clip range: the ratio is clipped at 1 - this.", min=0.0)] = None
    clip_high: Annotated[float | None, _knob("Upper clip range: the ratio is clipped at 1 + this.", min=0.0)] = None
    kl_coef: Annotated[float, _knob("Coefficient of the KL to the initial policy.", min=0.0)] = 0.0
    kl_estimator: Annotated[options.KlEstimator, _knob("Estimator of that KL.")] = options.KlEstimator.k3
    kl_in: Annotated[KlIn, _knob("Add the KL to the loss, or subtract it from each reward.")] = KlIn.loss
    truncated: Annotated[options.Truncated, _knob("Completions that reach --max-tokens: keep, mask (no gradient) or penalty (soft).")] = (
        options.Truncated.keep
    )
    overlong_buffer: Annotated[
        int | None, _knob("Tokens before the limit over which that penalty falls to -1.", min=1, show_default="a fifth")
    ] = None
    correction: Annotated[
        options.Correction | None,
        _knob("Importance correction of sampler/trainer mismatch: none, truncate or mask.", show_default="none; with --async-depth 1 mask"),
    ] = None
    correction_level: Annotated[
        options.CorrectionLevel, _knob("Ratio of that correction: per token, or per sequence (mean or sum of its log-ratios).")
    ] = options.CorrectionLevel.token
    correction_cap: Annotated[float, _knob("Largest ratio: truncated to it, or masked beyond it.", min=1.0)] = 2.0
    correction_floor: Annotated[
        float | None,
        _knob("Smallest ratio: truncated to it, or masked below it.", min=0.0, max=1.0, show_default="mask: 1 / --correction-cap"),
    ] = None
    dynamic_sampling: Annotated[int, _knob("Rounds of resampling: replace groups whose rewards are all equal.", min=0)] = 0

    def resolved(self, sampling: options.RolloutOptions) -> ObjectiveOptions:
        """Return it with the preset's values where none were given."""
        missing = {name: value for name, value in PRESETS[self.loss].items() if getattr(self, name) is None}
        if self.correction is None:
            missing["correction"] = options.Correction.mask if sampling.async_depth else options.Correction.none
        return replace(self, **missing, overlong_buffer=self.overlong_buffer or max(1, sampling.max_tokens // 5))


def check_correction(given: options.Correction | None, async_depth: int, dynamic_sampling: int) -> bool:
    """Return whether there is an importance correction. Raises UsageError for sampling ahead without one, or with what excludes it."""
    corrected = given is not options.Correction.none and (given is not None or async_depth > 0)
    if async_depth and not corrected:
        raise UsageError(
            "--async-depth 1 learns from rollouts of older weights, whose gradient is biased without an importance correction",
            hint="--correction mask (the default with it) or truncate",
        )
    if async_depth and dynamic_sampling:
        raise UsageError(
            "--dynamic-sampling samples when a step's rewards are known; with --async-depth 1 the engine is busy with the next step then",
            hint="leave one of them out",
        )
    return corrected
