"""LoRA adapters (arXiv 2106.09685) through peft: small float32 matrices trained in a frozen model's place."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from s2dcli.errors import ModelError, UsageError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# peft's word for every linear layer except the head.
ALL_LINEAR = "all-linear"
# peft's own names within a model's state dict.
_BASE, _ADAPTER_KEYS = ".base_layer", (".lora_A.", ".lora_B.")
_NAME = "default"
# Layers of a state-space mixer (Mamba) whose weights are read without running the layer, at least by its GPU kernels
_READ_DIRECTLY = ("conv1d", "dt_proj", "out_proj")


class Adapter:
    """A LoRA adapter inside a model: the model object stays what it is, and computes with the adapter on."""

    def __init__(self, model: PreTrainedModel, rank: int, alpha: float | None, targets: str | None, seed: int) -> None:
        """Freeze the model and put an adapter of `rank` beside its layers; the model computes what it did before.

        The layers' updates are scaled by alpha / rank; alpha is twice the rank by default. `targets` are
        names of linear layers, separated by commas, by default all but the head and those that their module
        does not call as such (see `_bypassed`). Where peft can, that includes experts. The first of its two
        matrices is drawn from `seed`, the second is zero. Raises UsageError or ModelError.
        """
        import torch
        from transformers.pytorch_utils import Conv1D

        peft = import_peft()
        names = [name.strip() for name in targets.split(",")] if targets else ALL_LINEAR
        if targets:
            _require_linear(model, names)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            lora_dropout=0.0,
            target_modules=names,
            exclude_modules=_bypassed(model),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's, stored transposed
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                self._peft = peft.get_peft_model(model, config)  # float32, whatever the model's type
            except ValueError as error:
                raise ModelError(f"peft cannot adapt {type(model).__name__}: {str(error).splitlines()[0]}") from None
        self.model, self.rank = model, rank
        # By the plain model's name of the weight. Experts kept as one tensor are adapted as a parameter of their module,
        # one wrapper around the other.
        self._layers = {
            f"{name.replace(_BASE, '')}.{getattr(layer, 'parameter_name', 'weight')}": layer
            for name, layer in model.named_modules()
            if isinstance(layer, peft.tuners.lora.LoraLayer)
        }
        for layer in self._layers.values():
            layer.cast_input_dtype_enabled = False  # under autocast, which casts the small matrices and not the activations
        self._peft.eval()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within this the model is the one that was loaded."""
        with self._peft.disable_adapter():
            yield

    def merged(self, dtype: torch.dtype, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """Return the state dict of a plain model that computes the same, the adapted weights summed in float32, cast to `dtype`.

        Merged weights are put on `device` one by one, where it is given; weights without an adapter are handed out as
        they are. The model itself does not change: merging and unmerging it would round its weights each time.
        """
        import torch

        state = {}
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                if any(key in name for key in _ADAPTER_KEYS):
                    continue
                name = name.replace(_BASE, "")
                if name in self._layers:
                    tensor = (tensor.float() + self._layers[name].get_delta_weight(_NAME).float()).to(device or tensor.device, dtype)
                state[name] = tensor
        return state

    @property
    def layers(self) -> list[str]:
        """Names of the adapted weights, as the plain model has them."""
        return list(self._layers)

    @property
    def unusual(self) -> str:
        """The first adapted weight that is not that of a torch.nn.Linear, "" if there is none."""
        import torch

        return next((name for name, layer in self._layers.items() if not isinstance(layer.get_base_layer(), torch.nn.Linear)), "")

    def state(self) -> dict[str, torch.Tensor]:
        """Return the adapter's own weights, as peft names them."""
        return import_peft().get_peft_model_state_dict(self._peft, save_embedding_layers=False)

    def save(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Write the adapter alone, whose weights are `state`, as peft reads it, into a new folder."""
        from safetensors.torch import save_file

        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")
        config = self._peft.peft_config[_NAME]
        for field in ("target_modules", "target_parameters"):  # sets, whose order differs between processes
            setattr(config, field, sorted(getattr(config, field) or ()) or None)
        config.save_pretrained(folder)


def import_peft():
    """Return the module. Raises UsageError if it is not installed."""
    # peft tries bitsandbytes, which warns of what it could be faster with.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft
    except ModuleNotFoundError:
        raise UsageError("--lora-rank needs peft, which is not installed", hint="pip install 's2d[lora]'") from None
    return peft


def _bypassed(model: PreTrainedModel) -> list[str]:
    """Layers where an adapter would not be part of what is computed: experts' routers, and weights that state spaces read directly."""
    import torch

    names = []
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        owner = model.get_submodule(parent)
        state_space = own in _READ_DIRECTLY and hasattr(owner, "A_log")
        router = isinstance(module, torch.nn.Linear) and any("Router" in type(part).__name__ for part in (module, owner))
        if state_space or router:
            names.append(name)
    return names


def _require_linear(model: PreTrainedModel, targets: list[str]) -> None:
    """Refuse targets that name nothing, something else than linear layers, or the head. Raises UsageError."""
    import torch
    from transformers.pytorch_utils import Conv1D

    modules, bypassed = dict(model.named_modules()), {id(model.get_submodule(name)) for name in _bypassed(model)}
    linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, torch.nn.Linear | Conv1D)}
    for target in targets:
        meant = [module for name, module in modules.items() if target and (name == target or name.endswith(f".{target}"))]
        if any(module is model.get_output_embeddings() for module in meant):
            raise UsageError(f"--lora-targets: {target!r} is the head, which an adapter does not train", hint="name layers of the backbone")
        if not meant:
            raise UsageError(f"--lora-targets: {type(model).__name__} has no layer {target!r}{nearest(target, linear)}")
        if not all(isinstance(module, torch.nn.Linear | Conv1D) for module in meant):
            raise UsageError(f"--lora-targets: {target!r} is no linear layer", hint=f"there are {', '.join(sorted(linear))}")
        if any(id(module) in bypassed for module in meant):
            raise UsageError(f"--lora-targets: {type(model).__name__} does not run {target!r} as a linear layer", hint="leave it out")
