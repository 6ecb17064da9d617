"""The definition of state-space duality, one token at a time. Every other form is checked against it."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.common.recording import pure


def recurrent(x: Tensor, g: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Step recurrence (Mamba-2, arXiv 2405.21060, eq. 1 with a scalar decay per head).

        S <- exp(g_t) S + B_t x_t^T;  y_t = S^T C_t

    Args:
        x: [B, T, H, P]. g (log decay): [B, T, H]. B, C: [B, T, G, N], H a multiple of G. state: [B, H, N, P].
            All of one floating dtype, which is also that of the arithmetic.
    Returns:
        y [B, T, H, P] and the final state [B, H, N, P].
    """
    plus = Tensor.addcmul if pure() else Tensor.addcmul_
    H, G = x.shape[2], B.shape[2]
    B, C = (y.expand(-1, -1, H, -1) if G == 1 else y.repeat_interleave(H // G, dim=2) for y in (B, C))
    outputs = []
    if torch.compiler.is_compiling() and x.shape[1] == 1:  # y from the old state, so that the new one can replace it
        decay, x, B, C = g[:, 0].exp()[..., None], x[:, 0], B[:, 0], C[:, 0]
        y = torch.addcmul((C * B).sum(-1, keepdim=True) * x, decay, (C[..., None] * state).sum(-2))
        return y[:, None], torch.addcmul(decay[..., None] * state, B[..., None], x[..., None, :])
    for t in range(x.shape[1]):
        decay = g[:, t].exp()[..., None, None]
        state = plus(decay * state, B[:, t, :, :, None], x[:, t, :, None])
        outputs.append(C[:, t, :, None] @ state)
    return torch.cat(outputs, dim=2).transpose(1, 2), state
