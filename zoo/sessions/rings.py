"""Window caches of many streams side by side, each at a position of its own, and these positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.blocks.attention import attention
from zoo.blocks.positions import Positions


class SlotPositions(Positions):
    """Positions of the next token of n streams: start: [n]."""

    def __init__(self, start: Tensor) -> None:
        super().__init__(start, 1, start.device)
        self.rows = torch.arange(len(start), device=start.device)
        self._visible: dict[int, Tensor] = {}

    def visible(self, slots: int) -> Tensor:
        """Return the mask of the ring slots that each stream attends to once its token is written: bool [n, 1, 1, slots]."""
        if slots not in self._visible:
            age = (self.position - torch.arange(slots, device=self.index.device)) % slots
            self._visible[slots] = (age <= self.position)[:, None, None]
        return self._visible[slots]


class Ring(NamedTuple):
    """Keys (after rotation) and values of streams, [streams, Hkv, R, D] each: position p is in slot p mod R.

    R is at most the reach of the attention, so every filled slot is visible.
    """

    key: Tensor
    value: Tensor

    def part(self, slots: int, positions: SlotPositions) -> RingPart:
        """Return the caches of the first n streams, of which only the first `slots` slots are filled once their tokens are written."""
        key, value = (tensor[: len(positions.rows), :, :slots] for tensor in self)
        return RingPart(key, value, positions.visible(key.shape[2]))


class RingPart(NamedTuple):
    """The first slots of the rings of n streams, which are rings while no position is beyond them. Written in place."""

    key: Tensor
    value: Tensor
    visible: Tensor
    """See `SlotPositions.visible`."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: SlotPositions, reach: int | None, scale: float | None = None
    ) -> tuple[Tensor, RingPart]:
        """Attention of q [n, H, 1, D] to the cache and to k, v [n, Hkv, 1, D]."""
        at = positions.position[:, 0] % self.key.shape[2]
        self.key[positions.rows, :, at] = k[:, :, 0].to(self.key.dtype)
        self.value[positions.rows, :, at] = v[:, :, 0].to(self.value.dtype)
        return attention(q, *self, scale=scale), self
