"""Stand-in for the slots of a pool, for a model that can only be called, such as that of a bundle."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from zoo.sessions.sleeping_model import SleepingModel
from zoo.state import State

Name = TypeVar("Name", bound=Hashable)


class OneByOne(Generic[Name]):
    """States of up to `slots` streams by name, with the interface of `Slots`; each token is a separate wake pass."""

    def __init__(self, model: SleepingModel, slots: int) -> None:
        self.model, self.slots = model, slots
        self._states: dict[Name, State] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[Name]:
        """Names of the streams."""
        return iter(self._states)

    def put(self, name: Name, state: State) -> None:
        """Keep the state of a stream."""
        self._states[name] = state

    def take(self, name: Name) -> State:
        """Remove a stream. Returns its state."""
        return self._states.pop(name)

    def read(self, names: Sequence[Name], ids: Tensor) -> Tensor:
        """Run a wake pass over a token of each named stream, ids [n, 1]. Returns logits [n, 1, V].

        If it raises, every stream is as it was.
        """
        passes = [self.model.wake_pass(ids[n : n + 1], self._states[name], 1) for n, name in enumerate(names)]
        self._states |= {name: state for name, (_, state, _) in zip(names, passes, strict=True)}
        return torch.cat([logits for logits, _, _ in passes])
