"""The definition of the selective scan, one token at a time. Every other form is checked against it."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.common.recording import pure


def recurrent(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Step recurrence (Mamba, arXiv 2312.00752, eq. 2 and 4; Euler's rule for B as in the released models).

        S <- exp(dt_t A) S + dt_t u_t B_t^T;  y_t = S C_t

    Args:
        u, dt: [B, T, D]. A: [D, N]. B, C: [B, T, N]. state: [B, D, N].
            All of one floating dtype, which is also that of the arithmetic.
    Returns:
        y [B, T, D] and the final state [B, D, N].
    """
    plus = Tensor.addcmul if pure() else Tensor.addcmul_
    outputs = []
    for t in range(u.shape[1]):
        decay = (dt[:, t, :, None] * A).exp()
        state = plus(decay * state, (dt[:, t] * u[:, t])[..., None], B[:, t, None])
        outputs.append(state @ C[:, t, :, None])
    return torch.cat(outputs, dim=-1).mT, state
