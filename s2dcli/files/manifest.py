"""`s2d.json`: what made a folder or file, from what, with which settings.

    s2d.json       in a folder
    FILE.s2d.json  beside a single file; pipes have none, there `sampler` names the checkpoint's hash

A manifest holds the manifests of all its ancestors, as *records*, so that they outlive the folders
and files they were written for: `ancestors` maps the sha256 of each record to the record, and `record`
of each input and parent names one of them, "" where s2d did not make it and UNKNOWN where its manifest
was not found. `labels` are the problem_sha256 of all problems whose answers the stage learnt from.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from typer.main import get_current_context

from s2dcli import __version__, console, world
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.atomic import whole_file
from s2dcli.options import HOW_STARTED

MANIFEST = "s2d.json"
HASHES = "meta.json"  # of a teacher cache: has the hashes of its files, which are checked where it is read
SCHEMA = "s2d.manifest/1"
RECORDED_VERSIONS = ("torch", "transformers", "vllm", "math-verify")
SAMPLER = "sampler"  # role of a checkpoint that sampled the rollouts
UNKNOWN = "unknown"
# What a manifest's record keeps of it
RECORDED = ("command", "options", "given", "versions", "commit", "seeds", "inputs", "parents", "counts", "labels", "output_sha256")
NEVER_COMPARED = {"out", *HOW_STARTED}  # options that say nothing about the work
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s]*@")  # `user:password@` of a URL
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


def sidecar(path: str | Path) -> Path:
    """Return where the manifest of a single file lies."""
    return Path(f"{path}.{MANIFEST}")


def folder_sha256(folder: Path) -> str:
    """Hash over names and contents of the files in a folder, hidden ones left out."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    return sha256_json([(name, file_sha256(folder / name)) for name in visible])


