"""The definition of Kimi Delta Attention, one token at a time. Every other form is checked against it."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.common.recording import pure


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """Step recurrence (Kimi Linear, arXiv 2510.26692, eq. 1): decay each key channel, predict, correct, read.

        S <- diag(exp(g_t)) S;  u_t = beta_t (v_t - S^T k_t);  S <- S + k_t u_t^T;  o_t = scale S^T q_t

    Args:
        q, k, g (log decay): [B, T, H, K]. v: [B, T, H, V]. beta: [B, T, H]. state: [B, H, K, V].
            All of one floating dtype, which is also that of the arithmetic.
    Returns:
        o [B, T, H, V] and the final state [B, H, K, V].
    """
    plus = Tensor.addcmul if pure() else Tensor.addcmul_
    outputs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = (x[:, t, :, None] for x in (q, k, v))  # rows: [B, H, 1, D]
        decay = g[:, t, :, None].exp()
        update = beta[:, t, :, None, None] * (v_t - (decay * k_t) @ state)
        state = plus(decay.mT * state, k_t.mT, update)
        outputs.append(scale * (q_t @ state))
    return torch.cat(outputs, dim=2).transpose(1, 2), state
