"""Options that several commands share, each declared once: an Annotated alias, or a field of a group.

A command takes a whole group as one parameter, `training: options.TrainingOptions`; on the command line
its fields are options like any other.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from s2dcli.errors import UsageError

SAMPLING = "Sampling"
GRADING = "Grading"
TRAINING = "Training"
MEMORY = "Memory"
OUTPUT = "Output"
ENGINE = "Engine"

# Default of --sample-tokens. A cache position of a 1.7-billion-parameter model takes 115 kB in
# bfloat16, so this is at most 8 GB there, and 50 rollouts of 1,300 tokens.
SAMPLE_TOKENS = 65536
MODEL = "Model"


class Dtype(StrEnum):
    """Type of the forward computation; master weights and optimizer state are always float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Weights(StrEnum):
    """Type that the weights in training are kept in; their masters are float32 in any case."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Optimizer(StrEnum):
    """AdamW with its moments in float32, or in 8 bits with a scale for each block of them."""

    adamw = "adamw"
    adamw_8bit = "adamw-8bit"


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Aggregate(StrEnum):
    """What each completion token's loss is divided by; see train/losses.token_weights."""

    token = "token"
    sequence = "sequence"
    constant = "constant"


class Advantage(StrEnum):
    """How rewards become advantages; see train/losses.group_advantages."""

    group_std = "group-std"
    group_mean = "group-mean"


class Importance(StrEnum):
    """Whose probability ratio is clipped: each token's, or its sequence's (mean of the log-ratios)."""

    token = "token"
    sequence = "sequence"


class Surrogate(StrEnum):
    """What clipping does: PPO's minimum, or CISPO's truncated weight."""

    ppo = "ppo"
    cispo = "cispo"


class KlEstimator(StrEnum):
    """Estimators of KL(policy || reference) from sampled tokens; see train/losses.kl_estimate."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class Truncated(StrEnum):
    """What becomes of completions that hit the length limit."""

    keep = "keep"
    mask = "mask"
    penalty = "penalty"


class Correction(StrEnum):
    """What is done about the distance between the sampler's log-probs and the trainer's."""

    none = "none"
    truncate = "truncate"
    mask = "mask"


def refuse_given(context: typer.Context, names: dict[str, str], reason: str) -> None:
    """Raise UsageError if an option that would be ignored was given; `names` maps parameters to options."""
    for parameter, option in names.items():
        source = context.get_parameter_source(parameter)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{option} {reason}", hint="leave it out")


def parse_cadence(text: str) -> tuple[float, float]:
    """Return steps and seconds between two saves, one of them infinite: `50` is 50 steps, `30m` 1800 seconds."""
    with suppress(ValueError):
        cadence = (math.inf, 60 * float(text[:-1])) if text.endswith("m") else (int(text), math.inf)
        if min(cadence) > 0:
            return cadence
    raise typer.BadParameter(f"{text!r} is neither a number of steps, 50, nor of minutes, 30m")


def _checked_cadence(text: str) -> str:
    parse_cadence(text)
    return text


def _panel(name: str) -> Callable[..., Any]:
    """Return what declares an option of a panel: its help, its names unless the parameter's will do, its settings."""
    return lambda text, *names, **settings: typer.Option(*names, help=text, rich_help_panel=name, **settings)


_model, _sampling, _engine, _grading = map(_panel, (MODEL, SAMPLING, ENGINE, GRADING))
_training, _memory, _output = map(_panel, (TRAINING, MEMORY, OUTPUT))

