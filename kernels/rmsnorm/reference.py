"""Root mean square norm: the definition, and the form for CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normed(x: Tensor, weight: Tensor, eps: float, style: str) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension in float32 or wider (arXiv 1910.07467, eq. 4), times a weight as `style` has it.

    Args:
        x: [..., N] or [..., G, N]. weight: [N] or [G, N]. style: "plain", "wide" or "centred", see op.py.
    """
    wide = F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:], None, eps)
    if style == "plain":
        return wide.to(x.dtype) * weight
    if style == "wide":
        return (wide * weight).to(x.dtype)
    return (wide * (1 + weight.to(wide.dtype))).to(x.dtype)
