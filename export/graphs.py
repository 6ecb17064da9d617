"""A model's own modules as two ONNX graphs: one wake pass over one token, and one whole sleep. README.md has the picture."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.blocks.steps import Steps
from zoo.export.ring import PAST, PRESENT, pack, unpack, with_rings
from zoo.kernels.registry import ZooError
from zoo.model import Model, State

try:
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript.optimizer import optimize
except ImportError:
    raise ZooError("export: needs pip install 'sleep-zoo[onnx]'") from None

for noisy in ("torch.onnx", "onnx_ir"):  # they warn that torchvision is not there, and that parameters have no value while we trace
    logging.getLogger(noisy).setLevel(logging.ERROR)

OPSET = 24
IR_VERSION = 12  # the oldest that has opset 24
PARAMETER = "model."  # how the names of parameters start: Graph.model
LOOP = "Span"  # stands for the looped blocks until they are put in its place


class Graph(nn.Module):
    """What one ONNX graph computes, over tensors by name. B streams, windows of L tokens."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.window: int = model.config.window  # type: ignore[assignment]

    def fresh(self, batch: int) -> State:
        return with_rings(self.model.init_state(batch), self.window)

    def run(self, layers: range, h: Tensor, state: State, steps: Steps) -> tuple[Tensor, State]:
        fast, window = list(state.fast), list(state.window)
        for i in layers:
            h, fast[i], window[i] = self.model.blocks[i](h, fast[i], window[i], steps)
        return h, State(tuple(fast), tuple(window), state.position)


class Prediction(Graph):
    """input_ids [B, 1], position, every state -> logits [B, 1, V], every state."""

    def example(self) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(2, 1, dtype=torch.int64), "position": torch.tensor(0), **pack(self.fresh(2), PAST)}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = inputs["input_ids"]
        state, steps = unpack(inputs, PAST, self.fresh(ids.shape[0])), Steps(inputs["position"], 1, ids.device)
        h, state = self.run(range(len(self.model.blocks)), self.model.embedded(ids, steps), state, steps)
        return {"logits": self.model.logits(h), **pack(state, PRESENT)}


class Asleep(Graph):
    """What the sleep and its loop share.

    A window that restarts is empty, and at position 0, when a sleep starts and when it ends: only fast weights are read.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.restarts = model.eviction.restarts

    def carried(self, state: State, layers: range) -> State:
        """The part of a state that passes read and hand on."""
        fast = tuple(fast if i in layers else None for i, fast in enumerate(state.fast))
        window = tuple(cache if i in layers and not self.restarts else None for i, cache in enumerate(state.window))
        return State(fast, window, state.position)

    def place(self) -> dict[str, Tensor]:
        """Examples of the scalars that say where the chunk stands and how much of it counts."""
        return {"n_valid": torch.tensor(self.window)} | ({} if self.restarts else {"position": torch.tensor(0)})

    def steps(self, inputs: dict[str, Tensor]) -> Steps:
        n_valid = inputs["n_valid"]
        return Steps(inputs.get("position", 0), self.window, n_valid.device, n_valid)


class Pass(Asleep):
    """One pass of the span: the body of the loop.

    pass (0 is the first), h and first [B, L, D] (the last pass's output; the span's first input), place, state -> h, state.
    """

    def example(self) -> dict[str, Tensor]:
        h = torch.zeros(2, self.window, self.model.config.d_model)
        state = self.carried(self.fresh(2), self.model.span)
        return {"pass": torch.tensor(0), "h": h, "first": h.clone(), **self.place(), **pack(state, PAST)}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        h = inputs["h"]
        if self.model.config.loop_norm or self.model.config.inject:
            h = torch.where(inputs["pass"] > 0, self.model.between_passes(h, inputs["first"]), h)
        state = unpack(inputs, PAST, self.fresh(h.shape[0]))
        h, state = self.run(self.model.span, h, state, self.steps(inputs))
        return {"h": h, **pack(self.carried(state, self.model.span), PRESENT)}


class Consolidation(Asleep):
    """input_ids [B, L], n_valid (the rest is padding at the end), position unless windows restart, states -> every state, evicted."""

    def example(self) -> dict[str, Tensor]:
        ids = torch.zeros(2, self.window, dtype=torch.int64)
        return {"input_ids": ids, **self.place(), **pack(self.fresh(2), PAST)}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, steps = inputs["input_ids"], self.steps(inputs)
        fresh = self.fresh(ids.shape[0])
        state = unpack(inputs, PAST, fresh)
        if self.restarts:  # whatever is left in the window it is given
            state = state._replace(window=fresh.window)
        h, state = self.run(self.model.prelude, self.model.embedded(ids, steps), state, steps)
        h, state = self._loop(h, state, inputs)
        h, state = self.run(self.model.coda, h, state, steps)
        kept = fresh.window if self.restarts else self.model.evict(state).window
        return pack(state._replace(window=kept), PRESENT)

    def _loop(self, h: Tensor, state: State, inputs: dict[str, Tensor]) -> tuple[Tensor, State]:
        """A node in the place of the loop, with the inputs and outputs of `Pass`, less those that every pass gets anew."""
        carried = pack(self.carried(state, self.model.span), PAST)
        tensors = [h, *carried.values()]
        outputs = torch.onnx.ops.symbolic_multi_out(
            LOOP,
            [h, *(inputs[name] for name in self.place()), *carried.values()],
            dtypes=[x.dtype for x in tensors],
            shapes=[x.shape for x in tensors],
            version=OPSET,
        )
        return outputs[0], unpack(dict(zip(carried, outputs[1:], strict=True)), PAST, state)


def prediction(model: Model) -> ir.Model:
    """The graph of one wake pass over one token."""
    return _trace(Prediction(model))


def consolidation(model: Model) -> ir.Model:
    """The graph of one whole sleep. The span is the body of one Loop over `config.loops` passes."""
    sleep = _trace(Consolidation(model))
    node = next(node for node in sleep.graph if node.op_type == LOOP)
    _put_loop(sleep.graph, node, _trace(Pass(model)).graph, model.config.loops)
    return sleep


def save(models: Mapping[str, ir.Model], folder: Path, weights: str) -> None:
    """Write each graph to the file it is named by, and every parameter once to the file `weights`, to which all of them refer."""
    values: list[Any] = [value for model in models.values() for value in model.graph.initializers.values() if _is_parameter(value)]
    tensors = {value.name: value.const_value for value in values}
    stored = dict(zip(tensors, ir.external_data.convert_tensors_to_external(list(tensors.values()), folder, weights), strict=True))
    for value in values:
        value.const_value = stored[value.name]
        value.name = value.name.removeprefix(PARAMETER)
    for name, model in models.items():
        ir.save(model, folder / name)


def _trace(graph: Prediction | Pass | Consolidation) -> ir.Model:
    """The ONNX form of a graph: named inputs and outputs, any batch size, parameters under the model's names, nothing folded into them."""
    example = graph.example()
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} if tensor.ndim else {} for name, tensor in example.items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph, (example,), dynamic_shapes=(shapes,), strict=False)
        outputs = graph(example).keys()
        onnx = torch.onnx.export(
            program, opset_version=OPSET, input_names=list(example), output_names=list(outputs), dynamo=True, optimize=False, verbose=False
        )
    assert onnx is not None
    model = onnx.model
    model.ir_version = IR_VERSION
    parameters = {value: value.const_value for value in model.graph.initializers.values() if _is_parameter(value)}
    for value in parameters:
        value.const_value = None  # so that what a parameter holds is neither folded nor merged with its equal
    optimize(model, output_size_limit=1024)
    for value, tensor in parameters.items():
        value.const_value = tensor
    ClearMetadataAndDocStringPass()(model)
    return model


