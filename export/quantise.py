"""Linear layers stored in 8 or 4 bits, in the forms that runtimes fuse with their products.

`portable`: integers [in, out], and a DequantizeLinear before each product. `ort`: MatMulNBits of com.microsoft.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.linear import ColumnLinear
from zoo.blocks.tied_head import TiedHead
from zoo.export.operators import MICROSOFT
from zoo.export.products import Use, initializer, of_one_input, uses
from zoo.export.trace import PARAMETER, replace
from zoo.model import Model

import onnx_ir as ir  # isort: skip  (zoo.export.trace says what to install where it is missing)
from onnx_ir.passes import common  # isort: skip

GROUPS = 32, 16  # inputs per scale: the first that divides a width, which TensorRT requires, else the first


class Quantised(NamedTuple):
    """A weight [out, in] as integers times scales, rounded to nearest. The last group is padded with zeros."""

    integers: Tensor
    """Integers [out, groups, inputs per scale] int8; from -127 to 127, or in 4 bits from -8 to 7."""
    scale: Tensor
    """Scales [out, groups]."""
    bits: int
    inputs: int

    @property
    def group(self) -> int:
        """Inputs per scale."""
        return self.integers.shape[2]

    def dequantised(self) -> Tensor:
        """Return the weight, [out, in]."""
        return (self.integers.to(self.scale.dtype) * self.scale[..., None]).flatten(1)[:, : self.inputs]


def quantised(weight: Tensor, bits: int) -> Quantised:
    """Quantise weight [out, in] in groups of inputs.

    In 4 bits the value of largest magnitude in a group becomes -8, so that the whole range is used.
    """
    wide = weight.detach().float()
    group = next((size for size in GROUPS if wide.shape[1] % size == 0), GROUPS[0])
    groups = F.pad(wide, (0, -wide.shape[1] % group)).unflatten(1, (-1, group))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (largest / -8 if bits == 4 else largest.abs() / 127).to(weight.dtype)
    scale = torch.where(scale == 0, 1, scale)
    most = 2 ** (bits - 1) - 1
    integers = (groups / scale.float()).round().clamp(-8 if bits == 4 else -127, most).to(torch.int8)
    return Quantised(integers, scale.squeeze(-1), bits, weight.shape[1])


def linear_weights(model: Model) -> dict[str, Tensor]:
    """Return the weights of all linear layers by name. A tied head's is `embed.weight`."""
    found = {f"{name}.weight": module.weight for name, module in model.named_modules() if type(module) in (nn.Linear, ColumnLinear)}
    return found | ({"embed.weight": model.head.weight} if isinstance(model.head, TiedHead) else {})


@torch.no_grad()
def rounded(model: Model, bits: int) -> Model:
    """Return a copy of the model whose linear layers hold the dequantised weights."""
    model = copy.deepcopy(model)
    for weight in linear_weights(model).values():
        weight.copy_(quantised(weight, bits).dequantised())
    return model


def store_integers(
    models: Mapping[str, ir.Model], weights: Mapping[str, Quantised], accuracy_level: int | None, *, whole_tables: bool = False
) -> None:
    """Replace weights in the graphs of a bundle by their integers and scales; all graphs share the stored tensors.

    Args:
        accuracy_level: write MatMulNBits of this level: 1 computes in float32, 4 rounds activations to 8 bits in groups. Default:
            DequantizeLinear and MatMul.
        whole_tables: dequantise a whole table before rows are looked up, for runtimes that gather no integers.
    """
    if accuracy_level is None:
        for name, weight in weights.items():
            stored = _transposed(name, weight)
            for model in models.values():
                for number, use in enumerate(_uses(model, name)):
                    _dequantise(use, weight, stored, number, whole_tables)
    else:
        for names in of_one_input(models.values(), weights):
            weight, widths = joined([weights[name] for name in names]), [len(weights[name].scale) for name in names]
            stored = _packed("+".join(names), weight)
            for model in models.values():
                for number, together in enumerate(zip(*(_uses(model, name) for name in names), strict=True)):
                    _fuse(model.graph, together, weight, widths, stored, number, accuracy_level)
                    model.opset_imports[MICROSOFT] = 1
    for model in models.values():
        common.RemoveUnusedNodesPass()(model)


