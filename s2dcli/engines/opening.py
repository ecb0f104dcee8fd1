"""Which engine samples: what `--engine` means, and making it ready with a checkpoint's weights."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from s2dcli import console
from s2dcli.engines.base import Engine, HostedEngine
from s2dcli.engines.weights import PARITY_ROWS, ParityGate
from s2dcli.errors import UsageError, nearest
from s2dcli.models.checkpoints import Checkpoint, LoadedModel, eos_ids, load, model_config, pick_device, pick_dtype
from s2dcli.models.prompts import PromptEncoder, vocabulary_size
from s2dcli.options import EngineOptions, ModelOptions

if TYPE_CHECKING:
    import torch

AUTO, TRANSFORMERS, VLLM, SERVER = "auto", "transformers", "vllm", "server"
# Options that belong to some engines only
KINDS_OF = {
    "gpu_memory_utilization": {VLLM},
    "tensor_parallel_size": {VLLM},
    "max_model_len": {VLLM},
    "max_in_flight": {SERVER},
    "parity_rows": {VLLM, SERVER},
    "parity_tolerance": {VLLM, SERVER},
}


def open_engine(
    checkpoint: Checkpoint,
    encoder: PromptEncoder,
    sampling: EngineOptions,
    loading: ModelOptions,
    *,
    training: LoadedModel | None = None,
) -> tuple[Engine, ParityGate | None]:
    """Open the engine that `--engine` names, with a checkpoint's weights; a hosted one comes with its parity gate.

    `training` is that checkpoint's model when it is trained here: the transformers engine samples from it.
    Raises EngineError, ModelError or UsageError.
    """
    kind = _kind(sampling, loading.device)
    gate = None
    if kind == TRANSFORMERS:
        loaded = training or load(checkpoint, **loading.of_load(), tokenizer=encoder.tokenizer)
        engine = _transformers(loaded, sampling)
    else:
        dtype = training.compute_dtype if training else pick_dtype(loading.dtype, pick_device(loading.device))
        if training and sampling.parity_rows == 0:
            raise UsageError("--parity-rows 0: a trainer does not sample from weights without proof", hint="1 or more")
        gate = ParityGate(dtype, sampling.parity_rows or PARITY_ROWS, sampling.parity_tolerance)
        if kind == VLLM:
            engine = _vllm(checkpoint, encoder, sampling, loading, dtype, beside_trainer=training is not None)
        else:
            engine = _server(checkpoint, encoder, sampling, loading)
    if sampling.engine == AUTO:
        console.info(f"sampling with {engine.name}")
    return engine, gate


def _kind(sampling: EngineOptions, device: str) -> str:
    """Return which kind of engine is meant. Raises UsageError, also for an option that this kind would ignore."""
    name = sampling.engine
    if name == AUTO:
        on_gpu = pick_device(device).type == "cuda"
        kind = VLLM if on_gpu and importlib.util.find_spec("vllm") else TRANSFORMERS
    elif name.startswith(("http://", "https://")):
        kind = SERVER
    elif name in (TRANSFORMERS, VLLM):
        kind = name
    else:
        known = [AUTO, TRANSFORMERS, VLLM]
        raise UsageError(f"no such engine: {name!r}{nearest(name, known)}", hint=f"--engine {', '.join(known)} or http://HOST:PORT,...")
    for option, kinds in KINDS_OF.items():
        if getattr(sampling, option) is not None and kind not in kinds:
            raise UsageError(f"the {kind} engine has no --{option.replace('_', '-')}", hint="leave it out")
    return kind


def _transformers(loaded: LoadedModel, sampling: EngineOptions) -> Engine:
    from s2dcli.engines.transformers import TransformersEngine

    return TransformersEngine(
        loaded.model,
        eos_ids=loaded.eos_ids,
        pad_id=loaded.pad_id,
        vocabulary=loaded.vocabulary,
        autocast=loaded.autocast,
        batch_tokens=sampling.sample_tokens,
    )


def _vllm(
    checkpoint: Checkpoint,
    encoder: PromptEncoder,
    sampling: EngineOptions,
    loading: ModelOptions,
    dtype: torch.dtype,
    *,
    beside_trainer: bool,
) -> HostedEngine:
    from s2dcli.engines.vllm import VllmEngine

    if pick_device(loading.device).index:
        raise UsageError(f"--device {loading.device}: vLLM takes the first GPUs that it sees", hint="choose them by CUDA_VISIBLE_DEVICES")
    return VllmEngine(
        checkpoint.folder,
        eos_ids=eos_ids(encoder.tokenizer, checkpoint, loading.trust_remote_code),
        vocabulary=vocabulary_size(encoder.tokenizer),
        dtype=dtype,
        gpu_memory_utilization=sampling.gpu_memory_utilization,
        tensor_parallel_size=sampling.tensor_parallel_size or 1,
        max_model_len=sampling.max_model_len,
        trust_remote_code=loading.trust_remote_code,
        beside_trainer=beside_trainer,
    )


def _server(checkpoint: Checkpoint, encoder: PromptEncoder, sampling: EngineOptions, loading: ModelOptions) -> HostedEngine:
    from s2dcli.engines.server import IN_FLIGHT, ServerEngine

    config = model_config(checkpoint, loading.trust_remote_code)
    return ServerEngine(
        sampling.engine.split(","),
        names=[checkpoint.name, str(checkpoint.folder), str(checkpoint.folder.resolve())],
        eos_ids=eos_ids(encoder.tokenizer, checkpoint, loading.trust_remote_code),
        vocabulary=vocabulary_size(encoder.tokenizer),
        model_vocabulary=config.get_text_config().vocab_size,
        in_flight=sampling.max_in_flight or IN_FLIGHT,
    )
