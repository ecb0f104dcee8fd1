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


# Inputs
Problems = Annotated[str, typer.Argument(metavar="PROBLEMS", help="Problems, JSONL; - is standard input.", show_default=False)]
Rollouts = Annotated[str, typer.Argument(metavar="ROLLOUTS", help="Rollouts, JSONL; - is standard input.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**53 - 1, help="Seed of every random number that is drawn.")]

# Outputs
OutFile = Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="Output file; - is standard output.", rich_help_panel=OUTPUT)]
RunDir = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Run folder.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=OUTPUT)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an output that was not finished.", rich_help_panel=OUTPUT)]

# Models and prompts
Model = Annotated[str, typer.Option("--model", "-m", metavar="CKPT", help="Hub id, checkpoint folder or run folder.", show_default=False)]
Teacher = Annotated[str, typer.Option("--teacher", metavar="CKPT", help="Frozen teacher.", show_default=False)]
Student = Annotated[str, typer.Option("--student", metavar="CKPT", help="Student to train.", show_default=False)]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Compute type; auto: float32 on CPU, bfloat16 on a GPU.", rich_help_panel=MODEL)
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.", rich_help_panel=MODEL)]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="NAME",
        help="One of transformers' implementations: eager, sdpa, flash_attention_2, ...",
        show_default="the model's own",
        rich_help_panel=MODEL,
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option("--chat-template", metavar="plain|FILE", help="For models without a chat template.", rich_help_panel=MODEL),
]
ChatTemplateKwargs = Annotated[
    str,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help='Passed to the chat template, e.g. {"enable_thinking": false}.',
        rich_help_panel=MODEL,
    ),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.", rich_help_panel=MODEL)]

# Sampling
NumSamples = Annotated[int, typer.Option("-n", metavar="N", min=1, help="Rollouts per problem.", rich_help_panel=SAMPLING)]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 is greedy.", rich_help_panel=SAMPLING)]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus sampling.", rich_help_panel=SAMPLING)]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Sample among the k likeliest tokens; 0 is all.", rich_help_panel=SAMPLING)]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Longest completion, in tokens.", rich_help_panel=SAMPLING)]
MaxPromptTokens = Annotated[
    int | None,
    typer.Option("--max-prompt-tokens", min=1, help="Problems with longer prompts are dropped and counted.", rich_help_panel=SAMPLING),
]
BatchTokens = Annotated[
    int,
    typer.Option(
        "--sample-tokens",
        min=1,
        metavar="TOKENS",
        help="Cache positions that one sampling batch may fill (transformers engine).",
        rich_help_panel=SAMPLING,
    ),
]

# Engines
Engine = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="auto|transformers|vllm|URL,...",
        help="Who samples; auto takes vLLM if it is installed and there is a GPU. URL: of a running vllm serve.",
        rich_help_panel=ENGINE,
    ),
]
GpuMemoryUtilization = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory-utilization",
        min=0.01,
        max=1.0,
        help="Share of a GPU's memory for vLLM; on a CPU, of main memory for its cache.",
        show_default="0.9; beside a trainer 0.4",
        rich_help_panel=ENGINE,
    ),
]
TensorParallelSize = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel-size", min=1, help="GPUs that vLLM spreads the weights over.", show_default="1", rich_help_panel=ENGINE
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        min=1,
        help="Tokens of prompt and completion that vLLM has to take.",
        show_default="what fits",
        rich_help_panel=ENGINE,
    ),
]
MaxInFlight = Annotated[
    int | None,
    typer.Option("--max-in-flight", min=1, help="Requests under way at each server.", show_default="256", rich_help_panel=ENGINE),
]
ParityRows = Annotated[
    int | None,
    typer.Option(
        "--parity-rows",
        min=0,
        help="Samples of vLLM or a server that transformers scores again, to prove the weights.",
        show_default="training: 8, after every update; else 0",
        rich_help_panel=ENGINE,
    ),
]
ParityTolerance = Annotated[
    float | None,
    typer.Option(
        "--parity-tolerance",
        min=0.0,
        help="Nats by which their log-probs may differ on average.",
        show_default="float32: 1e-3, bfloat16: 5e-2",
        rich_help_panel=ENGINE,
    ),
]

