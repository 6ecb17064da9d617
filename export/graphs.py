"""What each graph computes: the model's own modules over tensors by name. README.md has the picture.

Every kind of block is traced once per graph; a graph is traced with a node in the place of each block, and of the loop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic_multi_out

from zoo.blocks.block import Block
from zoo.blocks.positions import Positions
from zoo.export.operators import DIALECTS, DOMAIN
from zoo.export.ring import PAST, PRESENT, pack, unpack, with_rings
from zoo.export.trace import hand_over_initializers, inline, prefix_names, reads, replace, tidy, trace
from zoo.kernels.dispatch import use
from zoo.model import Model
from zoo.state import State

import onnx_ir as ir  # isort: skip  (zoo.export.trace says what to install where it is missing)


class Run(NamedTuple):
    """The tokens that a graph reads at once."""

    length: int
    padded: bool
    """Whether only the first n_valid of them count."""
    fresh: bool
    """Whether they are the first of a window that restarts: nothing cached is read, nor handed on."""

    def inputs(self) -> dict[str, Tensor]:
        """Examples of the scalars that say where the tokens stand in their stream, and how many count."""
        place = {} if self.fresh else {"position": torch.tensor(0)}
        return ({"n_valid": torch.tensor(self.length)} if self.padded else {}) | place

    def positions(self, inputs: Mapping[str, Tensor], device: torch.device) -> Positions:
        return Positions(inputs.get("position", 0), self.length, device, inputs.get("n_valid"))


class BlockPart(nn.Module):
    """One block over a run of tokens: h [B, T, D], place, fast weights, window cache -> h, fast weights, window cache."""

    def __init__(self, block: Block, run: Run, slots: int) -> None:
        super().__init__()
        self.model, self.tokens, self.slots = block, run, slots

    def example(self) -> dict[str, Tensor]:
        weight = next(self.model.parameters())
        h = torch.zeros(2, self.tokens.length, self.model.mixer_norm.normalized_shape[0], dtype=weight.dtype)
        state = pack(self._fresh(2), PAST, window=not self.tokens.fresh)
        return {"h": h, **self.tokens.inputs(), **{name: torch.zeros_like(tensor, device="cpu") for name, tensor in state.items()}}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        h = inputs["h"]
        state = unpack(inputs, PAST, self._fresh(h.shape[0]))
        y, fast, window = self.model(h, state.fast[0], state.window[0], self.tokens.positions(inputs, h.device))
        return {"y": y, **pack(State((fast,), (window,), 0), PRESENT, window=not self.tokens.fresh)}

    def _fresh(self, batch: int) -> State:
        mixer: Any = self.model.mixer
        return with_rings(State((mixer.new_fast(batch),), (mixer.new_window(batch),), 0), self.slots)


class Graph(nn.Module):
    """What one graph computes, over tensors by name. B streams; rings of `slots` tokens."""

    tokens: Run
    asleep = False

    def __init__(self, model: Model, slots: int) -> None:
        super().__init__()
        self.model, self.slots = model, slots

    def fresh(self, batch: int) -> State:
        return with_rings(self.model.init_state(batch), self.slots)

    def states(self, layers: range) -> dict[str, Tensor]:
        """Examples of the states of some layers."""
        state = self.part(self.fresh(2), layers)
        return {name: torch.zeros_like(tensor, device="cpu") for name, tensor in pack(state, PAST).items()}

    def ids(self) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(2, self.tokens.length, dtype=torch.int64), **self.tokens.inputs()}

    def h(self) -> Tensor:
        return torch.zeros(2, self.tokens.length, self.model.config.d_model, dtype=self.model.embed.weight.dtype)

    def part(self, state: State, layers: range) -> State:
        """The part of a state that belongs to some layers."""
        depth = len(self.model.blocks)
        fast = tuple(x if i in layers else None for i, x in enumerate(state.fast))
        return State(fast, tuple(x if i % depth in layers else None for i, x in enumerate(state.window)), state.position)

    def embedded(self, inputs: Mapping[str, Tensor]) -> Tensor:
        ids = inputs["input_ids"]
        return self.model.embedded(ids, self.tokens.positions(inputs, ids.device), asleep=self.asleep)

    def run(self, layers: range, h: Tensor, state: State, inputs: Mapping[str, Tensor], loop: int = 0) -> tuple[Tensor, State]:
        """Blocks one after the other, a stand-in for each; with wake loops, each loop has window caches of its own."""
        fast, window = list(state.fast), list(state.window)
        for i in layers:
            at = loop * len(self.model.blocks) + i
            one = State((fast[i],), (window[at],), 0)
            given = {"h": h, **{name: inputs[name] for name in self.tokens.inputs()}, **pack(one, PAST, window=not self.tokens.fresh)}
            changed = {name: tensor for name, tensor in given.items() if name not in self.tokens.inputs()}
            h, *after = symbolic_multi_out(
                f"{DOMAIN}::Block",
                list(given.values()),
                {"layer": i},
                dtypes=[tensor.dtype for tensor in changed.values()],
                shapes=[tensor.shape for tensor in changed.values()],
                version=1,
            )
            one = unpack(dict(zip(list(changed)[1:], after, strict=True)), PAST, one)
            fast[i], window[at] = one.fast[0], one.window[0]
        return h, State(tuple(fast), tuple(window), state.position)


class Wake(Graph):
    """input_ids [B, T], place, every state -> logits [B, T, V], every state.

    Where a runtime wants `position_ids` [B, T], the first of them stands for all: streams advance together.
    """

    def __init__(self, model: Model, slots: int, tokens: int, position_ids: bool) -> None:
        super().__init__(model, slots)
        self.tokens = Run(tokens, padded=tokens > 1, fresh=False)
        self.position_ids = position_ids

    def example(self) -> dict[str, Tensor]:
        ids = self.ids()
        if self.position_ids:
            del ids["position"]
            ids["position_ids"] = torch.zeros_like(ids["input_ids"])
        return {**ids, **self.states(range(len(self.model.blocks)))}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        model = self.model
        if self.position_ids:
            inputs = inputs | {"position": inputs["position_ids"][0, 0]}
        h, state = self.embedded(inputs), unpack(inputs, PAST, self.fresh(inputs["input_ids"].shape[0]))
        first, after = h, []
        for loop in range(model.config.wake_loops):
            h, state = self.run(range(len(model.blocks)), model.between_passes(h, first) if loop else h, state, inputs, loop)
            after.append(h)
        return {"logits": model.logits(torch.stack(after, dim=-2) if len(after) > 1 else h), **pack(state, PRESENT)}


class Asleep(Graph):
    """What the parts of a sleep share.

    A window that restarts is empty, and at position 0, when a sleep starts and when it ends: only fast weights are read.
    """

    asleep = True

    def __init__(self, model: Model, slots: int) -> None:
        super().__init__(model, slots)
        self.tokens = Run(model.config.window or 0, padded=True, fresh=model.eviction.restarts)

    def given(self, inputs: Mapping[str, Tensor], batch: int) -> State:
        """The state that comes in; where windows restart, whatever is left in the window is not looked at."""
        fresh = self.fresh(batch)
        state = unpack(inputs, PAST, fresh)
        return state._replace(window=fresh.window) if self.tokens.fresh else state

    def evicted(self, state: State, layers: range, batch: int) -> dict[str, Tensor]:
        """The states of some layers after the eviction that ends a chunk."""
        kept = self.fresh(batch).window if self.tokens.fresh else self.model.evict(state).window
        return pack(self.part(state._replace(window=kept), layers), PRESENT)

    def carried(self, state: State) -> State:
        """What passes read and hand on."""
        state = self.part(state, self.model.span)
        return state._replace(window=(None,) * len(state.window)) if self.tokens.fresh else state


class Pass(Asleep):
    """One pass of the span: the body of the loop.

    pass (0 is the first), h and first [B, L, D] (the last pass's output; the span's first input), place, state -> h, state.
    """

    def example(self) -> dict[str, Tensor]:
        carried = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in pack(self.carried(self.fresh(2)), PAST).items()}
        return {"pass": torch.tensor(0), "h": self.h(), "first": self.h(), **self.tokens.inputs(), **carried}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        h = inputs["h"]
        if self.model.config.loop_norm or self.model.config.inject:
            h = torch.where(inputs["pass"] > 0, self.model.between_passes(h, inputs["first"]), h)
        h, state = self.run(self.model.span, h, self.given(inputs, h.shape[0]), inputs)
        return {"h_out": h, **pack(self.carried(state), PRESENT)}


class Sleep(Asleep):
    """input_ids [B, L], place, every state -> every state, evicted. The loop is one node, or `unrolled`."""

    def __init__(self, model: Model, slots: int, unrolled: bool) -> None:
        super().__init__(model, slots)
        self.unrolled = unrolled

    def example(self) -> dict[str, Tensor]:
        return {**self.ids(), **self.states(range(len(self.model.blocks)))}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = inputs["input_ids"].shape[0]
        h, state = self.run(self.model.prelude, self.embedded(inputs), self.given(inputs, batch), inputs)
        h, state = self._unrolled(h, state, inputs) if self.unrolled else self._loop(h, state, inputs)
        h, state = self.run(self.model.coda, h, state, inputs)
        return self.evicted(state, range(len(self.model.blocks)), batch)

    def _unrolled(self, h: Tensor, state: State, inputs: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        first, start = h, state
        for n in range(self.model.config.loops):
            h = self.model.between_passes(h, first) if n else h
            h, state = self.run(self.model.span, h, start._replace(fast=state.fast), inputs)
        return h, state

    def _loop(self, h: Tensor, state: State, inputs: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """A node in the place of the loop, with the inputs and outputs of `Pass`, less those that every pass gets anew."""
        carried = pack(self.carried(state), PAST)
        tensors = [h, *carried.values()]
        outputs = symbolic_multi_out(
            f"{DOMAIN}::Loop",
            [h, *(inputs[name] for name in self.tokens.inputs()), *carried.values()],
            dtypes=[x.dtype for x in tensors],
            shapes=[x.shape for x in tensors],
            version=1,
        )
        return outputs[0], unpack(dict(zip(carried, outputs[1:], strict=True)), PAST, state)


class Prelude(Asleep):
    """What comes before the passes, for a host that runs them one by one: input_ids, place, states -> h [B, L, D], states."""

    def example(self) -> dict[str, Tensor]:
        return {**self.ids(), **self.states(self.model.prelude)}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = inputs["input_ids"].shape[0]
        h, state = self.run(self.model.prelude, self.embedded(inputs), self.given(inputs, batch), inputs)
        return {"h": h, **self.evicted(state, self.model.prelude, batch)}


class Coda(Asleep):
    """What comes after the passes: h [B, L, D], place, states -> states."""

    def example(self) -> dict[str, Tensor]:
        return {"h": self.h(), **self.tokens.inputs(), **self.states(self.model.coda)}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = inputs["h"].shape[0]
        _, state = self.run(self.model.coda, inputs["h"], self.given(inputs, batch), inputs)
        return self.evicted(state, self.model.coda, batch)


_parts: dict[object, ir.Graph] = {}  # traced blocks; without their weights, they are small


def build(graph: Wake | Pass | Sleep | Prelude | Coda, dialect: str) -> ir.Model:
    """The ONNX form of a graph, whole, in a dialect of `zoo.export.operators`."""
    with use(DIALECTS[dialect]):
        made = trace(graph, graph.example())
        outputs = [str(value.name) for value in made.graph.outputs]
        for node in list(made.graph):
            if (node.domain, node.op_type) == (DOMAIN, "Block"):
                layer = node.attributes["layer"].as_int()
                inline(made.graph, node, _block(graph, layer, dialect), f"blocks.{layer}")
    for node in list(made.graph):
        if (node.domain, node.op_type) == (DOMAIN, "Loop"):
            body = build(Pass(graph.model, graph.slots), dialect).graph
            _put_loop(made.graph, node, body, graph.model.config.loops)
    tidy(made, outputs)
    return made


def _block(graph: Graph, layer: int, dialect: str) -> ir.Graph:
    """A block as a graph over a run of tokens, traced when first asked for; one for all layers of its kind."""
    config, kind = graph.model.config, graph.model.config.pattern[layer]
    made_of = (config.d_model, config.mlp_width, config.norm, config.norm_eps, graph.model.eviction.reach, graph.model.embed.weight.dtype)
    key = (kind, json.dumps(config.blocks.get(kind)), *made_of, graph.tokens, graph.slots, dialect)
    if key not in _parts:
        block: Any = graph.model.blocks[layer]
        part = BlockPart(block, graph.tokens, graph.slots)
        _parts[key] = trace(part, part.example()).graph
    return _parts[key]


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
    hand_over_initializers(body, outer, "", "span/")
    varying: set[ir.Value | None] = {trip, *carried}
    for value in (trip, *carried):
        value.name = f"span/{value.name}"
    for node in list(body):
        prefix_names(node, "span/")
        if varying.isdisjoint(reads(node)):
            body.remove(node)
            outer.insert_before(stand_in, node)
        else:
            varying.update(node.outputs)

    onward = ir.node("Constant", [], {"value": ir.tensor(True)}, name="span/onward")
    body.append(onward)
    body.outputs.insert(0, onward.outputs[0])
    body.inputs[:] = [trip, ir.val("span/go", ir.DataType.BOOL, []), *carried]
    passes = ir.node("Constant", [], {"value": ir.tensor(trips)}, name="passes")
    outer.insert_before(stand_in, passes)
    starts = [start[value] for value in carried]
    replace(
        outer, stand_in, ir.node("Loop", [passes.outputs[0], None, *starts], {"body": body}, num_outputs=len(carried), name="span/Loop")
    )
