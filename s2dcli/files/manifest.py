"""`s2d.json`: what made a folder, from what, with which settings."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from s2dcli import __version__

MANIFEST = "s2d.json"
SCHEMA = "s2d.manifest/1"
RECORDED_VERSIONS = ("torch", "transformers", "vllm", "math-verify")


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(command: str, options: dict[str, Any], *, inputs: Sequence[str] = (), parents: Sequence[Any] = ()) -> dict[str, Any]:
    """Build a manifest. `parents` are checkpoints; `inputs` files; pipes have no hash."""
    return {
        "schema": SCHEMA,
        "command": command,
        "options": {name: _plain(value) for name, value in options.items()},
        "versions": {"s2d": __version__, "python": platform.python_version(), **_versions()},
        "inputs": [{"path": str(path), "sha256": file_sha256(path) if os.path.isfile(path) else ""} for path in inputs],
        "parents": [
            {"name": parent.name, "revision": parent.revision, "step": parent.step, "weights_sha256": parent.weights_sha256}
            for parent in parents
        ],
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in RECORDED_VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON under a temporary name, sync it, and move it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="ascii") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