def describe(
    command: str,
    options: Mapping[str, Any],
    *,
    inputs: Sequence[str] = (),
    parents: Iterable[tuple[str, Any]] = (),
    rollouts: Iterable[Mapping[str, Any]] = (),
    streamed: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Build a manifest. `inputs` are files, folders or pipes; `parents` are (role, checkpoint), e.g. ("teacher", CHECKPOINT).

    `rollouts` are the rows that are learnt from or measured: who sampled them is a parent too. `streamed` are the
    records that were read from a pipe or from the hub, whose hash is the input's then, so that a resume can be held to the same.
    Raises DataError if an input is not complete.
    """
    ancestors: dict[str, Any] = {}
    manifest = {
        "schema": SCHEMA,
        "complete": False,
        "command": command,
        "options": {name: plain(value) for name, value in options.items()},
        "given": [name for name in options if name not in NEVER_COMPARED and _is_given(name)],
        "versions": {"s2d": __version__, "python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "processes": world.size(),
        "seeds": {name: value for name, value in options.items() if name == "seed"},
        "inputs": [_input(str(path), ancestors, streamed) for path in inputs],
        "parents": [
            {
                "role": role,
                "name": parent.name,
                "revision": parent.revision,
                "step": parent.step,
                "weights_sha256": parent.weights_sha256,
                "setup_sha256": parent.setup_sha256,
                "record": record_of(parent.folder / MANIFEST, ancestors),
            }
            for role, parent in parents
        ],
        "counts": {},
        "labels": [],
        "ancestors": ancestors,
    }
    name_samplers(manifest, rollouts)
    return manifest


def _is_given(option: str) -> bool:
    """Whether the user gave an option of the running command; others are defaults or follow from what was given."""
    context = get_current_context(silent=True)
    source = context.get_parameter_source(option) if context else None
    return source is not None and source.name == "COMMANDLINE"


def _input(path: str, ancestors: dict[str, Any], streamed: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Name an input by its hash, and by the record of what made it: a folder's manifest, or a file's if it is about this content."""
    if os.path.isdir(path):
        require_complete(path, Path(path) / MANIFEST)
        digest = Path(path) / HASHES
        sha256 = file_sha256(digest) if digest.is_file() else folder_sha256(Path(path))
        return {"path": path, "sha256": sha256, "record": record_of(Path(path) / MANIFEST, ancestors)}
    if not os.path.isfile(path):
        sha256 = jsonl.sha256(streamed) if (jsonl.is_stream(path) or not os.path.exists(path)) and streamed else ""
        return {"path": path, "sha256": sha256, "record": ""}
    require_complete(path, sidecar(path))
    sha256 = file_sha256(path)
    about = sidecar(path).is_file() and read_manifest(sidecar(path)).get("output_sha256") == sha256
    return {"path": path, "sha256": sha256, "record": record_of(sidecar(path), ancestors) if about else ""}


def require_complete(path: str, manifest_path: Path) -> None:
    """Raise DataError if an input is an output of s2d that was not finished."""
    if manifest_path.is_file() and not (manifest := read_manifest(manifest_path))["complete"]:
        how = "--resume" if "resume" in manifest["options"] else "--overwrite"
        hint = f"s2d {manifest['command']} ... -o {path} {how} completes it"
        raise DataError("is not complete: the command that writes it was stopped or still runs", where=path, hint=hint)


def record_of(path: Path, ancestors: dict[str, Any]) -> str:
    """Add the record of a manifest, and those of its ancestors, to `ancestors`. Returns its name, "" if there is no manifest."""
    if not path.is_file():
        return ""
    manifest = read_manifest(path)
    record = {name: manifest[name] for name in RECORDED if name in manifest}
    name = sha256_json(record)
    ancestors |= {**manifest.get("ancestors", {}), name: record}
    return name


def sha256_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def name_samplers(manifest: dict[str, Any], rollouts: Iterable[Mapping[str, Any]]) -> None:
    """Add to a manifest's parents who sampled `rollouts`, with their records where these are known or can be found."""
    distinct = {sha256_json(whose): whose for whose in (_whose(record["sampler"]) for record in rollouts)}
    ancestors = manifest["ancestors"]
    for sampler in distinct.values():
        if sampler["name"] or sampler["weights_sha256"]:  # worked solutions were sampled by nobody
            known = [parent for record in (manifest, *ancestors.values()) for parent in record["parents"]]
            same = (parent["record"] for parent in known if parent["weights_sha256"] == sampler["weights_sha256"] != "")
            record = next(same, None)
            manifest["parents"].append(
                {"role": SAMPLER, **sampler, "setup_sha256": "", "record": _found(sampler, ancestors) if record is None else record}
            )


def _whose(sampler: Mapping[str, Any]) -> dict[str, Any]:
    step = sampler.get("step")
    names = {ours: str(sampler.get(theirs, "")) for ours, theirs in (("name", "model"), ("revision", "revision"))}
    return {**names, "step": step if isinstance(step, int) else 0, "weights_sha256": str(sampler.get("checkpoint", ""))}


def _found(sampler: Mapping[str, Any], ancestors: dict[str, Any]) -> str:
    """Look where a sampler says that it lay: what is there counts only if the weights are the same."""
    path = Path(str(sampler["name"]))
    if not os.path.isdir(path):
        return UNKNOWN
    for folder in (path, *(step for step in path.glob("step-*") if step.name.removeprefix("step-").lstrip("0") == str(sampler["step"]))):
        if folder.is_dir() and files_sha256(folder.glob("*.safetensors")) == sampler["weights_sha256"]:
            return record_of(folder / MANIFEST, ancestors)
    return UNKNOWN


def _commit() -> str:
    """Return the commit of s2d if it runs from a git checkout, with "-dirty" if files were changed, else ""."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # no git here
        return ""


def _versions() -> dict[str, str]:
    found = {}
    for name in RECORDED_VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def plain(value: Any) -> Any:
    """Return an option's value as a manifest keeps it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str | Path):
        return without_credentials(str(value))
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def without_credentials(text: str) -> str:
    """Return a text without the user names and passwords of the URLs in it: for whatever is recorded or shown."""
    return _CREDENTIALS.sub("", text)


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
    """Read a manifest. Raises DataError if it is none, lacks a field, or cannot be read."""
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise DataError(f"not a manifest of s2d ({SCHEMA})", where=str(path))
    _take_all({"measured": [], **content}, "measured", list, str, path)
    for name, record in {"": content, **_take(content, "ancestors", dict, path)}.items():
        if name and sha256_json(record) != name:
            raise DataError(f"the record {name[:12]} in it was changed", where=str(path))
        _take_all(record, "labels", list, str, path)
        _take_all(record, "given", list, str, path)
        _take_all(record, "versions", dict, str, path)
        _take_all(record, "counts", dict, (int, float), path)
        _take(record, "options", dict, path)
        texts = [(record, "command"), (record, "commit")]
        texts += [(item, key) for item in _take(record, "inputs", list, path) for key in ("path", "sha256", "record")]
        names = ("role", "name", "revision", "weights_sha256", "setup_sha256", "record")
        texts += [(item, key) for item in _take(record, "parents", list, path) for key in names]
        for item, key in texts:
            _take(item, key, str, path)
        for parent in record["parents"]:
            _take(parent, "step", int, path)
    _take(content, "complete", bool, path)
    return content


def _take(record: Any, field: str, kind: type, path: Path) -> Any:
    if not isinstance(record, dict) or not isinstance(record.get(field), kind):
        unlike = " of the right type" if isinstance(record, dict) and field in record else ""
        raise DataError(f"not a manifest of this version of s2d: no {field!r} in it{unlike}", where=str(path))
    return record[field]


def _take_all(record: Any, field: str, kind: type, of: type | tuple[type, ...], path: Path) -> None:
    """Check a list or object, and the values in it."""
    found = _take(record, field, kind, path)
    if not all(isinstance(value, of) for value in (found.values() if kind is dict else found)):
        raise DataError(f"not a manifest of this version of s2d: values of the wrong type in {field!r}", where=str(path))


def flag(option: str) -> str:
    """Return how an option is written on the command line."""
    return _FLAGS.get(option, "--" + option.replace("_", "-"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """Return a phrase for each thing in which two manifests describe different work; [] if in none.

    Inputs are compared by their hashes and models by those of their weights and of their config,
    tokenizer and chat template, so a moved file or folder is no difference; who sampled rollouts is
    told by an input's hash, and may be found out at the end only. Options are compared by
    value; `may_change` names those that may differ because the result does not depend on them.
    """
    if old["command"] != new["command"]:
        return [f"the command was {old['command']}, is {new['command']}"]
    found = []
    named_old, named_new = ({item.get("path", item.get("name")) for item in [*m["inputs"], *m["parents"]]} for m in (old, new))
    for name in old["options"].keys() & new["options"].keys() - NEVER_COMPARED - set(may_change):
        was, now = old["options"][name], new["options"][name]
        if was != now and not (isinstance(was, str) and was in named_old and now in named_new):
            found.append(f"{flag(name)} was {_shown(was)}, is {_shown(now)}")
    models = ([parent for parent in manifest["parents"] if parent["role"] != SAMPLER] for manifest in (old, new))
    return sorted(found) + _other_inputs(old["inputs"], new["inputs"]) + _other_parents(*models)


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
            hint=f"repeat the options that it was started with{_exceptions(may_change)}, or --overwrite to restart",
        )
    for package, was in old["versions"].items():
        now = new["versions"].get(package, "")
        if was != now:
            console.warn(f"{where} was started with {package} {was or '(none)'} and is resumed with {now or '(none)'}")


def _exceptions(may_change: Collection[str]) -> str:
    return f" (only {', '.join(sorted(map(flag, may_change)))} may change)" if may_change else ""
