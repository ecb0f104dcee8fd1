"""`s2d.json`: what made a folder, from what, with which settings."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from s2dcli import __version__, console
from s2dcli.errors import DataError, UsageError
from s2dcli.files.atomic import whole_file

MANIFEST = "s2d.json"
SCHEMA = "s2d.manifest/1"
RECORDED_VERSIONS = ("torch", "transformers", "vllm", "math-verify")
# Where a run goes and how it is started say nothing about what is in it.
NEVER_COMPARED = {"out", "overwrite", "resume", "dry_run"}
# Options whose flag is not their parameter's name
_FLAGS = {"num_samples": "-n", "k": "-k"}


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Iterable[Path]) -> str:
    """Hash over the contents of several files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def describe(command: str, options: dict[str, Any], *, inputs: Sequence[str] = (), parents: Sequence[Any] = ()) -> dict[str, Any]:
    """Build a manifest. `parents` are checkpoints; `inputs` files; pipes have no hash."""
    return {
        "schema": SCHEMA,
        "command": command,
        "options": {name: _plain(value) for name, value in options.items()},
        "versions": {"s2d": __version__, "python": platform.python_version(), **_versions()},
        "inputs": [{"path": str(path), "sha256": file_sha256(path) if os.path.isfile(path) else ""} for path in inputs],
        "parents": [
            {
                "name": parent.name,
                "revision": parent.revision,
                "step": parent.step,
                "weights_sha256": parent.weights_sha256,
                "setup_sha256": parent.setup_sha256,
            }
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
    """Write a file of JSON that appears when it is whole. Raises OSError."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that `write_json` wrote. Raises DataError if it is none or cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read it: {error.strerror}", where=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", where=str(path)) from None
    if not isinstance(content, dict):
        raise DataError("a JSON object was expected", where=str(path))
    return content


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest. Raises DataError if it is none or cannot be read."""
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise DataError(f"not a manifest of s2d ({SCHEMA})", where=str(path))
    return content


def flag(option: str) -> str:
    """Return how an option is written on the command line."""
    return _FLAGS.get(option, "--" + option.replace("_", "-"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """Return a phrase for each thing in which two manifests describe different work; [] if in none.

    Inputs are compared by their hashes and models by those of their weights and of their config,
    tokenizer and chat template, so a moved file or folder is no difference. Options are compared by
    value; `may_change` names those that may differ because the result does not depend on them.
    """
    if old["command"] != new["command"]:
        return [f"the command was {old['command']}, is {new['command']}"]
    found = []
    named_old, named_new = ({item.get("path", item.get("name")) for item in [*m["inputs"], *m["parents"]]} for m in (old, new))
    for name in old["options"].keys() & new["options"].keys() - NEVER_COMPARED - set(may_change):
        was, now = old["options"][name], new["options"][name]
        if was != now and not (was in named_old and now in named_new):
            found.append(f"{flag(name)} was {_shown(was)}, is {_shown(now)}")
    return sorted(found) + _other_inputs(old["inputs"], new["inputs"]) + _other_parents(old["parents"], new["parents"])


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value)


def _other_inputs(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    if len(old) != len(new):
        return [f"the inputs were {_names(old, 'path')}, are {_names(new, 'path')}"]
    return [
        f"input {now['path']} is not what {was['path']} was (another sha256)"
        for was, now in zip(old, new, strict=True)
        if was["sha256"] != now["sha256"]
    ]


def _other_parents(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    if len(old) != len(new):
        return [f"the models were {_names(old, 'name')}, are {_names(new, 'name')}"]
    found = []
    for was, now in zip(old, new, strict=True):
        if was["weights_sha256"] != now["weights_sha256"]:
            found.append(f"model {now['name']} is not what {was['name']} was (other weights)")
        elif was["setup_sha256"] != now["setup_sha256"]:
            found.append(f"the config, tokenizer or chat template of {now['name']} has changed")
    return found


def _names(items: Sequence[Mapping[str, Any]], key: str) -> str:
    return ", ".join(item[key] for item in items) or "none"


def refuse_differences(where: Path, old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str] = ()) -> None:
    """Raise UsageError that lists every difference, if what `old` describes cannot be resumed as `new`; warn of other versions."""
    found = differences(old, new, may_change)
    if found:
        raise UsageError(
            f"cannot be resumed, {len(found)} thing{'s' * (len(found) > 1)} differ{'s' * (len(found) == 1)}: {'; '.join(found)}",
            where=str(where),
            hint=f"give what it was begun with{_exceptions(may_change)}, or --overwrite to begin anew",
        )
    for package, was in old["versions"].items():
        now = new["versions"].get(package, "")
        if was != now:
            console.warn(f"{where} was begun with {package} {was or '(none)'} and goes on with {now or '(none)'}")


def _exceptions(may_change: Collection[str]) -> str:
    return f" (only {', '.join(sorted(map(flag, may_change)))} may change)" if may_change else ""
