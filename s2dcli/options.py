"""Options that several commands share, each declared once: an Annotated alias, or a field of a group.

A command takes a whole group as one parameter, `training: options.TrainingOptions`; on the command line
its fields are options like any other.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer

from s2dcli.errors import UsageError

SAMPLING = "Sampling"
GRADING = "Grading"
SCORING = "Scoring"
TRAINING = "Training"
MEMORY = "Memory"
OUTPUT = "Output"
ENGINE = "Engine"

# Default of --sample-tokens. A cache position of a 1.7-billion-parameter model takes 115 kB in
# bfloat16, so this is at most 8 GB there, and 50 rollouts of 1,300 tokens.
SAMPLE_TOKENS = 65536
MODEL = "Model"


class Dtype(StrEnum):
    """Compute type of the forward pass; master weights and optimizer state are always float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Weights(StrEnum):
    """Type of the trained weights in memory; their masters are float32 in any case."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Optimizer(StrEnum):
    """AdamW with its moments in float32, or in 8 bits with a scale for each block of them."""

    adamw = "adamw"
    adamw_8bit = "adamw-8bit"


class CorrectionLevel(StrEnum):
    """Level of that correction's ratio: per token, or per sequence by the mean or the sum of its tokens' log-ratios."""

    token = "token"
    sequence_mean = "sequence-mean"
    sequence_sum = "sequence-sum"


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Aggregate(StrEnum):
    """What each completion token's loss is divided by; see train/advantages.token_weights."""

    token = "token"
    sequence = "sequence"
    constant = "constant"


class Advantage(StrEnum):
    """How rewards become advantages; see train/advantages.group_advantages."""

    group_std = "group-std"
    group_mean = "group-mean"
    reward = "reward"


class Importance(StrEnum):
    """Level of the importance ratio: per token, or per sequence (the mean of its tokens' log-ratios)."""

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


class Estimator(StrEnum):
    """What KL(student || teacher) is computed from; see train/teachers.py."""

    full = "full"
    top_k = "top-k"
    sampled = "sampled"


class Divergence(StrEnum):
    """Between teacher and student at each token; see train/vocab.py."""

    reverse_kl = "reverse-kl"
    forward_kl = "forward-kl"
    jsd = "jsd"


class Baseline(StrEnum):
    """What the sampled estimator subtracts from a token's log-ratio; see train/objectives.SampledDistillation."""

    none = "none"
    kl = "kl"


class Phases(StrEnum):
    """Whether sampling, scoring and learning take turns on the device; auto: where teacher and student do not both fit."""

    auto = "auto"
    on = "on"
    off = "off"


class Sharding(StrEnum):
    """Whether each of several processes holds a part of every weight, or all of them; accelerate's names."""

    fsdp2 = "fsdp2"
    ddp = "ddp"


class Keep(StrEnum):
    """What a teacher cache holds of each distribution; see files/teacher_cache.py."""

    top_k = "top-k"
    sampled = "sampled"
    hidden = "hidden"


class ValueType(StrEnum):
    """Type of the numbers in a teacher cache."""

    float16 = "float16"
    float32 = "float32"


class Truncated(StrEnum):
    """Treatment of completions that hit the length limit."""

    keep = "keep"
    mask = "mask"
    penalty = "penalty"


class Correction(StrEnum):
    """Importance correction for a sampler whose log-probs differ from the trainer's."""

    none = "none"
    truncate = "truncate"
    mask = "mask"


class Preset(StrEnum):
    """Sampling that a model card recommends; see PRESETS."""

    qwen3_thinking = "qwen3-thinking"
    qwen3_plain = "qwen3-plain"


class Drawing(NamedTuple):
    """How tokens are drawn; 0 of top-k is all."""

    temperature: float
    top_p: float
    top_k: int


# Qwen3's model cards, "Best Practices": with and without thinking, which its chat template switches
PRESETS = {Preset.qwen3_thinking: (Drawing(0.6, 0.95, 20), True), Preset.qwen3_plain: (Drawing(0.7, 0.8, 20), False)}


def with_preset(context: typer.Context, preset: Preset, given: Drawing, loading: ModelOptions) -> tuple[Drawing, ModelOptions]:
    """Return the sampling of a preset and the template's switch for thinking; what the command line says itself stays as it is."""
    drawing, thinking = PRESETS[preset]
    kept = {name: getattr(given, name) for name in Drawing._fields if _on_command_line(context, name)}
    with suppress(ValueError):  # what is no JSON object is told where it is parsed
        arguments = json.loads(loading.chat_template_kwargs)
        if isinstance(arguments, dict):
            loading = dataclasses.replace(loading, chat_template_kwargs=json.dumps({"enable_thinking": thinking, **arguments}))
    return drawing._replace(**kept), loading


