"""PyTorch modules as ONNX graphs, and graphs put together from parts that were traced once each."""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from zoo.errors import ZooError
from zoo.export.operators import DOMAIN, MICROSOFT, trips

try:
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import optimize
except ImportError:
    raise ZooError("export: needs pip install 'sleep-zoo[onnx]'") from None

for noisy in ("torch.onnx", "onnx_ir"):  # they warn that torchvision is not there, and that parameters have no value while we trace
    logging.getLogger(noisy).setLevel(logging.ERROR)

OPSET = 24
IR_VERSION = 12  # the oldest that has opset 24
PARAMETER = "model."  # how the names of parameters start: the module that is traced has a `model`
FOLDED = 1024  # bytes; larger tables are computed by the graph


def trace(module: nn.Module, example: Mapping[str, Tensor]) -> ir.Model:
    """The ONNX form of a module over tensors by name: any batch size, parameters under their names, nothing folded into them.

    Nodes are named by their place in the module. Stand-ins of domain `zoo` remain.
    """
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} if tensor.ndim and not name.startswith("fixed") else {} for name, tensor in example.items()}
    with torch.no_grad(), warnings.catch_warnings():
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
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, value in list(model.graph.initializers.items()):
        if is_parameter(value) and name not in parameters:  # a constant that one of the model's modules brings
            del model.graph.initializers[name]
            value.name = name.removeprefix(PARAMETER)
            model.graph.register_initializer(value)
        elif is_parameter(value):
            value.const_value = None  # so that what a parameter holds is neither folded nor merged with its equal
    _name_nodes(model)
    optimize(model, output_size_limit=FOLDED)
    for node in list(model.graph):
        if (node.domain, node.op_type) == (DOMAIN, "Scan"):
            _put_scan(model.graph, node)
    return model


def _name_nodes(model: ir.Model) -> None:
    """Call every node by the module that made it and its operator, such as mixer/q_proj/MatMul."""
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


def tidy(model: ir.Model, names: Sequence[str]) -> None:
    """Compute nothing twice, keep nothing unused, and name every value after the node that makes it; the outputs are given names."""
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
        if value in taken:  # an output is a value of its own
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


def inline(outer: ir.Graph, stand_in: ir.Node, part: ir.Graph, module: str) -> None:
    """Put a copy of `part`, traced from one of the model's modules, in the place of a node with its inputs and outputs."""
    part = part.clone()
    given: dict[ir.Value, Any] = dict(zip(part.inputs, stand_in.inputs, strict=True))
    outputs = [given.get(value, value) for value in part.outputs]
    for value, outside in given.items():
        ir.convenience.replace_all_uses_with(value, outside)
    hand_over_initializers(part, outer, f"{module}.", f"{module}/")
    part.outputs.clear()
    for node in list(part):
        part.remove(node, safe=False)
        prefix_names(node, f"{module}/")
        outer.insert_before(stand_in, node)
    ir.convenience.replace_all_uses_with(stand_in.outputs, outputs, replace_graph_outputs=True)
    outer.remove(stand_in)


def hand_over_initializers(part: ir.Graph, outer: ir.Graph, module: str, place: str) -> None:
    """Let `part` refer to the outer graph for its parameters, which are those of a module of the model, and for its constants."""
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
    """Say of a node, and of all that it contains, where in the model it is."""
    node.name = place + (node.name or node.op_type)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                prefix_names(inner, place)


def _put_scan(outer: ir.Graph, stand_in: ir.Node) -> None:
    """A Scan over the first axis of its chunks in the place of `stand_in`."""
    chunks = stand_in.attributes["chunks"].as_int()
    body = trace(*trips[stand_in.attributes["trip"].as_string()]).graph.clone()
    fixed: list[Any] = [*stand_in.inputs[1 + chunks :]]
    for value, outside in zip(body.inputs[1 + chunks :], fixed, strict=True):
        ir.convenience.replace_all_uses_with(value, outside)
    place = f"{stand_in.name}/"
    body.inputs[:] = body.inputs[: 1 + chunks]
    for value in body.inputs:
        value.name = place + str(value.name)
    hand_over_initializers(body, outer, "", place)
    for node in body:
        prefix_names(node, place)
    scan = ir.node("Scan", stand_in.inputs[: 1 + chunks], {"body": body, "num_scan_inputs": chunks}, num_outputs=2, name=stand_in.name)
    replace(outer, stand_in, scan)


def replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`, which has the same outputs."""
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(old.outputs, new.outputs, replace_graph_outputs=True)
    for before, after in zip(old.outputs, new.outputs, strict=True):
        after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.remove(old)


def reads(node: ir.Node) -> Iterable[ir.Value | None]:
    """Every value that a node, or a graph that it contains, reads."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from reads(inner)


def is_parameter(value: ir.Value) -> bool:
    """Whether an initializer is one of the model's parameters, and not a constant that the graph brings."""
    return str(value.name).startswith(PARAMETER)


def save(models: Mapping[str, ir.Model], parameters: Mapping[str, ir.TensorProtocol], folder: Path, weights: str) -> None:
    """Write each graph to the file it is named by, and every parameter once to the file `weights`, to which all of them refer."""
    values: list[Any] = [value for model in models.values() for value in model.graph.initializers.values() if is_parameter(value)]
    used = {value.name: parameters[value.name.removeprefix(PARAMETER)] for value in values}
    stored = dict(zip(used, ir.external_data.convert_tensors_to_external(list(used.values()), folder, weights), strict=True))
    for value in values:
        value.const_value = stored[value.name]
        value.name = value.name.removeprefix(PARAMETER)
    for name, model in models.items():
        ir.save(model, folder / name)
