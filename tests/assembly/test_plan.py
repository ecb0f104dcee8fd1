"""The memory that `--dry-run` announces against the memory that an update takes."""

import shutil
from dataclasses import replace

import pytest
import torch
from memory import peak_bytes
from tiny import training_row

from s2dcli.assembly.loading import load_trained
from s2dcli.assembly.plan import Processes, memory_plan
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


def plan(folder, loading=LOADING, frozen=(), sample_tokens: int = 1, processes=Processes(), **changed) -> dict[str, int]:
    return memory_plan(resolve(str(folder)), frozen, loading, options(**changed), sample_tokens=sample_tokens, processes=processes)


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


ALWAYS = ("weights_bytes", "masters_bytes", "optimizer_bytes", "frozen_bytes")


@pytest.mark.parametrize("changed", [{}, {"weights": Weights.bfloat16}, {"lora_rank": 8}], ids=["float32", "bfloat16", "lora"])
def test_of_several_processes_each_holds_a_part_with_fsdp2_and_all_with_ddp(toy, changed):
    parent, other = resolve(str(toy / "teacher")), resolve(str(toy / "student"))
    one = plan(parent.folder, frozen=[other], **changed)
    assert plan(parent.folder, frozen=[other], processes=Processes(8), **changed) == one
    for number in (2, 8):
        part = plan(parent.folder, frozen=[other], processes=Processes(number, sharded=True), **changed)
        whole = {name: one[name] for name in (*ALWAYS, "gradients_bytes")}
        if changed.get("weights"):
            whole["weights_bytes"] = 0  # its parts are float32: the masters
        for name, size in whole.items():  # rows that do not come out even make parts a little larger
            assert size / number <= part[name] <= 1.1 * size / number + 64
        assert part["gathered_bytes"] > 0 < part["replica_bytes"]
        assert part["parameters"] == one["parameters"]
        phases = [sum(part[f"{name}_bytes"] for name in names) for names in (UPDATING, SAMPLING)]
        assert part["total_bytes"] == sum(part[name] for name in ALWAYS) + max(phases)


UPDATING, SAMPLING = ("gradients", "casts", "gathered", "activations", "logits"), ("cache", "replica", "sampler")


def test_what_fsdp2_gathers_by_hand(toy):
    """Width 64, 2 layers, a tied vocabulary of 33: the weights around the layers are the embedding and the last norm."""
    parent, sharded = resolve(str(toy / "teacher")), Processes(2, sharded=True)
    around = 33 * 64 + 64
    layer = (109056 - around) // 2
    gathered = plan(parent.folder, processes=sharded)["gathered_bytes"]
    assert gathered == 4 * (around + 2 * layer) + 8 * layer + 4 * 33 * 64
    narrow = plan(parent.folder, weights=Weights.bfloat16, frozen=[parent], processes=sharded)["gathered_bytes"]
    assert narrow == 2 * (2 * around + 2 * layer) + 6 * layer + 4 * 33 * 64
    kept = Processes(2, sharded=True, reshards=False)
    assert plan(parent.folder, lora_rank=2, processes=kept)["gathered_bytes"] > 4 * 109056


def test_a_row_beyond_the_budget_is_a_micro_batch_and_a_cache_of_its_own(s2d, toy, few, tmp_path):
    common = [
        "opd",
        "--teacher",
        toy / "teacher",
        "--student",
        toy / "student",
        few,
        "-o",
        tmp_path / "run",
        "--dry-run",
        "--max-tokens",
        48,
    ]
    large, small, tiny = (s2d(*common, "--tokens-per-batch", tokens).result for tokens in (120, 60, 1))
    assert 48 < small["row_tokens_at_most"] < 64
    assert large["activations_bytes"] > small["activations_bytes"] == small["row_tokens_at_most"] * large["activations_bytes"] // 120
    assert tiny["activations_bytes"] == small["activations_bytes"]
    short = s2d(*common, "--tokens-per-batch", 1, "--loss-tokens", 8).result
    assert short["row_tokens_at_most"] == small["row_tokens_at_most"] - 40
    caches = [s2d(*common, "--sample-tokens", tokens).result["cache_bytes"] for tokens in (1, small["row_tokens_at_most"])]
    assert caches[0] == caches[1] > 0


def test_a_plan_for_processes_and_a_gpu_that_are_not_here(s2d, toy, few, tmp_path):
    common = ["grpo", "-m", toy / "teacher", few, "--max-tokens", 16, "--kl-coef", 0.1, "-o", tmp_path / "run"]
    plans = {
        kind: s2d(*common, "--dry-run", "--device", "cuda", "--engine", "transformers", "--processes", 4, "--sharding", kind).result
        for kind in ("fsdp2", "ddp")
    }
    one = s2d(*common, "--dry-run").result
    assert [plans[kind]["sharded"] for kind in plans] == [True, False]
    assert plans["fsdp2"]["weights_bytes"] < 0.3 * plans["ddp"]["weights_bytes"] == 0.3 * one["weights_bytes"]
    assert plans["ddp"]["casts_bytes"] == 2 * one["parameters"]  # bfloat16, as on a GPU
    assert plans["ddp"]["step_tokens_at_most"] == one["step_tokens_at_most"] / 4
    if not torch.cuda.is_available():
        assert plans["ddp"]["available_bytes"] is None
    assert one["available_bytes"] > 0
    for more, message in (
        (["--processes", 4], "--processes says how many a plan is for, and requires --dry-run"),
        (["--dry-run", "--sharding", "ddp"], "--sharding requires --processes"),
        (["--dry-run", "--processes", 4, "--optimizer", "adamw-8bit"], "which FSDP2 would cut"),
        (["--dry-run", "--processes", 4, "--engine", "vllm", "--tensor-parallel-size", 2], "each of the 4 processes has one GPU"),
    ):
        result = s2d(*common, *more)
        assert (result.code, message in result.err) == (2, True), result.err
    assert not (tmp_path / "run").exists()


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
