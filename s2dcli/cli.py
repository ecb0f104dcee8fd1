"""The Typer app: registers the stages and maps errors to exit codes."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from s2dcli import __version__, console, help, options, world
from s2dcli.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED, S2DError
from s2dcli.stages import compare, fkl_warmup, grpo, lineage, opd, prepare, probe, report, rollout, score, verify
from s2dcli.stages import eval as eval_stage

app = typer.Typer(
    name="s2d",
    help="Sparse-to-dense post-training: spend scarce labels on a strong teacher, then distil it into a small student.",
    epilog="s2d rollout -m CKPT problems.jsonl -n 16 | s2d verify | s2d eval --rollouts -\ns2d grpo -m CKPT problems.jsonl -o runs/teacher",
    cls=help.Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"s2d {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def _end(signum: int, frame: object) -> None:
    """End a command in good order; whoever signals again wants it to end at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_at_once)
    raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(EXIT_TERMINATED)


def _end_at_once(signum: int, frame: object) -> None:
    console.show_cursor()
    os._exit(EXIT_INTERRUPTED if signum == signal.SIGINT else EXIT_TERMINATED)


def _ended(how: str, end: BaseException) -> str:
    """Say how a command was ended, what of its work stands (the notes of the exception), and the command that resumes it."""
    notes = getattr(end, "__notes__", [])
    given = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--resume")]
    return "; ".join([how, *notes, *([f"resume with {shlex.join(['s2d', *given, '--resume'])}"] if notes else [])])


def _general(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=help.GENERAL, **settings)


def _tell(text: str, error: BaseException) -> None:
    """Say what has ended a command, unless another of the processes that work on it says it."""
    text = world.ending(text, error)
    if text is not None:
        console.error(text)


def guarded(command: Callable[..., None], name: str, *, trains: bool) -> Callable[..., None]:
    """Give a command `-q`, `-v` and `--help-all`, and turn what ends it into one line and an exit code.

    One that `trains` may be launched as several processes.
    """
    expanded = options.expand(command)
    signature = inspect.signature(expanded)
    general = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])
        for name, option in (
            ("quiet", _general("Warnings and errors only.", "--quiet", "-q")),
            ("verbose", _general("Say more.", "--verbose", "-v")),
            ("help_all", _general("Show every option and exit.", "--help-all", is_eager=True, callback=help.show_everything)),
        )
    ]

    @functools.wraps(expanded)
    def run(*, quiet: bool, verbose: bool, help_all: bool, **given: object) -> None:
        console.configure(quiet=quiet, verbose=verbose, main=world.is_main())
        signal.signal(signal.SIGTERM, _end)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # background jobs of a shell ignore it
            signal.signal(signal.SIGINT, _end)
        debug = os.environ.get("S2D_DEBUG") == "1"
        try:
            console.claim_stdout()
            world.check(name, trains=trains)
            expanded(**given)
            world.leave()
        except BrokenPipeError:
            console.abandon_stdout()
            world.leave()
            raise typer.Exit(EXIT_DONE) from None
        except KeyboardInterrupt as interrupt:
            _tell(_ended("interrupted", interrupt), interrupt)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except SystemExit as end:
            if end.code == EXIT_TERMINATED:
                _tell(_ended("terminated", end), end)
            raise
        except S2DError as error:
            _tell(str(error), error)
            if debug:
                console.traceback()
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            _tell(f"{type(error).__name__}: {error} (S2D_DEBUG=1 shows where)", error)
            if debug:
                console.traceback()
            raise typer.Exit(EXIT_FAILED) from None

    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *general])
    run.__annotations__ = {name: parameter.annotation for name, parameter in run.__signature__.parameters.items()}
    del run.__wrapped__
    return run


STAGES = {
    "rollout": rollout.rollout,
    "verify": verify.verify,
    "grpo": grpo.grpo,
    "fkl-warmup": fkl_warmup.fkl_warmup,
    "opd": opd.opd,
    "eval": eval_stage.evaluate,
}
TRAINERS = {"grpo", "fkl-warmup", "opd"}
HELPERS = {
    "prepare": prepare.prepare,
    "score": score.score,
    "probe": probe.probe,
    "report": report.report,
    "compare": compare.compare,
    "lineage": lineage.lineage,
}

for panel, commands in (("Stages", STAGES), ("Helpers", HELPERS)):
    for name, command in commands.items():
        examples = help.examples(sys.modules[command.__module__].__doc__)
        app.command(name, cls=help.Command, rich_help_panel=panel, epilog=examples)(guarded(command, name, trains=name in TRAINERS))


def main() -> None:
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # help texts where the locale is ASCII
    try:
        code = app(prog_name="s2d", standalone_mode=False)
    except KeyboardInterrupt:  # before or after the command's own body
        code = EXIT_INTERRUPTED
    except (S2DError, typer.TyperException) as error:
        refused = error if isinstance(error, S2DError) else help.usage_error(error)
        if world.is_main():
            console.error(str(refused))
        code = refused.exit_code
    if code:
        sys.exit(code)
