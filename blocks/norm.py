"""RMS norms of the residual stream."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from zoo.kernels.rmsnorm.op import Style, rmsnorm


class RMSNorm(nn.RMSNorm):
    """RMSNorm: weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32 or wider (arXiv 1910.07467, eq. 4).

    The result is cast back before the weight is applied, as in Llama.
    """

    style: ClassVar[Style] = "plain"
    eps: float
    neutral = 1.0
    """Value of the weight that has no effect."""

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, eps=self.eps, style=self.style)


class WideRMSNorm(RMSNorm):
    """RMSNorm that casts back after the weight is applied, as in Jet-Nemotron."""

    style = "wide"


class CentredRMSNorm(RMSNorm):
    """RMSNorm with 1 + weight in place of the weight, cast back after it is applied, as in Qwen3-Next."""

    style = "centred"
    neutral = 0.0


norms = {"plain": RMSNorm, "wide": WideRMSNorm, "centred": CentredRMSNorm}
