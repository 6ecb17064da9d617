"""The definition of the depthwise causal convolution, one output at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def stepwise(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    """Compute y_t = sum_j weight[:, j] x_{t-K+1+j}, with `tail` as the inputs before x.

    Args:
        x: [B, T, C]. weight: [C, K], the last tap belongs to the current token. tail: [B, C, K-1].
    """
    window = torch.cat([tail, x.mT], dim=-1)
    K = weight.shape[-1]
    return torch.stack([torch.einsum("bck,ck->bc", window[..., t : t + K], weight) for t in range(x.shape[1])], dim=1)
