"""The memory that `--dry-run` announces against the memory that an update takes."""

import pytest
import torch
from memory import peak_bytes

from s2dcli.assembly.loading import load_trained
from s2dcli.assembly.plan import memory_plan
from s2dcli.models.batching import Row, micro_batches
from s2dcli.models.checkpoints import resolve
from s2dcli.options import Aggregate, Dtype, Optimizer, Weights
from s2dcli.train.losses import weights_of
from s2dcli.train.objectives import CrossEntropy
from s2dcli.train.optimizer import MasterOptimizer

TOKENS = 1024
SETTINGS = {
    "attention": None,
    "weights": Weights.float32,
    "optimizer": Optimizer.adamw,
    "dtype": Dtype.auto,
    "device": "cpu",
    "trust_remote_code": False,
    "gradient_checkpointing": False,
    "lora_rank": None,
    "lora_alpha": None,
    "lora_targets": None,
    "tokens_per_batch": TOKENS,
    "sample_tokens": 1,
    "eval_problems": None,
    "seed": 0,
    "lr": 1e-6,
    "weight_decay": 0.0,
    "adam_beta2": 0.95,
    "grad_clip": 1.0,
}


@pytest.fixture(scope="module")
def larger(toy, tmp_path_factory):
    """A random model of 25 million parameters with the toy's tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("larger") / "model"
    config = transformers.AutoConfig.from_pretrained(toy / "teacher")
    for name, value in {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}.items():
        setattr(config, name, value)
    config.num_hidden_layers, config.layer_types, config.head_dim = 8, ["full_attention"] * 8, 64
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(toy / "teacher").save_pretrained(folder)
    return folder


def measured(folder, small, settings) -> int:
    """Peak bytes of loading a model and two updates of it on a full micro-batch."""

    def update(model, tokens: int) -> None:
        _, policy = load_trained(resolve(str(model)), settings)
        optimizer = MasterOptimizer(policy, settings)
        rows = [Row([5] * 16, [6] * 48)] * (tokens // 64)
        objective = CrossEntropy(weights_of(range(len(rows)), [48] * len(rows), Aggregate.token, 48))
        for _ in range(2):
            for batch in micro_batches(rows, range(len(rows)), TOKENS, 0, torch.device("cpu"), share_prompts=False):
                policy(batch, objective(batch))[0].backward()
            optimizer.clip()
            optimizer.step(1e-6)

    return peak_bytes(lambda: update(small, 64), lambda: update(folder, TOKENS))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"gradient_checkpointing": True},
        {"weights": Weights.bfloat16},
        {"lora_rank": 8},
    ],
    ids=["plain", "checkpointing", "bfloat16", "lora"],
)
def test_the_plan_is_near_what_an_update_takes(larger, toy, changed):
    settings = {**SETTINGS, **changed}
    planned = memory_plan(settings, resolve(str(larger)), [])
    took = measured(larger, toy / "teacher", settings)
    assert 1.0 < planned["total_bytes"] / took < 1.35


def plan(folder, **changed) -> dict[str, int]:
    return memory_plan({**SETTINGS, **changed}, resolve(str(folder)), changed.pop("frozen", []))


def test_states_by_hand(toy):
    count = 109056
    plain = plan(toy / "teacher")
    assert plain["weights_bytes"] == plain["gradients_bytes"] == 4 * count
    assert plain["optimizer_bytes"] == 8 * count
    assert plain["masters_bytes"] == plain["casts_bytes"] == plain["frozen_bytes"] == 0
    narrow = plan(toy / "teacher", weights=Weights.bfloat16)
    assert (narrow["weights_bytes"], narrow["masters_bytes"], narrow["gradients_bytes"]) == (2 * count, 4 * count, 4 * count)
    assert plan(toy / "teacher", dtype=Dtype.bfloat16)["casts_bytes"] == 2 * count
    adapter = plan(toy / "teacher", lora_rank=2, lora_targets="q_proj,down_proj")
    assert adapter["trained_parameters"] == 2 * 2 * ((64 + 64) + (192 + 64))  # rank, layers, both sides of each
    assert adapter["optimizer_bytes"] == 8 * adapter["trained_parameters"]


def test_frozen_models_and_the_cache_by_hand(toy):
    parent, other = resolve(str(toy / "teacher")), resolve(str(toy / "student"))
    settings = {**SETTINGS, "sample_tokens": 1000}
    assert memory_plan(settings, parent, [parent])["frozen_bytes"] == 4 * 109056
    assert memory_plan({**settings, "lora_rank": 2}, parent, [parent])["frozen_bytes"] == 0  # the adapter switched off
    assert memory_plan({**settings, "weights": Weights.bfloat16}, other, [parent])["frozen_bytes"] == 2 * 109056
    assert memory_plan(settings, parent, [])["cache_bytes"] == 2 * 2 * 64 * 1000 * 4  # key and value, layers, heads x size
    stored = {**settings, "rollouts": "graded.jsonl"}
    assert memory_plan(stored, parent, [])["cache_bytes"] == 0
    assert memory_plan({**stored, "eval_problems": "p.jsonl"}, parent, [])["cache_bytes"] > 0


def test_the_total_is_what_is_always_there_and_the_larger_phase(toy):
    always = ("weights_bytes", "masters_bytes", "optimizer_bytes", "frozen_bytes")
    updating = ("gradients_bytes", "casts_bytes", "activations_bytes", "logits_bytes")
    for tokens in (1, 10**7):
        planned = plan(toy / "teacher", sample_tokens=tokens)
        phases = sum(planned[name] for name in updating), planned["cache_bytes"]
        assert planned["total_bytes"] == sum(planned[name] for name in always) + max(phases)
