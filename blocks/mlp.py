"""The feed-forward part of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.common.recording import recorded


class SwiGLU(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202). x: [B, T, D]."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, hidden, bias=False)
        self.up_proj = nn.Linear(d_model, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.silu(self.gate_proj(x)), self.up_proj(x)
        y: Tensor = self.down_proj(gate * up if recorded(gate, up) else gate.mul_(up))
        return y
