"""What a CKPT argument means, and loading it: hub ids, checkpoint folders, run folders."""

from __future__ import annotations

import ctypes
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2dcli import console, world
from s2dcli.errors import ModelError, UsageError
from s2dcli.files.checkpoint import TERMS, latest_step, step_of
from s2dcli.files.manifest import MANIFEST, files_sha256
from s2dcli.models.prompts import load_tokenizer, loading, unused_ids, vocabulary_size

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from s2dcli.models.sharding import Replica

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SETUP = (".json", ".model", ".txt", ".jinja", ".py")
# What a checkpoint needs; other weight formats are not even downloaded. Code is run with --trust-remote-code only.
_HUB_FILES = [*(f"*{suffix}" for suffix in (*_SETUP, ".safetensors")), "README.md", *(f"{name}*" for name in TERMS)]
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
# Files that are read whatever the family, each one JSON object.
_OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", _INDEX)
_LFS_POINTER = b"version https://git-lfs"
NAMED_TENSORS = 3  # in an error; the others are counted


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine. `name` is what the user wrote, `folder` where it lies."""

    name: str
    folder: Path
    revision: str  # commit of the hub, "" for a local folder
    step: int  # optimizer steps of the run that wrote it, 0 if none did

    @cached_property
    def weights_sha256(self) -> str:
        """Hash over the safetensors files, in the order of their names."""
        return files_sha256(self.folder.glob("*.safetensors"))

    @cached_property
    def setup_sha256(self) -> str:
        """Hash over what decides what the weights mean: config, tokenizer, chat template, code."""
        return files_sha256(path for path in self.folder.iterdir() if path.suffix in _SETUP and path.name != MANIFEST)


def resolve(name: str, *, weights: bool = True) -> Checkpoint:
    """Find the checkpoint that `name` means; a hub id is downloaded. Without `weights` a folder needs to hold none.

    Raises ModelError or UsageError.
    """
    path = Path(name)
    if path.is_dir():
        path = latest_step(path)
        if not (path / "config.json").is_file():
            raise ModelError("neither a checkpoint (no config.json) nor a run folder (no latest)", where=name)
        if weights or has_weights(path):
            _require_safetensors(path, name)
            _require_whole(path)
        return Checkpoint(name, path, "", step_of(path))
    if path.exists() or name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise UsageError("no such checkpoint folder", where=name)
    return _download(name, weights)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, in whatever format."""
    return any(path for pattern in _WEIGHTS for path in folder.glob(pattern))


def _require_safetensors(folder: Path, name: str) -> None:
    """Raise ModelError unless there are weights that can be read without running what is in them."""
    if any(folder.glob("*.safetensors")):
        return
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    converting = (
        f"python -c 'from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f'[k.from_pretrained("{name}").save_pretrained("converted") for k in (M, T)]\' converts it, if you trust where it is from'
    )
    raise ModelError("holds no *.safetensors; other weight formats are not read", where=name, hint=converting if pickled else "")


def _download(name: str, weights: bool) -> Checkpoint:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", *(() if weights else _WEIGHTS)]))
    except Exception as error:  # the hub's client raises its own, requests' and httpx' errors alike
        raise ModelError(
            f"no such folder, and the hub did not give it either ({type(error).__name__})",
            where=name,
            hint="check the spelling, the network, and HF_TOKEN for gated models",
        ) from None
    if weights:
        _require_safetensors(folder, name)
        _require_whole(folder)
    return Checkpoint(name, folder, folder.name, 0)


def _require_whole(folder: Path) -> None:
    """Raise ModelError, naming the file, for weights or JSON that cannot be read, and for weights from outside the folder."""
    objects = {path.name: _read_object(path) for path in (folder / name for name in _OBJECTS) if path.is_file()}
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            "holds an adapter (adapter_config.json), with which transformers would load the weights of another folder",
            where=str(folder),
            hint="merge it into its model first: peft's merge_and_unload, then save_pretrained",
        )
    shards = objects.get(_INDEX, {}).get("weight_map", {})
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError("weight_map must map names of tensors to files", where=str(folder / _INDEX))
    for name in sorted(set(shards.values())):
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ModelError(
                f"names weights outside the checkpoint's folder, or of another format: {name!r}",
                where=str(folder / _INDEX),
                hint="copy the file into the folder and name it there",
            )
        if not (folder / name).is_file():
            raise ModelError(f"names {name}, which is not there", where=str(folder / _INDEX), hint="download or copy the checkpoint again")
    for path in sorted(folder.glob("*.safetensors")):
        _require_readable(path)
    for name in ("config.json", "generation_config.json"):
        for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
            _require_ids(objects.get(name, {}).get(key), key, folder / name)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ModelError(f"is not UTF-8 ({error.reason} at byte {error.start})", where=str(path)) from None
    except ValueError as error:
        bom = "with a byte order mark" in str(error) or "BOM" in str(error)
        raise ModelError(
            "begins with a byte order mark (BOM)" if bom else f"is not JSON: {error}",
            where=str(path),
            hint="save it as UTF-8 without BOM" if bom else "download or copy the checkpoint again",
        ) from None
    if not isinstance(value, dict):
        raise ModelError("must hold one JSON object", where=str(path))
    return value


