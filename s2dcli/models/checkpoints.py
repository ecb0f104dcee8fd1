"""What a CKPT argument means, and loading it: hub ids, checkpoint folders, run folders."""

from __future__ import annotations

import ctypes
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from s2dcli.errors import ModelError, UsageError
from s2dcli.files.checkpoint import latest_step, step_of
from s2dcli.files.manifest import MANIFEST, files_sha256
from s2dcli.models.prompts import load_tokenizer, loading_failed, vocabulary_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SETUP = (".json", ".model", ".txt", ".jinja", ".py")
# What a checkpoint needs; other weight formats are not even downloaded. Code is run with --trust-remote-code only.
_HUB_FILES = [f"*{suffix}" for suffix in (*_SETUP, ".safetensors")]


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


def resolve(name: str) -> Checkpoint:
    """Find the checkpoint that `name` means; a hub id is downloaded. Raises ModelError or UsageError."""
    path = Path(name)
    if path.is_dir():
        path = latest_step(path)
        if not (path / "config.json").is_file():
            raise ModelError("neither a checkpoint (no config.json) nor a run folder (no latest)", where=name)
        _require_safetensors(path, name)
        return Checkpoint(name, path, "", step_of(path))
    if path.exists() or name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise UsageError("no such checkpoint folder", where=name)
    return _download(name)


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


def _download(name: str) -> Checkpoint:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises its own, requests' and httpx' errors alike
        raise ModelError(
            f"no such folder, and the hub did not give it either ({type(error).__name__})",
            where=name,
            hint="check the spelling, the network, and HF_TOKEN for gated models",
        ) from None
    _require_safetensors(folder, name)
    return Checkpoint(name, folder, folder.name, 0)


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


def load(
    checkpoint: Checkpoint,
    *,
    device: str = "auto",
    dtype: str = "auto",
    masters: bool = False,
    trust_remote_code: bool = False,
    attention: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, unless there is one already.

    With `masters` the weights are float32 whatever `dtype` says, and the forward pass is cast: an
    update of 1e-6 would round to nothing on bfloat16 weights. `attention` names one of transformers'
    implementations. Raises ModelError.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from s2dcli.models.forward import require_known_head

    quieten_transformers()
    tokenizer = tokenizer or load_tokenizer(checkpoint.folder, trust_remote_code)
    place = pick_device(device)
    compute = pick_dtype(dtype, place)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.folder),
            dtype=torch.float32 if masters else compute,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            attn_implementation=attention,
        )
    except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise loading_failed("the model", error, checkpoint.name) from None
    vocabulary = vocabulary_size(tokenizer)
    model = model.to(place).eval()
    require_known_head(model, vocabulary, checkpoint.name)
    _return_freed_memory()
    return LoadedModel(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        model=model,
        vocabulary=vocabulary,
        eos_ids=eos_ids(tokenizer, checkpoint, trust_remote_code),
        pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        autocast=compute if masters and compute != torch.float32 else None,
        compute_dtype=compute,
    )


def _return_freed_memory() -> None:
    """Hand what reading the files left free back to the system, where the C library keeps it: a large tokenizer leaves 60 MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def model_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read what config.json says of a model. Raises ModelError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(checkpoint.folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise loading_failed("config.json", error, checkpoint.name) from None


def empty_model(checkpoint: Checkpoint, trust_remote_code: bool = False) -> PreTrainedModel:
    """Make the model that config.json describes, its weights without values or memory. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    quieten_transformers()
    config = model_config(checkpoint, trust_remote_code)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).eval()
    except (OSError, ValueError, KeyError) as error:
        raise loading_failed("the model of config.json", error, checkpoint.name) from None


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


def pick_device(name: str) -> torch.device:
    """Turn `--device` into a torch device; `auto` takes a GPU if there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"no such device: {name!r}", hint="cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no GPU here")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn `--dtype` into the type of the forward computation."""
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
