"""Which engine samples or scores: checking `--engine` and its options, and opening the engine with a checkpoint's weights."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from s2dcli import console, world
from s2dcli.engines.base import Engine, HostedEngine
from s2dcli.engines.vllm import INSTALL_HINT
from s2dcli.engines.weights import PARITY_ROWS, ParityGate
from s2dcli.errors import UsageError, nearest
from s2dcli.files.manifest import without_credentials
from s2dcli.models.checkpoints import Checkpoint, LoadedModel, eos_ids, load, model_config, pick_device, pick_dtype
from s2dcli.models.prompts import unused_ids, vocabulary_size
from s2dcli.options import EngineOptions, Estimator, ModelOptions, ScoringOptions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from s2dcli.engines.server import ServerEngine
    from s2dcli.models.adapters import Adapter

AUTO, TRANSFORMERS, VLLM, SERVER = "auto", "transformers", "vllm", "server"
# Options that belong to some engines only
KINDS_OF = {
    "gpu_memory_utilization": {VLLM},
    "tensor_parallel_size": {VLLM},
    "max_model_len": {VLLM},
    "max_in_flight": {SERVER},
    "server_timeout": {SERVER},
    "parity_rows": {VLLM, SERVER},
    "parity_tolerance": {VLLM, SERVER},
}


def check_engine(sampling: ScoringOptions, *, training: bool = False, teacher: str | None = None) -> None:
    """Check `--engine` and the options that only some engines have. Imports nothing heavy: to be called before anything else.

    `training`: the engine is to follow the weights of a model in training; `teacher`: its teacher, which may be servers
    too. Raises UsageError.
    """
    served = {SERVER} if is_served(teacher) and server_urls(teacher, "--teacher") else set()
    _refuse_ignored(sampling, _kinds(sampling.engine) | served)
    if training:
        require_a_gpu_each(sampling, world.size())
    if training and sampling.parity_rows == 0:
        raise UsageError("--parity-rows 0: a trainer does not sample from weights without proof", hint="1 or more")


def require_a_gpu_each(sampling: ScoringOptions, processes: int) -> None:
    """Raise UsageError where each of several processes in training would shard its own vLLM over GPUs, of which it has one."""
    if processes > 1 and (sampling.tensor_parallel_size or 1) > 1:
        raise UsageError(
            f"--tensor-parallel-size {sampling.tensor_parallel_size}: each of the {processes} processes has one GPU",
            hint="leave it out, or start vllm serve with it and give --engine http://HOST:PORT,...",
        )


def open_engine(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    sampling: ScoringOptions,
    loading: ModelOptions,
    *,
    training: LoadedModel | None = None,
    adapter: Adapter | None = None,
    ahead: bool = False,
    top_k: int = 0,
) -> tuple[Engine, ParityGate | None]:
    """Open the engine that `--engine` names, with a checkpoint's weights; a hosted one comes with its parity gate.

    `training` is that checkpoint's model when it is trained here: the transformers engine samples from it, and others sample
    `ahead`, while it learns; `adapter`: what is trained in its weights' place. `top_k`: log-probs
    of a token that a hosted engine is to give where it scores. Raises EngineError, ModelError or UsageError.
    """
    check_engine(sampling, training=training is not None)
    kind = engine_kind(sampling, loading.device)
    gate = None
    if kind == TRANSFORMERS:
        loaded = training or load(checkpoint, **loading.of_load(), tokenizer=tokenizer)
        engine = _transformers(loaded, sampling)
    else:
        dtype = training.compute_dtype if training else pick_dtype(loading.dtype, pick_device(loading.device))
        gate = ParityGate(dtype, sampling.parity_rows or PARITY_ROWS, sampling.parity_tolerance)
        if kind == VLLM:
            how = {"beside_trainer": training is not None, "ahead": ahead, "max_logprobs": top_k, "adapter": adapter}
            engine = _vllm(checkpoint, tokenizer, sampling, loading, dtype, **how)
        else:
            engine = _server(checkpoint, tokenizer, sampling, loading)
    if sampling.engine == AUTO:
        console.info(f"sampling with {engine.name}")
    return engine, gate


def open_served_teacher(
    urls: str, student: Checkpoint, tokenizer: PreTrainedTokenizerBase, sampling: ScoringOptions, loading: ModelOptions
) -> ServerEngine:
    """Open servers of a teacher that has the student's tokenizer and EOS. Raises EngineError or UsageError."""
    return _server(student, tokenizer, replace(sampling, engine=urls), loading, named=False)


def check_served_teacher(estimator: Estimator, temperature: float) -> None:
    """Raise UsageError for targets that no server gives; `temperature` is the teacher's."""
    if estimator is Estimator.full:
        raise UsageError(
            "the teacher's whole distribution is needed; a server gives the most likely ids only",
            hint="opd: --estimator top-k or sampled, fkl-warmup: --top-k; or s2d score --keep hidden, and learn from the cache",
        )
    if temperature != 1.0:
        raise UsageError(
            f"the teacher's temperature is {temperature:g}: a server scores at temperature 1",
            hint="--teacher-temperature 1, a teacher in memory, or a cache",
        )


def is_served(name: str | None) -> bool:
    """Whether `--teacher` names servers, not a checkpoint."""
    return name is not None and name.startswith(("http://", "https://"))


