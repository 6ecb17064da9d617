"""One wake pass over a token of each of many streams, at any positions: states side by side in fixed buffers, updated in place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from zoo.blocks.attention import KV
from zoo.blocks.mixer import parts, replace_parts
from zoo.errors import ZooError
from zoo.kernels.cpu.linear import FewRows
from zoo.model import Model
from zoo.sessions.compiled import compiled_blocks, write_back
from zoo.sessions.rings import Ring, SlotPositions
from zoo.state import State

Name = TypeVar("Name", bound=Hashable)

PIECE = 64
"""Compiled blocks read a multiple of this many slots, or a whole ring."""


class Places(Protocol[Name]):
    """The interface of `Slots`, for other kinds of models."""

    slots: int
    """Maximum number of streams."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Name]: ...

    def put(self, name: Name, state: State) -> None: ...

    def take(self, name: Name) -> State: ...

    def read(self, names: Sequence[Name], ids: Tensor) -> Tensor: ...


@dataclass(eq=False)
class _Row(Generic[Name]):
    """The stream in one row of the buffers."""

    name: Name
    position: int
    cached: list[int]
    """Tokens in each of its KV caches when it was put in."""
    read: int = 0
    """Tokens read since."""


class Slots(Generic[Name]):
    """States of up to `slots` streams by name, and one wake pass over a token of any of them.

    `put` copies a stream's state in, `take` copies it out. On a GPU the pass over n streams is recorded as a CUDA graph the
    first time and replayed afterwards.

    Args:
        context: maximum number of tokens in a window cache.
        compile: on a CPU, compile the blocks for one stream or for several the first time, in the background, and use them from then on.
    Raises:
        ZooError: a model that cannot be compiled.
    """

    @torch.inference_mode(False)  # its buffers may be used in inference mode and outside
    def __init__(self, model: Model, slots: int, context: int, *, compile: bool = False) -> None:
        self.model, self.slots, self.context = model, slots, context
        self._rows: list[_Row[Name]] = []
        """The streams in the first rows of the buffers; the remaining rows are free."""
        fresh = model.init_state(slots)
        mixers = [block.mixer for block in model.blocks] * model.config.wake_loops
        self._reach: list[int | None] = [getattr(mixer, "reach", None) for mixer in mixers]
        self._fast: tuple[Any, ...] = fresh.fast
        self._window: tuple[Any, ...] = tuple(
            replace_parts(cache, partial(self._ring, reach=reach)) for cache, reach in zip(fresh.window, self._reach, strict=True)
        )
        self.ids = torch.zeros(slots, 1, dtype=torch.int64, device=model.embed.weight.device)
        """Input of `token`, [slots, 1]."""
        self._position = torch.zeros_like(self.ids[:, 0])
        self._recorded: dict[int, Callable[[], Tensor]] = {}
        self._compiled = compiled_blocks(model) if compile else None

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Name]:
        """Names of the streams."""
        return (row.name for row in self._rows)

    def _index(self, name: Name) -> int | None:
        return next((i for i, row in enumerate(self._rows) if row.name == name), None)

    def _ring(self, cache: Any, reach: int | None) -> Any:
        """Return empty rings in place of a KV cache, and anything else as it is."""
        if not isinstance(cache, KV):
            return cache
        ring = min(self.context, reach or self.context)
        # one slot more than are used: compiled for a part of a ring, code does not serve a contiguous one
        return Ring(*(tensor.new_zeros(*tensor.shape[:2], ring + 1, tensor.shape[3])[:, :, :ring] for tensor in cache))

    @property
    def _buffers(self) -> list[Tensor]:
        """All tensors with a row per stream."""
        return (
            [s for s in self._fast if s is not None]
            + [x for cache in self._window for part in parts(cache) for x in part]
            + [self._position]
        )

    def put(self, name: Name, state: State) -> None:
        """Copy the state of a stream, of batch size 1, into its slot, or into a free one; there must be one."""
        i, position, cached = self._index(name), int(state.position), []
        if i is None:
            i = len(self._rows)
            assert i < self.slots
        for ours, fast in zip(self._fast, state.fast, strict=True):
            if fast is not None:
                ours[i] = fast[0]
        for ours, cache in _pairs(self._window, state.window):
            if isinstance(ours, Ring):
                cached.append(cache.key.shape[2])
                at = torch.arange(position - cached[-1], position, device=cache.key.device) % ours.key.shape[2]
                for ring, kept in zip(ours, cache, strict=True):
                    ring[i, :, at] = kept[0].to(ring.dtype)
            else:
                for tail, kept in zip(ours, cache, strict=True):
                    tail[i] = kept[0]
        self._position[i] = position
        self._rows[i : i + 1] = [_Row(name, position, cached)]

    def take(self, name: Name) -> State:
        """Remove a stream from its slot. Returns its state."""
        i, last = self._index(name), len(self._rows) - 1
        assert i is not None
        self._swap(i, last)
        row = self._rows.pop()
        position, cached = row.position, iter(row.cached)
        fast = tuple(None if s is None else s[last : last + 1].clone() for s in self._fast)

        def own(cache: Any, reach: int | None) -> Any:
            if not isinstance(cache, Ring):
                return cache._make(tail[last : last + 1].clone() for tail in cache)
            tokens = next(cached) + row.read
            tokens = tokens if reach is None else min(tokens, reach - 1)
            at = torch.arange(position - tokens, position, device=cache.key.device) % cache.key.shape[2]
            return KV(cache.key[last : last + 1, :, at], cache.value[last : last + 1, :, at])

        window = (replace_parts(cache, partial(own, reach=reach)) for cache, reach in zip(self._window, self._reach, strict=True))
        return State(fast, tuple(window), position)

    def read(self, names: Sequence[Name], ids: Tensor) -> Tensor:
        """Run one wake pass over a token of each named stream, ids [n, 1]. Returns logits [n, 1, V].

        If it raises, every stream is as it was.
        """
        n = len(names)
        free = [i for i, row in enumerate(self._rows[:n]) if row.name not in names]
        for i, row in enumerate(self._rows[n:], n):
            if row.name in names:
                self._swap(i, free.pop())
        places = {row.name: i for i, row in enumerate(self._rows[:n])}
        rows = [places[name] for name in names]
        in_order = rows == list(range(n))  # indexing with a list would copy it to the GPU, and wait
        if in_order:
            self.ids[:n].copy_(ids)
        else:
            self.ids[rows] = ids
        if self.ids.is_cuda:
            if n not in self._recorded:
                self._recorded[n] = _record(partial(self.token, n, self.context), self._buffers)
            logits = self._recorded[n]()
        else:
            longest = max(row.position for row in self._rows[:n]) + 1
            if self._compiled is not None and (model := self._compiled.get(self.model, n > 1, self.context, self._rehearse)):
                logits = self.token(n, longest + -longest % PIECE, model)
            else:
                logits = self.token(n, longest)
        for row in self._rows[:n]:
            row.position += 1
            row.read += 1
        return logits.clone() if in_order else logits[rows]  # the next replay overwrites `logits`

    def _rehearse(self, model: Model, several: bool) -> None:
        """Read a token of scratch streams with a model whose blocks are compiled."""
        n = self.slots if several else 1
        Slots[int](self.model, n, self.context).token(n, PIECE, model)

    def token(self, n: int, longest: int, model: Model | None = None) -> Tensor:
        """Run one wake pass over `ids` of the first n rows, at positions below `longest`. Returns logits [n, 1, V].

        Reads and writes buffers that never move, so it can be recorded.

        Args:
            model: copy of the model with compiled blocks; default: the model itself.
        """
        run = self.model.run if model is None else model.run
        position = self._position[:n]
        positions = SlotPositions(position)
        fast: tuple[Any, ...] = tuple(None if s is None else s[:n] for s in self._fast)

        def first(part: Any) -> Any:
            return part.part(longest, positions) if isinstance(part, Ring) else part._make(tensor[:n] for tensor in part)

        window: tuple[Any, ...] = tuple(replace_parts(cache, first) for cache in self._window)
        h, passes = self.model.embedded(self.ids[:n], positions), self.model.passes(self.model.config.wake_loops)
        h, after = run(h, State(fast, window, 0), positions, passes)
        with nullcontext() if model is None else FewRows():
            logits = self.model.logits(h)
        for old, new in zip((*fast, *window), (*after.fast, *after.window), strict=True):
            write_back(old, new)
        position.add_(1)
        return logits

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        self._rows[a], self._rows[b] = self._rows[b], self._rows[a]
        for tensor in self._buffers:
            tensor[[a, b]] = tensor[[b, a]]


def _pairs(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """Return the parts of two tuples of window caches, side by side."""
    return [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(parts(a), parts(b), strict=True)]


def _record(step: Callable[[], Tensor], buffers: list[Tensor]) -> Callable[[], Tensor]:
    """Record `step` as a CUDA graph. `step` must change nothing but `buffers`; every replay returns the same memory."""
    before = [buffer.clone() for buffer in buffers]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile kernels and set up libraries before recording
        step()
    torch.cuda.current_stream().wait_stream(side)
    for buffer, was in zip(buffers, before, strict=True):
        buffer.copy_(was)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use CUDA meanwhile
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def context_of(model: Any, context: int | None) -> int:
    """Number of tokens that a window cache must hold; in a bundle that never sleeps, at most its `max_length`. Raises ZooError."""
    if model.config.window is not None:
        return model.config.window
    most = getattr(model, "max_length", None)
    context = most if context is None else context
    if context is None or context < 1:
        raise ZooError(f"context: {context}; {model.config.name} never sleeps, so give the maximum number of tokens per stream, at least 1")
    return context if most is None else min(context, most)
