"""Public face of the dynamic causal convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import given_or_zeros
from zoo.kernels.dispatch import choose, kernels
from zoo.kernels.dynamic_conv1d.chunked import chunked
from zoo.kernels.dynamic_conv1d.reference import stepwise

kernels.register("dynamic_conv1d.chunked", chunked)
kernels.register("dynamic_conv1d.reference", stepwise)


def dynamic_conv1d(x: Tensor, weight: Tensor, *, tail: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution with a kernel of its own for every token and channel, then SiLU (arXiv 2508.15884, section 2.3).

    Args:
        x: [B, T, C]. weight: [B, T, C, K], the last tap is the current token's.
        tail: the K-1 inputs before x, oldest first, [B, C, K-1]; default zeros.
    Returns:
        [B, T, C] in x's dtype.
    Raises:
        ValueError: shapes that do not fit.
    """
    B, _, C = x.shape
    if weight.ndim != 4 or weight.shape[:3] != x.shape:
        raise ValueError(f"weight {list(weight.shape)}: want [B, T, C, K] for x {list(x.shape)}")
    K = weight.shape[3]
    tail = given_or_zeros("tail", tail, (B, C, K - 1), x, x.dtype)
    return F.silu(choose("dynamic_conv1d", "chunked")(x, weight.to(x.dtype), tail))
