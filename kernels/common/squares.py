"""Sum of squares without intermediate tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.common.recording import pure


class _SquareSum(torch.autograd.Function):
    """The norm, squared. Its own derivatives do not exist at zero; those of the sum of squares do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradient * x


def square_sum(x: Tensor) -> Tensor:
    """Sum the squares over the last dimension: [..., N] -> [..., 1]."""
    if pure():
        return x.square().sum(-1, keepdim=True)
    if torch.is_grad_enabled() and x.requires_grad:
        return _SquareSum.apply(x)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()  # allocates no tensor of squares
