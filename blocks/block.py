"""One residual block: norm, mixer, residual; norm, MLP, residual."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.blocks.mixer import Mixer
from zoo.blocks.mlp import SwiGLU
from zoo.blocks.norm import RMSNorm
from zoo.blocks.steps import Steps


class Block(nn.Module):
    """Pre-norm block around any mixer. x: [B, T, D]; `fast` and `window` are the mixer's own."""

    def __init__(self, mixer: Mixer, d_model: int, d_ff: int, norm_eps: float) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(d_model, eps=norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(d_model, eps=norm_eps)
        self.mlp = SwiGLU(d_model, d_ff)

    def forward(self, x: Tensor, fast: Any, window: Any, steps: Steps) -> tuple[Tensor, Any, Any]:
        y, fast, window = self.mixer(self.mixer_norm(x), fast, window, steps)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), fast, window
