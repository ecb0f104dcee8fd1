"""A model in parts: FSDP2, where each process holds its rows of every weight, gradient and moment.

A layer's weights are gathered while the layer runs, those around the layers (embedding, last norm, head) for the whole
pass, and their gradients are summed and scattered after it. Gradients are sums over processes, as they are over
micro-batches: what a loss is divided by is fixed before the step. Checkpoints and training states are gathered one tensor
after the other, so they look the same whatever the number of processes.

torch's DistributedDataParallel is not used for models that every process holds whole: adding the gradients up once per
update, after its last micro-batch (`MasterOptimizer.sum_gradients`), moves less, and leaves sparse gradients, float32
sums beside bfloat16 weights, and the head's own sum as they are in one process.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch

from s2dcli import world
from s2dcli.errors import ModelError
from s2dcli.models.policy import Policy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

# torch.distributed's tensors and FSDP2 are imported where they are used: that takes seconds, and one process alone has no use for them.


def shard(policy: Policy, device: torch.device, *, narrow: bool = False) -> Policy:
    """Split a policy over the processes; returns it. So far only the main process's has weights, in main memory.

    `narrow`: the parts stay float32, and what is gathered of them to compute with is bfloat16. No more than a layer, or than
    what is around the layers, is ever whole on a device. Raises ModelError.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world.size(),))
    kinds = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if narrow else None, reduce_dtype=torch.float32 if narrow else None, cast_forward_inputs=False
    )
    tensors = world.broadcast([_Told(names, weight.shape, weight.dtype) for names, weight in _tied(policy)])
    for name, layer in layers_of(policy.model):
        inside = [told for told in tensors if told.names[0].startswith(f"model.{name}.")]
        _receive(policy, inside, device)
        _fully_shard(layer, mesh, kinds, reshard=world.reshards())
        tensors = [told for told in tensors if told not in inside]
    _receive(policy, tensors, device)
    _receive_buffers(policy, device)
    _fully_shard(policy, mesh, kinds, reshard=False)
    register_fsdp_forward_method(policy, "states")
    policy.sharded, policy.narrow = True, narrow
    assert all(_is_part(weight) for weight in policy.parameters()), "every weight is in parts"
    return policy


@dataclass(frozen=True)
class _Told:
    """What the main process says of one of its tensors: all names that it has, and how it is to be made."""

    names: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype


def _tied(module: torch.nn.Module) -> list[tuple[tuple[str, ...], torch.nn.Parameter]]:
    """Return the parameters of a module, each once, with all names it has: tied weights have several."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [(tuple(same), parameter) for parameter, same in names.items()]


def layers_of(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """Return a model's layers, each of which is gathered by itself, by their names. Raises ModelError if it has none that are known."""
    kinds = set(model._no_split_modules or ())
    layers = [(name, module) for name, module in model.named_modules() if type(module).__name__ in kinds]
    outer = [(name, layer) for name, layer in layers if not any(name.startswith(f"{other}.") for other, _ in layers)]
    if not outer:
        family = type(model).__name__
        raise ModelError(f"{family} does not say what its layers are, so it cannot be sharded", hint="train without FSDP")
    return outer


def _fully_shard(module: torch.nn.Module, mesh: DeviceMesh, kinds: MixedPrecisionPolicy, *, reshard: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=mesh, mp_policy=kinds, reshard_after_forward=reshard)
    module.set_gradient_divide_factor(1.0)  # sums, not means
    module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def _put(module: torch.nn.Module, name: str, kind: str, tensor: torch.Tensor) -> None:
    owner, _, own = name.rpartition(".")
    getattr(module.get_submodule(owner), kind)[own] = tensor


def _receive(policy: Policy, tensors: Sequence[_Told], device: torch.device) -> None:
    """Give parameters the main process's values, on `device`."""
    ours = dict(policy.named_parameters(remove_duplicate=False))
    for told in tensors:
        old = ours[told.names[0]]
        value = old.detach().to(device) if world.is_main() else torch.empty(told.shape, dtype=told.dtype, device=device)
        new = torch.nn.Parameter(world.send_out(value), requires_grad=old.requires_grad)
        for name in told.names:
            _put(policy, name, "_parameters", new)


def _receive_buffers(policy: Policy, device: torch.device) -> None:
    """Give buffers the main process's values, also those that no checkpoint holds. Raises ModelError for a tensor that is neither."""
    ours = dict(policy.named_buffers(remove_duplicate=False))
    for told in world.broadcast([_Told((name,), value.shape, value.dtype) for name, value in ours.items()]):
        value = ours[told.names[0]].to(device) if world.is_main() else torch.empty(told.shape, dtype=told.dtype, device=device)
        _put(policy, told.names[0], "_buffers", world.send_out(value.contiguous()))
    for name, module in policy.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise ModelError(f"{type(module).__name__} keeps {name}.{attribute} as no buffer, so it cannot be sharded")


