"""A server of a real model that answers as `vllm serve` does, one request at a time: the same request always gets the same bytes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from fake_vllm import FakeVllm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from s2dcli.engines.base import Request, SamplingParams
from s2dcli.engines.transformers import TransformersEngine


class ModelServer(FakeVllm):
    """Serves a checkpoint of the toy family, and the weights that it is given; `loads` counts these."""

    def __init__(self, folder: Path) -> None:
        super().__init__(self.complete, str(folder))
        self.loads = 0
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._engine = TransformersEngine(self._model, eos_ids=[3], pad_id=0, vocabulary=33, batch_tokens=1 << 16)
        self._lock = threading.Lock()

    def complete(self, body: dict) -> dict[str, Any]:
        request = Request(body["prompt"], body["seed"])
        with self._lock:
            how = SamplingParams(body["temperature"], body["top_p"], max(0, body["top_k"]), body["max_tokens"])
            [(_, sample)] = self._engine.generate([request], how)
        choice = {"index": 0, "finish_reason": sample.finish_reason, "token_ids": sample.completion_ids}
        return {"choices": [{**choice, "prompt_token_ids": request.prompt_ids, "logprobs": {"token_logprobs": sample.logprobs}}]}

    def command(self, path: str, body: dict) -> Any:
        if path == "/collective_rpc":
            assert body["method"] == "s2d_load_weights"
            state = {name: value for file in Path(body["args"][0]).glob("*.safetensors") for name, value in load_file(file).items()}
            with self._lock:
                missing, unexpected = self._model.load_state_dict(state, strict=False)
            assert not unexpected
            assert set(missing) <= {"lm_head.weight"}  # tied
            self.loads += 1
        return super().command(path, body)
