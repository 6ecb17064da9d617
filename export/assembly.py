"""Assembly of a graph: placeholders for blocks and for the passes of a sleep are replaced by parts that are traced once."""

from __future__ import annotations

import json
from typing import Any

from zoo.blocks.attention import KV
from zoo.blocks.mixer import parts
from zoo.export.graphs import BlockPart, Coda, Graph, Head, Pass, Prelude, Sleep, Wake
from zoo.export.operators import DIALECTS, DOMAIN, Scans
from zoo.export.ring import PAST, FilledKV, RingKV
from zoo.export.trace import hoist_initializers, inline, prefix_names, reads, replace, tidy, trace
from zoo.kernels.dispatch import replaced

import onnx_ir as ir  # isort: skip  (zoo.export.trace says what to install where it is missing)
from zoo.export.rewrites import rewrite_block, skip_reshapes  # isort: skip

_blocks: dict[object, ir.Graph] = {}  # traced blocks; small, since they hold no weights


def build(graph: Wake | Head | Pass | Sleep | Prelude | Coda, dialect: str) -> ir.Model:
    """Return the complete ONNX form of a graph, in a dialect of `zoo.export.operators`."""
    scans: Scans = {}
    with replaced(DIALECTS[dialect](scans)):
        made = trace(graph, graph.example(), scans)
        outputs = [str(value.name) for value in made.graph.outputs]
        for node in list(made.graph):
            if (node.domain, node.op_type) == (DOMAIN, "Block"):
                layer = node.attributes["layer"].as_int()
                inline(made.graph, node, _block(graph, layer, dialect, scans), f"blocks.{layer}")
    for node in list(made.graph):
        if (node.domain, node.op_type) == (DOMAIN, "Loop"):
            body = build(Pass(graph.model, graph.slots), dialect).graph
            assert isinstance(graph, Sleep)
            _put_loop(made.graph, node, body, graph.looped)
    tidy(made, outputs)
    return made


def _block(graph: Graph, layer: int, dialect: str, scans: Scans) -> ir.Graph:
    """Return the traced graph of a block; blocks of the same kind share one."""
    config = graph.model.config
    kind, mlp = config.pattern[layer], config.mlp_pattern[layer]
    made_of = (config.d_model, config.mlp_width, config.norm, config.norm_eps)
    dtypes = (graph.model.residual_dtype, *(parameter.dtype for parameter in graph.model.blocks[layer].parameters()))
    options = json.dumps([config.blocks.get(kind), config.mlps.get(mlp)])
    block: Any = graph.model.blocks[layer]
    rings = any(isinstance(part, KV) for part in parts(block.mixer.new_window(1)))
    reach = graph.model.eviction.reach
    ring = (graph.slots, reach) if rings else ()
    key = (kind, mlp, options, *made_of, *dtypes, graph.tokens, *ring, dialect)
    if key not in _blocks:
        filled = dialect == "ort" and reach is None  # windows do not slide
        part = BlockPart(block, graph.model.residual_dtype, graph.tokens, graph.slots, FilledKV if filled else RingKV)
        model = trace(part, part.example(), scans)
        rewrite_block(model, rotations=dialect == "ort" and not graph.tokens.padded)
        skip_reshapes(model.graph)
        _blocks[key] = model.graph
    return _blocks[key]


def _put_loop(outer: ir.Graph, placeholder: ir.Node, body: ir.Graph, passes: int) -> None:
    """Replace `placeholder` by a Loop of `passes` iterations.

    The body refers to the outer graph for the weights, for the window caches at the start of the chunk, and for everything
    else that is the same in every pass and therefore computed once.
    """
    n, h, first, *given = body.inputs
    start: dict[Any, Any] = dict(zip([h, *given], placeholder.inputs, strict=True)) | {first: placeholder.inputs[0]}
    carried = [h, *(value for value in given if str(value.name).startswith(PAST))]
    for value, outside in start.items():
        if value is not h and not value.name.endswith("recurrent_state"):
            ir.convenience.replace_all_uses_with(value, outside)
    hoist_initializers(body, outer, "", "span/")
    varying: set[ir.Value | None] = {n, *carried}
    for value in (n, *carried):
        value.name = f"span/{value.name}"
    for node in list(body):
        prefix_names(node, "span/")
        if varying.isdisjoint(reads(node)):
            body.remove(node)
            outer.insert_before(placeholder, node)
        else:
            varying.update(node.outputs)

    # some runtimes run no iteration without an explicit condition, although ONNX calls it optional
    again = ir.node("Constant", [], {"value": ir.tensor(True)}, name="span/again")
    body.append(again)
    body.outputs.insert(0, again.outputs[0])
    body.inputs[:] = [n, ir.val("span/condition", ir.DataType.BOOL, []), *carried]
    constants = {"passes": ir.tensor(passes), "always": ir.tensor(True)}
    count, always = (ir.node("Constant", [], {"value": value}, name=name) for name, value in constants.items())
    outer.insert_before(placeholder, [count, always])
    given = [count.outputs[0], always.outputs[0], *(start[value] for value in carried)]
    replace(outer, placeholder, ir.node("Loop", given, {"body": body}, num_outputs=len(carried), name="span/Loop"))
