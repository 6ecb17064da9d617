"""The gated delta rule, one token at a time: the definition every other form is checked against."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """Step recurrence (Gated Delta Networks, arXiv 2412.06464, eq. 10): decay, predict, correct, read.

        S <- exp(g_t) S;  u_t = beta_t (v_t - S^T k_t);  S <- S + k_t u_t^T;  o_t = scale S^T q_t

    Args:
        q, k: [B, T, H, K]. v: [B, T, H, V]. g (log decay), beta: [B, T, H]. state: [B, H, K, V].
            All of one floating dtype, in which the arithmetic is done.
    Returns:
        o [B, T, H, V] and the final state [B, H, K, V].
    """
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        predicted = (state * k[:, t, :, :, None]).sum(-2)
        update = beta[:, t, :, None] * (v[:, t] - predicted)
        state = state + k[:, t, :, :, None] * update[:, :, None, :]
        outputs.append((state * q[:, t, :, :, None]).sum(-2) * scale)
    return torch.stack(outputs, dim=1), state
