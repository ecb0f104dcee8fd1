"""The command of a stage, made from the record that a manifest keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2dcli.files.manifest import flag

# The options that are arguments without a name
POSITIONAL = {
    "prepare": "source",
    "rollout": "problems",
    "verify": "rollouts",
    "score": "rollouts",
    "grpo": "problems",
    "opd": "problems",
    "eval": "problems",
}
_STREAM = "-"  # standard input and output, which no command needs to name


def command_line(record: Mapping[str, Any]) -> list[str]:
    """Return the words of the command that a record tells of: the options that were given, and where it wrote to."""
    command, options, given = record["command"], record["options"], {*record["given"], "out"}
    argument = POSITIONAL.get(command)
    words = ["s2d", command]
    if argument in given:
        words += [word for word in _words(options.get(argument)) if word != _STREAM]
    for name, value in options.items():
        if name not in given or name == argument or (name == "out" and value == _STREAM):
            continue
        named = "-o" if name == "out" else flag(name)
        if isinstance(value, bool):
            words += [named] * value
        else:
            words += [word for item in _words(value) for word in (named, item)]
    return words


def _words(value: Any) -> list[str]:
    return [] if value is None else [str(item) for item in value] if isinstance(value, list) else [str(value)]
