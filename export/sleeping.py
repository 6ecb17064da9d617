"""One graph that sleeps by itself, for hosts that only call a graph again and again and carry its states.

while tokens remain:
    if length == L: states = start = consolidation(window, start); length = 0
    logits, states = prediction(next token) or prefill(next n tokens), n at most L - length
    window[length : length + n] = the tokens; length += n
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from zoo.export.manifest import CONSOLIDATION, PREDICTION, PREFILL
from zoo.export.ring import PAST, PRESENT
from zoo.export.runtime import STEP
from zoo.export.trace import IR_VERSION, OPSET, hoist_initializers, prefix_names, tidy

import onnx_ir as ir  # isort: skip  (zoo.export.trace says what to install where it is missing)
from onnx_ir.tape import Tape  # isort: skip

TOKENS = "tokens"  # name of the free dimension
INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL

Values = dict[str, ir.Value]
"""A value for every state, by its name without `past_key_values` or `present`."""


class SelfSleeping:
    """The graph of one stream: input_ids [1, tokens], states -> logits [1, 1, V] of the last token, states.

    One or more tokens may cross any number of windows. No token, or one outside the vocabulary, is an error on a CPU.
    A stream starts with zeros in all states, which are

    - `window.ids` [1, L] and `window.length` [1]: the tokens of the window, and their number;
    - `window.offset` [1], if windows slide: position of the first token of the window;
    - the states of the prediction graph;
    - `start.*`, those that a sleep reads, as they were at the start of the window.

    Args:
        made: graphs of a bundle whose weights are not stored yet; prediction, consolidation and, if there is one, prefill are copied.
        slots: L, tokens of a window.
    """

    def __init__(self, made: Mapping[str, ir.Model], slots: int) -> None:
        self.token, self.sleep = made[PREDICTION].graph, made[CONSOLIDATION].graph
        self.piece = made[PREFILL].graph if PREFILL in made else None
        self.slots, self.most = slots, 1 if self.piece is None else _kind(self.piece.inputs[0])[1][1]
        self.logits = _kind(self.token.outputs[0])
        self.awake = {_short(value): _kind(value) for value in self.token.inputs if str(value.name).startswith(PAST)}
        self.start = {
            f"start.{_short(value)}": _kind(value) for value in self.sleep.inputs if str(value.name).startswith(PAST) and value.uses()
        }
        self.slides = any(value.name == "position" for value in self.sleep.inputs)
        window = {"window.ids": (INT64, [1, slots]), "window.length": (INT64, [1])}
        window |= {"window.offset": (INT64, [1])} if self.slides else {}
        self.states = window | self.awake | self.start
        self.main = ir.Graph([], [], nodes=[], name="sleeping", opset_imports={"": OPSET})

    def model(self) -> ir.Model:
        ids, past = ir.val("input_ids", INT64, [1, TOKENS]), {name: ir.val(f"{PAST}.{name}", *kind) for name, kind in self.states.items()}
        self.main.inputs.extend([ids, *past.values()])
        write = _Writer(self.main)
        total = write("Shape", ids, start=1)
        last = write("Gather", ids, write.constant([-1]), axis=1)  # fails if there are no tokens
        padded = write("Concat", ids, write("Expand", last, write.constant([1, self.most])), axis=1)
        # Gather would count a negative token from the end of the embeddings; it refuses one that is too large
        padded = write("Where", write("Less", padded, write.constant(0)), write.constant(self.logits[1][-1]), padded)
        logits = write("Cast", write("ConstantOfShape", write.constant(self.logits[1])), to=self.logits[0])
        given = [write("Squeeze", total), write.constant(True), write.constant([0]), logits, *past.values()]
        outputs = write.several(len(given) - 2, "Loop", *given, body=self._iteration(padded, total))
        self.main.outputs.extend(outputs[1:])
        _set_kinds(self.main.outputs, [self.logits, *self.states.values()])
        model = ir.Model(self.main, ir_version=IR_VERSION)
        tidy(model, ["logits", *(f"{PRESENT}.{name}" for name in self.states)])
        return model

    def _iteration(self, padded: ir.Value, total: ir.Value) -> ir.Graph:
        """Return the body of the Loop: sleep if the window is full, then read tokens that fit into it.

        Inputs: number of the iteration, condition, number of tokens read so far, logits, states.
        """
        at, now = ir.val("stream/at", INT64, [1]), {name: ir.val(f"stream/{name}", *kind) for name, kind in self.states.items()}
        unread = [ir.val("stream/iteration", INT64, []), ir.val("stream/condition", BOOL, []), ir.val("stream/logits", *self.logits)]
        body = ir.Graph([*unread[:2], at, unread[2], *now.values()], [], nodes=[], name="stream")
        write = _Writer(body)
        slots, zero = write.constant([self.slots]), write.constant([0])

        full = write("Squeeze", write("Equal", now["window.length"], slots))
        now |= self._slept(write, full, now)
        length = position = write("Where", full, zero, now["window.length"])
        if self.slides:
            moved = write("Add", now["window.offset"], slots)
            now["window.offset"] = write("Where", full, moved, now["window.offset"])
            position = write("Add", now["window.offset"], length)

        piece = write("Slice", padded, at, write("Add", at, write.constant([self.most])), write.constant([1]))
        room = write("Min", write("Sub", total, at), write("Sub", slots, length))
        logits, n, states = self._read(write, piece, room, position, now)
        now |= states

        index = write("Sub", write.constant(range(self.slots)), length)  # of the new token for each place of the window
        new = write("Gather", piece, write("Clip", index, write.constant(0), write.constant(self.most - 1)), axis=1)
        lands = write("And", write("GreaterOrEqual", index, zero), write("Less", index, n))
        now["window.ids"] = write("Where", lands, new, now["window.ids"])
        now["window.length"] = write("Add", length, n)
        at = write("Add", at, n)
        body.outputs.extend([write("Squeeze", write("Less", at, total)), at, logits, *(now[name] for name in self.states)])
        _set_kinds(body.outputs, [(BOOL, []), (INT64, [1]), self.logits, *self.states.values()])
        return body

    def _slept(self, write: _Writer, full: ir.Value, now: Values) -> Values:
        """Return the states after a sleep if the window is full, else those of `now`."""
        given = {f"{PAST}.{name.removeprefix('start.')}": now[name] for name in self.start}
        given |= {"input_ids": now["window.ids"], "n_valid": write.constant(self.slots)}
        given |= {"position": write("Squeeze", now["window.offset"])} if self.slides else {}
        asleep, awake = self._part(self.sleep, "asleep", given), ir.Graph([], [], nodes=[], name="awake")
        after = {_short(value): value for value in asleep.outputs}
        copy, same = _Writer(asleep), _Writer(awake)
        starts = [copy("Identity", after[name.removeprefix("start.")]) for name in self.start]
        asleep.outputs[:] = [*(after[name] for name in self.awake), *starts]
        changed = [*self.awake, *self.start]
        awake.outputs.extend(same("Identity", now[name]) for name in changed)
        return dict(zip(changed, write.several(len(changed), "If", full, then_branch=asleep, else_branch=awake), strict=True))

    def _read(self, write: _Writer, piece: ir.Value, room: ir.Value, position: ir.Value, now: Values) -> tuple[ir.Value, ir.Value, Values]:
        """Read at most `room` [1] tokens from a piece [1, most]. Returns the logits, the number of tokens [1], and the states."""
        one = write.constant([1])
        given = {f"{PAST}.{name}": now[name] for name in self.awake}
        first = write("Slice", piece, write.constant([0]), one, one)
        column = write("Reshape", position, write.constant([1, 1]))
        token = self._part(self.token, "token", given | {"input_ids": first, "position": position, "position_ids": column})
        if self.piece is None:
            logits, *states = token.outputs
            token.outputs.clear()
            for node in list(token):
                token.remove(node)
                write.graph.append(node)
            return logits, one, dict(zip(self.awake, states, strict=True))
        n = write("Min", room, write.constant([self.most]))
        given |= {
            "input_ids": piece,
            "n_valid": write("Squeeze", n),
            "position": write("Squeeze", position),
            "position_ids": write("Expand", position, write.constant([1, self.most])),
        }
        several = self._part(self.piece, "piece", given)
        several.outputs[:] = [value for value in several.outputs if value.name != "hidden"]
        few = write("Squeeze", write("LessOrEqual", n, write.constant([1 + self.most // STEP])))
        logits, *states = write.several(1 + len(self.awake), "If", few, then_branch=token, else_branch=several)
        return logits, write("Where", few, one, n), dict(zip(self.awake, states, strict=True))

    def _part(self, part: ir.Graph, place: str, given: Mapping[str, ir.Value]) -> ir.Graph:
        """Return a copy of a graph for a branch of an If: without inputs, which are `given` by the graphs around it."""
        part = part.clone()
        for value in part.inputs:
            if value.uses():
                ir.convenience.replace_all_uses_with(value, given[str(value.name)])
        part.inputs.clear()
        part.name = place
        hoist_initializers(part, self.main, "", f"{place}/")
        for node in part:
            prefix_names(node, f"{place}/")
        return part


class _Writer:
    """Writer of nodes at the end of a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self._tape = graph, Tape(graph)

    def __call__(self, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.several(1, operator, *inputs, **attributes)[0]

    def several(self, outputs: int, operator: str, *inputs: ir.Value, **attributes: Any) -> list[ir.Value]:
        name = f"{self.graph.name}/{operator}"
        return list(self._tape.op_multi_out(operator, inputs, attributes, num_outputs=outputs, name=name))

    def constant(self, value: Any) -> ir.Value:
        """Write an integer, or a nested sequence of them, or a truth value."""
        return self("Constant", value=ir.tensor(np.asarray(value)))


def _short(value: ir.Value) -> str:
    return str(value.name).removeprefix(f"{PAST}.").removeprefix(f"{PRESENT}.")


def _kind(value: ir.Value) -> tuple[Any, list[int]]:
    """Return the type and the shape of a value, for one stream."""
    assert value.shape is not None
    return value.dtype, [size if isinstance(size, int) else 1 for size in value.shape]


def _set_kinds(values: Any, kinds: list[tuple[Any, list[int]]]) -> None:
    for value, (dtype, shape) in zip(values, kinds, strict=True):
        value.dtype, value.shape = dtype, ir.Shape(shape)