def _kinds(name: str) -> set[str]:
    """Return the kinds of engine that `--engine` may mean: `auto` leaves a choice. Raises UsageError."""
    vllm_installed = importlib.util.find_spec("vllm") is not None
    if name == AUTO:
        return {TRANSFORMERS, VLLM} if vllm_installed else {TRANSFORMERS}
    if name == VLLM and not vllm_installed:
        raise UsageError("--engine vllm needs vLLM, which is not installed", hint=INSTALL_HINT)
    if name in (TRANSFORMERS, VLLM):
        return {name}
    if any(mark in name for mark in (":", "/", "@", ",")):
        server_urls(name)
        return {SERVER}
    known = [AUTO, TRANSFORMERS, VLLM]
    raise UsageError(f"no such engine: {name!r}{nearest(name, known)}", hint=f"--engine {', '.join(known)} or http://HOST:PORT,...")


def require_ahead(sampling: ScoringOptions, device: str) -> None:
    """Raise UsageError if the engine cannot sample while the model in training is updated."""
    if engine_kind(sampling, device) == TRANSFORMERS:
        raise UsageError(
            "--async-depth 1: the transformers engine samples from the very weights that are updated, so it has to wait for them",
            hint="--engine vllm, or http://HOST:PORT of a running vllm serve",
        )


def engine_kind(sampling: ScoringOptions, device: str) -> str:
    """Return the kind of engine that samples on a device. Raises UsageError, also for an option that this kind would ignore."""
    kinds = _kinds(sampling.engine)
    if len(kinds) > 1:
        kinds = {VLLM if pick_device(device, here=False).type == "cuda" else TRANSFORMERS}
        _refuse_ignored(sampling, kinds)
    return kinds.pop()


def _refuse_ignored(sampling: ScoringOptions, kinds: set[str]) -> None:
    for option, owners in KINDS_OF.items():
        if getattr(sampling, option) is not None and not kinds & owners:
            raise UsageError(f"the {' or '.join(sorted(kinds))} engine has no --{option.replace('_', '-')}", hint="leave it out")


def server_urls(text: str, option: str = "--engine") -> list[str]:
    """Return the URLs of `--engine URL,...` or `--teacher URL,...`.

    Raises UsageError, which shows no password, for the first that is malformed.
    """
    shown = without_credentials(text)
    shown = repr(shown) if "@" not in shown else "the URL"  # what is left of a password that was not escaped
    for number, url in enumerate(urls := text.split(","), 1):
        wrong = _wrong_with(url)
        if wrong:
            which = f" {number}" if len(urls) > 1 else ""
            raise UsageError(
                f"{option} {shown}: URL{which} {wrong}", hint=f"{option} http://HOST:PORT or http://HOST1:PORT,http://HOST2:PORT"
            )
    return urls


def _wrong_with(url: str) -> str:
    """Return what is wrong with the URL of a server, "" if nothing is."""
    if not url:
        return "is empty"
    if any(character.isspace() or not character.isprintable() for character in url):
        return "holds a space"
    if not url.startswith(("http://", "https://")):
        return "must begin with http:// or https://"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "has an invalid host or port"
    if "@" in parts.path + parts.query + parts.fragment:
        return "has an @ behind the host; in a password, write / as %2F, ? as %3F, # as %23"
    if not host:
        return "names no host"
    if port == 0 or (port is None and parts.scheme == "http"):
        return "names no port; vllm serve listens on 8000 by default"
    return "ends in a query or fragment" if parts.query or parts.fragment else ""


def _transformers(loaded: LoadedModel, sampling: EngineOptions) -> Engine:
    from s2dcli.engines.transformers import TransformersEngine

    return TransformersEngine(
        loaded.replica.model if loaded.replica else loaded.model,
        eos_ids=loaded.eos_ids,
        pad_id=loaded.pad_id,
        vocabulary=loaded.vocabulary,
        autocast=loaded.autocast,
        batch_tokens=sampling.sample_tokens,
    )


def _vllm(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    sampling: ScoringOptions,
    loading: ModelOptions,
    dtype: torch.dtype,
    **how: Any,
) -> HostedEngine:
    from s2dcli.engines.vllm import VllmEngine

    gpu = pick_device(loading.device).index
    if gpu and world.size() == 1:
        raise UsageError(f"--device {loading.device}: vLLM takes the first GPUs that it sees", hint="choose them by CUDA_VISIBLE_DEVICES")
    return VllmEngine(
        checkpoint.folder,
        eos_ids=eos_ids(tokenizer, checkpoint, loading.trust_remote_code),
        vocabulary=vocabulary_size(tokenizer),
        unused=unused_ids(tokenizer),
        dtype=dtype,
        gpu_memory_utilization=sampling.gpu_memory_utilization,
        tensor_parallel_size=sampling.tensor_parallel_size or 1,
        max_model_len=sampling.max_model_len,
        trust_remote_code=loading.trust_remote_code,
        gpu=gpu,
        **how,
    )


def _server(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, sampling: ScoringOptions, loading: ModelOptions, *, named: bool = True
) -> ServerEngine:
    """Open servers of a checkpoint; unless `named`, of another model that has its tokenizer."""
    from s2dcli.engines.server import IN_FLIGHT, TIMEOUT_SECONDS, ServerEngine

    config = model_config(checkpoint, loading.trust_remote_code)
    return ServerEngine(
        server_urls(sampling.engine),
        names=[checkpoint.name, str(checkpoint.folder), str(checkpoint.folder.resolve())] if named else [],
        eos_ids=eos_ids(tokenizer, checkpoint, loading.trust_remote_code),
        vocabulary=vocabulary_size(tokenizer),
        unused=unused_ids(tokenizer),
        model_vocabulary=config.get_text_config().vocab_size,
        in_flight=sampling.max_in_flight or IN_FLIGHT,
        timeout=sampling.server_timeout or TIMEOUT_SECONDS,
    )