# Grading
Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Grading processes.", show_default="CPUs", rich_help_panel=GRADING)]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that one answer may take.", rich_help_panel=GRADING)]
MemoryLimit = Annotated[
    str, typer.Option("--memory-limit", metavar="SIZE", help="Memory that one grading process may use.", rich_help_panel=GRADING)
]

Reward = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        metavar="REWARD",
        help="math, exact or python:MODULE:FUNCTION[=WEIGHT]; repeatable.",
        show_default="math",
        rich_help_panel=GRADING,
    ),
]

# Training
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Steps to train; default: as --epochs says.", rich_help_panel=TRAINING)]
Epochs = Annotated[
    int, typer.Option("--epochs", min=1, help="Passes over the problems, if --steps is not given.", rich_help_panel=TRAINING)
]
ProblemsPerStep = Annotated[
    int, typer.Option("--problems-per-step", min=1, help="Problems sampled for each step.", rich_help_panel=TRAINING)
]
MiniBatchSize = Annotated[
    int | None,
    typer.Option(
        "--mini-batch-size", min=1, help="Rollouts per optimizer update.", show_default="all: one update per step", rich_help_panel=TRAINING
    ),
]
LearningRate = Annotated[float, typer.Option("--lr", min=0.0, help="Peak learning rate.", rich_help_panel=TRAINING)]
ScheduleOption = Annotated[Schedule, typer.Option("--schedule", help="Learning rate after the warm-up.", rich_help_panel=TRAINING)]
MinLrRatio = Annotated[
    float,
    typer.Option("--min-lr-ratio", min=0.0, max=1.0, help="Where linear and cosine end, as a share of --lr.", rich_help_panel=TRAINING),
]
WarmupSteps = Annotated[int, typer.Option("--warmup-steps", min=0, help="Steps of linear warm-up.", rich_help_panel=TRAINING)]
WeightDecay = Annotated[float, typer.Option("--weight-decay", min=0.0, help="AdamW's decoupled weight decay.", rich_help_panel=TRAINING)]
AdamBeta2 = Annotated[
    float, typer.Option("--adam-beta2", min=0.0, max=0.99999, help="AdamW's second-moment decay.", rich_help_panel=TRAINING)
]
GradClip = Annotated[float, typer.Option("--grad-clip", min=0.0, help="Largest gradient norm; 0 is no limit.", rich_help_panel=TRAINING)]
TokensPerBatch = Annotated[
    int,
    typer.Option(
        "--tokens-per-batch",
        min=1,
        help="Positions of one micro-batch, padding included; changes memory, not the gradient.",
        rich_help_panel=TRAINING,
    ),
]
WeightsOption = Annotated[
    Weights,
    typer.Option(
        "--weights",
        help="Of the model in training; bfloat16 computes in it too, and keeps float32 masters in the optimizer.",
        rich_help_panel=MEMORY,
    ),
]
OptimizerOption = Annotated[
    Optimizer,
    typer.Option("--optimizer", help="adamw-8bit keeps AdamW's moments in 8 bits (extra: 8bit).", rich_help_panel=MEMORY),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing", help="Run the layers again in the backward pass, to keep less of them.", rich_help_panel=MEMORY
    ),
]
LoraRank = Annotated[
    int | None,
    typer.Option("--lora-rank", min=1, help="Train an adapter of this rank, not the weights (extra: lora).", rich_help_panel=MEMORY),
]
LoraAlpha = Annotated[
    float | None,
    typer.Option(
        "--lora-alpha", min=0.0, help="The adapter's scale, times the rank.", show_default="twice the rank", rich_help_panel=MEMORY
    ),
]
LoraTargets = Annotated[
    str | None,
    typer.Option(
        "--lora-targets",
        metavar="NAME,...",
        help="Linear layers to adapt, e.g. q_proj,v_proj.",
        show_default="all but the head",
        rich_help_panel=MEMORY,
    ),
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Keep the frozen model in main memory while it is not asked (GPU).", rich_help_panel=MEMORY),
]
TrainTemperature = Annotated[
    float,
    typer.Option("--temperature", min=1e-3, help="Of sampling and of every probability in the loss.", rich_help_panel=SAMPLING),
]
AggregateOption = Annotated[
    Aggregate,
    typer.Option(
        "--aggregate",
        help="What a token's loss is divided by: all tokens, its own sequence's, or the longest length.",
        rich_help_panel=TRAINING,
    ),
]
SaveEvery = Annotated[
    str,
    typer.Option(
        "--save-every",
        metavar="STEPS|MINUTESm",
        callback=lambda text: parse_cadence(text) and text,
        help="Between checkpoints, e.g. 50 or 30m; the last step is always saved.",
        rich_help_panel=OUTPUT,
    ),
]
KeepLast = Annotated[
    int | None,
    typer.Option("--keep-last", min=1, help="Checkpoints that are kept.", show_default="all", rich_help_panel=OUTPUT),
]
KeepStates = Annotated[
    int,
    typer.Option("--keep-states", min=1, help="Checkpoints that keep the optimizer's state, for --resume.", rich_help_panel=OUTPUT),
]
KeepRollouts = Annotated[
    bool, typer.Option("--keep-rollouts", help="Write each step's rollouts to the run folder.", rich_help_panel=OUTPUT)
]
EvalProblems = Annotated[
    str | None, typer.Option("--eval-problems", metavar="FILE", help="Problems to measure avg@k on while training.", rich_help_panel=OUTPUT)
]
EvalEvery = Annotated[
    int,
    typer.Option(
        "--eval-every", min=1, help="Steps between evaluations; also before the first and after the last.", rich_help_panel=OUTPUT
    ),
]
EvalSamples = Annotated[
    int, typer.Option("--eval-samples", min=1, help="k of avg@k in evaluations while training.", rich_help_panel=OUTPUT)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check inputs and print the plan; load no weights.", rich_help_panel=OUTPUT)]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How checkpoints are loaded, and how their prompts are built."""

    chat_template: ChatTemplate = None
    chat_template_kwargs: ChatTemplateKwargs = "{}"
    dtype: DtypeOption = Dtype.auto
    device: Device = "auto"
    attention: Attention = None
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
    sample_tokens: BatchTokens = SAMPLE_TOKENS
    gpu_memory_utilization: GpuMemoryUtilization = None
    tensor_parallel_size: TensorParallelSize = None
    max_model_len: MaxModelLen = None
    max_in_flight: MaxInFlight = None
    parity_rows: ParityRows = None
    parity_tolerance: ParityTolerance = None


@dataclass(frozen=True, kw_only=True)
class GradingOptions:
    """What is rewarded, and what grading may take."""

    reward: Reward = None
    workers: Workers = None
    timeout: Timeout = 5.0
    memory_limit: MemoryLimit = "2GiB"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How every trainer turns a loss into updates."""

    lr: LearningRate = 1e-6
    schedule: ScheduleOption = Schedule.constant
    min_lr_ratio: MinLrRatio = 0.0
    warmup_steps: WarmupSteps = 0
    weight_decay: WeightDecay = 0.0
    adam_beta2: AdamBeta2 = 0.999
    grad_clip: GradClip = 1.0
    tokens_per_batch: TokensPerBatch = 8192
    weights: WeightsOption = Weights.float32
    optimizer: OptimizerOption = Optimizer.adamw
    gradient_checkpointing: GradientCheckpointing = False
    lora_rank: LoraRank = None
    lora_alpha: LoraAlpha = None
    lora_targets: LoraTargets = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a training run writes, measures and repeats."""

    save_every: SaveEvery = "50"
    keep_last: KeepLast = None
    keep_states: KeepStates = 1
    eval_problems: EvalProblems = None
    eval_every: EvalEvery = 50
    eval_samples: EvalSamples = 4
    dry_run: DryRun = False
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
