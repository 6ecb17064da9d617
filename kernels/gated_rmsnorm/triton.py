"""The norm of kernels/rmsnorm/triton.py with a gate."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.rmsnorm.triton import norm


def run(x: Tensor, gate: Tensor, weight: Tensor, eps: float, gate_first: bool) -> Tensor:
    return norm(x, gate, weight, eps, True, gate_first, False, True)[0]
