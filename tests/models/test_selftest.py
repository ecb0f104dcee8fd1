"""The self-test at load: what it finds, refuses and says, what pairs of models share, and how long rows may be."""

import json
import shutil

import pytest
import torch
from families import MAX_POSITIONS, family
from tiny import VOCABULARY, tiny

from s2dcli.engines.base import Request, SamplingParams
from s2dcli.engines.transformers import TransformersEngine
from s2dcli.errors import ModelError, UsageError
from s2dcli.models.batching import Row, micro_batches
from s2dcli.models.policy import Policy
from s2dcli.models.selftest import FastPaths, fast_paths, max_length, require_rows_fit, self_test


def test_the_fast_paths_of_a_pair_are_those_of_both():
    student, teacher = fast_paths(tiny("qwen3")), fast_paths(tiny("gemma2"))
    assert student == FastPaths(left_padding=True, cache=True, share_prompts=True, pack=False)
    assert student & teacher == teacher & student == FastPaths(left_padding=True, cache=True, share_prompts=False, pack=False)


def test_a_pair_with_a_sliding_window_teacher_gets_the_teachers_own_states():
    """Prompts shared because the student can give the teacher's window padding to count."""
    teacher = Policy(family("mistral+window"), VOCABULARY)
    rows = [Row([3 + index] * (2 + 9 * (index // 2)), [5, 6, 7, 8, 9, 10]) for index in range(4)]
    rows = [Row(rows[index // 2 * 2].prompt_ids, row.completion_ids) for index, row in enumerate(rows)]
    paths = fast_paths(tiny("qwen3")) & fast_paths(teacher.model)
    with torch.no_grad():
        alone = torch.cat([teacher.states(next(micro_batches([row], 999, 0, torch.device("cpu")))) for row in rows])
        (batch,) = micro_batches(rows, 999, 0, torch.device("cpu"), share_prompts=paths.share_prompts, pack=paths.pack)
        order = sorted(range(4), key=lambda place: rows.index(batch.rows[place]))
        parts = teacher.states(batch).split(batch.lengths_B)
        assert (torch.cat([parts[place] for place in order]) - alone).abs().max() < 1e-5
        (shared,) = micro_batches(rows, 999, 0, torch.device("cpu"), share_prompts=fast_paths(tiny("qwen3")).share_prompts)
        parts = teacher.states(shared).split(shared.lengths_B)
        order = sorted(range(4), key=lambda place: rows.index(shared.rows[place]))
        assert (torch.cat([parts[place] for place in order]) - alone).abs().max() > 1e-2


def test_a_model_whose_rows_see_each_other_is_refused():
    model = tiny("llama")
    forward = model.model.forward

    def leaking(input_ids, **rest):
        found = forward(input_ids=input_ids, **rest)
        found.last_hidden_state = found.last_hidden_state + found.last_hidden_state.mean((0, 1)) * (len(input_ids) - 1)
        return found

    model.model.forward = leaking
    with pytest.raises(ModelError, match="odd: rows of different lengths in one batch change each other in LlamaForCausalLM"):
        self_test(model, VOCABULARY, "odd")


def test_weights_that_are_not_finite_are_named(s2d, toy, few, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(toy / "student", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    result = s2d("rollout", "--model", tmp_path / "bad", few, "-n", 1, "--max-tokens", 4)
    assert (result.code, result.out) == (1, b"")
    assert "has weights that are not a finite number: model.layers.1.mlp.up_proj.weight" in result.err


def test_what_was_found_is_said_with_v(s2d, toy, few):
    said = "fast paths of Qwen3ForCausalLM: left padding, cache, share prompts"
    for flag, there in ((["-v"], True), ([], False)):
        result = s2d("rollout", "--model", toy / "student", few, "-n", 1, "--max-tokens", 4, *flag)
        assert (result.code, said in result.err) == (0, there), result.err


def test_prompts_are_batched_by_length_where_left_padding_is_wrong():
    model = family("mamba")
    assert not fast_paths(model).left_padding
    engine = TransformersEngine(model, eos_ids=[2], pad_id=0, vocabulary=VOCABULARY, batch_tokens=64)
    requests = [Request([3] * (1 + index % 3), index) for index in range(12)]
    found = dict(engine.generate(requests, SamplingParams(1.0, 1.0, 0, 5)))
    again = dict(engine.generate(requests[:1], SamplingParams(1.0, 1.0, 0, 5)))
    assert sorted(found) == list(range(12))
    assert found[0].completion_ids == again[0].completion_ids


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt2", MAX_POSITIONS), ("llama", MAX_POSITIONS), ("phi3+longrope", 32), ("llama+dynamic", MAX_POSITIONS), ("opt", MAX_POSITIONS)],
)
def test_the_longest_row(name, expected):
    """Up to it, what stands before does not change with what follows; LongRoPE and dynamic NTK change one token later."""
    model = family(name)
    assert max_length(model.config) == expected
    ids = torch.arange(3, 3 + expected + 1)[None] % VOCABULARY
    with torch.no_grad():
        start = model(input_ids=ids[:, :8], use_cache=False).logits[0]
        assert (model(input_ids=ids[:, :expected], use_cache=False).logits[0, :8] - start).abs().max() < 1e-4
        if "+" in name:
            assert (model(input_ids=ids, use_cache=False).logits[0, :8] - start).abs().max() > 1e-3
    require_rows_fit(model.config, [Row([3] * (expected - 2), [4, 5])], "rollouts.jsonl")
    with pytest.raises(UsageError, match=f"rollouts.jsonl: a row of .* exceeds the {expected} positions"):
        require_rows_fit(model.config, [Row([3] * (expected - 1), [4, 5])], "rollouts.jsonl")


@pytest.mark.parametrize("stage", ["rollout", "eval", "grpo", "opd"])
def test_more_tokens_than_positions_are_refused_before_any_sampling(s2d, toy, few, tmp_path, stage):
    positions = json.loads((toy / "student" / "config.json").read_text())["max_position_embeddings"]
    models = ["--teacher", toy / "teacher", "--student", toy / "student"] if stage == "opd" else ["--model", toy / "student"]
    out = [] if stage == "rollout" else ["-o", tmp_path / "out"]
    more = ["--steps", 1] if stage in ("grpo", "opd") else []
    result = s2d(stage, *models, few, *out, *more, "--max-tokens", positions)
    assert (result.code, result.out) == (2, b"")
    limit = f"computes at most {positions} right" if more else f"exceed the {positions} tokens that transformers takes"
    assert "--max-tokens" in result.err
    assert limit in result.err
