"""`s2d grpo` through the command line."""

import json

import pytest
import torch
from conftest import read_jsonl, write_jsonl

SHORT = ["--steps", 2, "--problems-per-step", 4, "-n", 4, "--max-tokens", 16, "--lr", "1e-3", "--adam-beta2", 0.95]


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def train(s2d, toy, out, *more, model=None):
    """Train on toy problems, graded by equal text unless another reward is given: sympy takes seconds to start."""
    graded = [] if "--reward" in more else ["--reward", "exact", "--workers", 1]
    result = s2d("grpo", "--model", model or toy / "teacher", toy / "problems" / "1H.jsonl", "-o", out, *SHORT, *graded, *more)
    assert result.code == 0, result.err
    return result.result


@pytest.fixture(scope="module")
def trained(s2d, toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("grpo") / "run"
    more = [
        "--eval-problems",
        toy / "problems" / "validation.jsonl",
        "--eval-every",
        1,
        "--eval-samples",
        1,
        "--keep-rollouts",
        "--save-every",
        1,
    ]
    return out, train(s2d, toy, out, *more)


def test_run_folder_and_closing_line(trained):
    out, result = trained
    assert {path.name for path in out.iterdir()} == {
        "s2d.json",
        "problems.jsonl",
        "metrics.jsonl",
        "evals.jsonl",
        "latest",
        "rollouts",
        "step-000001",
        "step-000002",
    }
    assert (out / "latest").read_text() == "step-000002\n"
    assert result["checkpoint"] == str(out / "step-000002")
    manifest = json.loads((out / "s2d.json").read_text())
    assert manifest["complete"] is True
    assert manifest["command"] == "grpo"
    assert manifest["options"]["lr"] == 1e-3
    assert manifest["parents"][0]["weights_sha256"]
    rows = read_jsonl(out / "metrics.jsonl")
    tokens, seconds = (sum(row[name] for row in rows) for name in ("tokens", "seconds"))
    assert manifest["counts"] == {"steps": 2, "updates": 2, "rollouts": 32, "tokens": tokens, "seconds": pytest.approx(seconds)}
    kept = [record for step in (1, 2) for record in read_jsonl(out / "rollouts" / f"step-{step:06d}.jsonl")]
    assert manifest["labels"] == sorted({record["problem_sha256"] for record in kept})


def test_metrics_hold_the_contracts_fields(trained):
    rows = read_jsonl(trained[0] / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert list(row) == list(rows[0])
        assert {
            "loss",
            "lr",
            "grad_norm",
            "seconds",
            "tokens",
            "reward",
            "mixed_groups",
            "kl",
            "entropy",
            "clip_fraction",
            "padding",
        } <= row.keys()
        assert row["logprob_mismatch"] < 1e-5
        assert row["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert row["rollouts"] == 16
    assert [row["labels"] for row in rows] == [4, 8]


def test_metrics_agree_with_the_kept_rollouts(trained):
    out, _ = trained
    for row in read_jsonl(out / "metrics.jsonl"):
        kept = read_jsonl(out / "rollouts" / f"step-{row['step']:06d}.jsonl")
        assert row["reward"] == pytest.approx(sum(record["reward"] for record in kept) / 16)
        assert row["mean_tokens"] == pytest.approx(sum(len(record["completion_ids"]) for record in kept) / 16)
        assert all(record["group_id"] == f"{record['problem_id']}@{row['step']}" for record in kept)


def test_evaluations_stand_before_the_first_and_after_every_step(trained):
    rows = read_jsonl(trained[0] / "evals.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["problems"] == 200 and 0 <= row["avg_at_k"] <= 1 for row in rows)


def test_checkpoint_loads_in_plain_transformers_with_the_same_tokenizer(trained, toy):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    step = trained[0] / "step-000002"
    model = AutoModelForCausalLM.from_pretrained(step)
    assert model.dtype == torch.float32
    ids = AutoTokenizer.from_pretrained(step).apply_chat_template(
        [{"role": "user", "content": "7-1-5-6+4-5="}], add_generation_prompt=True
    )["input_ids"]
    assert len(ids) == 14
    assert model.generate(torch.tensor([ids]), max_new_tokens=4).shape[1] > 14
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (step / name).read_bytes() == (toy / "teacher" / name).read_bytes()
    assert (step / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_parameters_move_even_at_the_papers_learning_rate_on_bfloat16(s2d, toy, tmp_path):
    before = weights(toy / "teacher")
    train(s2d, toy, tmp_path / "run", "--dtype", "bfloat16", "--lr", "1e-6")
    after = weights(tmp_path / "run" / "step-000002")
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_checkpoints_keep_the_parents_dtype(s2d, toy, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(toy / "student", dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(toy / "student").save_pretrained(half)
    train(s2d, toy, tmp_path / "run", model=half)
    saved = weights(tmp_path / "run" / "step-000002")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in saved  # tied: saved once
    assert json.loads((tmp_path / "run" / "step-000002" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_same_command_gives_the_same_weights(s2d, toy, tmp_path):
    train(s2d, toy, tmp_path / "a")
    train(s2d, toy, tmp_path / "b", "--tokens-per-batch", 100000)
    assert (tmp_path / "a" / "step-000002" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "step-000002" / "model.safetensors"
    ).read_bytes()


def test_mini_batches_make_several_updates_from_old_log_probs(s2d, toy, tmp_path):
    train(s2d, toy, tmp_path / "run", "--mini-batch-size", 4)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(row["updates"] > 1 for row in rows)
    assert all(abs(row["ratio"] - 1.0) > 1e-7 for row in rows)  # the policy has moved between the updates


def test_reference_kl_starts_at_zero_and_grows(s2d, toy, tmp_path):
    train(s2d, toy, tmp_path / "run", "--kl-coef", "5e-4")
    first, second = (row["kl"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert first == pytest.approx(0.0, abs=1e-9)
    assert second > 1e-6


@pytest.fixture(scope="module")
def graded(s2d, toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graded")
    rolled = s2d("rollout", "-m", toy / "teacher", toy / "problems" / "validation.jsonl", "-n", 4, "--max-tokens", 16)
    verified = s2d("verify", "-", "-o", folder / "graded.jsonl", stdin=rolled.out)
    assert verified.code == 0, verified.err
    return folder / "graded.jsonl"


def test_one_pass_over_graded_rollouts_from_disk(s2d, toy, graded, tmp_path):
    result = s2d("grpo", "-m", toy / "teacher", "--rollouts", graded, "-o", tmp_path / "run", "--lr", "1e-4", "--problems-per-step", 64)
    assert result.code == 0, result.err
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["rollouts"] for row in rows] == [256, 256, 256, 32]
    assert rows[0]["logprob_mismatch"] < 1e-5
    assert rows[-1]["labels"] == 200


def test_rollouts_of_another_temperature_or_without_rewards_are_refused(s2d, toy, graded, tmp_path):
    wrong = s2d("grpo", "-m", toy / "teacher", "--rollouts", graded, "-o", tmp_path / "run", "--temperature", 0.6)
    assert wrong.code == 1
    assert "graded.jsonl:1: sampled at temperature 1.0" in wrong.err
    rows = [{key: value for key, value in row.items() if key != "reward"} for row in read_jsonl(graded)]
    bare = s2d("grpo", "-m", toy / "teacher", "--rollouts", write_jsonl(tmp_path / "bare.jsonl", rows), "-o", tmp_path / "run")
    assert bare.code == 1
    assert "s2d verify" in bare.err
    assert not (tmp_path / "run").exists()


def test_a_step_without_signal_makes_no_update_and_says_so(s2d, toy, graded, tmp_path):
    rows = [{**row, "reward": 1.0} for row in read_jsonl(graded)[:16]]
    result = s2d(
        "grpo", "-m", toy / "teacher", "--rollouts", write_jsonl(tmp_path / "flat.jsonl", rows), "-o", tmp_path / "run", "--lr", "1e-2"
    )
    assert result.code == 0, result.err
    assert "no update was made" in result.err
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert (row["updates"], row["tokens"], row["mixed_groups"]) == (0, 0, 0.0)
    unmeasured = ("loss", "grad_norm", "trained_entropy", "ratio", "clip_fraction", "logprob_mismatch")
    assert [row[name] for name in unmeasured] == [None] * len(unmeasured)
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(tmp_path / "run" / "step-000001").values(), weights(toy / "teacher").values(), strict=True)
    )


def test_null_rewards_change_nothing(s2d, toy, graded, tmp_path):
    rows = read_jsonl(graded)[:32]
    extra = [{**row, "sample_index": 99, "reward": None} for row in rows[::4]]
    mixed = sorted([*rows, *extra], key=lambda row: row["problem_id"])
    for name, content in (("plain", rows), ("nulls", mixed)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", content)
        assert (
            s2d("grpo", "-m", toy / "teacher", "--rollouts", path, "-o", tmp_path / name, "--lr", "1e-3", "--aggregate", "token").code == 0
        )
    plain, nulls = weights(tmp_path / "plain" / "step-000001"), weights(tmp_path / "nulls" / "step-000001")
    assert read_jsonl(tmp_path / "nulls" / "metrics.jsonl")[0]["ungraded"] == 8
    assert all(torch.equal(plain[name], nulls[name]) for name in plain)


def test_dry_run_loads_no_weights_and_writes_nothing(s2d, toy, tmp_path):
    result = s2d(
        "grpo",
        "-m",
        toy / "teacher",
        toy / "problems" / "1H.jsonl",
        "-o",
        tmp_path / "run",
        "--dry-run",
        "--epochs",
        10,
        "--max-tokens",
        16,
    )
    assert result.result["steps"] == 160
    assert result.result["parameters"] == 109056
    assert result.result["rollouts"] == 160 * 32 * 8
    assert not (tmp_path / "run").exists()


def test_refusals(s2d, toy, few, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("do not delete")
    for more in ([], ["--overwrite"]):
        result = s2d("grpo", "-m", toy / "teacher", few, "-o", full, *more)
        assert result.code == 2
        assert (full / "thesis.tex").exists()
    unlabelled = write_jsonl(tmp_path / "unlabelled.jsonl", [{**row, "answer": ""} for row in read_jsonl(few)])
    result = s2d("grpo", "-m", toy / "teacher", unlabelled, "-o", tmp_path / "run")
    assert result.code == 1
    assert "8 of 8 problems have no answer" in result.err
    assert s2d("grpo", "-m", toy / "teacher", few, "--rollouts", few, "-o", tmp_path / "run").code == 2


def test_overwrite_replaces_a_run(s2d, toy, tmp_path):
    train(s2d, toy, tmp_path / "run")
    (tmp_path / "run" / "step-000099").mkdir()
    train(s2d, toy, tmp_path / "run", "--overwrite")
    assert not (tmp_path / "run" / "step-000099").exists()


def test_an_exploding_gradient_stops_the_run_and_names_the_step(s2d, toy, graded, tmp_path):
    rows = [{**row, "completion_logprobs": [-3e38] * len(row["completion_ids"])} for row in read_jsonl(graded)[:16]]
    result = s2d("grpo", "-m", toy / "teacher", "--rollouts", write_jsonl(tmp_path / "bad.jsonl", rows), "-o", tmp_path / "run")
    assert result.code == 1
    assert "the gradient of step 1 is not finite" in result.err


PRESETS = {
    "grpo": {
        "aggregate": "sequence",
        "advantage": "group-std",
        "importance": "token",
        "surrogate": "ppo",
        "clip_low": 0.2,
        "clip_high": 0.2,
    },
    "dr-grpo": {"aggregate": "constant", "advantage": "group-mean", "importance": "token", "clip_high": 0.2},
    "dapo": {"aggregate": "token", "advantage": "group-std", "clip_low": 0.2, "clip_high": 0.28},
    "gspo": {"aggregate": "sequence", "importance": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"aggregate": "token", "surrogate": "cispo", "clip_high": 4.0},
}


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_set_the_knobs_that_are_not_given(s2d, toy, tmp_path, preset):
    train(s2d, toy, tmp_path / "run", "--loss", preset, "--mini-batch-size", 8, "--clip-low", 0.125)
    used = json.loads((tmp_path / "run" / "s2d.json").read_text())["options"]
    assert {name: used[name] for name in PRESETS[preset]} == {
        **PRESETS[preset],
        **({"clip_low": 0.125} if "clip_low" in PRESETS[preset] else {}),
    }
    assert all(row["updates"] == 2 for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"))


def test_flat_groups_are_replaced_by_further_problems(s2d, toy, tmp_path):
    result = train(s2d, toy, tmp_path / "run", "--dynamic-sampling", 8, "--keep-rollouts", "--problems-per-step", 8)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(row["mixed_groups"] == 1.0 and row["rollouts"] == 32 for row in rows)
    assert sum(row["resampled_groups"] for row in rows) > 0
    assert 16 < result["labels"] <= 16 + sum(row["resampled_groups"] for row in rows)  # the dropped groups' labels are spent too
    for row in rows:
        kept = read_jsonl(tmp_path / "run" / "rollouts" / f"step-{row['step']:06d}.jsonl")
        assert len({record["group_id"] for record in kept}) == 8


def test_truncated_completions_are_masked_or_punished(s2d, toy, tmp_path):
    short = ["--max-tokens", 12, "--keep-rollouts", "--lr", "1e-3"]
    trained = {}
    for how in ("keep", "mask", "penalty"):
        buffer = ["--overlong-buffer", 4] if how == "penalty" else []
        train(s2d, toy, tmp_path / how, *short, "--truncated", how, *buffer)
        trained[how] = read_jsonl(tmp_path / how / "metrics.jsonl")[0]
    assert trained["keep"]["truncated"] > 0
    assert len({row["reward"] for row in trained.values()}) == 1  # the raw reward is never overwritten
    assert len({row["grad_norm"] for row in trained.values()}) == 3


def test_kl_in_the_reward_and_its_estimators(s2d, toy, tmp_path):
    for estimator in ("k1", "k2", "k3"):
        train(s2d, toy, tmp_path / estimator, "--kl-coef", 0.1, "--kl-in", "reward", "--kl-estimator", estimator)
        first, second = (row["kl"] for row in read_jsonl(tmp_path / estimator / "metrics.jsonl"))
        assert first == pytest.approx(0.0, abs=1e-6)
        assert abs(second) > 1e-6


def test_correction_by_a_sampler_that_equals_the_trainer_changes_nothing(s2d, toy, tmp_path):
    more = {"plain": [], "truncate": ["--correction", "truncate"], "mask": ["--correction", "mask", "--correction-level", "sequence-mean"]}
    for name, arguments in more.items():
        train(s2d, toy, tmp_path / name, *arguments)
    norms = [read_jsonl(tmp_path / name / "metrics.jsonl")[0]["grad_norm"] for name in more]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_rewards_of_the_users_own(s2d, toy, tmp_path):
    (tmp_path / "mine.py").write_text("def short(completion, answer, record):\n    return 1.0 / len(completion)\n")
    arguments = [
        "grpo",
        "-m",
        toy / "student",
        toy / "problems" / "1H.jsonl",
        "-o",
        tmp_path / "run",
        *SHORT,
        "--reward",
        "python:mine:short",
    ]
    result = s2d(*arguments, cwd=tmp_path)
    assert result.code == 0, result.err
    assert 0.0 < result.result["reward"] < 1.0


def test_a_constant_reward_without_a_baseline_lowers_what_was_sampled(s2d, toy, tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "mine.py").write_text("def minus_one(completion, answer, record):\n    return -1.0\n")
    run = tmp_path / "run"
    arguments = ["grpo", "-m", toy / "student", toy / "problems" / "1H.jsonl", "-o", run, *SHORT, "--steps", 1, "--keep-rollouts"]
    arguments += ["--reward", "python:mine:minus_one", "--aggregate", "token", "-n", 1]
    assert "groups of one" in s2d(*arguments, cwd=tmp_path).err
    arguments += ["--advantage", "reward"]
    assert "--dynamic-sampling requires --advantage" in s2d(*arguments, "--dynamic-sampling", 1, cwd=tmp_path).err
    result = s2d(*arguments, cwd=tmp_path).result
    assert (result["updates"], result["reward"], result["mixed_groups"]) == (1, -1.0, 0.0)
    assert result["loss"] == pytest.approx(1.0)  # weights add up to 1, each ratio is 1, each advantage -1

    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (toy / "student", run / "step-000001"))
    fell = []
    for row in read_jsonl(run / "rollouts" / "step-000001.jsonl"):
        ids, start = torch.tensor([row["prompt_ids"] + row["completion_ids"]]), len(row["prompt_ids"])
        with torch.no_grad():
            old, new = (model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1) for model in (before, after))
        fell += (new - old).gather(1, ids[0, start:, None]).flatten().tolist()
    assert sum(fell) < -1.0  # nats


def test_a_run_never_deletes_what_it_reads(s2d, toy, tmp_path):
    train(s2d, toy, tmp_path / "run")
    problems = tmp_path / "run" / "mine.jsonl"
    problems.write_bytes((toy / "problems" / "1H.jsonl").read_bytes())
    for arguments in (["-m", tmp_path / "run", toy / "problems" / "1H.jsonl"], ["-m", toy / "teacher", problems]):
        result = s2d("grpo", *arguments, "-o", tmp_path / "run", "--overwrite", *SHORT)
        assert result.code == 2
        assert "which --overwrite would delete" in result.err
        assert (tmp_path / "run" / "step-000002" / "model.safetensors").exists()


def test_no_usable_row_and_kl_in_the_reward_is_no_crash(s2d, toy, tmp_path):
    more = ["--max-tokens", 2, "--truncated", "mask", "--kl-coef", 0.1, "--kl-in", "reward"]
    result = s2d("grpo", "-m", toy / "teacher", toy / "problems" / "1H.jsonl", "-o", tmp_path / "run", *SHORT, *more)
    assert result.code == 0, result.err
    assert result.result["updates"] == 0


def test_reference_kl_is_zero_before_the_first_update_in_bfloat16_too(s2d, toy, tmp_path):
    train(s2d, toy, tmp_path / "run", "--kl-coef", 0.1, "--dtype", "bfloat16")
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]["kl"] == pytest.approx(0.0, abs=1e-9)


def test_masked_rows_leave_the_baseline(s2d, toy, graded, tmp_path):
    rows = [{**row, "finish_reason": "stop"} for row in read_jsonl(graded)[:32]]
    extra = [{**row, "sample_index": 99, "reward": 0.0, "finish_reason": "length"} for row in rows[::4]]
    mixed = sorted([*rows, *extra], key=lambda row: row["problem_id"])
    for name, content in (("plain", rows), ("masked", mixed)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", content)
        arguments = ["--rollouts", path, "-o", tmp_path / name, "--lr", "1e-3", "--aggregate", "token", "--truncated", "mask"]
        assert s2d("grpo", "-m", toy / "teacher", *arguments).code == 0
    plain, masked = weights(tmp_path / "plain" / "step-000001"), weights(tmp_path / "masked" / "step-000001")
    assert all(torch.equal(plain[name], masked[name]) for name in plain)


def test_stored_rollouts_of_another_tokenizer_are_refused(s2d, toy, graded, tmp_path):
    rows = read_jsonl(graded)[:4]
    swapped = [{**row, "completion_ids": [token - 1 if token > 10 else token for token in row["completion_ids"]]} for row in rows]
    beyond = [rows[0], {**rows[1], "prompt_ids": [400]}]
    for name, content, message in (("swapped", swapped, "another tokenizer"), ("beyond", beyond, "does not know")):
        path = write_jsonl(tmp_path / f"{name}.jsonl", content)
        result = s2d("grpo", "-m", toy / "teacher", "--rollouts", path, "-o", tmp_path / "run")
        assert result.code == 1
        assert message in result.err


def test_groups_that_are_resampled_groups_stay_groups_of_their_own(s2d, toy, graded, tmp_path):
    path = write_jsonl(tmp_path / "one.jsonl", read_jsonl(graded)[:8])
    more = ["--rollouts", path, "--steps", 1, "--problems-per-step", 8, "--keep-rollouts"]
    assert s2d("grpo", "-m", toy / "teacher", "-o", tmp_path / "run", *more).code == 0
    kept = tmp_path / "run" / "rollouts" / "step-000001.jsonl"
    assert s2d("eval", "--rollouts", kept).code == 0
    assert len({row["group_id"] for row in read_jsonl(kept)}) == 8


def test_kept_rollouts_say_whose_weights_drew_them(trained, toy):
    first, second = (read_jsonl(trained[0] / "rollouts" / f"step-00000{step}.jsonl")[0]["sampler"] for step in (1, 2))
    assert (first["model"], first["step"], len(first["checkpoint"])) == (str(toy / "teacher"), 0, 64)
    assert (second["model"], second["step"], second["checkpoint"]) == (str(trained[0]), 1, "")


def test_options_that_would_be_ignored_are_refused(s2d, toy, few, graded, tmp_path):
    for option in (["-n", 4], ["--dynamic-sampling", 1], ["--reward", "exact"], ["--max-tokens", 8]):
        result = s2d("grpo", "-m", toy / "teacher", "--rollouts", graded, "-o", tmp_path / "run", *option)
        assert result.code == 2
        assert f"{option[0]} applies to sampling" in result.err
    alone = s2d("grpo", "-m", toy / "teacher", few, "-o", tmp_path / "run", "-n", 1)
    assert alone.code == 2
    assert "groups of one" in alone.err


def test_rollouts_of_several_length_limits_are_refused(s2d, toy, graded, tmp_path):
    rows = read_jsonl(graded)[:8]
    rows[-1]["sampler"]["max_tokens"] = 12
    result = s2d("grpo", "-m", toy / "teacher", "--rollouts", write_jsonl(tmp_path / "two.jsonl", rows), "-o", tmp_path / "run")
    assert result.code == 1
    assert "two.jsonl: sampled with several --max-tokens: 12, 16" in result.err


def test_k1_in_the_loss_is_refused(s2d, toy, few, tmp_path):
    result = s2d("grpo", "-m", toy / "teacher", few, "-o", tmp_path / "run", "--kl-coef", 0.1, "--kl-estimator", "k1")
    assert result.code == 2
    assert "expected gradient of zero" in result.err


def test_kl_in_the_reward_makes_no_signal_of_rounding(s2d, toy, graded, tmp_path):
    """Before the first update policy and reference are one, whatever the sampler's rounding: flat groups teach nothing."""
    rows = [
        {**row, "reward": 1.0, "completion_logprobs": [value - 1e-3 * number for value in row["completion_logprobs"]]}
        for number, row in enumerate(read_jsonl(graded)[:32])
    ]
    more = ["--kl-coef", 0.5, "--kl-in", "reward", "--rollouts", write_jsonl(tmp_path / "flat.jsonl", rows)]
    result = s2d("grpo", "-m", toy / "teacher", "-o", tmp_path / "run", *more)
    assert result.code == 0, result.err
    assert result.result["updates"] == 0
    assert result.result["kl"] == pytest.approx(0.0, abs=1e-9)


def test_the_mismatch_is_the_samplers_alone_and_entropy_is_that_of_all_tokens(s2d, toy, tmp_path):
    """Whatever the policy does between the updates of a step, and whichever groups are trained on."""
    from transformers import AutoModelForCausalLM

    result = train(s2d, toy, tmp_path / "run", "--mini-batch-size", 4, "--steps", 1, "--keep-rollouts", "--lr", "1e-2")
    assert result["updates"] > 1
    assert abs(result["ratio"] - 1.0) > 1e-3  # the policy has moved
    assert result["logprob_mismatch"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(toy / "teacher")
    exact, tokens = 0.0, 0
    for row in read_jsonl(tmp_path / "run" / "rollouts" / "step-000001.jsonl"):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["prompt_ids"] + row["completion_ids"]])).logits[0, len(row["prompt_ids"]) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        exact -= (logprobs.exp() * logprobs).sum().item()
        tokens += len(row["completion_ids"])
    # an estimate from some 150 tokens, whose -log p has a standard deviation of about 0.9
    assert result["entropy"] == pytest.approx(exact / tokens, abs=4 * 0.9 / tokens**0.5)
    assert result["trained_entropy"] > 0


REWARDS = """
def half(completion, answer, record):
    if record["sample_index"] % 2:
        raise KeyError("gold")
    return float(len(completion) % 2)

def broken(completion):
    return 1.0
"""


def test_failures_of_a_reward_are_counted_and_told(s2d, toy, tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    arguments = ["grpo", "-m", toy / "student", toy / "problems" / "1H.jsonl", "-o", tmp_path / "run", *SHORT]
    result = s2d(*arguments, "--reward", "python:mine:half", cwd=tmp_path)
    assert result.code == 0, result.err
    assert [row["grader_errors"]["failed"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [8, 8]
    assert "step 1: rewards of 8 of 16 rollouts failed (8 failed), the first: python:mine:half raised KeyError: 'gold'" in result.err


def test_a_reward_that_always_fails_stops_the_run(s2d, toy, tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    arguments = ["grpo", "-m", toy / "student", toy / "problems" / "1H.jsonl", "-o", tmp_path / "run", *SHORT]
    for more, message in ([], "the rewards of all 16 rollouts of step 1 failed"), (["--dry-run"], "fails on a made-up rollout"):
        result = s2d(*arguments, "--reward", "python:mine:broken", *more, cwd=tmp_path)
        assert result.code in (1, 2)
        assert message in result.err
        assert "TypeError" in result.err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("save_dtype", "lost"), [("auto", 1.0), ("float32", 0.0)])
def test_small_updates_of_a_bfloat16_parent_are_told_or_kept(s2d, toy, tmp_path, save_dtype, lost):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(toy / "teacher", dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(toy / "teacher").save_pretrained(half)
    more = ["--lr", "1e-6", "--save-dtype", save_dtype, "--eval-problems", toy / "problems" / "validation.jsonl", "--eval-samples", 1]
    result = s2d("grpo", "-m", half, toy / "problems" / "1H.jsonl", "-o", tmp_path / "run", *SHORT, *more)
    assert result.code == 0, result.err
    saved = json.loads((tmp_path / "run" / "step-000002" / "s2d.json").read_text())["saved"]
    assert saved["rounding_loss"] == pytest.approx(lost, abs=0.2)
    assert saved["kl"] < 1e-4
    assert ("--save-dtype float32 keeps it" in result.err) is (lost == 1.0)
    before, after = weights(half), weights(tmp_path / "run" / "step-000002")
    unchanged = sum((after[name].float() == before[name].float()).sum().item() for name in before)
    assert (unchanged > 0.9 * 109056) is (lost == 1.0)
    assert {row["weights"] for row in read_jsonl(tmp_path / "run" / "evals.jsonl")} == {"live"}
