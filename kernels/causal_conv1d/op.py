"""Public face of the short causal convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.causal_conv1d.chunked import chunked
from zoo.kernels.causal_conv1d.reference import stepwise
from zoo.kernels.checks import given_or_zeros
from zoo.kernels.dispatch import choose, kernels

kernels.register("causal_conv1d.chunked", chunked)
kernels.register("causal_conv1d.reference", stepwise)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tail: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution with SiLU (Mamba, arXiv 2312.00752, section 3.4).

    Args:
        x: [B, T, C]. weight: [C, K], the last tap is the current token's. bias: [C].
        tail: the K-1 inputs before x, oldest first, [B, C, K-1]; default zeros.
    Returns:
        [B, T, C] in x's dtype.
    """
    B, _, C = x.shape
    if weight.ndim != 2 or weight.shape[0] != C:
        raise ValueError(f"weight {list(weight.shape)}: want [C, K] with C = {C}")
    K = weight.shape[1]
    tail = given_or_zeros("tail", tail, (B, C, K - 1), x, x.dtype)
    y = choose("causal_conv1d", "chunked")(x, weight, tail)
    return F.silu(y if bias is None else y + bias)