# Inputs
Problems = Annotated[str, typer.Argument(metavar="PROBLEMS", help="Problems, JSONL; - is standard input.", show_default=False)]
Rollouts = Annotated[str, typer.Argument(metavar="ROLLOUTS", help="Rollouts, JSONL; - is standard input.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**53 - 1, help="Seed of every random number that is drawn.")]

# Outputs
OutFile = Annotated[str, _output("Output file; - is standard output.", "--out", "-o", metavar="FILE")]
RunDir = Annotated[Path, _output("Run folder.", "--out", "-o", metavar="DIR")]
Overwrite = Annotated[bool, _output("Replace an existing output.", "--overwrite")]
Resume = Annotated[bool, _output("Go on with an output that was not finished.", "--resume")]

# Models and prompts
Model = Annotated[str, typer.Option("--model", "-m", metavar="CKPT", help="Hub id, checkpoint folder or run folder.", show_default=False)]
Teacher = Annotated[str, typer.Option("--teacher", metavar="CKPT", help="Frozen teacher.", show_default=False)]
Student = Annotated[str, typer.Option("--student", metavar="CKPT", help="Student to train.", show_default=False)]
ChatTemplate = Annotated[str | None, _model("For models without a chat template.", "--chat-template", metavar="plain|FILE")]
ChatTemplateKwargs = Annotated[
    str, _model('Passed to the chat template, e.g. {"enable_thinking": false}.', "--chat-template-kwargs", metavar="JSON")
]
TrustRemoteCode = Annotated[bool, _model("Run code that the checkpoint brings.", "--trust-remote-code")]

# Sampling
NumSamples = Annotated[int, _sampling("Rollouts per problem.", "-n", metavar="N", min=1)]
Temperature = Annotated[float, _sampling("Sampling temperature; 0 is greedy.", "--temperature", min=0.0)]
TopP = Annotated[float, _sampling("Nucleus sampling.", "--top-p", min=0.0, max=1.0)]
TopK = Annotated[int, _sampling("Sample among the k likeliest tokens; 0 is all.", "--top-k", min=0)]
MaxTokens = Annotated[int, _sampling("Longest completion, in tokens.", "--max-tokens", min=1)]
MaxPromptTokens = Annotated[int | None, _sampling("Problems with longer prompts are dropped and counted.", "--max-prompt-tokens", min=1)]

# Engines
Engine = Annotated[
    str,
    _engine(
        "Who samples; auto takes vLLM if it is installed and there is a GPU. URL: of a running vllm serve.",
        "--engine",
        metavar="auto|transformers|vllm|URL,...",
    ),
]

# Training
Steps = Annotated[int | None, _training("Steps to train; default: as --epochs says.", "--steps", min=1)]
Epochs = Annotated[int, _training("Passes over the problems, if --steps is not given.", "--epochs", min=1)]
ProblemsPerStep = Annotated[int, _training("Problems sampled for each step.", "--problems-per-step", min=1)]
MiniBatchSize = Annotated[
    int | None, _training("Rollouts per optimizer update.", "--mini-batch-size", min=1, show_default="all: one update per step")
]
Offload = Annotated[bool, _memory("Keep the frozen model in main memory while it is not asked (GPU).", "--offload")]
TrainTemperature = Annotated[float, _sampling("Of sampling and of every probability in the loss.", "--temperature", min=1e-3)]
AggregateOption = Annotated[
    Aggregate, _training("What a token's loss is divided by: all tokens, its own sequence's, or the longest length.", "--aggregate")
]
KeepRollouts = Annotated[bool, _output("Write each step's rollouts to the run folder.", "--keep-rollouts")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How checkpoints are loaded, and how their prompts are built."""

    chat_template: ChatTemplate = None
    chat_template_kwargs: ChatTemplateKwargs = "{}"
    dtype: Annotated[Dtype, _model("Compute type; auto: float32 on CPU, bfloat16 on a GPU.")] = Dtype.auto
    device: Annotated[str, _model("cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")] = "auto"
    attention: Annotated[
        str | None,
        _model("One of transformers' implementations: eager, sdpa, flash_attention_2, ...", metavar="NAME", show_default="the model's own"),
    ] = None
    trust_remote_code: TrustRemoteCode = False

    def of_load(self) -> dict[str, Any]:
        """Return what models/checkpoints.load takes of these."""
        return {name: getattr(self, name) for name in ("device", "dtype", "attention", "trust_remote_code")}

    @property
    def files(self) -> list[str]:
        """Files that are named here; what is in them counts as an input does."""
        return [] if self.chat_template in (None, "plain") else [self.chat_template]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Who turns prompts into completions."""

    engine: Engine = "auto"
    sample_tokens: Annotated[
        int, _sampling("Cache positions that one sampling batch may fill (transformers engine).", min=1, metavar="TOKENS")
    ] = SAMPLE_TOKENS
    gpu_memory_utilization: Annotated[
        float | None,
        _engine(
            "Share of a GPU's memory for vLLM; on a CPU, of main memory for its cache.",
            min=0.01,
            max=1.0,
            show_default="0.9; beside a trainer 0.4",
        ),
    ] = None
    tensor_parallel_size: Annotated[int | None, _engine("GPUs that vLLM spreads the weights over.", min=1, show_default="1")] = None
    max_model_len: Annotated[
        int | None, _engine("Tokens of prompt and completion that vLLM has to take.", min=1, show_default="what fits")
    ] = None
    max_in_flight: Annotated[int | None, _engine("Requests under way at each server.", min=1, show_default="256")] = None
    parity_rows: Annotated[
        int | None,
        _engine(
            "Samples of vLLM or a server that transformers scores again, to prove the weights.",
            min=0,
            show_default="training: 8, after every update; else 0",
        ),
    ] = None
    parity_tolerance: Annotated[
        float | None, _engine("Nats by which their log-probs may differ on average.", min=0.0, show_default="float32: 1e-3, bfloat16: 5e-2")
    ] = None


@dataclass(frozen=True, kw_only=True)
class GradingOptions:
    """What is rewarded, and what grading may take."""

    reward: Annotated[
        list[str] | None,
        _grading("math, math:strict, exact or python:MODULE:FUNCTION[=WEIGHT]; repeatable.", metavar="REWARD", show_default="math"),
    ] = None
    workers: Annotated[int | None, _grading("Grading processes.", min=1, show_default="CPUs")] = None
    timeout: Annotated[float, _grading("Seconds that one answer may take.", min=0.1, max=86_400.0)] = 5.0
    memory_limit: Annotated[str, _grading("Memory that one grading process may use.", metavar="SIZE")] = "2GiB"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How every trainer turns a loss into updates."""

    lr: Annotated[float, _training("Peak learning rate.", min=0.0)] = 1e-6
    schedule: Annotated[Schedule, _training("Learning rate after the warm-up.")] = Schedule.constant
    min_lr_ratio: Annotated[float, _training("Where linear and cosine end, as a share of --lr.", min=0.0, max=1.0)] = 0.0
    warmup_steps: Annotated[int, _training("Steps of linear warm-up.", min=0)] = 0
    weight_decay: Annotated[float, _training("AdamW's decoupled weight decay.", min=0.0)] = 0.0
    adam_beta2: Annotated[float, _training("AdamW's second-moment decay.", min=0.0, max=0.99999)] = 0.999
    grad_clip: Annotated[float, _training("Largest gradient norm; 0 is no limit.", min=0.0)] = 1.0
    tokens_per_batch: Annotated[
        int, _training("Positions of one micro-batch, padding included; changes memory, not the gradient.", min=1)
    ] = 8192
    weights: Annotated[
        Weights, _memory("Of the model in training; bfloat16 computes in it too, and keeps float32 masters in the optimizer.")
    ] = Weights.float32
    optimizer: Annotated[Optimizer, _memory("adamw-8bit keeps AdamW's moments in 8 bits (extra: 8bit).")] = Optimizer.adamw
    gradient_checkpointing: Annotated[
        bool, _memory("Run the layers again in the backward pass, to keep less of them.", "--gradient-checkpointing")
    ] = False
    lora_rank: Annotated[int | None, _memory("Train an adapter of this rank, not the weights (extra: lora).", min=1)] = None
    lora_alpha: Annotated[float | None, _memory("The adapter's scale, times the rank.", min=0.0, show_default="twice the rank")] = None
    lora_targets: Annotated[
        str | None, _memory("Linear layers to adapt, e.g. q_proj,v_proj.", metavar="NAME,...", show_default="all but the head")
    ] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a training run writes, measures and repeats."""

    save_every: Annotated[
        str,
        _output(
            "Between checkpoints, e.g. 50 or 30m; the last step is always saved.",
            metavar="STEPS|MINUTESm",
            callback=_checked_cadence,
        ),
    ] = "50"
    keep_last: Annotated[int | None, _output("Checkpoints that are kept.", min=1, show_default="all")] = None
    keep_states: Annotated[int, _output("Checkpoints that keep the optimizer's state, for --resume.", min=1)] = 1
    eval_problems: Annotated[str | None, _output("Problems to measure avg@k on while training.", metavar="FILE")] = None
    eval_every: Annotated[int, _output("Steps between evaluations; also before the first and after the last.", min=1)] = 50
    eval_samples: Annotated[int, _output("k of avg@k in evaluations while training.", min=1)] = 4
    dry_run: Annotated[bool, _output("Check inputs and print the plan; load no weights.", "--dry-run")] = False
    overwrite: Overwrite = False
    resume: Resume = False
    seed: Seed = 0


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes the fields of its groups one by one, as its signature then says."""
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if not dataclasses.is_dataclass(parameter.annotation):
            parameters.append(parameter)
            continue
        groups[name] = group = parameter.annotation
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
            for field in dataclasses.fields(group)
        ]

    def run(**options: Any) -> None:
        for name, group in groups.items():
            options[name] = group(**{field.name: options.pop(field.name) for field in dataclasses.fields(group)})
        command(**options)

    run.__signature__ = inspect.Signature(parameters)
    run.__doc__ = command.__doc__
    return run


def flatten(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a command's options by name, those of its groups too; its `context` is left out."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if dataclasses.is_dataclass(value):
            flat |= {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        elif name != "context":
            flat[name] = value
    return flat
