"""The options that save memory, on every trainer through the command line."""

import json

import pytest
import torch
from conftest import read_jsonl

TRAINERS = ["grpo", "opd", "fkl-warmup"]
SHORT = ["--steps", 2, "--lr", "1e-3"]


@pytest.fixture(scope="module")
def rollouts(s2d, toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    result = s2d("rollout", "-m", toy / "teacher", toy / "problems" / "validation.jsonl", "-n", 1, "--max-tokens", 16, "-o", path)
    assert result.code == 0, result.err
    return path


@pytest.fixture(scope="module")
def train(s2d, toy, rollouts):
    """Run a short training of any trainer, of `teacher` and `student` of the toy family by default; returns its result."""
    sampling = [toy / "problems" / "1H.jsonl", "--problems-per-step", 4, "-n", 4, "--max-tokens", 16]
    commands = {
        "grpo": ["grpo", "--model", toy / "teacher", *sampling, "--reward", "exact", "--workers", 1],
        "opd": ["opd", *sampling],
        "fkl-warmup": ["fkl-warmup", "--rollouts", rollouts],
    }

    def run(trainer, out, *more, teacher="teacher", student="student"):
        pair = [] if trainer == "grpo" else ["--teacher", toy / teacher, "--student", toy / student]
        return s2d(*commands[trainer], *pair, "-o", out, *SHORT, *more)

    return run


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def parent(toy, trainer) -> dict[str, torch.Tensor]:
    return weights(toy / ("teacher" if trainer == "grpo" else "student"))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_bfloat16_weights_move_at_1e_6_as_float32_ones_do(train, toy, tmp_path, trainer):
    moved = {}
    for kind in ("float32", "bfloat16"):
        result = train(trainer, tmp_path / kind, "--weights", kind, "--lr", "1e-6", "--steps", 3)
        assert result.code == 0, result.err
        assert json.loads((tmp_path / kind / "s2d.json").read_text())["options"]["weights"] == kind
        saved, before = weights(tmp_path / kind / "step-000003"), parent(toy, trainer)
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}  # the masters, in the type of the parent
        moved[kind] = torch.cat([(saved[name].double() - before[name]).flatten() for name in before])
    assert (moved["bfloat16"] != 0).double().mean() > 0.9
    assert moved["bfloat16"].abs().max() < 4e-6
    assert torch.nn.functional.cosine_similarity(moved["float32"], moved["bfloat16"], dim=0) > (0.5 if trainer == "grpo" else 0.9)
    rows = read_jsonl(tmp_path / "bfloat16" / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 for row in rows)
    if trainer == "grpo":
        assert all(row["logprob_mismatch"] < 0.05 for row in rows)  # the sampler uses the same rounded weights


