"""RMS norms of the residual stream."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.kernels.gated_rmsnorm.op import gated_rmsnorm
from zoo.kernels.rmsnorm.op import Style, rmsnorm


class RMSNorm(nn.RMSNorm):
    """RMSNorm: weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32 or wider (arXiv 1910.07467, eq. 4).

    The result is cast back before the weight is applied, as in Llama.
    """

    style: ClassVar[Style] = "plain"
    eps: float
    neutral = 1.0
    """Value at which the weight has no effect."""

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, eps=self.eps, style=self.style).to(x.dtype)  # the weight may be wider


class GatedRMSNorm(RMSNorm):
    """RMSNorm, times silu(gate) if there is a gate (Gated DeltaNet, arXiv 2412.06464, section 3.3). x, gate: [..., D]."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) if gate is None else gated_rmsnorm(x, gate, self.weight, eps=self.eps)


class UnitRMSNorm(nn.Module):
    """RMSNorm without a weight: x / sqrt(mean(x^2) + eps) over the last dimension, in float32 or wider, cast back."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


class WideRMSNorm(RMSNorm):
    """RMSNorm that casts back after the weight is applied, as in Jet-Nemotron."""

    style = "wide"


class CentredRMSNorm(RMSNorm):
    """RMSNorm with 1 + weight in place of the weight, cast back after it is applied, as in Qwen3-Next."""

    style = "centred"
    neutral = 0.0


norms = {"plain": RMSNorm, "wide": WideRMSNorm, "centred": CentredRMSNorm}
