"""The memory that `--dry-run` announces against the memory that an update takes."""

import shutil
from dataclasses import replace

import pytest
import torch
from memory import peak_bytes
from tiny import training_row

from s2dcli.assembly.loading import load_trained
from s2dcli.assembly.plan import memory_plan
from s2dcli.models.batching import micro_batches
from s2dcli.models.checkpoints import resolve
from s2dcli.options import Aggregate, Dtype, ModelOptions, TrainingOptions, Weights
from s2dcli.train.objectives import CrossEntropy
from s2dcli.train.optimizer import MasterOptimizer
from s2dcli.train.rows import set_weights

TOKENS = 1024
LOADING = ModelOptions(device="cpu")


def options(**changed) -> TrainingOptions:
    return TrainingOptions(**{"tokens_per_batch": TOKENS, "adam_beta2": 0.95, **changed})


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


def measured(folder, small, training) -> int:
    """Peak bytes of loading a model and two updates of it on a full micro-batch."""

    def update(model, tokens: int) -> None:
        _, policy = load_trained(resolve(str(model)), LOADING, training)
        optimizer = MasterOptimizer(policy, training)
        policy.collect_gradients(optimizer.gradient_of)
        rows = [training_row([5] * 16, [6] * 48)] * (min(tokens, training.tokens_per_batch) // 64)
        set_weights(rows, Aggregate.token, 48)
        for _ in range(2):
            for batch in micro_batches(rows, TOKENS, 0, torch.device("cpu"), share_prompts=False):
                policy(batch, CrossEntropy())[0].backward()
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
    training = options(**changed)
    if changed.get("weights"):  # products in bfloat16 take a hundred times as long on a CPU without it
        training = replace(training, tokens_per_batch=TOKENS // 8)
    planned = memory_plan(resolve(str(larger)), [], LOADING, training, sample_tokens=1)
    took = measured(larger, toy / "teacher", training)
    assert 1.0 < planned["total_bytes"] / took < 1.35


def plan(folder, loading=LOADING, frozen=(), sample_tokens: int = 1, **changed) -> dict[str, int]:
    return memory_plan(resolve(str(folder)), frozen, loading, options(**changed), sample_tokens=sample_tokens)


def test_states_by_hand(toy):
    count = 109056
    plain = plan(toy / "teacher")
    assert plain["weights_bytes"] == plain["gradients_bytes"] == 4 * count
    assert plain["optimizer_bytes"] == 8 * count
    assert plain["masters_bytes"] == plain["casts_bytes"] == plain["frozen_bytes"] == 0
    narrow = plan(toy / "teacher", weights=Weights.bfloat16)
    assert (narrow["weights_bytes"], narrow["masters_bytes"], narrow["gradients_bytes"]) == (2 * count, 4 * count, 4 * count)
    assert plan(toy / "teacher", ModelOptions(device="cpu", dtype=Dtype.bfloat16))["casts_bytes"] == 2 * count
    adapter = plan(toy / "teacher", lora_rank=2, lora_targets="q_proj,down_proj")
    assert adapter["trained_parameters"] == 2 * 2 * ((64 + 64) + (192 + 64))  # rank, layers, both sides of each
    assert adapter["optimizer_bytes"] == 8 * adapter["trained_parameters"]


def test_frozen_models_and_the_cache_by_hand(toy):
    parent, other = resolve(str(toy / "teacher")), resolve(str(toy / "student"))
    assert plan(parent.folder, frozen=[parent])["frozen_bytes"] == 4 * 109056
    assert plan(parent.folder, frozen=[parent], lora_rank=2)["frozen_bytes"] == 0  # the adapter switched off
    assert plan(other.folder, frozen=[parent], weights=Weights.bfloat16)["frozen_bytes"] == 2 * 109056
    cached = plan(parent.folder, sample_tokens=1000)["cache_bytes"]
    assert cached == 2 * 2 * 64 * 1125 * 4  # key and value, layers, heads x size, an eighth of room to grow
    assert plan(parent.folder, sample_tokens=0)["cache_bytes"] == 0


def test_only_what_samples_has_a_cache(s2d, toy, few, tmp_path):
    rolled = s2d("rollout", "-m", toy / "teacher", few, "-n", 2, "--max-tokens", 4).out
    graded = tmp_path / "graded.jsonl"
    assert s2d("verify", "-o", graded, stdin=rolled).code == 0
    stored = ["grpo", "-m", toy / "teacher", "--rollouts", graded, "-o", tmp_path / "run", "--dry-run"]
    assert s2d(*stored).result["cache_bytes"] == 0
    assert s2d(*stored, "--eval-problems", few).result["cache_bytes"] > 0


def test_the_total_is_what_is_always_there_and_the_larger_phase(toy):
    always = ("weights_bytes", "masters_bytes", "optimizer_bytes", "frozen_bytes")
    updating = ("gradients_bytes", "casts_bytes", "activations_bytes", "logits_bytes")
    for tokens in (1, 10**7):
        planned = plan(toy / "teacher", sample_tokens=tokens)
        phases = sum(planned[name] for name in updating), planned["cache_bytes"]
        assert planned["total_bytes"] == sum(planned[name] for name in always) + max(phases)


def test_a_dry_run_needs_no_weights_and_plans_the_same_without_them(s2d, toy, few, tmp_path):
    for role in ("teacher", "student"):
        shutil.copytree(toy / role, tmp_path / role, ignore=shutil.ignore_patterns("*.safetensors"))
    common = [few, "--max-tokens", 4, "-o", tmp_path / "run"]
    plans = [s2d("opd", "--teacher", at / "teacher", "--student", at / "student", *common, "--dry-run").result for at in (toy, tmp_path)]
    assert {**plans[0], "available_bytes": 0} == {**plans[1], "available_bytes": 0}
    done = s2d("opd", "--teacher", toy / "teacher", "--student", tmp_path / "student", *common)
    assert done.code == 1
    assert "holds no *.safetensors" in done.err
    (tmp_path / "student" / "pytorch_model.bin").touch()
    assert s2d("opd", "--teacher", toy / "teacher", "--student", tmp_path / "student", *common, "--dry-run").code == 1
