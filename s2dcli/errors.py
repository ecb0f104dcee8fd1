"""The exceptions that s2d raises for its users, and the exit code of each.

    S2DError                 1   the run failed
    ├── DataError            1   a file or record is not what it should be   (also ValueError)
    ├── ModelError           1   a checkpoint or tokenizer cannot be used    (also ValueError)
    ├── GradingError         1   the grader's own machinery failed           (also RuntimeError)
    ├── EngineError          1   an engine fails, or samples something else  (also RuntimeError)
    └── UsageError           2   the command line asks for the impossible    (also ValueError)

Each carries one line for the user: what is wrong, where, and `hint`, the command or the change
that mends it. They are raised where the trouble is noticed and printed in one place, `cli.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_TERMINATED = 143  # 128 + SIGTERM


class S2DError(Exception):
    """Base of all errors that are meant for the user."""

    exit_code = EXIT_FAILED

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}; {self.hint}" if self.hint else text


class DataError(S2DError, ValueError):
    """A file or a record is not what it should be."""


class ModelError(S2DError, ValueError):
    """A checkpoint, tokenizer or pair of them cannot be used."""


class GradingError(S2DError, RuntimeError):
    """The grader's own machinery failed, not the answer it was given."""


class EngineError(S2DError, RuntimeError):
    """An engine or server cannot do its work, or samples from other weights than it should."""


class UsageError(S2DError, ValueError):
    """The command line asks for something that cannot be done."""

    exit_code = EXIT_USAGE


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)' for the known name closest to `name`, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
