"""Trace PyTorch modules to ONNX graphs, and assemble graphs from parts traced once each."""

from __future__ import annotations

import ast
import functools
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from zoo.errors import ZooError
from zoo.export.operators import DOMAIN, MICROSOFT, Scans

try:
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import optimize
    from torch.onnx._internal.exporter._registration import ONNXRegistry
except ImportError:
    raise ZooError("export: needs pip install 'sleep-zoo[onnx]'") from None

OPSET = 24
IR_VERSION = 12  # the oldest version with opset 24
PARAMETER = "model."  # prefix of parameter names: traced modules hold theirs in `model`
FOLDED = 1024  # bytes up to which constants are folded; the graph computes larger ones
BATCH = "batch"


@contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    """Silence these loggers' warnings: that torchvision is missing, and that parameters have no value."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_build_translations = ONNXRegistry.from_torchlib


@functools.cache
def _translations(opset_version: int) -> ONNXRegistry:
    """Return torch's translations to ONNX. Torch parses the source of all 500 for every graph."""
    return _build_translations(opset_version=opset_version)


@_errors_only("torch.onnx", "onnx_ir")
def trace(module: nn.Module, example: Mapping[str, Tensor], scans: Scans) -> ir.Model:
    """Trace a module over named tensors to ONNX, with a dynamic dimension `batch` and with parameters by name only.

    Nodes are named by their place in the module. Placeholders of domain `zoo` remain, except those of `scans`.
    """
    batch = torch.export.Dim(BATCH)
    shapes = {name: {0: batch} if tensor.ndim and not name.startswith("fixed") else {} for name, tensor in example.items()}
    cached = mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(_translations))
    with torch.no_grad(), warnings.catch_warnings(), cached:
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (dict(example),), dynamic_shapes=(shapes,), strict=False)
        spec = program.call_spec.out_spec
        assert spec is not None
        outputs = tree_unflatten(range(spec.num_leaves), spec)
        onnx = torch.onnx.export(
            program, opset_version=OPSET, input_names=list(example), output_names=list(outputs), dynamo=True, optimize=False, verbose=False
        )
    assert onnx is not None
    model = onnx.model
    parameters = set(module.state_dict())
    for name, value in list(model.graph.initializers.items()):
        if is_parameter(value) and name not in parameters:  # a constant of one of the model's modules
            del model.graph.initializers[name]
            value.name = name.removeprefix(PARAMETER)
            model.graph.register_initializer(value)
        elif is_parameter(value):
            value.const_value = None  # keeps parameters from being folded, or merged with equal ones
    _name_nodes(model)
    optimize(model, output_size_limit=FOLDED)
    _name_batch(model.graph)
    for node in list(model.graph):
        if (node.domain, node.op_type) == (DOMAIN, "Scan"):
            _put_scan(model.graph, node, scans)
    return model


def _name_batch(graph: ir.Graph) -> None:
    """Rename the dynamic dimension, which torch calls s41 or the like, to `batch`, including in expressions such as 2*s41."""
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(
                re.sub(r"\bs\d+\b", BATCH, str(size)) if isinstance(size, ir.SymbolicDim) else size for size in value.shape
            )


def _name_nodes(model: ir.Model) -> None:
    """Name every node after its module and its operator, such as mixer/q_proj/MatMul."""
    seen: Counter[str] = Counter()
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in parts:
        for node in graph.all_nodes():
            scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
            place = scopes[-2] if len(scopes) > 1 else ""
            node.name = _unique(seen, "/".join([*place.split(".")[1:], node.op_type]))


def _unique(seen: Counter[str], name: str) -> str:
    chosen = name
    while chosen in seen:
        seen[name] += 1
        chosen = f"{name}_{seen[name]}"
    seen[chosen] += 1
    return chosen


@_errors_only("onnx_ir")
def tidy(model: ir.Model, names: Sequence[str]) -> None:
    """Merge equal subexpressions, drop unused nodes, and name values after their nodes and the outputs by `names`."""
    graph = model.graph
    common.DeduplicateInitializersPass(size_limit=FOLDED)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    seen: Counter[str] = Counter()
    for node in graph.all_nodes():
        node.name = _unique(seen, node.name or node.op_type)
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}:{i}"
    taken = {*graph.inputs, *graph.initializers.values()}
    for i, value in enumerate(graph.outputs):
        if value in taken:  # every output needs a separate value
            copy = ir.node("Identity", [value], name=f"{names[i]}/Identity")
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            graph.outputs[i] = copy.outputs[0]
        taken.add(graph.outputs[i])
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name
    model.ir_version = IR_VERSION
    model.functions.clear()
    used = {node.domain for node in graph.all_nodes()}
    model.opset_imports.clear()
    model.opset_imports.update({"": OPSET} | ({MICROSOFT: 1} if MICROSOFT in used else {}))


