"""The Typer app: registers the stages and maps errors to exit codes."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from s2dcli import __version__, console, options
from s2dcli.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED, S2DError
from s2dcli.stages import compare, fkl_warmup, grpo, lineage, opd, prepare, report, rollout, verify
from s2dcli.stages import eval as eval_stage

app = typer.Typer(
    name="s2d",
    help="Sparse-to-dense post-training: spend scarce labels on a strong teacher, then distil it into a small student.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"s2d {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
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


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `-q` and `-v`, and turn what ends it into one line and an exit code."""
    expanded = options.expand(command)
    signature = inspect.signature(expanded)
    level = [
        inspect.Parameter(
            "quiet",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")],
        ),
        inspect.Parameter(
            "verbose",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")],
        ),
    ]

    @functools.wraps(expanded)
    def run(*, quiet: bool, verbose: bool, **given: object) -> None:
        console.configure(quiet=quiet, verbose=verbose)
        signal.signal(signal.SIGTERM, _end)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background jobs of a shell ignore it
            signal.signal(signal.SIGINT, _end)
        debug = os.environ.get("S2D_DEBUG") == "1"
        try:
            console.claim_stdout()
            expanded(**given)
        except BrokenPipeError:
            console.abandon_stdout()
            raise typer.Exit(EXIT_DONE) from None
        except KeyboardInterrupt:
            console.error("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except S2DError as error:
            console.error(str(error))
            if debug:
                console.traceback()
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            console.error(f"{type(error).__name__}: {error} (S2D_DEBUG=1 shows where)")
            if debug:
                console.traceback()
            raise typer.Exit(EXIT_FAILED) from None

    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *level])
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
HELPERS = {"prepare": prepare.prepare, "report": report.report, "compare": compare.compare, "lineage": lineage.lineage}

for panel, commands in (("Stages", STAGES), ("Helpers", HELPERS)):
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(guarded(command))


def main() -> None:
    try:
        app()
    except KeyboardInterrupt:  # before or after the command's own body
        sys.exit(EXIT_INTERRUPTED)
