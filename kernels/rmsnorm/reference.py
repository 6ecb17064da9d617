"""Root mean square norm: the definition, and the form for CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scaled(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in float32 or wider, cast to `dtype`, times the weight; shapes as below."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if weight.ndim == 1 and weight.dtype == dtype == wide:
        return F.rms_norm(x.to(wide), weight.shape, weight, eps)  # the same, as one operator of an exported graph
    return F.rms_norm(x.to(wide), x.shape[-1:], None, eps).to(dtype) * weight


def normed(x: Tensor, weight: Tensor, eps: float, style: str) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension in float32 or wider (arXiv 1910.07467, eq. 4), times a weight as `style` has it.

    Args:
        x: [..., N] or [..., G, N]. weight: [N] or [G, N]. style: "plain", "wide" or "centred", see op.py.
    """
    if style == "plain":
        return scaled(x, weight, eps, x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(wide)
    return scaled(x, weight if style == "wide" else 1 + weight, eps, wide).to(x.dtype)