def inline(outer: ir.Graph, placeholder: ir.Node, part: ir.Graph, module: str) -> None:
    """Replace a placeholder node with a copy of `part`, which was traced from a module of the model and has its inputs and outputs."""
    part = part.clone()
    given: dict[ir.Value, Any] = dict(zip(part.inputs, placeholder.inputs, strict=True))
    outputs = [given.get(value, value) for value in part.outputs]
    for value, outside in given.items():
        ir.convenience.replace_all_uses_with(value, outside)
    hoist_initializers(part, outer, f"{module}.", f"{module}/")
    part.outputs.clear()
    for node in list(part):
        part.remove(node, safe=False)
        prefix_names(node, f"{module}/")
        outer.insert_before(placeholder, node)
    ir.convenience.replace_all_uses_with(placeholder.outputs, outputs, replace_graph_outputs=True)
    outer.remove(placeholder)


def hoist_initializers(part: ir.Graph, outer: ir.Graph, module: str, place: str) -> None:
    """Move the parameters of `part`, which belong to `module` of the model, and its constants to the outer graph."""
    for name, value in list(part.initializers.items()):
        del part.initializers[name]
        if is_parameter(value):
            value.name = PARAMETER + module + name.removeprefix(PARAMETER)
            if value.name in outer.initializers:
                ir.convenience.replace_all_uses_with(value, outer.initializers[value.name])
                continue
        else:
            value.name = place + name
            while value.name in outer.initializers:
                value.name += "_"
        outer.initializers[value.name] = value


def prefix_names(node: ir.Node, place: str) -> None:
    """Prefix the names of a node and of all nodes inside it with their place in the model."""
    node.name = place + (node.name or node.op_type)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                prefix_names(inner, place)


def _put_scan(outer: ir.Graph, placeholder: ir.Node, scans: Scans) -> None:
    """Replace a placeholder by a Scan over the first axis of its chunks."""
    chunks = placeholder.attributes["chunks"].as_int()
    body = trace(*scans[placeholder.attributes["scan"].as_string()], scans).graph.clone()
    fixed: list[Any] = [*placeholder.inputs[1 + chunks :]]
    for value, outside in zip(body.inputs[1 + chunks :], fixed, strict=True):
        ir.convenience.replace_all_uses_with(value, outside)
    place = f"{placeholder.name}/"
    body.inputs[:] = body.inputs[: 1 + chunks]
    for value in body.inputs:
        value.name = place + str(value.name)
    hoist_initializers(body, outer, "", place)
    for node in body:
        prefix_names(node, place)
    scan = ir.node(
        "Scan", placeholder.inputs[: 1 + chunks], {"body": body, "num_scan_inputs": chunks}, num_outputs=2, name=placeholder.name
    )
    replace(outer, placeholder, scan)


def replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Replace `old` by `new`, which has the same outputs."""
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(old.outputs, new.outputs, replace_graph_outputs=True)
    for before, after in zip(old.outputs, new.outputs, strict=True):
        after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.remove(old, safe=True)


def reads(node: ir.Node) -> Iterable[ir.Value | None]:
    """Yield every value that a node, or a graph inside it, reads."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from reads(inner)


def is_parameter(value: ir.Value) -> bool:
    """Return True for initializers that are parameters of the model, False for the graph's own constants."""
    return str(value.name).startswith(PARAMETER)


def save(models: Mapping[str, ir.Model], parameters: Mapping[str, ir.TensorProtocol], folder: Path, weights: str) -> None:
    """Write each graph to the file of its name, and every parameter once to the file `weights`, which all graphs share.

    A parameter that already has a value, in another form than in `parameters`, keeps it.
    """
    graphs = [graph for model in models.values() for graph in model.graphs()]
    values: list[Any] = [value for graph in graphs for value in graph.initializers.values() if is_parameter(value)]
    for value in values:
        value.name = value.name.removeprefix(PARAMETER)
        if value.const_value is None:
            value.const_value = parameters[value.name]
    used = {id(value.const_value): value.const_value for value in values}
    stored = dict(zip(used, ir.external_data.convert_tensors_to_external(list(used.values()), folder, weights), strict=True))
    for value in values:
        value.const_value = stored[id(value.const_value)]
    for name, model in models.items():
        ir.save(model, folder / name)
