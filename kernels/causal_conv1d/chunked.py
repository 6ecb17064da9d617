"""Depthwise causal convolution over a whole chunk at once, tap by tap."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.common.recording import recorded


def chunked(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    """Compute the same as `reference.stepwise`; same shapes and arguments.

    A few fused multiply-adds: on a CPU the backward pass of a grouped convolution takes ten times as long for short kernels.
    """
    T, taps = x.shape[1], weight.mT.contiguous()
    inputs = torch.cat([tail.mT, x], dim=1)
    y = inputs[:, :T] * taps[0]
    into = None if recorded(x, weight, tail) else y
    for tap in range(1, len(taps)):
        y = torch.addcmul(y, inputs[:, tap : tap + T], taps[tap], out=into)
    return y
