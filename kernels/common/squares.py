"""Sums of squares."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.common.recording import recorded


def square_sum(x: Tensor) -> Tensor:
    """Sum the squares over the last dimension: [..., N] -> [..., 1]."""
    if recorded(x):  # the second derivative of a norm does not exist at zero
        return x.square().sum(-1, keepdim=True)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()  # allocates no tensor of squares
