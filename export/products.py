"""Where graphs use the weights of linear layers, and their storage as [in, out]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from zoo.export.trace import PARAMETER

import onnx_ir as ir  # isort: skip  (zoo.export.trace says what to install where it is missing)
from onnx_ir.passes import common  # isort: skip


class Use(NamedTuple):
    """A node that reads a weight [out, in]: a product with its transpose, or a lookup of its rows."""

    node: ir.Node
    lookup: bool


def uses(weight: ir.Value) -> Iterator[Use]:
    """Yield every use of a linear layer's weight in a graph and in the graphs inside it; Transposes in between are skipped."""
    for node, _ in list(weight.uses()):
        if node.op_type == "Transpose":
            yield from (Use(product, lookup=False) for product, _ in list(node.outputs[0].uses()))
        else:
            yield Use(node, lookup=node.op_type == "Gather")


def of_one_input(models: Iterable[ir.Model], names: Iterable[str]) -> list[list[str]]:
    """Return the weights in groups of those that multiply the same inputs in every graph, so that one product can do for all."""
    graphs = [model.graph for model in models]
    groups: dict[object, list[str]] = {}
    for name in names:
        weights = [graph.initializers[PARAMETER + name] for graph in graphs if PARAMETER + name in graph.initializers]
        found = [use for weight in weights for use in uses(weight)]
        multiplied = found and all(use.node.op_type == "MatMul" for use in found)
        groups.setdefault(tuple(use.node.inputs[0] for use in found) if multiplied else name, []).append(name)
    return list(groups.values())


def store_transposed(models: Mapping[str, ir.Model], weights: Mapping[str, Tensor]) -> None:
    """Store weights [out, in] as [in, out] in all graphs of a bundle, except where rows are looked up, as in a tied embedding.

    Runtimes then multiply by the memory-mapped weights directly, and keep no transposed copies. Lookups and products read one stored
    tensor by two names: a runtime that packs it for products then releases the pages that it read.
    """
    for name, weight in weights.items():
        values = [model.graph.initializers[PARAMETER + name] for model in models.values() if PARAMETER + name in model.graph.initializers]
        found = [(value, use) for value in values for use in uses(value)]
        if any(use.lookup for _, use in found):
            _separate(name, weight, values)
            continue
        stored = _transposed(name, weight.detach())
        for value in values:
            value.const_value, value.shape = stored, stored.shape
        for value, use in found:
            use.node.replace_input_with(1, value)
            if use.node.op_type == "Gemm":
                use.node.attributes["transB"] = ir.AttrInt64("transB", 0)
    for model in models.values():
        common.RemoveUnusedNodesPass()(model)


def _separate(name: str, weight: Tensor, values: Iterable[ir.Value]) -> None:
    """Give products initializers of their own, of the tensor in which the same graph looks up rows."""
    stored = ir.tensor_adapters.TorchTensor(weight.detach(), name=name)
    for value in values:
        value.const_value = stored
        products = [(node, index) for node, index in value.uses() if node.op_type != "Gather"]
        for node, index in products if len(products) < len(value.uses()) else []:
            assert isinstance(node.graph, ir.Graph)
            node.replace_input_with(index, initializer(node.graph, stored, 1))


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol, number: int) -> ir.Value:
    """Return the initializer of `graph` that holds a parameter; each `number` has one of its own."""
    name = PARAMETER + str(tensor.name) + (f"_{number}" if number else "")
    if name not in graph.initializers:
        value = ir.val(name, tensor.dtype, tensor.shape.numpy())
        value.const_value = tensor
        graph.initializers[name] = value
    return graph.initializers[name]


def _transposed(name: str, weight: Tensor) -> ir.LazyTensor:
    """Transpose a weight when it is written, so that no second copy of all weights is held."""

    def tensor() -> ir.TensorProtocol:
        return ir.tensor_adapters.TorchTensor(weight.T.contiguous(), name=name)

    dtype = ir.tensor_adapters.from_torch_dtype(weight.dtype)
    return ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(weight.T.shape), name=name)
