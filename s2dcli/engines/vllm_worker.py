"""What s2d puts into vLLM's worker processes. vLLM imports it by name; nothing here is called by s2d itself.

A server gets it at its start: `vllm serve ... --worker-extension-cls s2dcli.engines.vllm_worker.WorkerExtension`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import LogitsProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate

# Keys of `additional_config`: how many ids the tokenizer has, and which of these no token has.
VOCABULARY = "s2d_vocabulary"
UNUSED = "s2d_unused"


class WorkerExtension:
    """Methods that vLLM adds to its worker class."""

    def s2d_load_weights(self, folder: str) -> None:
        """Reload the weights from a folder of safetensors."""
        self.reload_weights(weights_path=folder)
        if not current_platform.is_cpu():
            return
        # On a CPU, embedding and head multiply by a packed copy, which reload_weights leaves as it was (seen with 0.32.0).
        for layer in self.get_model().modules():
            if isinstance(layer, VocabParallelEmbedding) and isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
                dispatch_cpu_unquantized_gemm(layer, remove_weight=False)

    def s2d_ignored_layers(self, number: int) -> list[str]:
        """Names of those layers of a loaded LoRA adapter that the model does not compute with: vLLM passes over them in silence."""
        manager = self.model_runner.lora_manager._adapter_manager
        return sorted(set(manager.get_adapter(number).loras) - set(manager.modules))


class VocabularyMask(LogitsProcessor):
    """Gives probability 0 to ids that no token has: beyond the tokenizer, where models are padded, and below its highest id."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.vocabulary: int = vllm_config.additional_config[VOCABULARY]
        self.unused_U = torch.tensor(vllm_config.additional_config[UNUSED], dtype=torch.long, device=device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        logits[:, self.vocabulary :] = -torch.inf
        return logits.index_fill_(1, self.unused_U, -torch.inf)

    def is_argmax_invariant(self) -> bool:
        return False  # so that it is applied before greedy sampling too

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing depends on the requests."""
