"""How often sampling and learning ask for a number of the device: each time a GPU is waited for, and given nothing meanwhile.

transformers asks by itself, once in each pass of a model, whether its rows are packed or padded: that is not counted.
"""

import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from s2dcli.engines import transformers as engine
from s2dcli.engines.base import Request, SamplingParams
from s2dcli.models.batching import micro_batches
from s2dcli.models.policy import Policy, freeze
from s2dcli.train.objectives import Distillation, PolicyGradient
from s2dcli.train.rows import TrainingRow
from s2dcli.train.teachers import LiveTeacher
from s2dcli.train.vocab import reverse_kl

VOCABULARY = 30
# What copies a number to main memory on any device, under either name; nonzero has to know the size of its result.
WAITS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero")


class Waits(TorchDispatchMode):
    """Counts operators that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in WAITS and not _is_masking():
            self.found[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def _is_masking() -> bool:
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.endswith("transformers/masking_utils.py"):
        frame = frame.f_back
    return frame is not None


def waits(work) -> int:
    with Waits() as counted:
        work()
    return counted.found.total()


def rows(count: int, length: int) -> list[TrainingRow]:
    made = [TrainingRow([3 + i % 2] * (2 + i % 2), [5] * length, sample_index=i, logprobs=[-3.0] * length) for i in range(count)]
    for row in made:
        row.weight, row.advantage = 1 / count, 1.0
    return made


@pytest.mark.parametrize("method", ["grpo", "opd"])
def test_an_updates_micro_batches_never_wait(method):
    policy = Policy(tiny("qwen3"), VOCABULARY)
    policy.collect_gradients(lambda parameter, held={}: held.setdefault(parameter, torch.zeros_like(parameter)))
    objective = PolicyGradient(temperature=1.0, clip_low=0.2, clip_high=0.2)
    if method == "opd":
        objective = Distillation(
            teacher=LiveTeacher(policy=freeze(Policy(tiny("qwen3"), VOCABULARY))), divergence=reverse_kl, temperature=1.0
        )

    def update(count: int, length: int) -> int:
        """Learn from rows, four in a micro-batch, of prompts of different lengths."""
        batches = list(micro_batches(rows(count, length), 4 * (3 + length), 0, torch.device("cpu"), share_prompts=count < 9))
        assert len(batches) >= count / 4

        def work() -> None:
            for batch in batches:
                policy(batch, objective)[0].backward()

        return waits(work)

    assert [update(count, length) for count, length in ((4, 3), (8, 3), (12, 3), (8, 12))] == [0, 0, 0, 0]


@pytest.mark.parametrize("cached", [True, False])
def test_decoding_waits_once_in_several_tokens_whatever_the_rows(monkeypatch, cached):
    monkeypatch.setattr(engine, "CPU_COUNT_EVERY", engine.COUNT_EVERY)  # as on a GPU
    model = tiny("qwen3")
    sampler = engine.TransformersEngine(model, eos_ids=[], pad_id=0, vocabulary=VOCABULARY, batch_tokens=10**6)
    sampler.paths = replace(sampler.paths, cache=cached)

    def decode(count: int, tokens: int) -> int:
        requests = [Request([3 + i % 2] * (2 + i % 2), seed=i) for i in range(count)]
        return waits(lambda: list(sampler.generate(requests, SamplingParams(1.0, top_p=1.0, top_k=0, max_tokens=tokens))))

    every = engine.COUNT_EVERY
    assert [decode(count, tokens) for count, tokens in ((2, every), (8, every), (2, 4 * every))] == [0, 0, 3]
