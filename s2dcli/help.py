"""Help pages and usage errors as plain text: names are never cut, an error is one line with what mends it.

`s2d CMD --help` shows the options in COMMON, `--help-all` every one; a page of few options is shown whole.
The examples at the end of a page are the commands in the docstring of the stage's module.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from s2dcli.errors import UsageError

GENERAL = "General"
BEHIND = f"{__name__}.behind"  # key of a context's `meta`: the arguments that come after `--`
# Panels in the order of use; others stand before the last four, in the order in which a command declares them.
PANELS = ("Arguments", "Options", "Model", "Sampling", "Scoring", "Objective", "Grading", "Training")
LAST_PANELS = ("Output", "Memory", "Engine", GENERAL)
WHOLE_PAGE = 24  # options up to which `--help` shows all of them
# Parameters that `--help` shows where a command has more options than that, beside those that are required.
COMMON = """
    model teacher student base_teacher problems rollouts teacher_rollouts cache out num_samples k keep top_k temperature max_tokens
    max_prompt_tokens engine shard
    loss kl_coef estimator hard_labels only_correct reward preset export steps epochs problems_per_step mini_batch_size lr
    tokens_per_batch lora_rank dtype device chat_template save_every eval_problems eval_every dry_run overwrite resume seed quiet
    verbose help_all help
"""
LARGEST = 2**53  # integers beyond it are not the same number for every reader of JSON
WIDEST = 120  # columns
UNBROKEN = "\xa0"  # a space at which no line is broken
SHORT_NOTE = 24  # characters of a default that is kept on one line
EXAMPLES = 2

_TYPES = {"int": "N", "int range": "N", "float": "X", "float range": "X", "str": "TEXT", "path": "PATH"}
# What users of TRL, verl and transformers type, behind what does that here; of several options those that the command has.
_MEANT = """
    --lr: learning-rate actor-lr; -n -k: n k num-generations num-return-sequences num-samples rollouts-per-problem group-size;
    --problems-per-step --mini-batch-size: batch-size train-batch-size generation-batch-size; --mini-batch-size: ppo-mini-batch-size;
    --tokens-per-batch: per-device-train-batch-size gradient-accumulation-steps micro-batch-size ppo-max-token-len-per-gpu;
    --kl-coef --jsd-beta: beta kl-beta kl-loss-coef; --max-prompt-tokens: max-prompt-length; --teacher: teacher-model-name-or-path;
    --max-tokens: max-new-tokens max-completion-length max-response-length max-length max-seq-length; -o: output output-dir;
    --model --student: model-name-or-path model-path; --epochs: num-train-epochs total-epochs; --steps: max-steps total-training-steps;
    PROBLEMS ROLLOUTS --rollouts: data dataset dataset-name train-files; --eval-problems: eval-dataset val-files;
    --eval-every: eval-steps test-freq; --save-every: save-steps save-freq; --keep-last: save-total-limit; --grad-clip: max-grad-norm;
    --schedule: lr-scheduler-type; --warmup-steps: lr-warmup-steps warmup-ratio; --clip-low --clip-high: epsilon clip-ratio;
    --clip-high: epsilon-high; --loss: loss-type; --aggregate: loss-agg-mode; --advantage: adv-estimator scale-rewards;
    --importance: importance-sampling-level; --truncated: mask-truncated-completions; --reward: reward-funcs; --lora-rank: lora-r use-peft;
    --attention: attn-implementation; --optimizer: optim; --dtype: bf16 fp16 torch-dtype; --engine: use-vllm vllm-mode;
    --gpu-memory-utilization: vllm-gpu-memory-utilization; --tensor-parallel-size: tensor-model-parallel-size vllm-tensor-parallel-size;
    --resume: resume-from-checkpoint resume-mode; metrics.jsonl: report-to logger logging-steps
"""
_MEANT_COMMANDS = """
    rollout: generate sample infer; verify: grade check; grpo: rl ppo train; fkl-warmup: warmup; fkl-warmup --hard-labels: sft;
    opd: distill distil gkd; score: cache logits logprobs; eval: evaluate test benchmark; prepare: data preprocess convert; compare: diff;
    probe: diagnose preflight
"""


def examples(docstring: str) -> str:
    """Return the first commands of a module's docstring, a line each."""
    return "\n".join(re.findall(r"^ {4}(s2d .*)", docstring, re.M)[:EXAMPLES])


def show_everything(context: typer.Context, wanted: bool) -> None:
    """Print the whole page: the callback of --help-all."""
    if wanted:
        context.meta[__name__] = True
        typer.echo(context.get_help())
        raise typer.Exit