def _is_part(tensor: torch.Tensor | None) -> TypeGuard[DTensor]:
    """Whether a tensor is one of which each process holds a part: none is before the module of such tensors was imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor: its rows, or all of it."""
    return tensor.detach().to_local() if _is_part(tensor) else tensor


def cut(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the rows of a tensor that this process holds of `like`."""
    if not _is_part(like):
        return whole
    parts = whole.chunk(world.size())
    return parts[world.rank()] if world.rank() < len(parts) else whole[:0]


def whole(part: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Gather a tensor of which each process holds its rows, as of `like` where it is not itself a part; others are returned as they are."""
    if _is_part(like) and not _is_part(part):
        from torch.distributed.tensor import DTensor

        part = DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
    return part.full_tensor() if _is_part(part) else part


def whole_state(state: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Gather a state dict to the main process's main memory, tensor by tensor, in `dtype` what is wider; others get an empty one."""
    gathered: dict[str, torch.Tensor] = {}
    done: dict[tuple, torch.Tensor] = {}  # tied weights stay one tensor
    for name, tensor in state.items():
        key = _identity(tensor)
        if key not in done:
            full = whole(tensor.detach())
            narrower = dtype if dtype and full.is_floating_point() and full.itemsize > dtype.itemsize else None
            done[key] = full.to("cpu", narrower) if world.is_main() else None
        if world.is_main():
            gathered[name] = done[key]
    return gathered


def _identity(tensor: torch.Tensor) -> tuple:
    """What two names of one tensor have in common, and no two tensors."""
    local = part_of(tensor)
    return (local.data_ptr(), tensor.shape, tensor.dtype) if local.numel() else (id(tensor), tensor.shape, tensor.dtype)


class GatheredGradients:
    """Gradients of a sharded embedding and head: summed in float32 over a micro-batch's tokens, then over processes, which keep their rows.

    FSDP2 would have them in the type of the gathered weights, whose sums over many tokens are rough in bfloat16.
    """

    def __init__(self, policy: Policy) -> None:
        layers = (policy.model.get_input_embeddings(), policy.model.get_output_embeddings())
        # By the sharded weight, tied ones once
        self._layers = {layer.weight: layer for layer in layers if layer.weight.requires_grad}
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._parts: dict[torch.nn.Parameter, torch.Tensor] = {}  # this process's rows, of all micro-batches so far

    def of(self, gathered: torch.nn.Parameter) -> torch.Tensor:
        """Return what a micro-batch adds the gradient of a gathered weight to."""
        sharded = next(weight for weight, layer in self._layers.items() if layer.weight is gathered)
        if sharded not in self._sums:
            self._sums[sharded] = torch.zeros_like(gathered, dtype=torch.float32)
        return self._sums[sharded]

    def scatter(self) -> None:
        """Sum over the processes what a micro-batch has collected: to be called by all of them."""
        from torch.distributed.tensor import DTensor, Partial

        for weight in self._layers:
            collected = DTensor.from_local(self._sums.pop(weight), weight.device_mesh, [Partial()], run_check=False)
            rows = collected.redistribute(weight.device_mesh, weight.placements).to_local()
            self._parts[weight] = self._parts[weight].add_(rows) if weight in self._parts else rows

    def take(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Return, and forget, the rows of the gradients."""
        parts, self._parts = self._parts, {}
        return parts


class Replica:
    """A whole model with the modules of a sharded one, to sample from: it has weights between `fill` and `clear`."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Copy a model's modules, before it is sharded, without weights."""
        weights = (*model.parameters(), *model.buffers())
        empty = {id(weight): _without_values(weight) for weight in weights}
        self.model: PreTrainedModel = copy.deepcopy(model, empty)

    @torch.no_grad()
    def fill(self, policy: Policy) -> None:
        """Gather the weights, tensor by tensor, in the type that `policy` computes with them."""
        policy.reshard()
        for names, parameter in _tied(policy.model):
            full = whole(parameter.detach())
            narrow = policy.narrow and parameter.requires_grad
            new = torch.nn.Parameter(full.bfloat16() if narrow else full, requires_grad=False)
            for name in names:
                _put(self.model, name, "_parameters", new)
        for name, buffer in policy.model.named_buffers(remove_duplicate=False):
            _put(self.model, name, "_buffers", buffer)

    def clear(self) -> None:
        for names, parameter in _tied(self.model):
            empty = _without_values(parameter)
            for name in names:
                _put(self.model, name, "_parameters", empty)


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return torch.nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


def squared_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of squares over tensors of which each process holds its part."""
    norms = torch._foreach_norm([tensor for tensor in tensors if tensor.numel()])
    total = torch.stack(norms).square().sum()
    world.add_up([total])
    return total
