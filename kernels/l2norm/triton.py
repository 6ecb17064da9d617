"""The norm of kernels/rmsnorm/triton.py with a sum in place of the mean, and no weight."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.rmsnorm.triton import norm


def run(x: Tensor, eps: float) -> Tensor:
    return norm(x, None, None, eps, False, False, False, False)[0]
