"""Streams that decode in place on onnxruntime: the prediction graph reads and writes buffers that never move."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from zoo.export.ring import PAST, PRESENT, RingKV, pack, unpack, with_caches
from zoo.state import State

if TYPE_CHECKING:
    from zoo.export.runtime import ExportedModel, OnnxRuntime

Name = TypeVar("Name", bound=Hashable)


@dataclass(eq=False)
class _Row(Generic[Name]):
    """The stream in one row of the buffers."""

    name: Name
    position: int
    side: int
    """The side that holds its state."""


class BoundSlots(Generic[Name]):
    """States of up to `slots` streams by name, with the interface of `zoo.sessions.slots.Slots`.

    Buffers have two sides: a token is read from one and leaves the state in the other. Rings of keys and values are the same on
    both sides, since a token only writes a slot that no other token can see.
    """

    @torch.inference_mode(False)  # its buffers may be used in inference mode and outside
    def __init__(self, model: ExportedModel, graph: OnnxRuntime, slots: int) -> None:
        self.model, self.slots = model, slots
        self._graph = graph
        self._rows: list[_Row[Name]] = []
        """The streams in the first rows of the buffers; the remaining rows are free."""
        state = model.init_state(slots)
        self._sides = pack(state, PAST), pack(_other_side(state), PAST)
        self._ids = torch.zeros(slots, 1, dtype=torch.int64, device="cpu")
        self._position = torch.zeros(slots, dtype=torch.int64, device="cpu")
        self._logits = torch.empty(slots, 1, model.config.vocab_size, dtype=getattr(torch, model.bundle.precision), device="cpu")
        self._bound: dict[tuple[int, int], Callable[[], None]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Name]:
        """Names of the streams."""
        return (row.name for row in self._rows)

    def put(self, name: Name, state: State) -> None:
        """Copy the state of a stream, of batch size 1, into its row, or into a free one; there must be one. Raises ZooError."""
        self.model.check_state(state, 1)
        i = self._names().get(name, len(self._rows))
        for key, tensor in pack(state, PAST).items():
            self._sides[0][key][i] = tensor[0].detach()
        self._rows[i : i + 1] = [_Row(name, int(state.position), 0)]

    def take(self, name: Name) -> State:
        """Remove a stream. Returns its state."""
        i = self._names()[name]
        row, last = self._rows[i], len(self._rows) - 1
        taken = {key: tensor[i : i + 1].clone() for key, tensor in self._sides[row.side].items()}
        if i != last:
            self._rows[i] = self._rows[last]
            for tensor in self._sides[self._rows[i].side].values():
                tensor[i] = tensor[last]
        self._rows.pop()
        return unpack(taken, PAST, self.model.like)._replace(position=row.position)

    def read(self, names: Sequence[Name], ids: Tensor) -> Tensor:
        """Run one wake pass over a token of each named stream, ids [n, 1]. Returns logits [n, 1, V].

        If it raises, every stream is as it was.

        Raises:
            ZooError: a window is full.
        """
        n = len(names)
        free = [i for i, row in enumerate(self._rows[:n]) if row.name not in names]
        for i, row in enumerate(self._rows[n:], n):
            if row.name in names:
                self._swap(i, free.pop())
        rows, places = self._rows[:n], self._names()
        self.model.check_room(max(row.position for row in rows), 1)
        side = int(2 * sum(row.side for row in rows) > n)  # the one that fewer rows must be copied to
        for i, row in enumerate(rows):
            if row.side != side:
                self._turn(i)
        order = [places[name] for name in names]
        self._ids[order] = ids
        self._position[:n] = torch.tensor([row.position for row in rows], device="cpu")
        if (n, side) not in self._bound:
            self._bound[n, side] = self._bind(n, side)
        self._bound[n, side]()
        for row in rows:
            row.position, row.side = row.position + 1, 1 - side
        logits = self._logits[:n]
        return logits.clone() if order == list(range(n)) else logits[order]

    def _bind(self, n: int, side: int) -> Callable[[], None]:
        """Return a call that reads a token of each of the first n rows, from `side` to the other."""
        position = self._position[:n]
        tokens = {"input_ids": self._ids[:n], "position": position, "position_ids": position[:, None]}
        past, present = ({key: tensor[:n] for key, tensor in self._sides[s].items()} for s in (side, 1 - side))
        made = {"logits": self._logits[:n], **{key.replace(PAST, PRESENT): tensor for key, tensor in present.items()}}
        return self._graph.bind(tokens | past | made)

    def _names(self) -> dict[Name, int]:
        return {row.name: i for i, row in enumerate(self._rows)}

    def _turn(self, i: int) -> None:
        """Copy the state of a row to the other side."""
        row = self._rows[i]
        for ours, other in zip(self._sides[row.side].values(), self._sides[1 - row.side].values(), strict=True):
            if ours is not other:
                other[i] = ours[i]
        row.side = 1 - row.side

    def _swap(self, a: int, b: int) -> None:
        self._rows[a], self._rows[b] = self._rows[b], self._rows[a]
        for tensor in {id(tensor): tensor for side in self._sides for tensor in side.values()}.values():
            tensor[[a, b]] = tensor[[b, a]]


def _other_side(state: State) -> State:
    """Return buffers like those of `state`, with the same rings."""

    def other(i: int, cache: Any) -> Any:
        return cache if isinstance(cache, RingKV) else cache._make(map(torch.zeros_like, cache))

    return with_caches(state, other)._replace(fast=tuple(None if s is None else torch.zeros_like(s) for s in state.fast))
