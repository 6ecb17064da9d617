"""The state of streams, and the outputs of a model. Shapes: B streams, T tokens, vocabulary V."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class State(NamedTuple):
    """State of B streams. It is never changed in place: a pass returns a new one."""

    fast: tuple[Tensor | None, ...]
    """Fast weights S of each layer, float32 (float64 in a float64 model); None where the mixer has none."""
    window: tuple[Any, ...]
    """Window cache of each layer, a NamedTuple of tensors or of such caches; with wake loops, one for each layer of each loop in turn."""
    position: int | Tensor
    """Position of the next token: in the window under `hard`, in the stream otherwise. int64 [S] after S packed sequences."""


class Output(NamedTuple):
    """Output of a wake pass."""

    logits: Tensor
    """Logits [B, T, V]; those at t predict token t + 1."""
    state: State
    """State after the tokens."""


class Answers(NamedTuple):
    """Predictions of the n supervised tokens of a batch, in no particular order."""

    logits: Tensor
    """Logits [n, V] of the predictions."""
    place: Tensor
    """Index of each token in ids.flatten(), [n] int64."""
    target: Tensor
    """Token to predict, [n] int64."""

    def losses(self) -> Tensor:
        """Return the cross-entropy of each token, [n], in float32 or wider."""
        return F.cross_entropy(self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)), self.target, reduction="none")

    def right(self) -> Tensor:
        """Return whether the most likely token is the right one, bool [n]."""
        return self.logits.argmax(-1) == self.target
