"""The formats of `--export`, each below a folder of its name."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from s2dcli.errors import DataError
from s2dcli.exports import every_eval_ever, hub, lm_eval
from s2dcli.exports.evaluated import Evaluated


class Export(StrEnum):
    """A format that leaderboards and other tools read."""

    lm_eval = "lm-eval"
    every_eval_ever = "every-eval-ever"
    hub = "hub"


_WRITERS = {Export.lm_eval: lm_eval.write, Export.every_eval_ever: every_eval_ever.write, Export.hub: hub.write}


def write(kind: Export, evaluated: Evaluated, folder: Path) -> list[Path]:
    """Write an evaluation in a format; returns the files. Raises DataError where the format has no place for it, OSError."""
    if not evaluated.metrics:
        raise DataError("the rewards have no notion of right: there is no score to export")
    return _WRITERS[kind](evaluated, folder / kind.value)
