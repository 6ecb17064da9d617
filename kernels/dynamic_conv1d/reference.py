"""The definition of the depthwise causal convolution with a kernel per token, one output at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def stepwise(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    """Compute y_t = sum_j weight_t[:, j] x_{t-K+1+j}, with `tail` as the inputs before x.

    Args:
        x: [B, T, C]. weight: [B, T, C, K], the last tap belongs to the current token. tail: [B, C, K-1].
    """
    window = torch.cat([tail, x.mT], dim=-1)
    K = weight.shape[-1]
    return torch.stack([torch.einsum("bck,bck->bc", window[..., t : t + K], weight[:, t]) for t in range(x.shape[1])], dim=1)
