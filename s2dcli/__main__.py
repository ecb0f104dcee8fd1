"""The entry point `s2d`, `python -m s2dcli`, and `accelerate launch -m s2dcli ...`."""

import os
import signal


def _interrupted(signum: int, frame: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def main() -> None:
    """Run the command line; until its modules are imported, Ctrl-C ends it with one line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background jobs of a shell ignore it
        signal.signal(signal.SIGINT, _interrupted)
    from s2dcli.cli import main

    main()


if __name__ == "__main__":
    main()
