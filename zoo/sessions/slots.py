"""One token for each of many streams, wherever they stand: their states side by side in buffers of fixed size, changed in place."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.blocks.attention import KV
from zoo.blocks.positions import Positions
from zoo.errors import ZooError
from zoo.model import Model
from zoo.state import State

Name = TypeVar("Name", bound=Hashable)


class SlotPositions(Positions):
    """The next token of each of n streams, at positions start: [n], none of them at `longest` or beyond."""

    def __init__(self, start: Tensor, longest: int) -> None:
        super().__init__(start, 1, start.device)
        self.longest = longest
        self.rows = torch.arange(len(start), device=start.device)

    def visible(self, slots: int) -> Tensor:
        """Which slot of a ring each stream sees, once its token is in: bool [n, 1, 1, slots]."""
        key = ("visible", slots)
        if key not in self._tables:
            age = (self.position - torch.arange(slots, device=self.index.device)) % slots
            self._tables[key] = (age <= self.position)[:, None, None]
        return self._tables[key]  # type: ignore[return-value]


class SlotKV(NamedTuple):
    """Keys (after rotation) and values of n streams, [n, Hkv, R, D]: position p lies in slot p mod R. Written in place.

    R is at most what attention may reach, so whatever a ring holds is seen.
    """

    key: Tensor
    value: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: SlotPositions, reach: int | None) -> tuple[Tensor, SlotKV]:
        """Attention of q [n, H, 1, D] to what is cached and to k, v [n, Hkv, 1, D]."""
        ring = self.key.shape[2]
        at = positions.position[:, 0] % ring
        self.key[positions.rows, :, at] = k[:, :, 0]
        self.value[positions.rows, :, at] = v[:, :, 0]
        used = min(ring, positions.longest)
        visible = positions.visible(ring)[..., :used]
        y = F.scaled_dot_product_attention(
            q, self.key[:, :, :used], self.value[:, :, :used], attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1]
        )
        return y, self


class Slots(Generic[Name]):
    """States of at most `slots` streams, by name, and one wake pass over a token of any of them.

    A stream is put in with its state and taken out with what became of it. On a GPU the pass over n streams is recorded
    the first time as a CUDA graph, and replayed from then on.

    Args:
        context: tokens that a window cache holds at most.
    """

    def __init__(self, model: Model, slots: int, context: int) -> None:
        self.model, self.slots, self.context = model, slots, context
        self.names: list[Name] = []
        """Whose state stands in each row; the rows behind are free."""
        self._positions: list[int] = []
        self._read: list[int] = []  # tokens since a stream was put in
        self._held: list[list[int]] = []  # what each of its KV caches held then
        fresh = model.init_state(slots)
        mixers = [block.mixer for block in model.blocks] * model.config.wake_loops
        self._reach: list[int | None] = [getattr(mixer, "reach", None) for mixer in mixers]
        self._fast: tuple[Any, ...] = fresh.fast
        self._window: tuple[Any, ...] = tuple(
            self._ring(cache, reach) if isinstance(cache, KV) else cache for cache, reach in zip(fresh.window, self._reach, strict=True)
        )
        self.ids = torch.zeros(slots, 1, dtype=torch.int64, device=model.embed.weight.device)
        """What `token` reads, [slots, 1]."""
        self._position = torch.zeros_like(self.ids[:, 0])
        self._recorded: dict[int, Callable[[], Tensor]] = {}

    def _ring(self, cache: KV, reach: int | None) -> SlotKV:
        slots, heads, _, dim = cache.key.shape
        shape = slots, heads, min(self.context, reach or self.context), dim
        return SlotKV(cache.key.new_zeros(shape), cache.value.new_zeros(shape))

    @property
    def _buffers(self) -> list[Tensor]:
        """All that belongs to the streams, a row each."""
        return (
            [s for s in self._fast if s is not None] + [x for cache in self._window if cache is not None for x in cache] + [self._position]
        )

    def put(self, name: Name, state: State) -> None:
        """Give a stream, of batch size 1, a slot of its own; there must be a free one."""
        row, position = len(self.names), int(state.position)
        assert row < self.slots
        for ours, fast in zip(self._fast, state.fast, strict=True):
            if fast is not None:
                ours[row] = fast[0]
        held = []
        for ours, cache in zip(self._window, state.window, strict=True):
            if isinstance(ours, SlotKV):
                held.append(cache.key.shape[2])
                at = torch.arange(position - held[-1], position, device=cache.key.device) % ours.key.shape[2]
                for ring, kept in zip(ours, cache, strict=True):
                    ring[row, :, at] = kept[0]
            elif ours is not None:
                for tail, kept in zip(ours, cache, strict=True):
                    tail[row] = kept[0]
        self._position[row] = position
        self.names.append(name)
        self._positions.append(position)
        self._read.append(0)
        self._held.append(held)

    def take(self, name: Name) -> State:
        """The state of a stream, which leaves its slot."""
        row, last = self.names.index(name), len(self.names) - 1
        self._swap(row, last)
        position, held = self._positions[last], iter(self._held[last])
        fast = tuple(None if s is None else s[last : last + 1].clone() for s in self._fast)
        window: list[Any] = []
        for cache, reach in zip(self._window, self._reach, strict=True):
            if isinstance(cache, SlotKV):
                tokens = next(held) + self._read[last]
                tokens = tokens if reach is None else min(tokens, reach - 1)
                at = torch.arange(position - tokens, position, device=cache.key.device) % cache.key.shape[2]
                window.append(KV(cache.key[last : last + 1, :, at], cache.value[last : last + 1, :, at]))
            else:
                window.append(cache and cache._make(tail[last : last + 1].clone() for tail in cache))
        for rows in (self.names, self._positions, self._read, self._held):
            rows.pop()
        return State(fast, tuple(window), position)

    def read(self, names: Sequence[Name], ids: Tensor) -> Tensor:
        """One wake pass over a token of each named stream, ids [n, 1]. Returns logits [n, 1, V].

        An error leaves every stream as it was.
        """
        n = len(names)
        free = [row for row in range(n) if self.names[row] not in names]
        for row in [row for row in range(n, len(self.names)) if self.names[row] in names]:
            self._swap(row, free.pop())
        rows = [self.names.index(name) for name in names]
        self.ids[rows] = ids
        if self.ids.is_cuda:
            if n not in self._recorded:
                self._recorded[n] = _record(partial(self.token, n, self.context), self._buffers)
            logits = self._recorded[n]()
        else:
            logits = self.token(n, max(self._positions[:n]) + 1)
        for row in range(n):
            self._positions[row] += 1
            self._read[row] += 1
        return logits[rows]

    def token(self, n: int, longest: int) -> Tensor:
        """One wake pass over `ids` of the first n rows, at positions below `longest`. Returns logits [n, 1, V].

        What it reads and changes stands in buffers that stay where they are, so it can be compiled or recorded.
        """
        position = self._position[:n]
        positions = SlotPositions(position, longest)
        fast: tuple[Any, ...] = tuple(None if s is None else s[:n] for s in self._fast)
        window: tuple[Any, ...] = tuple(c and c._make(tensor[:n] for tensor in c) for c in self._window)
        h, after = self.model.run(
            self.model.embedded(self.ids[:n], positions), State(fast, window, 0), positions, self.model.passes(self.model.config.wake_loops)
        )
        logits = self.model.logits(h)
        for old, new in zip(fast, after.fast, strict=True):
            if new is not None:
                old.copy_(new)
        for cache, changed in zip(window, after.window, strict=True):
            if cache is not None and not isinstance(cache, SlotKV):
                for old, new in zip(cache, changed, strict=True):
                    old.copy_(new)
        position.add_(1)
        return logits

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        lists: list[list[Any]] = [self.names, self._positions, self._read, self._held]
        for rows in lists:
            rows[a], rows[b] = rows[b], rows[a]
        for tensor in self._buffers:
            tensor[[a, b]] = tensor[[b, a]]


def _record(step: Callable[[], Tensor], buffers: list[Tensor]) -> Callable[[], Tensor]:
    """`step` as a CUDA graph: what it launches, at once. It must change nothing but `buffers`, and returns the same memory always."""
    before = [buffer.clone() for buffer in buffers]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and libraries set up before anything is recorded
        step()
    torch.cuda.current_stream().wait_stream(side)
    for buffer, was in zip(buffers, before, strict=True):
        buffer.copy_(was)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def context_of(model: Model, context: int | None) -> int:
    """Tokens that a window cache must hold. Raises ZooError."""
    if model.config.window is not None:
        return model.config.window
    if context is None or context < 1:
        raise ZooError(f"context: {context}; {model.config.name} never sleeps, so say how many tokens a stream may have, at least 1")
    return context
