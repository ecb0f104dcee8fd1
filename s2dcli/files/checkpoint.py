"""What is in the folder of a checkpoint.

step-000100/  config, *.safetensors, tokenizer, s2d.json, README.md (the model card): an ordinary checkpoint
              adapter/         if one was trained
              training_state/  masters and moments of the optimizer, to resume with; safetensors, no pickle
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from s2dcli.errors import ModelError
from s2dcli.files.atomic import disk_errors
from s2dcli.files.manifest import MANIFEST

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ADAPTER = "adapter"
TRAINING_STATE = "training_state"
LATEST = "latest"  # names the last whole step
SHARD_BYTES = 1 << 30  # of training state in one file, and so at most copied from a GPU at a time
# Written anew with the weights; everything else of a checkpoint folder is copied as it is.
_OWN_FILES = {"config.json", "model.safetensors.index.json", MANIFEST}
_COPIED = (".json", ".jinja", ".model", ".txt", ".py")
TERMS = ("LICENSE", "LICENCE", "NOTICE")  # files of these names, whatever their ending, go where the weights go


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    """Return the step that a file or folder is named after, 0 if none."""
    match = re.fullmatch(r"step-(\d+)(\.jsonl)?", path.name)
    return int(match[1]) if match else 0


def latest_step(folder: Path) -> Path:
    """Return the last whole step of a run folder; another folder is returned as it is. Raises ModelError."""
    pointer = folder / LATEST
    if not pointer.is_file():
        return folder
    step = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"step-\d+", step) or not (folder / step).is_dir():  # only a step: no path leads out of the folder
        raise ModelError(f"{LATEST!r} names {step!r}, which is no step in there", where=str(folder))
    return folder / step


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    parent: Path,
    dtype: torch.dtype,
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    save_adapter: Callable[[Path], None] | None = None,
) -> None:
    """Write a model to a folder, in `dtype`, with the config and tokenizer of its parent.

    `state` holds the weights to save where these are not the model's own: its masters, or the model
    merged with its adapter, which `save_adapter` then writes to a new folder beside them. Raises OSError.
    """
    save_weights(folder, model, model.state_dict() if state is None else state, dtype)
    if save_adapter:
        save_adapter(folder / ADAPTER)
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):  # safetensors makes them readable by their owner only
        path.chmod(0o666 & ~mask)
    for path in parent.iterdir():
        wanted = path.suffix in _COPIED or path.stem.upper() in TERMS
        if path.is_file() and wanted and path.name not in _OWN_FILES:
            shutil.copyfile(path, folder / path.name)


def save_weights(folder: Path, model: PreTrainedModel, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write safetensors and config.json of a model whose weights are `state`, cast to `dtype`. Raises OSError."""
    cast: dict[int, torch.Tensor] = {}  # tied weights stay one tensor, so that they are saved once
    saved = {}
    for name, tensor in state.items():
        saved[name] = cast.setdefault(tensor.data_ptr(), tensor.to(dtype)) if tensor.is_floating_point() else tensor
    model.save_pretrained(folder, state_dict=saved)
    config = copy.deepcopy(model.config)
    config.dtype = dtype  # save_pretrained has written the dtype of the masters
    config.save_pretrained(folder)


def write_training_state(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write named tensors to a new folder, in files of about SHARD_BYTES. Raises OSError.

    The tensors are taken one after the other, so at most one file's are copied from a GPU at a time.
    """
    from safetensors.torch import save_file

    folder.mkdir()
    shard: dict[str, torch.Tensor] = {}
    size = number = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            save_file(shard, folder / f"{number:05d}.safetensors")
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
    save_file(shard, folder / f"{number:05d}.safetensors")


def read_training_state(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what `write_training_state` has written, one tensor at a time. Raises DataError."""
    from safetensors import safe_open

    with disk_errors("read the training state", folder):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, file.get_tensor(name)