def _require_ids(value: Any, key: str, path: Path) -> None:
    """Raise ModelError unless a field is a token id, a list of them, or null."""
    for item in value if isinstance(value, list) else [value]:
        if item is not None and (isinstance(item, bool) or not isinstance(item, int)):
            raise ModelError(f"{key} must be a token id or a list of them, not {json.dumps(value)}", where=str(path))


def _require_readable(path: Path) -> None:
    """Raise ModelError unless the header of a safetensors file is whole and fits the file's length."""
    from safetensors import SafetensorError, safe_open

    again = "download or copy the file again"
    if path.stat().st_size == 0:
        raise ModelError("is empty", where=str(path), hint=again)
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError("is a Git LFS pointer in place of the weights", where=str(path), hint="git lfs pull")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"is damaged or cut off ({str(error).splitlines()[0]})", where=str(path), hint=again) from None


@dataclass(frozen=True)
class LoadedModel:
    """A model with what is needed to sample from it and to train it."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel  # in eval mode: no dropout, in sampling, scoring and training alike
    vocabulary: int  # ids that the tokenizer knows; columns beyond have probability 0
    eos_ids: tuple[int, ...]
    pad_id: int
    autocast: torch.dtype | None  # computes in this type although the weights are float32
    compute_dtype: torch.dtype  # of the forward pass, whatever the weights are
    trust_remote_code: bool  # code that the checkpoint brings was run to load it
    replica: Replica | None = None  # of a sharded model: what samples in its place


def load(
    checkpoint: Checkpoint,
    *,
    device: str = "auto",
    dtype: str = "auto",
    masters: bool = False,
    trust_remote_code: bool = False,
    attention: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    announce: bool = True,
    to_shard: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, unless there is one already.

    With `masters` the weights are float32 whatever `dtype` says, and the forward pass is cast: an
    update of 1e-6 would round to nothing on bfloat16 weights. `attention` names one of transformers'
    implementations. What takes the time is said unless `announce` is off. A model `to_shard` has its weights
    in the main process only, in main memory. Raises ModelError.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from s2dcli.models.forward import mask_unused
    from s2dcli.models.selftest import fast_paths, note_fast_paths, self_test

    quieten_transformers()
    tokenizer = tokenizer or load_tokenizer(checkpoint.folder, trust_remote_code)
    place = pick_device(device)
    compute = pick_dtype(dtype, place)
    if announce:
        console.loading(checkpoint.name, num_parameters(checkpoint), str(compute).removeprefix("torch."), str(place))
    vocabulary, unused = vocabulary_size(tokenizer), unused_ids(tokenizer)
    if to_shard and not world.is_main():
        model = empty_model(checkpoint, trust_remote_code, attention)
        mask_unused(model, unused)
    else:
        with loading("the model", checkpoint.name):
            model, report = AutoModelForCausalLM.from_pretrained(
                str(checkpoint.folder),
                dtype=torch.float32 if masters else compute,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                attn_implementation=attention,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
        _require_all_weights(report, model, checkpoint.name)
        model = model.to("cpu" if to_shard else place).eval()
        mask_unused(model, unused)
        self_test(model, vocabulary, checkpoint.name, compute)
    if to_shard:
        note_fast_paths(model, world.broadcast(fast_paths(model) if world.is_main() else None))
    return_freed_memory()
    return LoadedModel(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        model=model,
        vocabulary=vocabulary,
        eos_ids=eos_ids(tokenizer, checkpoint, trust_remote_code),
        pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        autocast=compute if masters and compute != torch.float32 else None,
        compute_dtype=compute,
        trust_remote_code=trust_remote_code,
    )


def _require_all_weights(report: Mapping[str, Collection], model: PreTrainedModel, name: str) -> None:
    """Raise ModelError, naming tensors, unless every weight of the model came from the checkpoint and none was left over.

    transformers would draw missing weights at random. Its report leaves out what a family may lack: tied
    weights, buffers that are computed, parts of a larger model.
    """
    family = type(model).__name__
    shapes = [f"{key} ({list(theirs)} in place of {list(ours)})" for key, theirs, ours in sorted(report["mismatched_keys"])]
    for what, tensors in (
        (f"lacks weights of {family}", sorted(report["missing_keys"])),
        (f"holds weights of another shape than config.json gives {family}", shapes),
        (f"holds weights that {family} does not have", sorted(report["unexpected_keys"])),
    ):
        if tensors:
            more = f" and {len(tensors) - NAMED_TENSORS} more" if len(tensors) > NAMED_TENSORS else ""
            raise ModelError(
                f"{what}: {', '.join(tensors[:NAMED_TENSORS])}{more}",
                where=name,
                hint="config.json and weights must be those of one model, and complete",
            )


def return_freed_memory() -> None:
    """Hand back what a GPU's allocator keeps, and what the C library does, where it keeps any: a large tokenizer leaves 60 MB."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def model_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read what config.json says of a model. Raises ModelError."""
    from transformers import AutoConfig

    with loading("config.json", checkpoint.name):
        return AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=trust_remote_code)


