"""Master weights: what AdamW updates, what the model computes with, and what the gradient is summed in."""

import sys

import pytest
import torch
from tiny import VOCABULARY, ragged_rows, tiny, training_row

from s2dcli.assembly.loading import compute_dtype
from s2dcli.assembly.plan import moment_bytes
from s2dcli.errors import ModelError, UsageError
from s2dcli.models.batching import micro_batches
from s2dcli.models.policy import Policy
from s2dcli.options import Aggregate, Dtype, ModelOptions, Optimizer, TrainingOptions, Weights
from s2dcli.train.objectives import CrossEntropy
from s2dcli.train.optimizer import BLOCK_SIZE, MIN_8BIT_SIZE, MasterOptimizer
from s2dcli.train.rows import set_weights

CPU = torch.device("cpu")


def settings(**changed) -> TrainingOptions:
    given = {"weights": Weights.bfloat16, "weight_decay": 0.1, "adam_beta2": 0.95, "grad_clip": 0.0}
    return TrainingOptions(**{**given, **changed})


def backward(policy: Policy, tokens_per_batch: int = 10_000) -> None:
    rows = [training_row(row.prompt_ids, [min(token, policy.vocabulary - 1) for token in row.completion_ids]) for row in ragged_rows()]
    set_weights(rows, Aggregate.token, 32)
    for batch in micro_batches(rows, tokens_per_batch, 0, CPU):
        policy(batch, CrossEntropy())[0].backward()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_many_small_steps_on_bfloat16_weights_equal_adamw_on_float32_ones(family):
    """The same gradients given to a plain AdamW on float32 weights, whose groups are told apart by hand."""
    policy = Policy(tiny(family), VOCABULARY)
    start = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    optimizer = MasterOptimizer(policy, settings())
    names = {id(optimizer.masters[parameter]): name for name, parameter in policy.named_parameters()}
    plain = {name: torch.nn.Parameter(value.double()) for name, value in start.items()}
    adamw = torch.optim.AdamW(
        [
            {"params": [value for value in plain.values() if value.ndim >= 2], "weight_decay": 0.1},
            {"params": [value for value in plain.values() if value.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-6,
        betas=(0.9, 0.95),
        foreach=False,
    )
    for _ in range(50):
        backward(policy)
        for master in optimizer.masters.values():
            plain[names[id(master)]].grad = master.grad.double()
        adamw.step()
        optimizer.step(1e-6)
    for parameter, master in optimizer.masters.items():
        name = names[id(master)]
        moved, exact = master - start[name], plain[name].detach() - start[name]
        assert moved.abs().max() > 1e-5  # fifty steps of 1e-6, of which bfloat16 weights would see none
        # Norm weights are 1, where float32 numbers are 1.2e-7 apart: each step rounds by up to 6 %.
        assert (moved.double() - exact).norm() < (0.06 if master.ndim < 2 else 0.02) * exact.norm()
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, master.bfloat16())


def test_float32_weights_are_their_own_masters():
    policy = Policy(tiny("llama"), VOCABULARY)
    optimizer = MasterOptimizer(policy, settings(weights=Weights.float32))
    assert all(parameter is master for parameter, master in optimizer.masters.items())
    backward(policy)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    optimizer.step(1e-6)
    assert all(not torch.equal(parameter, old) for parameter, old in zip(policy.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_gradients_of_bfloat16_micro_batches_are_summed_in_float32():
    policy = Policy(tiny("qwen3"), VOCABULARY)
    optimizer = MasterOptimizer(policy, settings())
    sums: dict[torch.Tensor, torch.Tensor] = {}
    rows = ragged_rows()
    set_weights(rows, Aggregate.token, 32)
    for batch in micro_batches(rows, 1, 0, CPU):  # one row at a time
        policy(batch, CrossEntropy())[0].backward()
        for master in optimizer.masters.values():
            sums[master] = master.grad.clone()
    assert all(parameter.grad is None for parameter in optimizer.masters)
    assert {master.grad.dtype for master in sums} == {torch.float32}
    # A sum that was kept in bfloat16 would have no bits beyond bfloat16's.
    assert all(not torch.equal(total, total.bfloat16().float()) for total in sums.values())
    before = optimizer.clip()
    optimizer.grad_clip = before / 2
    optimizer.clip()
    assert torch.cat([master.grad.flatten() for master in sums]).norm() == pytest.approx(before / 2, rel=1e-5)


def test_saved_weights_are_the_masters_and_tied_ones_stay_one():
    policy = Policy(tiny("qwen3"), VOCABULARY)
    start = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    optimizer = MasterOptimizer(policy, settings())
    state = optimizer.full_precision(policy.model)
    assert state.keys() == start.keys()
    assert all(torch.equal(state[name], start[name]) for name in start)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_bfloat16_weights_settle_the_compute_type():
    narrow, wide = TrainingOptions(weights=Weights.bfloat16), TrainingOptions()
    assert compute_dtype(ModelOptions(), narrow) is Dtype.bfloat16
    assert compute_dtype(ModelOptions(), wide) is Dtype.auto
    with pytest.raises(UsageError, match="--weights bfloat16"):
        compute_dtype(ModelOptions(dtype=Dtype.float32), narrow)


@pytest.mark.parametrize("weights", list(Weights))
def test_moments_in_8_bits_move_the_masters_as_float32_ones_do(weights, toy):
    """On the same gradients; the announced bytes are those of the tensors that hold the moments."""
    from transformers import AutoModelForCausalLM

    moved, start = {}, {}
    for kind in Optimizer:
        model = AutoModelForCausalLM.from_pretrained(toy / "teacher").eval()
        optimizer = MasterOptimizer(Policy(model, 33), settings(weights=weights, optimizer=kind, weight_decay=0.0))
        start[kind] = torch.cat([master.detach().flatten().clone() for master in optimizer.masters.values()])
        torch.manual_seed(0)
        for _ in range(30):
            for master in optimizer.masters.values():
                master.grad = torch.randn_like(master) + 0.5
            optimizer.step(1e-4)
        moved[kind] = torch.cat([master.detach().flatten() for master in optimizer.masters.values()]) - start[kind]
    assert moved[Optimizer.adamw_8bit].abs().max() > 1e-3
    assert torch.nn.functional.cosine_similarity(moved[Optimizer.adamw], moved[Optimizer.adamw_8bit], dim=0) > 0.98
    states = list(optimizer.adamw.state.values())
    narrow = [state[name] for state in states for name in ("state1", "state2") if state[name].dtype == torch.uint8]
    assert {moment.numel() >= MIN_8BIT_SIZE for moment in narrow} == {True}
    assert sum(moment.numel() for moment in narrow) > 1.9 * 100_000
    scales = [state["absmax1"].numel() for state in states if "absmax1" in state]
    assert scales == [-(-state["state1"].numel() // BLOCK_SIZE) for state in states if "absmax1" in state]
    held = sum(tensor.nbytes for state in states for name, tensor in state.items() if name in ("state1", "state2", "absmax1", "absmax2"))
    assert held == moment_bytes([master.numel() for master in optimizer.masters.values()], Optimizer.adamw_8bit)


def test_without_bitsandbytes_the_command_that_brings_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"pip install 's2d\[8bit\]'"):
        MasterOptimizer(Policy(tiny("llama"), VOCABULARY), settings(optimizer=Optimizer.adamw_8bit))


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma2", "cohere"])
@pytest.mark.parametrize("weights", [Weights.float32, Weights.bfloat16])
def test_the_gradient_of_a_vocabulary_is_added_up_in_one_place(family, weights):
    """The head's, collected where the optimizer says, and the embedding's, which comes sparse, are autograd's own."""
    plain, collected = Policy(tiny(family), VOCABULARY - 3), Policy(tiny(family), VOCABULARY - 3)
    optimizer = MasterOptimizer(collected, settings(weights=weights))
    collected.collect_gradients(optimizer.gradient_of)
    for policy in (plain, collected):
        backward(policy, tokens_per_batch=64)
    tolerance = 1e-5 if weights is Weights.float32 else 0.1
    for name, parameter in plain.named_parameters():
        gradient = optimizer.masters[collected.get_parameter(name)].grad
        assert not gradient.is_sparse
        assert gradient.dtype == torch.float32
        assert (gradient - parameter.grad).norm() <= tolerance * parameter.grad.norm(), name


def test_a_collected_gradient_refuses_a_loss_that_is_scaled_afterwards():
    policy = Policy(tiny("qwen3"), VOCABULARY)
    policy.collect_gradients(MasterOptimizer(policy, settings(weights=Weights.float32)).gradient_of)
    (batch,) = micro_batches(ragged_rows(), 10_000, 0, CPU)
    loss, _ = policy(batch, CrossEntropy())
    with pytest.raises(RuntimeError, match="inside its kernel"):
        (2 * loss).backward()


@pytest.mark.parametrize("weights", list(Weights))
@pytest.mark.parametrize("kind", list(Optimizer))
def test_a_restored_optimizer_goes_on_to_the_bit(weights, kind, toy):
    """On the same gradients, from a model as it was loaded."""
    from transformers import AutoModelForCausalLM

    def fresh() -> tuple[Policy, MasterOptimizer]:
        policy = Policy(AutoModelForCausalLM.from_pretrained(toy / "teacher").eval(), 33)
        return policy, MasterOptimizer(policy, settings(weights=weights, optimizer=kind))

    def advance(optimizer: MasterOptimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            for master in optimizer.masters.values():
                master.grad = torch.randn_like(master)
            optimizer.step(1e-3 / (1 + step))

    policy, optimizer = fresh()
    advance(optimizer, range(3))
    saved = [(name, tensor.clone()) for name, tensor in optimizer.state()]
    again, restored = fresh()
    restored.restore(saved)
    assert all(torch.equal(one, other) for one, other in zip(policy.parameters(), again.parameters(), strict=True))
    for steps in (range(3, 4), range(4, 8)):
        advance(optimizer, steps)
        advance(restored, steps)
        assert all(torch.equal(one, other) for one, other in zip(policy.parameters(), again.parameters(), strict=True))
    one, other = dict(optimizer.state()), dict(restored.state())
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {name.split("/")[0] for name in one} >= {"master", "step"}


def test_the_state_of_another_model_is_refused():
    state = dict(MasterOptimizer(Policy(tiny("qwen3"), VOCABULARY), settings()).state())
    with pytest.raises(ModelError, match="of another model"):
        MasterOptimizer(Policy(tiny("llama"), VOCABULARY), settings()).restore([*state.items(), ("master/model.x", torch.ones(1))])
    state.popitem()
    with pytest.raises(ModelError, match="lacks 1 of "):
        MasterOptimizer(Policy(tiny("qwen3"), VOCABULARY), settings()).restore(state.items())
