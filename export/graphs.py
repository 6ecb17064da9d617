"""The computation of each graph: the model's own modules over named tensors. README.md has a diagram.

Each kind of block is traced once per graph; the graph itself is traced with placeholder nodes for the blocks and the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic_multi_out

from zoo.blocks.block import Block
from zoo.blocks.positions import Positions
from zoo.export.operators import DOMAIN
from zoo.export.ring import PAST, PRESENT, RingKV, pack, unpack, with_rings
from zoo.model import Model
from zoo.state import State


class Tokens(NamedTuple):
    """The tokens of one call of a graph."""

    length: int
    padded: bool
    """True if only the first `n_valid` tokens are valid."""
    fresh: bool
    """True for the first tokens of a window that restarts: no window cache is read or returned."""

    def inputs(self) -> dict[str, Tensor]:
        """Return examples: for a token its position in each stream, [B]; otherwise two scalars, the number of valid tokens and the
        position of the first."""
        if not self.padded:
            return {"position": torch.zeros(2, dtype=torch.int64)}
        return {"n_valid": torch.tensor(self.length)} | ({} if self.fresh else {"position": torch.tensor(0)})

    def positions(self, inputs: Mapping[str, Tensor], device: torch.device) -> Positions:
        return Positions(inputs.get("position", 0), self.length, device, inputs.get("n_valid"))


class BlockPart(nn.Module):
    """One block: h [B, T, D], position, fast weights, window cache -> h, fast weights, window cache."""

    def __init__(self, block: Block, dtype: torch.dtype, tokens: Tokens, slots: int, ring: type[RingKV]) -> None:
        super().__init__()
        self.model, self.dtype, self.tokens, self.slots, self.ring = block, dtype, tokens, slots, ring

    def example(self) -> dict[str, Tensor]:
        h = torch.zeros(2, self.tokens.length, self.model.d_model, dtype=self.dtype)
        state = pack(self._fresh(2), PAST, window=not self.tokens.fresh)
        return {"h": h, **self.tokens.inputs(), **{name: torch.zeros_like(tensor, device="cpu") for name, tensor in state.items()}}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        h = inputs["h"]
        state = unpack(inputs, PAST, self._fresh(h.shape[0]))
        y, fast, window = self.model(h, state.fast[0], state.window[0], self.tokens.positions(inputs, h.device))
        return {"y": y, **pack(State((fast,), (window,), 0), PRESENT, window=not self.tokens.fresh)}

    def _fresh(self, batch: int) -> State:
        mixer: Any = self.model.mixer
        return with_rings(State((mixer.new_fast(batch),), (mixer.new_window(batch),), 0), self.slots, self.ring)


class Graph(nn.Module):
    """One graph as a function of named tensors, for B streams and rings of `slots` tokens."""

    tokens: Tokens
    asleep = False

    def __init__(self, model: Model, slots: int) -> None:
        super().__init__()
        self.model, self.slots = model, slots

    def fresh(self, batch: int) -> State:
        return with_rings(self.model.init_state(batch), self.slots)

    def example_states(self, layers: range, *, window: bool = True) -> dict[str, Tensor]:
        """Return example states of these layers."""
        named = pack(self.fresh(2), PAST, layers=layers, window=window)
        return {name: torch.zeros_like(tensor, device="cpu") for name, tensor in named.items()}

    def ids(self) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(2, self.tokens.length, dtype=torch.int64), **self.tokens.inputs()}

    def h(self) -> Tensor:
        return torch.zeros(2, self.tokens.length, self.model.config.d_model, dtype=self.model.residual_dtype)

    def embedded(self, inputs: Mapping[str, Tensor]) -> Tensor:
        ids = inputs["input_ids"]
        return self.model.embedded(ids, self.tokens.positions(inputs, ids.device), asleep=self.asleep)

    def run(
        self, layers: range, h: Tensor, state: State, inputs: Mapping[str, Tensor], n: int | Tensor = 0, loop: int = 0
    ) -> tuple[Tensor, State]:
        """Run these blocks in pass n, one placeholder node each; with wake loops, every loop has its own window caches."""
        fast, window, span = list(state.fast), list(state.window), self.model.span
        for i in layers:
            if i == span.start:
                entered = h
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
            h = self.model.gated(h, entered, n) if i == span.stop - 1 else h
        return h, State(tuple(fast), tuple(window), state.position)


class Wake(Graph):
    """Wake pass: input_ids [B, T], position, all states -> logits [B, 1, V] of the last valid token, all states.

    A single token has a position in each stream, [B]; the streams of a piece are at the same position. A piece also returns the
    hidden states of all tokens, [B, T, D] ([B, T, loops, D] with wake loops), for `Head`.
    With `position_ids` [B, T], which some runtimes require, the first column is read, or in a piece the first entry.
    """

    def __init__(self, model: Model, slots: int, tokens: int, position_ids: bool) -> None:
        super().__init__(model, slots)
        self.tokens = Tokens(tokens, padded=tokens > 1, fresh=False)
        self.position_ids = position_ids

    def example(self) -> dict[str, Tensor]:
        ids = self.ids()
        if self.position_ids:
            del ids["position"]
            ids["position_ids"] = torch.zeros_like(ids["input_ids"])
        return {**ids, **self.example_states(range(len(self.model.blocks)))}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        model = self.model
        if self.position_ids:
            position = inputs["position_ids"][:, 0]
            inputs = inputs | {"position": position[0] if self.tokens.padded else position}
        h, state = self.embedded(inputs), unpack(inputs, PAST, self.fresh(inputs["input_ids"].shape[0]))
        first, after = h, []
        for loop in range(model.config.wake_loops):
            h, state = self.run(range(len(model.blocks)), model.between_passes(h, first) if loop else h, state, inputs, loop, loop)
            after.append(h)
        h = torch.stack(after, dim=-2) if len(after) > 1 else h
        if not self.tokens.padded:
            return {"logits": model.logits(h[:, 0])[:, None], **pack(state, PRESENT)}
        last = h.index_select(1, inputs["n_valid"].reshape(1) - 1)
        return {"logits": model.logits(last[:, 0])[:, None], "hidden": h, **pack(state, PRESENT)}


class Head(Graph):
    """Logits of a whole piece: hidden [B, T, D] ([B, T, loops, D] with wake loops) of a piece of T tokens -> logits [B, T, V]."""

    def __init__(self, model: Model, slots: int, tokens: int) -> None:
        super().__init__(model, slots)
        self.tokens = Tokens(tokens, padded=False, fresh=False)

    def example(self) -> dict[str, Tensor]:
        loops, h = self.model.config.wake_loops, self.h()
        return {"hidden": torch.stack([h] * loops, dim=-2) if loops > 1 else h}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.model.logits(inputs["hidden"])}


class Asleep(Graph):
    """Common part of the graphs of a sleep.

    A window that restarts is empty and at position 0 when a sleep starts and when it ends, so only the fast weights are read.
    """

    asleep = True

    def __init__(self, model: Model, slots: int) -> None:
        super().__init__(model, slots)
        self.tokens = Tokens(model.config.window or 0, padded=True, fresh=model.eviction.restarts)

    def start(self, inputs: Mapping[str, Tensor], batch: int) -> State:
        """Return the state at the start of the chunk, with an empty window if windows restart."""
        fresh = self.fresh(batch)
        state = unpack(inputs, PAST, fresh)
        return state._replace(window=fresh.window) if self.tokens.fresh else state

    def carried(self, state: State, prefix: str) -> dict[str, Tensor]:
        """Return the states that one pass hands to the next."""
        return pack(state, prefix, layers=self.model.span, window=not self.tokens.fresh)

    def evicted(self, state: State, layers: range, batch: int) -> dict[str, Tensor]:
        """Return the states of these layers after the eviction that ends a chunk."""
        window = self.fresh(batch).window if self.tokens.fresh else self.model.evict(state).window
        return pack(state._replace(window=window), PRESENT, layers=layers)


class Pass(Asleep):
    """One pass of the span, the body of the loop.

    pass (0 for the first), h [B, L, D] (output of the previous pass), first [B, L, D] (input of the first pass), position, states
    -> h, states.
    """

    def example(self) -> dict[str, Tensor]:
        carried = self.example_states(self.model.span, window=not self.tokens.fresh)
        return {"pass": torch.tensor(0), "h": self.h(), "first": self.h(), **self.tokens.inputs(), **carried}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        h = inputs["h"]
        if self.model.config.loop_norm or self.model.config.inject:
            h = torch.where(inputs["pass"] > 0, self.model.between_passes(h, inputs["first"]), h)
        h, state = self.run(self.model.span, h, self.start(inputs, h.shape[0]), inputs, inputs["pass"])
        return {"h_out": h, **self.carried(state, PRESENT)}


class Sleep(Asleep):
    """Whole sleep: input_ids [B, L], position, all states -> all states, evicted. The passes are one Loop, or `unrolled`.

    The last pass follows the Loop where part of it is dead code: what no output reads is not in the graph.
    """

    def __init__(self, model: Model, slots: int, unrolled: bool, whole: bool = False) -> None:
        super().__init__(model, slots)
        self.unrolled = unrolled
        self.whole = whole
        """True if the last pass stays in the Loop, with its dead part."""

    def example(self) -> dict[str, Tensor]:
        return {**self.ids(), **self.example_states(range(len(self.model.blocks)))}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = inputs["input_ids"].shape[0]
        first, start = self.run(self.model.prelude, self.embedded(inputs), self.start(inputs, batch), inputs)
        h, state, looped = first, start, self.looped
        if looped:
            h, state = self._loop(h, state, inputs)
        for n in range(looped, self.model.config.loops):
            h = self.model.between_passes(h, first) if n else h
            h, state = self.run(self.model.span, h, start._replace(fast=state.fast), inputs, n)
        h, state = self.run(self.model.coda, h, state, inputs)
        return self.evicted(state, range(len(self.model.blocks)), batch)

    @property
    def looped(self) -> int:
        """Passes inside the Loop."""
        if self.unrolled:
            return 0
        loops = self.model.config.loops
        if self.whole:
            return loops
        last, keep = self.model.passes(loops, asleep=True)[-1][-1]
        whole = last not in self.model.span or (last == self.model.span.stop - 1 and (keep is None or self.model.blocks[last].mlp is None))
        return loops if whole else loops - 1

    def _loop(self, h: Tensor, state: State, inputs: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """Insert a placeholder for the loop, with the inputs and outputs of `Pass` except `pass` and `first`."""
        carried = self.carried(state, PAST)
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
    """The prelude, for hosts that run the passes one by one: input_ids, position, states -> h [B, L, D], states."""

    def example(self) -> dict[str, Tensor]:
        return {**self.ids(), **self.example_states(self.model.prelude)}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = inputs["input_ids"].shape[0]
        h, state = self.run(self.model.prelude, self.embedded(inputs), self.start(inputs, batch), inputs)
        return {"h": h, **self.evicted(state, self.model.prelude, batch)}


class Coda(Asleep):
    """The coda, for hosts that run the passes one by one: h [B, L, D], position, states -> states."""

    def example(self) -> dict[str, Tensor]:
        return {"h": self.h(), **self.tokens.inputs(), **self.example_states(self.model.coda)}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = inputs["h"].shape[0]
        _, state = self.run(self.model.coda, inputs["h"], self.start(inputs, batch), inputs)
        return self.evicted(state, self.model.coda, batch)
