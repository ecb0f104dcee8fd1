"""AdamW over float32 master weights, whatever type the model computes with.

At the learning rates of RL (1e-6) an update is far below the spacing of bfloat16 numbers, so an
optimizer that writes to bfloat16 weights changes nothing. Here it never does: it owns float32
masters and moments, and the model gets the masters' rounded values after every update.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator

import torch

from s2dcli import world
from s2dcli.errors import ModelError, UsageError
from s2dcli.models.policy import Policy
from s2dcli.models.sharding import GatheredGradients, cut, part_of, squared_norm, whole
from s2dcli.options import Optimizer, TrainingOptions, Weights

# bitsandbytes keeps the moments of tensors with fewer numbers in float32 (its own default) ...
MIN_8BIT_SIZE = 4096
# ... and a float32 scale for each block of this many moments of the others.
BLOCK_SIZE = 256
# Its name of either moment: where it keeps the table of the values that 8 bits stand for, and that table's name.
_TABLES = {"state1": ("qmap1", "dynamic"), "state2": ("qmap2", "udynamic")}
_MASTER = "master"
ADAM_BETA1 = 0.9  # AdamW's first-moment decay, the same in all of the method's settings


class MasterOptimizer:
    """Holds what training needs beyond the model's weights: masters, their gradients, AdamW's moments.

    With float32 weights the parameters are their own masters: 4 bytes of weight, 4 of gradient and 8
    of moments per parameter, or 2 with `--optimizer adamw-8bit` (arXiv 2110.02861). With `--weights
    bfloat16` the trained parameters become bfloat16 in place and their old values the masters: 2 + 4 + 4
    + 8 bytes. Each micro-batch's gradient is then added to the master's as soon as autograd has formed
    it, in float32, so that the sum over micro-batches does not depend on how the batch was cut. A
    parameter of an adapter is always its own master.

    A large vocabulary's gradient is as large as the model's, and is held once where `gradient_of` is given to
    `Policy.collect_gradients`.

    Of a policy that is sharded over processes (models/sharding.py) each holds the masters, gradients and moments of its own
    rows, float32 with either type of weights. States are those of whole tensors, whatever the number of processes.
    """

    def __init__(self, policy: Policy, training: TrainingOptions) -> None:
        """Take over the trained parameters of `policy`. Raises UsageError if bitsandbytes is needed and missing."""
        self.grad_clip = training.grad_clip or math.inf
        self._trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
        self.sharded = policy.sharded
        narrow = training.weights is Weights.bfloat16 and policy.adapter is None
        split_off = _own_part if policy.sharded else _split_off_master if narrow else lambda parameter: parameter
        # parameter of the model -> its master, which is the parameter itself unless that is narrow or sharded
        self.masters = {parameter: split_off(parameter) for parameter in self._trained.values()}
        self._gathered = GatheredGradients(policy) if policy.sharded else None
        masters = list(self.masters.values())
        groups = [
            {"params": [master for master in masters if master.ndim >= 2], "weight_decay": training.weight_decay},
            {"params": [master for master in masters if master.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        betas = (ADAM_BETA1, training.adam_beta2)
        self.eight_bit = training.optimizer is Optimizer.adamw_8bit
        if self.eight_bit:
            kind = import_bitsandbytes().optim.AdamW8bit
            self.adamw = kind(groups, lr=training.lr, betas=betas, min_8bit_size=MIN_8BIT_SIZE)
        else:
            self.adamw = torch.optim.AdamW(groups, lr=training.lr, betas=betas, fused=True)

    def gradient_of(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return the float32 gradient of a parameter's master, zeros at first, to add to; of a gathered one that of a micro-batch."""
        if self._gathered:
            return self._gathered.of(parameter)
        master = self.masters[parameter]
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    def end_micro_batch(self) -> None:
        """Be told of the end of each backward pass, in all processes."""
        if self._gathered:
            self._gathered.scatter()

    def sum_gradients(self) -> None:
        """Add up what several processes have found, after the last micro-batch of an update; each then has the sum, or its rows of it."""
        if self._gathered:
            gathered = self._gathered.take()
            for parameter, master in self.masters.items():
                if parameter in gathered:
                    master.grad = gathered[parameter]
                elif parameter.grad is not None:
                    master.grad, parameter.grad = part_of(parameter.grad).float(), None
        elif world.size() > 1:
            world.add_up([self.gradient_of(parameter) for parameter in self.masters])

    def clip(self) -> float:
        """Scale the gradient down to the largest allowed norm; returns its norm before that."""
        masters = list(self.masters.values())
        if not self.sharded:
            return float(torch.nn.utils.clip_grad_norm_(masters, self.grad_clip))
        norm = squared_norm(master.grad for master in masters if master.grad is not None).sqrt()
        torch.nn.utils.clip_grads_with_norm_(masters, self.grad_clip, norm)
        return float(norm)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the masters by their gradients, drop these, and round the masters into the model."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self._round_masters()

    def _round_masters(self) -> None:
        """Give the model the masters' values. Parts share their memory with the model."""
        for parameter, master in () if self.sharded else self.masters.items():
            if parameter is not master:
                parameter.copy_(master)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what the next updates depend on, as `KIND/PARAMETER`: masters, moments and step counts, one by one.

        What is sharded is gathered: all processes must take all of it.
        """
        for name, parameter in self._trained.items():
            master = self.masters[parameter]
            yield f"{_MASTER}/{name}", whole(master.detach(), like=parameter)
            for kind, value in self.adamw.state.get(master, {}).items():
                if kind not in ("qmap1", "qmap2"):  # constants
                    value = torch.as_tensor(value)
                    yield f"{kind}/{name}", whole(value, like=parameter) if value.ndim else value

    @torch.no_grad()
    def restore(self, state: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over what `state` has yielded in a run with the same model and settings. Raises ModelError if it was another."""
        found = set()
        for key, value in state:
            kind, _, name = key.partition("/")
            if name not in self._trained:
                raise ModelError(f"the training state is of another model: this one trains no {name!r}")
            found.add(name)
            master = self.masters[self._trained[name]]
            if value.ndim:
                value = cut(value, like=self._trained[name])
            if kind == _MASTER:
                master.copy_(value)
            elif self.eight_bit and kind == "step":
                self.adamw.state[master][kind] = int(value)
            else:
                self.adamw.state[master][kind] = value.to(master.device, copy=True)
        if len(found) < len(self._trained):
            raise ModelError(f"the training state lacks {len(self._trained) - len(found)} of {len(self._trained)} parameters")
        for entries in self.adamw.state.values():
            for kind, (table, values) in _TABLES.items():
                if kind in entries and entries[kind].dtype == torch.uint8:
                    entries[table] = self.adamw.name2qmap[values]
        self._round_masters()

    def full_precision(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the model's state dict with the masters in place of the weights that were rounded from them."""
        state = model.state_dict()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in self.masters:
                state[name] = self.masters[parameter].detach()
        return state


def _own_part(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return this process's rows of a sharded parameter as a parameter of their own, in the same memory."""
    return torch.nn.Parameter(part_of(parameter))


def _split_off_master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Make a float32 parameter bfloat16 in place; returns its old values, which collect its gradients."""
    master = torch.nn.Parameter(parameter.data)
    parameter.data = master.data.bfloat16()
    parameter.register_post_accumulate_grad_hook(_move_gradient_to(master))
    return master


def _move_gradient_to(master: torch.nn.Parameter) -> Callable[[torch.Tensor], None]:
    def move(parameter: torch.Tensor) -> None:
        if parameter.grad is None:  # all of it was added up elsewhere: see MasterOptimizer.gradient_of
            return
        if master.grad is None:
            master.grad = parameter.grad.float().to_dense()
        else:
            master.grad += parameter.grad.float()
        parameter.grad = None

    return move


def import_bitsandbytes():
    """Return the module. Raises UsageError if it is not installed."""
    # At import it logs which kernels, of no use here, it could not load.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ModuleNotFoundError:
        raise UsageError("--optimizer adamw-8bit needs bitsandbytes, which is not installed", hint="pip install 's2d[8bit]'") from None
    return bitsandbytes
