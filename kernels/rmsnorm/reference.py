"""The definition of the root mean square norm, which is also its form for CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.common.normalise import normalise


def scaled(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) in float32 or wider, cast to `dtype`, times the weight; shapes as below."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    at_once = weight.ndim == 1 and weight.dtype == dtype == x.dtype
    if not torch.compiler.is_compiling():
        y = normalise(x, weight if at_once else None, eps, mean=True)
        return y if at_once else y.to(dtype) * weight
    if at_once:
        return F.rms_norm(x, weight.shape, weight, eps)  # one operator of an exported graph
    return F.rms_norm(x, x.shape[-1:], None, eps).to(dtype) * weight


def normed(x: Tensor, weight: Tensor, eps: float, style: str) -> Tensor:
    """Normalise the last dimension in float32 or wider (arXiv 1910.07467, eq. 4) and apply the weight according to `style`.

    Args:
        x: [..., N] or [..., G, N]. weight: [N] or [G, N]. style: "plain", "wide" or "centred", see op.py.
    """
    if style == "plain":
        return scaled(x, weight, eps, x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(wide)
    return scaled(x, weight if style == "wide" else 1 + weight, eps, wide).to(x.dtype)
