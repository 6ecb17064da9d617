"""The definition of the L2 norm, which is also its form for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.common.normalise import normalise


def normed(x: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(sum(x^2) + eps) over the last dimension, in float32 or wider. x: [..., N]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return normalise(wide, None, eps, mean=False).to(x.dtype)