class Command(TyperCommand):
    """A command with our help page, whose numbers are finite."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        # Arguments behind `--`: of two groups the second (s2d compare A1 A2 -- B1 B2); the parser drops the mark
        ctx.meta[BEHIND] = args[args.index("--") + 1 :] if "--" in args else []
        rest = super().parse_args(ctx, args)
        for option in self.params:
            value = ctx.params.get(option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{_name(option)} {value}: not a finite number")
            if isinstance(value, int) and abs(value) >= LARGEST:
                raise UsageError(f"{_name(option)} {value}: too large")
        return rest

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        options = self.get_params(ctx)
        short, whole = len(options) <= WHOLE_PAGE, len(options) <= WHOLE_PAGE or __name__ in ctx.meta
        shown = [option for option in options if whole or option.required or option.name in COMMON.split()]
        panels: dict[str, list[tuple[str, str]]] = {}
        for option in shown:
            if option.name != "help_all" or not short:
                panels.setdefault(_panel(option), []).append((_label(option, ctx), _description(option)))
        order = [*PANELS, *(panel for panel in panels if panel not in PANELS + LAST_PANELS), *LAST_PANELS]
        left = "" if whole else f"{len(options) - len(shown)} more options: {ctx.command_path} --help-all"
        parts = [(panel, panels[panel]) for panel in order if panel in panels]
        formatter.write(_page(_usage(self, ctx), self.help or "", parts, left, self.epilog or ""))


class Group(TyperGroup):
    """`s2d` itself: its help page, `s2d help CMD`, and the nearest name for a command that there is not."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if not args or args[0] == "help":
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:
        if args[0] not in self.commands and not args[0].startswith("-"):
            hint = _did_you_mean(_meaning(_MEANT_COMMANDS, args[0].lower()) or _nearest(args[0], self.commands))
            raise UsageError(f"no command {args[0]!r}", hint=hint or "s2d --help lists them")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            panels.setdefault(command.rich_help_panel, []).append((name, " ".join((command.help or "").split("\n\n")[0].split())))
        panels["Options"] = [(_label(option, ctx), _description(option)) for option in self.get_params(ctx)]
        usage = "s2d COMMAND [OPTIONS]"
        left = "s2d help COMMAND shows a command's options and examples."
        formatter.write(_page(usage, self.help or "", list(panels.items()), left, self.epilog or ""))


