"""Run folders, and checkpoints in them that are either whole or not there.

out/ s2d.json problems.jsonl metrics.jsonl evals.jsonl rollouts/ latest
     step-000100/  config, *.safetensors, tokenizer, s2d.json, adapter/ if one was trained
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2dcli.errors import DataError, UsageError
from s2dcli.files.manifest import MANIFEST, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ADAPTER = "adapter"
LATEST = "latest"  # names the last whole step
# Written anew with the weights; everything else of a checkpoint folder is copied as it is.
_OWN_FILES = {"config.json", "model.safetensors.index.json", MANIFEST}
_COPIED = (".json", ".jinja", ".model", ".txt", ".py")


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def refuse_folder(out: Path, overwrite: bool) -> None:
    """Raise UsageError unless `out` is new or empty, or `overwrite` may replace it because s2d made it."""
    if out.exists() and not out.is_dir():
        raise UsageError("exists and is not a folder", where=str(out), hint="choose another -o")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UsageError("output exists", where=str(out), hint="--overwrite replaces it, or choose another -o")
        if not (out / MANIFEST).is_file():
            raise UsageError(f"was not made by s2d (no {MANIFEST}), so --overwrite leaves it alone", where=str(out))


def refuse_inside(out: Path, inputs: Iterable[str | Path]) -> None:
    """Raise UsageError if replacing `out` would delete something that is read from."""
    for path in map(str, inputs):
        if Path(path).exists() and Path(path).resolve().is_relative_to(out.resolve()):
            raise UsageError(
                f"the output folder holds the input {path}, which --overwrite would delete", where=str(out), hint="choose another -o"
            )


def create_folder(out: Path, overwrite: bool) -> None:
    """Make an output folder, emptying an old one where `refuse_folder` lets it."""
    refuse_folder(out, overwrite)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise DataError(f"cannot make the folder: {error.strerror or error}", where=str(out)) from None


def save_step(
    out: Path,
    step: int,
    model: PreTrainedModel,
    parent: Path,
    dtype: torch.dtype,
    manifest: dict[str, Any],
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    save_adapter: Callable[[Path], None] | None = None,
) -> Path:
    """Save the model as `out/step-NNNNNN` in `dtype`, with the parent's tokenizer; then move `latest`.

    `state` holds the weights to save where these are not the model's own: its masters, or the model
    merged with its adapter, which `save_adapter` then writes to a new folder beside them.
    The folder is written under a temporary name, synced and renamed, so what exists is whole.
    """
    final = out / step_name(step)
    temporary = out / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _save_weights(temporary, model, model.state_dict() if state is None else state, dtype)
        if save_adapter:
            save_adapter(temporary / ADAPTER)
        mask = os.umask(0)
        os.umask(mask)
        for path in temporary.rglob("*.safetensors"):  # safetensors makes them readable by their owner only
            path.chmod(0o666 & ~mask)
        for path in parent.iterdir():
            if path.is_file() and path.suffix in _COPIED and path.name not in _OWN_FILES:
                shutil.copyfile(path, temporary / path.name)
        write_json(temporary / MANIFEST, manifest)
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
    except OSError as error:
        raise DataError(f"cannot save the checkpoint: {error.strerror or error}", where=str(final)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(out)
    pointer = out / f".{LATEST}.{os.getpid()}"
    pointer.write_text(final.name + "\n", encoding="ascii")
    _sync(pointer)
    os.replace(pointer, out / LATEST)
    _sync(out)
    return final


def _save_weights(folder: Path, model: PreTrainedModel, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    cast: dict[int, torch.Tensor] = {}  # tied weights stay one tensor, so that they are saved once
    saved = {}
    for name, tensor in state.items():
        saved[name] = cast.setdefault(tensor.data_ptr(), tensor.to(dtype)) if tensor.is_floating_point() else tensor
    model.save_pretrained(folder, state_dict=saved)
    config = copy.deepcopy(model.config)
    config.dtype = dtype  # save_pretrained has written the dtype of the masters
    config.save_pretrained(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
