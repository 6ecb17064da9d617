"""The window cache of mixers with a short convolution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ConvTail(NamedTuple):
    """The last K-1 inputs of a short convolution, oldest first: [B, C, K-1]."""

    conv_state: Tensor

    def empty(self) -> ConvTail:
        return ConvTail(torch.zeros_like(self.conv_state))

    def keep(self, tokens: int) -> ConvTail:
        return self