def _page(usage: str, about: str, panels: list[tuple[str, list[tuple[str, str]]]], left: str, commands: str) -> str:
    width = min(WIDEST, shutil.get_terminal_size((80, 24)).columns)
    plain = not sys.stdout or not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    longest = max(len(label) for _, rows in panels for label, _ in rows) + 4
    column = min(longest, max(24, width * 2 // 5)) if width >= 60 else 6

    def style(text: str, **how: Any) -> str:
        return text if plain else typer.style(text, **how)

    def lines() -> Iterator[str]:
        yield from _wrap(f"Usage: {usage}", width, "", " " * 7)
        for paragraph in re.split(r"\n\s*\n", about.strip()):
            yield ""
            yield from _wrap(paragraph, width)
        for title, rows in panels:
            yield from ("", style(f"{title}:", bold=True))
            for label, text in rows:
                named, first, rest = "  " + style(label, fg="cyan"), "", _wrap(text, width, " " * column, " " * column)
                if len(label) + 4 <= column and rest:
                    first, *rest = rest
                yield named + first[2 + len(label) :]
                yield from rest
        if left:
            yield from ("", *_wrap(left, width))
        if commands:
            yield from ("", style("Examples:", bold=True))
            for command in commands.splitlines():
                whole = re.sub(r" (?!--?\w|\|)", UNBROKEN, command)  # broken before an option or a pipe
                yield from " \\\n".join(_wrap(whole, width - 2, "  ", " " * 6)).splitlines()

    return "\n".join(lines()).replace(UNBROKEN, " ") + "\n"


def _wrap(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)


def _panel(option: Any) -> str:
    if option.param_type_name == "argument":
        return "Arguments"
    return GENERAL if option.name in ("help", "seed") else option.rich_help_panel or "Options"


def _value(option: Any, ctx: typer.Context) -> str:
    """What stands for the value: the metavar, the choices, N of integers or X of numbers; a flag has none."""
    if option.param_type_name == "argument":
        return (option.metavar or option.name.upper()) + ("..." if option.nargs != 1 else "")
    if option.is_flag:
        return ""
    shown = option.metavar or option.display_type_rich(ctx=ctx).strip("<>")
    return _TYPES.get(shown, shown)


def _label(option: Any, ctx: typer.Context) -> str:
    names = [] if option.param_type_name == "argument" else [", ".join(sorted(option.opts, key=len))]
    return " ".join([*names, _value(option, ctx)]).strip()


def _name(option: Any) -> str:
    """The name of an option or argument in an error."""
    return option.metavar or option.name.upper() if option.param_type_name == "argument" else max(option.opts, key=len)


def _description(option: Any) -> str:
    """The help text with bounds that are worth a word, the default, or that the option is required."""
    notes, default = [], option.default
    if option.min is not None and option.max is not None and option.max < LARGEST - 1:
        notes.append(f"{option.min:g} to {option.max:g}")
    if option.required:
        notes.append("required")
    elif isinstance(option.show_default, str):
        notes.append(f"default: {option.show_default}")
    elif option.show_default and default not in (None, "") and default is not False:
        notes.append(
            f"default: {default.value if isinstance(default, Enum) else f'{default:g}' if isinstance(default, float) else default}"
        )
    joined = f"[{'; '.join(notes)}]" if notes else ""
    return f"{option.help or ''} {joined.replace(' ', UNBROKEN) if len(joined) < SHORT_NOTE else joined}".strip()


def _usage(command: Command, ctx: typer.Context) -> str:
    required = [f"{_name(option)} {_value(option, ctx)}" for option in command.params if option.required and option.opts[0][0] == "-"]
    arguments = [option for option in command.params if option.param_type_name == "argument"]
    named = [_value(option, ctx) if option.required else f"[{_value(option, ctx)}]" for option in arguments]
    return " ".join([ctx.command_path, *required, "[OPTIONS]", *named])


def usage_error(error: typer.TyperException) -> UsageError:
    """Return a usage error of Typer's as ours: what is wrong, and what to type instead."""
    context, option = getattr(error, "ctx", None), getattr(error, "param", None)
    page = f"see {context.command_path if context else 's2d'} --help"
    message = " ".join(error.message.split())
    match type(error).__name__:
        case "NoSuchOption":
            hint = _instead(error.option_name, context.command) or (f"{page}-all" if isinstance(context.command, Command) else page)
            return UsageError(f"no option {error.option_name}", hint=hint)
        case "MissingParameter":
            return UsageError(f"missing {_label(option, context)}", hint=page)
        case "BadParameter" if option is not None:
            return UsageError(_refusal(option, error, message))
    if extra := re.match(r"Got unexpected extra argument.*? \((.*)\)", message):
        plural = "s" if " " in extra[1] else ""
        return UsageError(f"unexpected argument{plural} {extra[1]}", hint=f"usage: {_usage(context.command, context)}")
    return UsageError(message[:1].lower() + message[1:].rstrip("."), hint=page if context else "")


def _refusal(option: Any, error: typer.TyperException, message: str) -> str:
    """Say which values an option takes."""
    if not hasattr(error.__cause__, "errors"):  # a callback's own words
        return f"{_name(option)}: {message}"
    found, descriptor = error.__cause__.errors()[0], option.type_descriptor
    given = f"{_name(option)} {shlex.quote(str(found['input']))}"
    if descriptor.choices is not None:
        names = [str(getattr(choice, "value", choice)) for choice in descriptor.choices]
        close = _did_you_mean(_nearest(str(found["input"]), names))
        return f"{given}: not one of {', '.join(names)}" + (f"; {close}" if close else "")
    if "parsing" in found["type"] or descriptor.annotation not in (int, float):
        return f"{given}: not a {'whole number' if descriptor.annotation is int else 'number'}"
    if option.max is None or option.max >= LARGEST - 1:
        return f"{given}: at least {option.min:g} is needed"
    return f"{given}: not between {option.min:g} and {option.max:g}"


def _instead(typed: str, command: TyperCommand | TyperGroup) -> str:
    """Return what to use instead of an option that there is not: by meaning, or else by spelling."""
    known = [name for option in command.params for name in ([option.metavar] if option.param_type_name == "argument" else option.opts)]
    plain = typed.lstrip("-").replace("_", "-").rpartition(".")[2].lower()
    meant = _meaning(_MEANT, plain)
    if meant.endswith(".jsonl"):
        return f"each step is a line of {meant} in the run folder"
    here = [name for name in [*meant.split(), f"--{plain}"] if name in known]
    if here or meant:  # what is meant and not there has no neighbour in spelling either
        return "use " + " or ".join(here) if here else ""
    return _did_you_mean(_nearest(typed.replace("_", "-"), filter(None, known)))


def _meaning(table: str, typed: str) -> str:
    entries = (entry.split(":") for entry in table.split(";"))
    return next((ours.strip() for ours, theirs in entries if typed in theirs.split()), "")


def _nearest(name: str, known: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), "")


def _did_you_mean(name: str) -> str:
    return f"did you mean {name}?" if name else ""
