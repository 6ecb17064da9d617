"""The weights of a model as plain tensors, however the model is compiled, wrapped or parametrised."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from zoo.blocks.mixer import Mixer
from zoo.blocks.moe import Router
from zoo.blocks.norm import RMSNorm
from zoo.config import ModelConfig
from zoo.errors import ZooError
from zoo.model import Model


def empty_model(config: ModelConfig, label: str | None = None) -> Model:
    """Build the model of a config without allocating memory. Raises ZooError, starting with `label` if there is one."""
    try:
        with torch.device("meta"):
            return Model(config)
    except ZooError as error:
        raise ZooError(f"{label}: {error}" if label else str(error)) from None
    except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:  # sizes that no tensor can have
        raise ZooError(f"{label or config.name}: no model has these sizes: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """Return the beginning of an error message, on one line."""
    return " ".join(str(error).split())[:200]


def unwrap(model: nn.Module) -> Model:
    """Return the model inside `torch.compile`, DistributedDataParallel or DataParallel. Raises ZooError if there is none."""
    inner = model
    while not isinstance(inner, Model):
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(wrapped, nn.Module):
            raise ZooError(f"model: a {type(model).__name__} holds no model of this package; want what zoo.create or zoo.load return")
        inner = wrapped
    return inner


def wide_parameters(model: Model) -> set[str]:
    """Return the names of parameters and buffers that stay float32 in a 16-bit model: weights of norms, and `Mixer.wide`."""
    names = set()
    for prefix, module in model.named_modules():
        own = ("weight",) if isinstance(module, RMSNorm) else module.wide if isinstance(module, Mixer | Router) else ()
        names |= {f"{prefix}.{name}" for name in own}
    return names


def cast(model: Model, dtype: torch.dtype) -> Model:
    """Cast a model without values (meta device), except the parameters and buffers that stay float32. Returns it."""
    wide = wide_parameters(model)
    for name, tensor in chain(model.to(dtype).named_parameters(), model.named_buffers()):
        if name in wide:
            tensor.data = tensor.data.to(torch.promote_types(dtype, torch.float32))
    return model


def plain_tensors(model: Model) -> dict[str, Tensor]:
    """Return the tensors of a model by name, exactly those that a new model with its config has.

    Compiled submodules and parametrisations are resolved.

    Raises:
        ZooError: tensors that are missing, additional (adapters), of another shape (a resized vocabulary), not of a floating-point
            dtype, without values (meta device), or of a kind that a file cannot hold (sharded, quantised); names the tensor.
    """
    config = model.config
    tensors: dict[str, Tensor] = {}
    parametrised = {f"{prefix}." for prefix, module in model.named_modules() if is_parametrized(module)}
    for name, tensor in model.state_dict().items():
        owner, mark, rest = name.partition("parametrizations.")
        if mark and owner in parametrised:
            attribute = rest.split(".")[0]
            tensor, name = getattr(model.get_submodule(owner[:-1]), attribute).detach(), owner + attribute
        tensors[name.replace("_orig_mod.", "")] = tensor
    wanted = {name: list(tensor.shape) for name, tensor in empty_model(config, config.name).state_dict().items()}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ZooError(f"{config.name}: tensor '{missing[0]}' is missing in the model ({len(missing)} such tensors)")
    if added := sorted(tensors.keys() - wanted.keys()):
        raise ZooError(f"{config.name}: tensor '{added[0]}' is not part of its config ({len(added)} such tensors); merge adapters first")
    for name, tensor in tensors.items():
        if list(tensor.shape) != wanted[name]:
            raise ZooError(f"{config.name}: tensor '{name}' is {list(tensor.shape)}, its config has {wanted[name]}; change the config too")
        if tensor.is_meta:
            raise ZooError(f"{config.name}: the model is on the meta device and has no weights to save")
        if type(tensor) not in (Tensor, nn.Parameter):
            raise ZooError(f"{config.name}: tensor '{name}' is a {type(tensor).__name__}; gather or dequantise it first")
        if not tensor.is_floating_point():
            raise ZooError(f"{config.name}: tensor '{name}' is {tensor.dtype}; want a floating-point dtype")
    return tensors
