"""Linear layers stored in 8 or 4 bits. The graph dequantises them first; activations and arithmetic keep the model's precision."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.export.trace import PARAMETER
from zoo.model import Model

import onnx_ir as ir  # isort: skip  (zoo.export.trace says what to install where it is missing)

GROUP = 32  # inputs per scale in 4 bits; layers with other widths are stored in 8 bits


class Quantised(NamedTuple):
    """A weight as integers times scales, quantised symmetrically and rounded to nearest."""

    integers: Tensor
    """Integers [out, in] int8; from -7 to 7 in 4 bits."""
    scale: Tensor
    """Scales [out], or [out, in / GROUP] in 4 bits."""
    bits: int

    def dequantised(self) -> Tensor:
        scale = self.scale[:, None] if self.bits == 8 else self.scale.repeat_interleave(GROUP, dim=1)
        return self.integers.to(scale.dtype) * scale

    def tensors(self, name: str) -> dict[str, ir.TensorProtocol]:
        """Return the stored tensors of the weight `name`, by name."""
        return {
            f"{name}_integers": self._stored(f"{name}_integers"),
            f"{name}_scale": ir.tensor_adapters.TorchTensor(self.scale, name=f"{name}_scale"),
        }

    def _stored(self, name: str) -> ir.TensorProtocol:
        if self.bits == 8:
            return ir.tensor(self.integers.numpy(), name=name)
        pairs = (self.integers & 0xF).to(torch.uint8).reshape(-1, 2)
        return ir.PackedTensor((pairs[:, 0] | pairs[:, 1] << 4).numpy(), ir.DataType.INT4, shape=self.integers.shape, name=name)


def quantised(weight: Tensor, how: str) -> Quantised:
    """Quantise weight [out, in] to "int8", with a scale per output channel, or "int4", with a scale per group of inputs."""
    bits = 4 if how == "int4" and weight.shape[1] % GROUP == 0 else 8
    groups = weight.detach().float().unflatten(1, (-1, GROUP if bits == 4 else weight.shape[1]))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-8) / (2 ** (bits - 1) - 1)
    scale = scale.to(weight.dtype)
    integers = (groups / scale.float()).round().to(torch.int8).flatten(1)
    return Quantised(integers, scale.squeeze(-1) if bits == 4 else scale.flatten(), bits)


def linear_weights(model: Model) -> dict[str, Tensor]:
    """Return the weights of all linear layers by name."""
    return {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def rounded(model: Model, how: str) -> Model:
    """Return a copy of the model whose linear layers hold the dequantised weights."""
    model = copy.deepcopy(model)
    for weight in linear_weights(model).values():
        weight.copy_(quantised(weight, how).dequantised())
    return model


def dequantise_in(graph: ir.Graph, weights: dict[str, Quantised]) -> None:
    """Replace these weights in a graph with their integers and scales, followed by dequantisation."""
    for name, weight in weights.items():
        value = graph.initializers.get(PARAMETER + name)
        if value is None:
            continue
        stored = [ir.val(PARAMETER + part, tensor.dtype, tensor.shape.numpy()) for part, tensor in weight.tensors(name).items()]
        blocks = {"axis": 1, "block_size": GROUP} if weight.bits == 4 else {"axis": 0}
        node = ir.node("DequantizeLinear", stored, blocks, name=f"{name.removesuffix('.weight').replace('.', '/')}/DequantizeLinear")
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{node.name}:0", value.type, value.shape
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        del graph.initializers[PARAMETER + name]
        for part in stored:
            graph.initializers[str(part.name)] = part
        graph.insert_before(graph[0], node)