def _on_command_line(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def refuse_given(context: typer.Context, names: dict[str, str], reason: str) -> None:
    """Raise UsageError if an option that would be ignored was given; `names` maps parameters to options."""
    for parameter, option in names.items():
        if _on_command_line(context, parameter):
            raise UsageError(f"{option} {reason}", hint="leave it out")


def refuse_idle(context: typer.Context, training: TrainingOptions, running: RunOptions) -> None:
    """Raise UsageError for a trainer's options that were given and would be ignored."""
    if running.eval_problems is None:
        refuse_given(context, {"eval_every": "--eval-every", "eval_samples": "--eval-samples"}, "requires --eval-problems")
    if training.schedule is Schedule.constant:
        refuse_given(context, {"min_lr_ratio": "--min-lr-ratio"}, "requires --schedule linear or cosine")
    if running.processes is None:
        refuse_given(context, {"sharding": "--sharding"}, "requires --processes")
    elif not running.dry_run:
        raise UsageError(
            "--processes says how many a plan is for, and requires --dry-run",
            hint="processes are started by accelerate launch --num_processes N -m s2dcli ...",
        )


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
in_training, _memory, _output = map(_panel, (TRAINING, MEMORY, OUTPUT))
in_scoring, in_output = _panel(SCORING), _output

# Inputs
Problems = Annotated[str, typer.Argument(metavar="PROBLEMS", help="Problems, JSONL; - is standard input.", show_default=False)]
Rollouts = Annotated[str, typer.Argument(metavar="ROLLOUTS", help="Rollouts, JSONL; - is standard input.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**53 - 1, help="Random seed.")]

# Outputs
OutFile = Annotated[str, _output("Output file; - is standard output.", "--out", "-o", metavar="FILE")]
RunDir = Annotated[Path, _output("Run folder.", "--out", "-o", metavar="DIR")]
Overwrite = Annotated[bool, _output("Replace an existing output.", "--overwrite")]
Resume = Annotated[bool, _output("Resume an unfinished output.", "--resume")]

# Models and prompts
Model = Annotated[str, typer.Option("--model", "-m", metavar="CKPT", help="Hub id, checkpoint folder or run folder.", show_default=False)]
Teacher = Annotated[str, typer.Option("--teacher", metavar="CKPT", help="Frozen teacher.", show_default=False)]
Student = Annotated[str, typer.Option("--student", metavar="CKPT", help="Student to train.", show_default=False)]
ChatTemplate = Annotated[
    str | None, _model("Chat template for models without one: plain, or a Jinja file.", "--chat-template", metavar="plain|FILE")
]
ChatTemplateKwargs = Annotated[
    str, _model('Arguments of the chat template, e.g. {"enable_thinking": false}.', "--chat-template-kwargs", metavar="JSON")
]
TrustRemoteCode = Annotated[bool, _model("Run Python code that comes with the checkpoint.", "--trust-remote-code")]

# Sampling
NumSamples = Annotated[int, _sampling("Rollouts per problem.", "-n", metavar="N", min=1)]
Temperature = Annotated[float, _sampling("Sampling temperature; 0 is greedy.", "--temperature", min=0.0)]
TopP = Annotated[float, _sampling("Nucleus sampling: smallest probability mass to keep.", "--top-p", min=0.0, max=1.0)]
TopK = Annotated[int, _sampling("Sample from the k most likely tokens; 0 is all.", "--top-k", min=0)]
PresetOption = Annotated[
    Preset | None, _sampling("Sampling and thinking switch that a model card recommends; options given beside it win.", "--preset")
]
MaxTokens = Annotated[int, _sampling("Maximum completion length in tokens.", "--max-tokens", min=1)]
MaxPromptTokens = Annotated[int | None, _sampling("Drop problems with longer prompts; they are counted.", "--max-prompt-tokens", min=1)]

# Training
Steps = Annotated[int | None, in_training("Training steps; default: from --epochs.", "--steps", min=1)]
PhasesOption = Annotated[
    Phases,
    _memory("Sample, score and learn in turns, one large model at a time; auto: if the models do not fit together.", "--phases"),
]
Offload = Annotated[bool, _memory("Offload the frozen model to the CPU while idle (GPU only).", "--offload")]
AggregateOption = Annotated[
    Aggregate,
    in_training("Denominator of a token's loss: all tokens, its sequence's tokens, or the maximum length.", "--aggregate"),
]

DivergenceOption = Annotated[
    Divergence, in_training("Divergence at each token: KL(student || teacher), KL(teacher || student), or Jensen-Shannon.", "--divergence")
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How checkpoints are loaded, and how their prompts are built."""

    chat_template: ChatTemplate = None
    chat_template_kwargs: ChatTemplateKwargs = "{}"
    dtype: Annotated[Dtype, _model("Compute type; auto: float32 on CPU, bfloat16 on a GPU.")] = Dtype.auto
    device: Annotated[str, _model("cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.")] = "auto"
    attention: Annotated[
        str | None,
        _model("Attention implementation of transformers: eager, sdpa, flash_attention_2, ...", metavar="NAME", show_default="the model's"),
    ] = None
    trust_remote_code: TrustRemoteCode = False

    def of_load(self) -> dict[str, Any]:
        """Return what models/checkpoints.load takes of these."""
        return {name: getattr(self, name) for name in ("device", "dtype", "attention", "trust_remote_code")}

    @property
    def files(self) -> list[str]:
        """Files that are named here; their content counts as an input."""
        return [] if self.chat_template in (None, "plain") else [self.chat_template]


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Which engine scores, and what it may use."""

    engine: Annotated[str, _engine("Scoring engine. URL: a running vllm serve.", "--engine", metavar="transformers|vllm|URL,...")] = (
        "transformers"
    )
    gpu_memory_utilization: Annotated[
        float | None,
        _engine(
            "Share of a GPU's memory for vLLM; on a CPU, of main memory for its cache.",
            min=0.01,
            max=1.0,
            show_default="0.9; beside a trainer 0.4",
        ),
    ] = None
    tensor_parallel_size: Annotated[int | None, _engine("GPUs to shard vLLM's weights over.", min=1, show_default="1")] = None
    max_model_len: Annotated[
        int | None, _engine("Maximum length of prompt and completion in vLLM, in tokens.", min=1, show_default="what fits")
    ] = None
    max_in_flight: Annotated[int | None, _engine("Concurrent requests per server.", min=1, show_default="256")] = None
    server_timeout: Annotated[
        int | None,
        _engine(
            "Fail after this many seconds without an answer from any server.",
            min=1,
            max=604800,
            metavar="SECONDS",
            show_default="900",
        ),
    ] = None
    parity_rows: Annotated[
        int | None,
        _engine(
            "Samples of vLLM or a server to re-score with transformers, as proof of its weights.",
            min=0,
            show_default="training: 8, after every update; else 0",
        ),
    ] = None
    parity_tolerance: Annotated[
        float | None,
        _engine("Largest mean difference of their log-probs, in nats.", min=0.0, show_default="float32: 1e-3, bfloat16: 5e-2"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EngineOptions(ScoringOptions):
    """Which engine samples, and what it may use."""

    engine: Annotated[
        str,
        _engine(
            "Sampling engine; auto: vLLM if installed and there is a GPU, else transformers. URL: a running vllm serve.",
            metavar="auto|transformers|vllm|URL,...",
        ),
    ] = "auto"
    sample_tokens: Annotated[int, _sampling("KV-cache positions per sampling batch (transformers engine).", min=1, metavar="TOKENS")] = (
        SAMPLE_TOKENS
    )


@dataclass(frozen=True, kw_only=True)
class GradingOptions:
    """What is rewarded, and what grading may use."""

    reward: Annotated[
        list[str] | None,
        _grading("Reward: math, math:strict, exact or python:MODULE:FUNCTION[=WEIGHT]; repeatable.", metavar="REWARD", show_default="math"),
    ] = None
    workers: Annotated[int | None, _grading("Grading processes.", min=1, show_default="CPUs")] = None
    timeout: Annotated[float, _grading("Time limit per answer, in seconds.", min=0.1, max=86_400.0)] = 5.0
    memory_limit: Annotated[str, _grading("Memory limit per grading process.", metavar="SIZE")] = "2GiB"


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """How a trainer samples: at the temperature of its loss, from the whole vocabulary."""

    num_samples: NumSamples = 8
    max_tokens: MaxTokens = 1024
    max_prompt_tokens: MaxPromptTokens = None
    temperature: Annotated[float, _sampling("Temperature of sampling and of all probabilities in the loss.", min=1e-3)] = 1.0
    async_depth: Annotated[
        int,
        _sampling(
            "Steps that sampling runs ahead (vLLM, servers): 1 samples while the step before learns, from weights one step old.",
            min=0,
            max=1,
        ),
    ] = 0


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """Whose distributions a student learns from, and by which loss."""

    teacher: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher",
            metavar="CKPT|URL,...|NAME=CKPT",
            help="Frozen teacher; repeated as NAME=CKPT, that of the problems whose source.dataset is NAME.",
            show_default=False,
        ),
    ] = None
    cache: Annotated[
        str | None, typer.Option("--cache", metavar="DIR", help="Teacher cache of the rollouts (s2d score), instead of a teacher.")
    ] = None
    divergence: DivergenceOption = Divergence.reverse_kl
    jsd_beta: Annotated[
        float, in_training("Weight of the teacher in --divergence jsd; 0 is forward-kl, 1 is reverse-kl.", min=0.0, max=1.0)
    ] = 0.5
    teacher_temperature: Annotated[
        float | None, in_training("Temperature of the teacher's distribution.", min=1e-3, show_default="the student's")
    ] = None
    clamp: Annotated[
        float | None,
        in_training("Largest divergence of a token; one beyond it has no gradient. Sampled estimator: of the log-ratio.", metavar="NATS"),
    ] = None
    loss_tokens: Annotated[int | None, in_training("Learn from so many first tokens of each rollout.", min=1, show_default="all")] = None
    aggregate: AggregateOption = Aggregate.token


@dataclass(frozen=True, kw_only=True)
class WarmupOptions(DistillationOptions):
    """Distillation on a teacher's rollouts."""

    divergence: DivergenceOption = Divergence.forward_kl
    top_k: Annotated[
        int | None, in_training("Ids of the teacher in the divergence, with a bucket for the rest.", min=1, show_default="all there are")
    ] = None
    temperature: Annotated[float, in_training("Temperature of both distributions in the divergence.", min=1e-3)] = 1.0


@dataclass(frozen=True, kw_only=True)
class OnPolicyOptions(DistillationOptions):
    """Distillation on the student's own rollouts."""

    estimator: Annotated[
        Estimator, in_training("Divergence from: all ids, the teacher's top k and a bucket for the rest, or the sampled tokens.")
    ] = Estimator.full
    top_k: Annotated[int, in_training("k of --estimator top-k, and of --baseline kl by a server.", min=1)] = 128
    baseline: Annotated[
        Baseline, in_training("Subtract each token's KL from its log-ratio (--estimator sampled): less variance far from the teacher.")
    ] = Baseline.none
    reference: Annotated[
        str | None, in_training("The teacher before its RL, for --task-reward-weight.", metavar="CKPT", show_default="none")
    ] = None
    task_reward_weight: Annotated[
        float | None,
        in_training(
            "Target log r + X (log q - log r) of teacher q and --reference r; beyond 1 it extrapolates.", metavar="X", show_default="none"
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How many problems a trainer takes, and how many at a time."""

    steps: Steps = None
    epochs: Annotated[int, in_training("Passes over the problems, unless --steps is given.", min=1)] = 1
    problems_per_step: Annotated[int, in_training("Problems to sample per step.", min=1)] = 32
    mini_batch_size: Annotated[
        int | None, in_training("Rollouts per optimizer update.", min=1, show_default="all: one update per step")
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How every trainer turns a loss into updates."""

    lr: Annotated[float, in_training("Peak learning rate.", min=0.0)] = 1e-6
    schedule: Annotated[Schedule, in_training("Learning-rate schedule after the warm-up.")] = Schedule.constant
    min_lr_ratio: Annotated[
        float, in_training("Final learning rate as a share of --lr (linear and cosine schedules).", min=0.0, max=1.0)
    ] = 0.0
    warmup_steps: Annotated[int, in_training("Steps of linear warm-up.", min=0)] = 0
    weight_decay: Annotated[float, in_training("Decoupled weight decay (AdamW).", min=0.0)] = 0.0
    adam_beta2: Annotated[float, in_training("Second-moment decay (AdamW).", min=0.0, max=0.99999)] = 0.999
    grad_clip: Annotated[float, in_training("Maximum gradient norm; 0 is no limit.", min=0.0)] = 1.0
    tokens_per_batch: Annotated[int, in_training("Tokens per micro-batch, padding included; affects memory, not the gradient.", min=1)] = (
        8192
    )
    weights: Annotated[
        Weights, _memory("Type of the trained weights; bfloat16 also computes in bfloat16, with float32 masters in the optimizer.")
    ] = Weights.float32
    optimizer: Annotated[Optimizer, _memory("Optimizer; adamw-8bit keeps AdamW's moments in 8 bits (pip install 's2d[8bit]').")] = (
        Optimizer.adamw
    )
    gradient_checkpointing: Annotated[
        bool, _memory("Recompute activations in the backward pass to save memory.", "--gradient-checkpointing")
    ] = False
    lora_rank: Annotated[
        int | None, _memory("Train a LoRA adapter of this rank instead of the weights (pip install 's2d[lora]').", min=1)
    ] = None
    lora_alpha: Annotated[
        float | None, _memory("LoRA scale: updates are multiplied by alpha / rank.", min=0.0, show_default="twice the rank")
    ] = None
    lora_targets: Annotated[
        str | None, _memory("Linear layers to adapt, e.g. q_proj,v_proj.", metavar="NAME,...", show_default="all but the head")
    ] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a training run writes, measures and repeats."""

    save_every: Annotated[
        str,
        _output(
            "Interval between checkpoints: steps (50) or minutes (30m); the last step is always saved.",
            metavar="STEPS|MINUTESm",
            callback=_checked_cadence,
        ),
    ] = "50"
    save_dtype: Annotated[Dtype, _output("Type of saved weights; auto: that of the checkpoint trained from.")] = Dtype.auto
    keep_last: Annotated[int | None, _output("Checkpoints to keep.", min=1, show_default="all")] = None
    keep_states: Annotated[int, _output("Checkpoints that keep their optimizer state, needed by --resume.", min=1)] = 1
    eval_problems: Annotated[str | None, _output("Problems for avg@k evaluations during training.", metavar="FILE")] = None
    eval_every: Annotated[int, _output("Steps between evaluations; also before the first step and after the last.", min=1)] = 50
    eval_samples: Annotated[int, _output("Samples per problem (k) in these evaluations.", min=1)] = 4
    no_card: Annotated[bool, _output("Write no model card (README.md) beside the weights.", "--no-card")] = False
    track: Annotated[
        list[str] | None,
        _output("Also log to these trackers; several by commas, or repeatable.", "--track", metavar="tensorboard|wandb|trackio,..."),
    ] = None
    dry_run: Annotated[bool, _output("Check inputs and print the plan; load no weights.", "--dry-run")] = False
    processes: Annotated[
        int | None,
        _memory("Plan (--dry-run) for one of so many processes, on a GPU each.", min=1, show_default="those that were launched"),
    ] = None
    sharding: Annotated[Sharding, _memory("What each of --processes holds: a part of all weights (FSDP2), or all of them (DDP).")] = (
        Sharding.fsdp2
    )
    overwrite: Overwrite = False
    resume: Resume = False
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class SampledRunOptions(RunOptions):
    """Those of a run that samples as it trains."""

    keep_rollouts: Annotated[bool, _output("Write each step's rollouts to the run folder.", "--keep-rollouts")] = False


# Options that describe how a command was started and say nothing about its result.
HOW_STARTED = frozenset({"overwrite", "resume", "dry_run", "processes", "sharding"})
# Options whose value may differ when a training run is resumed. Most of them decide what is kept or how fast it
# is; the first row changes shapes or places of computations, with results equal within rounding.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "tokens_per_batch",
        "sample_tokens",
        "tensor_parallel_size",
        "gradient_checkpointing",
        "attention",
        "device",
        "offload",
        "phases",
        "gpu_memory_utilization",
        "max_model_len",
        "max_in_flight",
        "server_timeout",
        "parity_rows",
        "parity_tolerance",
        "trust_remote_code",
        "workers",
        "timeout",
        "memory_limit",
        "save_every",
        "keep_last",
        "keep_states",
        "keep_rollouts",
        "eval_every",
        "no_card",
        "track",
    }
)


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(text: str, option: str) -> int:
    """Return the bytes that `2GiB`, `500MB` or `1073741824` stands for. Raises UsageError that names the option."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"invalid size {text!r}", where=option, hint="write it as 2GiB or 800MB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


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
