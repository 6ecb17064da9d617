"""Normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32 or wider (arXiv 1910.07467, eq. 4).

    Cast back before the weight is applied, as in Llama.
    """

    neutral = 1.0
    """The weight that leaves the normed x alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self._normed(x).to(x.dtype) * self.weight

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), self.normalized_shape, None, self.eps)


class WideRMSNorm(RMSNorm):
    """Cast back after the weight is applied, as in Jet-Nemotron."""

    def forward(self, x: Tensor) -> Tensor:
        return (self._normed(x) * self.weight).to(x.dtype)


class CentredRMSNorm(RMSNorm):
    """(1 + weight) in place of the weight, cast back after it is applied, as in Qwen3-Next."""

    neutral = 0.0

    def forward(self, x: Tensor) -> Tensor:
        normed = self._normed(x)
        return (normed * (1 + self.weight.to(normed.dtype))).to(x.dtype)


norms = {"plain": RMSNorm, "wide": WideRMSNorm, "centred": CentredRMSNorm}


def l2norm(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)
