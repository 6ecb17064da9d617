"""What a stream carries from call to call, and what a model gives back. Shapes: B streams, T tokens, D width, V words."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class State(NamedTuple):
    """All that a stream carries. Never changed in place: a pass returns a new one."""

    fast: tuple[Tensor | None, ...]
    """Fast weights S of each layer, float32 (float64 in a float64 model); None where the mixer has none."""
    window: tuple[Any, ...]
    """Window cache of each layer, a NamedTuple of tensors; with wake loops, of each loop's layers in turn."""
    position: int | Tensor
    """Position of the next token: in the window under `hard`, in the stream otherwise. After packed sequences, that of each
    stream, int64 [S]."""


class Output(NamedTuple):
    logits: Tensor
    """[B, T, V]"""
    state: State


class Answers(NamedTuple):
    """Predictions of the supervised tokens of a batch, in no particular order."""

    logits: Tensor
    """[n, V]"""
    place: Tensor
    """[n], where each token stands in ids.flatten()"""
    target: Tensor
    """[n], the token itself"""

    def losses(self) -> Tensor:
        """Cross-entropy of each, [n], in float32 or wider."""
        return F.cross_entropy(self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)), self.target, reduction="none")

    def right(self) -> Tensor:
        """Whether the likeliest token is the right one, bool [n]."""
        return self.logits.argmax(-1) == self.target
