"""A stream of tokens that sleeps when its window is full."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from zoo.config import ModelConfig
from zoo.kernels.registry import ZooError
from zoo.model import Output, State


class Sleeper(Protocol):
    """What a session needs of a model: `zoo.Model`, or the exported graphs of one."""

    config: ModelConfig

    def init_state(self, batch_size: int = 1) -> State: ...

    def __call__(self, ids: Tensor, state: State) -> Output: ...

    def consolidate(self, ids: Tensor, state: State) -> State: ...


class Session:
    """`batch_size` streams that advance together.

    Keeps the state at the window's start and the window's tokens, which is all that a sleep needs, beside the waking
    state that answers meanwhile.
    """

    def __init__(self, model: Sleeper, batch_size: int = 1) -> None:
        self.model = model
        self.state = self._start = model.init_state(batch_size)
        self._pending: list[Tensor] = []
        self._held = 0

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Read ids: [B, T] int64, any T. Sleeps whenever the window is full and a further token comes.

        Returns logits [B, T, V]: after each token, those of the next.
        """
        logits = []
        window = self.model.config.window or ids.shape[1]
        while ids.shape[1]:
            if self.model.config.window and self._held == window:
                self.sleep()
            piece, ids = ids[:, : window - self._held], ids[:, window - self._held :]
            out, self.state = self.model(piece, self.state)
            logits.append(out)
            if self.model.config.window:
                self._pending.append(piece)
                self._held += piece.shape[1]
        return torch.cat(logits, dim=1)

    @torch.no_grad()
    def sleep(self) -> None:
        """Consolidate the tokens read since the last sleep and evict them. Does nothing if there are none."""
        if self._pending:
            self.state = self._start = self.model.consolidate(torch.cat(self._pending, dim=1), self._start)
            self._pending, self._held = [], 0

    @torch.no_grad()
    def generate(self, prompt: Tensor, tokens: int) -> Tensor:
        """Read prompt: [B, T] and continue it greedily by `tokens` tokens, [B, tokens]."""
        if tokens < 1:
            raise ZooError(f"tokens: {tokens} must be at least 1")
        made = [self.feed(prompt)[:, -1:].argmax(-1)]
        while len(made) < tokens:
            made.append(self.feed(made[-1])[:, -1:].argmax(-1))
        return torch.cat(made, dim=1)
