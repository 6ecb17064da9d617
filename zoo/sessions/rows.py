"""The slots of a pool for a model whose states are never changed in place, such as that of a bundle on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from zoo.sessions.sleeping_model import SleepingModel
from zoo.state import State

Name = TypeVar("Name", bound=Hashable)


class Rows(Generic[Name]):
    """States of up to `slots` streams by name, the rows of one state, with the interface of `Slots`: one wake pass reads a token of each.

    The model must accept a state at int64 positions [n], one per row.
    """

    def __init__(self, model: SleepingModel, slots: int) -> None:
        self.model, self.slots = model, slots
        self._names: list[Name] = []
        self._state: State | None = None

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Name]:
        """Names of the streams."""
        return iter(self._names)

    def put(self, name: Name, state: State) -> None:
        """Keep the state of a stream, of batch size 1."""
        if name in self._names:
            self.take(name)
        row = state._replace(position=torch.tensor([int(state.position)]))
        self._state = row if self._state is None else _each(lambda ours, new: torch.cat([ours, new]), self._state, row)
        self._names.append(name)

    def take(self, name: Name) -> State:
        """Remove a stream. Returns its state."""
        row = self._names.index(name)
        taken = self._select([row])
        del self._names[row]
        others = [i for i in range(len(self._names) + 1) if i != row]
        self._state = self._select(others) if others else None
        return taken._replace(position=int(taken.position))

    def read(self, names: Sequence[Name], ids: Tensor) -> Tensor:
        """Run one wake pass over a token of each named stream, ids [n, 1]. Returns logits [n, 1, V].

        If it raises, every stream is as it was.
        """
        rows = [self._names.index(name) for name in names]
        if sorted(rows) == list(range(len(self._names))):  # then nothing is copied
            order = torch.tensor(rows).argsort()
            assert self._state is not None
            logits, self._state, _ = self.model.wake_pass(ids[order], self._state, 1)
            return logits[rows]
        logits, after, _ = self.model.wake_pass(ids, self._select(rows), 1)
        self._state = _each(lambda ours, new: ours.index_copy(0, torch.tensor(rows, device=ours.device), new), self._state, after)
        return logits

    def _select(self, rows: list[int]) -> State:
        return _each(lambda tensor: tensor[rows], self._state)


def _each(change: Callable[..., Tensor], *states: State | None) -> State:
    """Apply `change` to each tensor of the states; mixers without fast weights have None."""
    changed: State = tree_map(lambda *tensors: None if tensors[0] is None else change(*tensors), *states)
    return changed
