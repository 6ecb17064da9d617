"""LoRA (arXiv 2106.09685): low-rank adapters alongside frozen linear layers, y = W x + alpha / rank * B A x."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.checkpoints.stored import ADAPTER
from zoo.errors import ZooError
from zoo.files import replacing
from zoo.model import Model

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class LoRA(BaseModel):
    """Fields of `lora:` in a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int = Field(8, ge=1, description="rows of A, columns of B")
    alpha: float = Field(16.0, gt=0, description="adapters are scaled by alpha / rank")
    patterns: tuple[str, ...] = Field(("blocks.*_proj",), min_length=1, description="name patterns of the linear layers that get adapters")
    train: tuple[str, ...] = Field((), description="name patterns of parameters that are trained too, such as those of inserted blocks")
    output: Literal["merged", "adapter"] = Field("merged", description="final model: whole, or the adapters alone, in the format of peft")

    @model_validator(mode="after")
    def _fits(self) -> LoRA:
        if self.train and self.output == "adapter":
            raise ValueError(f"train: {list(self.train)}: an adapter cannot hold these; want output: merged")
        return self

    @property
    def scale(self) -> float:
        """Return the factor of B A x."""
        return self.alpha / self.rank


class _Adapt:
    """Forward hook that adds the output of the adapter to that of its layer, which may be quantised."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        a, b = layer.get_parameter("lora_A"), layer.get_parameter("lora_B")
        return output + (self.scale * F.linear(F.linear(inputs[0].to(a.dtype), a), b)).to(output.dtype)


def add_adapters(model: Model, lora: LoRA, *, seed: int = 0) -> None:
    """Freeze a model, except `lora.train`, and give its linear layers adapters, which have no effect before training: B is zero.

    A layer keeps its name and weight; it gets the parameters lora_A [rank, in] and lora_B [out, rank], in the dtype of activations.

    Raises:
        ZooError: a pattern matches nothing, or the model has adapters.
    """
    if adapted(model):
        raise ZooError(f"{model.config.name}: already has adapters")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    parameters = dict(model.named_parameters())
    chosen = {name for pattern in lora.patterns for name in _matching(layers, pattern, "patterns", "linear layer")}
    trained = {name for pattern in lora.train for name in _matching(parameters, pattern, "train", "parameter")}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    random = torch.Generator().manual_seed(seed)
    for name in layers:
        if name in chosen:
            _add(layers[name], lora, model.dtype, random)


def _add(layer: nn.Linear, lora: LoRA, dtype: torch.dtype, random: torch.Generator) -> None:
    a = (2 * torch.rand(lora.rank, layer.in_features, generator=random) - 1) / math.sqrt(layer.in_features)
    b = torch.zeros(layer.out_features, lora.rank)
    device = layer.weight.device
    layer.register_parameter("lora_A", nn.Parameter(a.to(device, dtype)))
    layer.register_parameter("lora_B", nn.Parameter(b.to(device, dtype)))
    layer.register_forward_hook(_Adapt(lora.scale))


def _matching(names: dict[str, Any], pattern: str, field: str, kind: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ZooError(f"lora.{field}: '{pattern}' matches no {kind}; there are, for example, {next(iter(names))} and {list(names)[-1]}")
    return found


def adapted(model: nn.Module) -> dict[str, float]:
    """Return the layers that have adapters, by name, with the factor of each."""
    hooks = {name: list(layer._forward_hooks.values()) for name, layer in model.named_modules()}
    return {name: hook.scale for name, found in hooks.items() for hook in found if isinstance(hook, _Adapt)}


@torch.no_grad()
def merged_tensors(model: Model) -> dict[str, Tensor]:
    """Return the tensors of a model by name, with adapters merged into the weights. The model is not changed.

    Raises:
        ZooError: the weight of an adapted layer is quantised.
    """
    tensors = dict(model.state_dict())
    for name, scale in adapted(model).items():
        weight, a, b = (tensors[f"{name}.{part}"] for part in ("weight", "lora_A", "lora_B"))
        if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
            raise ZooError(f"{name}: its weight is quantised, so no adapter can be merged into it; save the adapters alone")
        wide = torch.promote_types(weight.dtype, torch.float32)
        tensors[f"{name}.weight"] = (weight.to(wide) + scale * b.to(wide) @ a.to(wide)).to(weight.dtype)
        del tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
    return tensors


@torch.no_grad()
def merge_adapters(model: Model) -> None:
    """Merge the adapters of a model into its weights, and remove them. Raises ZooError as `merged_tensors`."""
    tensors, names = merged_tensors(model), list(adapted(model))
    for name in names:
        layer = model.get_submodule(name)
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, _Adapt):
                del layer._forward_hooks[key]
        del layer.lora_A, layer.lora_B
        layer.get_parameter("weight").copy_(tensors[f"{name}.weight"])


def write_adapter(model: Model, lora: LoRA, folder: Path, base: str | None) -> None:
    """Write the adapters of a model to `folder`, as peft stores them: `PeftModel.from_pretrained(model, folder)` reads them.

    Args:
        base: name or folder of the model that they are trained for.
    """
    names, tensors = list(adapted(model)), model.state_dict()
    stored = {f"base_model.model.{name}.{part}.weight": tensors[f"{name}.{part}"] for name in names for part in ("lora_A", "lora_B")}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": names,
        "lora_dropout": 0.0,
        "bias": "none",
        "task_type": None,
        "inference_mode": True,
    }
    folder.mkdir(exist_ok=True)
    with replacing(folder / ADAPTER_WEIGHTS) as file:
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, file, metadata={"format": "pt"})
    with replacing(folder / ADAPTER) as file:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