def _uses(model: ir.Model, name: str) -> list[Use]:
    value = model.graph.initializers.get(PARAMETER + name)
    return [] if value is None else list(uses(value))


def joined(weights: Sequence[Quantised]) -> Quantised:
    """Return weights of the same inputs as one, with the outputs of all."""
    integers, scale = (torch.cat(parts) for parts in zip(*(weight[:2] for weight in weights), strict=True))
    return weights[0]._replace(integers=integers, scale=scale)


class _Stored(NamedTuple):
    integers: ir.TensorProtocol
    scale: ir.TensorProtocol

    def values(self, graph: ir.Graph, number: int = 0) -> tuple[ir.Value, ir.Value]:
        """Return both as initializers of `graph`; each `number` has its own initializers of the same tensors."""
        return tuple(initializer(graph, tensor, number) for tensor in self)  # type: ignore[return-value]


def _transposed(name: str, weight: Quantised) -> _Stored:
    """Integers [in, out] int8 or int4, scales [groups, out]."""
    integers = weight.integers.flatten(1)[:, : weight.inputs].T.contiguous()
    scale = ir.tensor_adapters.TorchTensor(weight.scale.T.contiguous(), name=f"{name}_scale")
    if weight.bits == 8:
        return _Stored(ir.tensor(integers.numpy(), name=f"{name}_integers"), scale)
    flat = integers.flatten()
    packed = _pairs(F.pad(flat, (0, len(flat) % 2)) & 0xF)
    return _Stored(ir.PackedTensor(packed, ir.DataType.INT4, shape=ir.Shape(integers.shape), name=f"{name}_integers"), scale)


def _packed(name: str, weight: Quantised) -> _Stored:
    """Integers [out, groups, bytes] uint8 around a zero point of 128 or 8, scales [out, groups]."""
    raised = weight.integers.short() + 2 ** (weight.bits - 1)
    integers = raised.to(torch.uint8).numpy() if weight.bits == 8 else _pairs(raised)
    scale = ir.tensor_adapters.TorchTensor(weight.scale, name=f"{name}_scale")
    return _Stored(ir.tensor(integers, name=f"{name}_integers"), scale)


def _pairs(values: Tensor) -> Any:
    """Pack two 4-bit values into a byte, the first in the lower half: [..., 2 n] -> uint8 [..., n]."""
    values = values.to(torch.uint8)
    return (values[..., 0::2] | values[..., 1::2] << 4).numpy()


def _dequantise(use: Use, weight: Quantised, stored: _Stored, number: int, whole_tables: bool) -> None:
    """Put a DequantizeLinear next to a product or a lookup.

    onnxruntime fuses the two if the integers are initializers of the graph around them, a Loop's body for example, and no other
    node reads these.
    """
    graph = use.node.graph
    assert isinstance(graph, ir.Graph)
    integers, scale = stored.values(graph, number)
    write = _Writer(graph, use.node)
    blocks = {"axis": 0, "block_size": weight.group}
    if not use.lookup:
        use.node.replace_input_with(1, write("DequantizeLinear", [integers, scale], **blocks))
        if use.node.op_type == "Gemm":
            use.node.attributes["transB"] = ir.AttrInt64("transB", 0)
        return
    ids = use.node.inputs[1]
    if whole_tables:
        columns = write("Gather", [write("DequantizeLinear", [integers, scale], **blocks), ids], axis=1)
    else:
        if weight.bits == 4:  # Gather has no 4-bit form
            integers = write("Cast", [integers], to=ir.DataType.INT8)
        columns = write("DequantizeLinear", [write("Gather", [source, ids], axis=1) for source in (integers, scale)], **blocks)
    replace(graph, use.node, ir.node("Transpose", [columns], {"perm": [1, 2, 0]}, name=use.node.name))


