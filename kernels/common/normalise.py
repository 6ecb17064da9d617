"""The arithmetic of RMS and L2 norms, with a hand-written gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.common.recording import pure, recorded
from zoo.kernels.common.second_order import gradients


def normalise(x: Tensor, weight: Tensor | None, eps: float, *, mean: bool) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps), or with the sum in place of the mean, times a weight if there is one.

    Args:
        x: [..., N]. weight: [N], of x's dtype.
    """
    if pure():
        return _definition(x, weight, eps, mean)
    if recorded(x, *(() if weight is None else (weight,))):
        y: Tensor = _Normalise.apply(x, weight, eps, mean)
        return y
    return _forward(x, weight, eps, mean)[0]


def _definition(x: Tensor, weight: Tensor | None, eps: float, mean: bool) -> Tensor:
    y = x * (x.square().sum(-1, keepdim=True) / (x.shape[-1] if mean else 1) + eps).rsqrt()
    return y if weight is None else y * weight


def _forward(x: Tensor, weight: Tensor | None, eps: float, mean: bool) -> tuple[Tensor, Tensor]:
    """Return the result and the factor of each row."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()  # allocates no tensor of squares
    factor = (squares.div_(x.shape[-1]) if mean else squares).add_(eps).rsqrt_()
    y = x * factor
    return y if weight is None else y.mul_(weight), factor


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, mean: bool) -> Tensor:
        y, factor = _forward(x, weight, eps, mean)
        ctx.save_for_backward(x, weight, factor)
        ctx.eps, ctx.mean = eps, mean
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return gradients(lambda *inputs: [_definition(*inputs)], (x, weight, ctx.eps, ctx.mean), (dy,))
        # that of torch's layer norm, one pass over x, with a mean of zero; what it subtracts for the mean is added again
        N, wanted = x.shape[-1], [True, weight is not None and ctx.needs_input_grad[1], False]
        root = 1.0 if ctx.mean else math.sqrt(N)
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, [N], torch.zeros_like(factor), factor * root, weight, None, wanted
        )
        subtracted = dy.sum(-1, keepdim=True) if weight is None else (dy @ weight)[..., None]
        return (dx if ctx.mean else dx.div_(root)).add_(subtracted.mul_(factor).div_(N)), dweight, None, None
