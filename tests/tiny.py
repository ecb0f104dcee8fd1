"""Small random models of several families, for tests of what must hold for any of them."""

from __future__ import annotations

import random

import numpy as np
import torch

from s2dcli.models.batching import micro_batches
from s2dcli.models.policy import Policy
from s2dcli.models.rows import Row
from s2dcli.models.scoring import score
from s2dcli.train.rows import TrainingRow
from s2dcli.train.targets import SampledTargets
from s2dcli.train.teachers import LiveTeacher

VOCABULARY = 40


def tiny(family: str, seed: int = 0) -> torch.nn.Module:
    """Make a random causal language model in eval mode: `qwen3` (RoPE, tied), `llama` (untied), `gpt2` (absolute), `gemma2`, `cohere`."""
    import transformers

    torch.manual_seed(seed)
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {
        **common,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "qwen3":
        config = transformers.Qwen3Config(**rope, head_dim=16, tie_word_embeddings=True)
    elif family == "llama":
        config = transformers.LlamaConfig(**rope, tie_word_embeddings=False)
    elif family == "gemma2":
        config = transformers.Gemma2Config(**rope, head_dim=16, final_logit_softcapping=4.0, sliding_window=64)
    elif family == "cohere":
        config = transformers.CohereConfig(**rope, logit_scale=0.25)
    else:
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=64,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def small(family: str, seed: int = 0) -> torch.nn.Module:
    """Make a random `qwen3` (tied) or `llama` (untied) in a shape that vLLM's CPU kernels take: heads of 32."""
    import transformers

    torch.manual_seed(seed)
    kind = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}[family]
    config = kind(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=family == "qwen3",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def training_row(prompt_ids, completion_ids, **numbers) -> TrainingRow:
    """A row whose sampler's log-probs are 0 unless given; its token weight is 1."""
    numbers = {"logprobs": np.zeros(len(completion_ids)), "weight": 1.0, **numbers}
    return TrainingRow(prompt_ids, completion_ids, **numbers)


def scores(policy, rows: list[Row], **settings) -> list[list[float]]:
    """What `score` yields, in the order of the rows."""
    found = dict(score(policy, rows, **settings))
    return [found[row].tolist() for row in rows]


def ragged_rows(count: int = 8, seed: int = 0, group: int = 1) -> list[TrainingRow]:
    """Rows of ragged lengths, `group` of them to a prompt."""
    draw = random.Random(seed)
    ids = lambda n: [draw.randrange(3, VOCABULARY) for _ in range(n)]  # noqa: E731
    prompts = [ids(draw.randint(1, 9)) for _ in range(count // group)]
    return [training_row(prompts[index // group], ids(draw.randint(1, 20))) for index in range(count)]


def learn(student, rows, objective, budget=60):
    """The loss of all rows, and its gradient."""
    student.zero_grad()
    objective.teacher.begin(rows)
    total = 0.0
    for batch in micro_batches(rows, budget, 0, torch.device("cpu"), share_prompts=False):
        loss, _ = student(batch, objective)
        loss.backward()
        total += loss.item()
    return total, torch.cat([parameter.grad.flatten() for parameter in student.parameters()]).clone()


def close(found, expected, tolerance):
    """Assert that two results of `learn` agree to a relative tolerance."""
    assert abs(found[0] - expected[0]) <= tolerance * abs(expected[0])
    assert (found[1] - expected[1]).norm() <= tolerance * expected[1].norm()


class LiveAround:
    """A teacher in memory that gives the sampled tokens' log-probs, and what those who know k ids have for a baseline."""

    others = sources = ()
    waited = None

    def __init__(self, policy: Policy, k: int) -> None:
        self.sampled, self.around = LiveTeacher(policy=policy, sampled=True), LiveTeacher(policy=policy, top_k=k)

    def begin(self, rows) -> None:
        pass

    def targets(self, batch) -> SampledTargets:
        return SampledTargets(self.sampled.targets(batch).logprobs_N, self.around.targets(batch))