def _fuse(
    outer: ir.Graph,
    together: Sequence[Use],
    weight: Quantised,
    widths: Sequence[int],
    stored: _Stored,
    number: int,
    accuracy_level: int,
) -> None:
    """Replace products of one input by one MatMulNBits, or a lookup by one in the same integers.

    Args:
        widths: outputs of each product.
    """
    use = together[0]
    graph = use.node.graph
    assert isinstance(graph, ir.Graph)
    integers, scale = stored.values(outer, number)
    if not use.lookup:
        sizes = {"N": len(weight.scale), "K": weight.inputs, "bits": weight.bits, "block_size": weight.group}
        bias = [None, None, use.node.inputs[2]] if len(use.node.inputs) == 3 else []
        product = ir.node(
            "MatMulNBits",
            [use.node.inputs[0], integers, scale, *bias],
            {**sizes, "accuracy_level": accuracy_level},
            domain=MICROSOFT,
            name=use.node.name,
        )
        if len(together) == 1:
            replace(graph, use.node, product)
        else:
            _split(graph, [part.node for part in together], product, widths)
        return
    write = _Writer(graph, use.node)
    ids = use.node.inputs[1]
    rows, steps = (write("Gather", [source, ids], axis=0) for source in (integers, scale))
    if weight.bits == 4:
        low = write("BitwiseAnd", [rows, write.constant(15, torch.uint8)])
        high = write("BitShift", [rows, write.constant(4, torch.uint8)], direction="RIGHT")
        pairs = write("Concat", [write("Unsqueeze", [half, write.constant([-1])]) for half in (low, high)], axis=-1)
        rows = write("Reshape", [pairs, write.constant([0, 0, 0, weight.group])])
    centred = write("Sub", [write("Cast", [rows], to=scale.dtype), write.constant(2 ** (weight.bits - 1), weight.scale.dtype)])
    scaled = write("Mul", [centred, write("Unsqueeze", [steps, write.constant([-1])])])
    flat = write("Reshape", [scaled, write.constant([0, 0, -1])])
    ends = [write.constant([at]) for at in (0, weight.inputs, -1)]
    replace(graph, use.node, ir.node("Slice", [flat, *ends], name=use.node.name))


def _split(graph: ir.Graph, products: Sequence[ir.Node], joint: ir.Node, widths: Sequence[int]) -> None:
    """Replace products by the parts of a joint one."""
    first = next(node for node in graph if node in products)
    joint.outputs[0].name = f"{joint.name}/joint:0"
    graph.insert_before(first, joint)
    sizes = _Writer(graph, first).constant(list(widths))
    parts = ir.node("Split", [joint.outputs[0], sizes], {"axis": -1}, num_outputs=len(products), name=f"{joint.name}/Split")
    graph.insert_before(first, parts)
    for product, part in zip(products, parts.outputs, strict=True):
        part.type, part.shape = product.outputs[0].type, product.outputs[0].shape
        part.name = product.outputs[0].name
        ir.convenience.replace_all_uses_with(product.outputs[0], part, replace_graph_outputs=True)
        graph.remove(product, safe=True)


class _Writer:
    """Inserts nodes before a node, and names them after it."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self._graph, self._before, self._count = graph, before, 0

    def __call__(self, operator: str, inputs: list[Any], **attributes: Any) -> ir.Value:
        node = ir.node(operator, inputs, attributes, name=f"{self._before.name}/{operator}_{self._count}")
        node.outputs[0].name = f"{node.name}:0"
        self._graph.insert_before(self._before, node)
        self._count += 1
        return node.outputs[0]

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> ir.Value:
        return self("Constant", [], value=ir.tensor_adapters.TorchTensor(torch.tensor(value, dtype=dtype)))