def empty_model(checkpoint: Checkpoint, trust_remote_code: bool = False, attention: str | None = None) -> PreTrainedModel:
    """Make the model that config.json describes, its weights without values or memory. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    quieten_transformers()
    config = model_config(checkpoint, trust_remote_code)
    with loading("the model of config.json", checkpoint.name), torch.device("meta"):
        how = {} if attention is None else {"attn_implementation": attention}
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **how).eval()


def quieten_transformers() -> None:
    """Keep the library's progress bars and advice off the terminal; its errors still show."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def eos_ids(tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, trust_remote_code: bool = False) -> tuple[int, ...]:
    """Ids that end a completion: the tokenizer's EOS and those of the generation config, or without one the model's."""
    path = checkpoint.folder / "generation_config.json"
    more = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    if more is None:
        more = model_config(checkpoint, trust_remote_code).get_text_config().eos_token_id
    more = [] if more is None else [more] if isinstance(more, int) else more
    return tuple(sorted({tokenizer.eos_token_id, *more}))


def require_same_eos(teacher: Checkpoint, student: Checkpoint, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> None:
    """Raise ModelError unless the same ids end a completion of both: a student would learn to write on where it should stop."""
    theirs, ours = (eos_ids(tokenizer, checkpoint, trust_remote_code) for checkpoint in (teacher, student))
    require_same_ends(theirs, teacher.name, ours, student.name, tokenizer)


def require_same_ends(
    theirs: Collection[int], teacher: str, ours: Collection[int], student: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ModelError unless two sets of EOS are equal; `teacher` and `student` name whose they are."""
    if set(theirs) != set(ours):
        name = lambda ids: ", ".join(f"{index} ({str(tokenizer.convert_ids_to_tokens(index))!r})" for index in sorted(ids))  # noqa: E731
        raise ModelError(
            f"teacher and student end a completion with different tokens: {name(theirs)} in {teacher}, {name(ours)} in {student}",
            hint="set eos_token_id in one's generation_config.json to the other's",
        )


def num_parameters(checkpoint: Checkpoint, trust_remote_code: bool = False) -> int:
    """Count the parameters of a checkpoint from its safetensors headers, or where there are none from config.json; nothing is loaded."""
    from safetensors import safe_open

    if not has_weights(checkpoint.folder):
        return sum(parameter.numel() for parameter in empty_model(checkpoint, trust_remote_code).parameters())
    total = 0
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not a dict
    return total


def saved_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Dtype of the weights on disk (of the first floating-point tensor)."""
    import torch
    from safetensors import safe_open

    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                dtype = getattr(
                    torch,
                    {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}.get(file.get_slice(key).get_dtype(), "int8"),
                )
                if dtype.is_floating_point:
                    return dtype
    raise ModelError("holds no floating-point weights", where=checkpoint.name)


def pick_device(name: str, *, here: bool = True) -> torch.device:
    """Turn `--device` into a torch device; `auto` takes a GPU if there is one, of several processes on a host each its own.

    A plan may be for a device that is not `here`. Raises UsageError.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world.size() > 1:
        if name != ("cuda" if torch.cuda.is_available() else "cpu"):
            raise UsageError(
                f"--device {name}, with {world.size()} processes: each takes the GPU of its number, or none if there are none",
                hint="leave it out; CUDA_VISIBLE_DEVICES chooses GPUs, and hides them if it is empty",
            )
        name = f"cuda:{world.local_rank()}" if name == "cuda" else name
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"no such device: {name!r}", hint="cpu, cuda or cuda:N") from None
    if here and device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no GPU here")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn `--dtype` into the type of the forward computation."""
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