def test_the_reference_of_bfloat16_weights_is_rounded_alike(train, tmp_path):
    result = train("grpo", tmp_path / "run", "--weights", "bfloat16", "--kl-coef", "1e-3", "--kl-estimator", "k2")
    assert result.code == 0, result.err
    first, second = (row["kl"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert first == pytest.approx(0.0, abs=1e-6)
    assert second > 1e-6


def test_bfloat16_weights_and_float32_computation_exclude_each_other(train, tmp_path):
    result = train("grpo", tmp_path / "run", "--weights", "bfloat16", "--dtype", "float32")
    assert result.code == 2
    assert "--weights bfloat16 computes in bfloat16" in result.err


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_an_adapter_is_trained_merged_and_kept(train, toy, tmp_path, trainer, kind):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = train(trainer, tmp_path / "run", "--lora-rank", 4, "--lora-alpha", 16, "--weights", kind)
    assert result.code == 0, result.err
    step = tmp_path / "run" / "step-000002"
    before, after = parent(toy, trainer), weights(step)
    assert after.keys() == before.keys()
    changed = {name for name in before if (after[name] - before[name].to(getattr(torch, kind))).abs().max() > 0}
    assert changed == {name for name in before if "_proj" in name}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    options = json.loads((tmp_path / "run" / "s2d.json").read_text())["options"]
    assert (options["lora_rank"], options["lora_alpha"], options["lora_targets"]) == (4, 16.0, None)

    base = AutoModelForCausalLM.from_pretrained(toy / ("teacher" if trainer == "grpo" else "student"))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(step)(ids).logits
        apart = PeftModel.from_pretrained(base, step / "adapter")(ids).logits
    assert (merged - apart).abs().max() < (1e-4 if kind == "float32" else 0.5)
    assert {path.name for path in (step / "adapter").iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (step / "adapter").iterdir())


def test_the_next_command_starts_from_the_merged_weights(s2d, train, few, tmp_path):
    """The sampler of the last step and a sampler of the saved checkpoint agree about the same tokens."""
    result = train("grpo", tmp_path / "run", "--lora-rank", 4, "--keep-rollouts", "--steps", 3)
    assert result.code == 0, result.err
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(row["logprob_mismatch"] < 1e-5 for row in rows)  # sampled and trained with the adapter on
    rolled = s2d("rollout", "-m", tmp_path / "run", few, "-n", 1, "--max-tokens", 8)
    assert rolled.code == 0, rolled.err
    assert {row["sampler"]["step"] for row in rolled.rows} == {3}


def test_the_reference_of_an_adapter_is_the_model_without_it(train, toy, tmp_path):
    """Measured against the parent loaded by transformers: the second step's KL, from the tokens sampled for it."""
    from transformers import AutoModelForCausalLM

    more = ["--lora-rank", 4, "--kl-coef", "1e-3", "--kl-estimator", "k1", "--kl-in", "reward", "--keep-rollouts", "--truncated", "keep"]
    result = train("grpo", tmp_path / "run", *more)
    assert result.code == 0, result.err
    first, second = (row["kl"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert first == pytest.approx(0.0, abs=1e-6)
    model = AutoModelForCausalLM.from_pretrained(toy / "teacher")
    gaps = []
    for row in read_jsonl(tmp_path / "run" / "rollouts" / "step-000002.jsonl"):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
        theirs = logprobs.gather(1, torch.tensor(row["completion_ids"])[:, None])[:, 0]
        gaps += (torch.tensor(row["completion_logprobs"]) - theirs).tolist()
    assert abs(second) > 1e-4
    assert second == pytest.approx(sum(gaps) / len(gaps), abs=2e-5)


def test_adapters_that_are_refused(train, tmp_path):
    for more, message in (
        (["--lora-rank", 4, "--lora-targets", "lm_head"], "'lm_head' is the head"),
        (["--lora-rank", 4, "--lora-targets", "q_porj"], "did you mean 'q_proj'"),
        (["--lora-targets", "q_proj"], "--lora-rank"),
        (["--lora-alpha", 4], "--lora-rank"),
    ):
        result = train("opd", tmp_path / "run", *more)
        assert result.code == 2
        assert message in result.err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], ["--lora-rank", 4], ["--weights", "bfloat16"]], ids=["plain", "lora", "bfloat16"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_gradient_checkpointing_changes_no_result(train, tmp_path, trainer, more):
    norms = []
    for name, arguments in (("kept", []), ("again", ["--gradient-checkpointing"])):
        result = train(trainer, tmp_path / name, *more, *arguments)
        assert result.code == 0, result.err
        norms.append(read_jsonl(tmp_path / name / "metrics.jsonl")[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=2e-2 if "bfloat16" in more else 1e-4)
    assert json.loads((tmp_path / "again" / "s2d.json").read_text())["options"]["gradient_checkpointing"] is True


@pytest.mark.parametrize("trainer", TRAINERS)
def test_dry_run_prints_the_memory_plan(train, tmp_path, trainer):
    plain, small = (
        train(trainer, tmp_path / "run", "--dry-run", *more).result
        for more in ([], ["--gradient-checkpointing", "--weights", "bfloat16", "--lora-rank", 1, "--lora-targets", "q_proj"])
    )
    assert plain["weights_bytes"] == plain["gradients_bytes"] == 4 * plain["parameters"]
    assert plain["frozen_bytes"] == (0 if trainer == "grpo" else 4 * 109056)
    assert (plain["cache_bytes"] > 0) == (trainer != "fkl-warmup")
    assert small["activations_bytes"] < plain["activations_bytes"]
    assert 0 < small["trained_parameters"] < 0.02 * plain["trained_parameters"]
    assert small["total_bytes"] < plain["total_bytes"]
    assert not (tmp_path / "run").exists()


def test_dry_run_refuses_what_the_run_would_refuse(train, tmp_path):
    for more in (["--lora-rank", 4, "--lora-targets", "q_porj"], ["--weights", "bfloat16", "--dtype", "float32"]):
        assert train("opd", tmp_path / "run", "--dry-run", *more).code == 2


@pytest.mark.parametrize("more", [[], ["--weights", "bfloat16"], ["--lora-rank", 8]], ids=["plain", "bfloat16", "lora"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_8_bit_moments_train_as_float32_ones_do(train, toy, tmp_path, trainer, more):
    pair = {"teacher": "student", "student": "teacher"}  # the toy student's tensors are so small that their moments stay in float32
    moved, before = {}, weights(toy / "teacher")
    for kind in ("adamw", "adamw-8bit"):
        result = train(trainer, tmp_path / kind, "--optimizer", kind, "--lr", "1e-5", *more, **pair)
        assert result.code == 0, result.err
        saved = weights(tmp_path / kind / "step-000002")
        moved[kind] = torch.cat([(saved[name].double() - before[name]).flatten() for name in before])
    assert moved["adamw-8bit"].norm() > 0
    assert not torch.equal(*moved.values())
    assert torch.nn.functional.cosine_similarity(*moved.values(), dim=0) > 0.8
    assert json.loads((tmp_path / "adamw-8bit" / "s2d.json").read_text())["options"]["optimizer"] == "adamw-8bit"


def test_8_bit_moments_are_part_of_the_plan(train, tmp_path):
    plans = [train("grpo", tmp_path / "run", "--dry-run", "--optimizer", kind).result for kind in ("adamw", "adamw-8bit")]
    assert plans[1]["optimizer_bytes"] < 0.6 * plans[0]["optimizer_bytes"]
