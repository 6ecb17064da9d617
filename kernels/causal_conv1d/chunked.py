"""Depthwise causal convolution over a whole chunk at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def chunked(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    """Same result as `reference.stepwise`; same shapes and arguments."""
    window = torch.cat([tail, x.mT], dim=-1)
    return F.conv1d(window, weight[:, None], groups=weight.shape[0]).mT