def _put_loop(outer: ir.Graph, stand_in: ir.Node, body: ir.Graph, trips: int) -> None:
    """Put a Loop of `trips` passes in the place of `stand_in`.

    The body refers to the outer graph for the weights, for the window caches at the chunk's start and for whatever else
    is the same in every pass, which is computed there once.
    """
    trip, h, first, *given = body.inputs
    start: dict[Any, Any] = dict(zip([h, *given], stand_in.inputs, strict=True)) | {first: stand_in.inputs[0]}
    carried = [h, *(value for value in given if str(value.name).startswith(PAST))]
    for value, outside in start.items():
        if value is not h and not value.name.endswith("recurrent_state"):
            ir.convenience.replace_all_uses_with(value, outside)
    for name, value in list(body.initializers.items()):
        del body.initializers[name]
        if not _is_parameter(value):
            value.name = f"{LOOP}/{name}"
        elif name in outer.initializers:
            ir.convenience.replace_all_uses_with(value, outer.initializers[name])
            continue
        outer.register_initializer(value)

    varying = {trip, *carried}
    for value in varying:
        value.name = f"{LOOP}/{value.name}"
    for node in list(body):
        node.name = f"{LOOP}/{node.name}"
        for value in node.outputs:
            value.name = f"{LOOP}/{value.name}"
        if varying.isdisjoint(node.inputs):
            body.remove(node)
            outer.insert_before(stand_in, node)
        else:
            varying.update(node.outputs)

    onward = ir.node("Constant", [], {"value": ir.tensor(True)}, name=f"{LOOP}/onward")
    onward.outputs[0].name = f"{LOOP}/onward"
    body.append(onward)
    body.outputs.insert(0, onward.outputs[0])
    body.inputs[:] = [trip, ir.val(f"{LOOP}/go", ir.DataType.BOOL, []), *carried]
    passes = ir.node("Constant", [], {"value": ir.tensor(trips)}, name="passes")
    loop = ir.node(
        "Loop", [passes.outputs[0], None, *(start[value] for value in carried)], {"body": body}, num_outputs=len(carried), name=LOOP
    )
    outer.insert_before(stand_in, [passes, loop])
    ir.convenience.replace_all_uses_with(stand_in.outputs, loop.outputs, replace_graph_outputs=True)
    for old, new in zip(stand_in.outputs, loop.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    outer.remove(stand_in)


def _is_parameter(value: ir.Value) -> bool:
    """Whether an initializer is one of the model's parameters, and not a constant that the graph brings."""
    return str(value.name).startswith(PARAMETER)
