"""The residual block: norm, mixer, residual; norm, MLP, residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from zoo.blocks.mixer import Mixer, Options, linear_flops
from zoo.blocks.mlp import SwiGLU
from zoo.blocks.norm import RMSNorm
from zoo.blocks.positions import Positions


class Block(nn.Module):
    """Residual block around any mixer. x: [B, T, D]; `fast` and `window` are the mixer's state."""

    def __init__(self, mixer: Mixer, options: Options, d_model: int, d_ff: int, norm: Callable[[int], RMSNorm]) -> None:
        super().__init__()
        self.inserted = options.inserted
        self.mixer_norm = norm(d_model)
        self.mixer = mixer
        self.mixer_post_norm = norm(d_model) if options.post_norm else nn.Identity()
        self.mlp = SwiGLU(d_model, d_ff) if options.mlp else None
        if options.mlp:
            self.mlp_norm = norm(d_model)
            self.mlp_post_norm = norm(d_model) if options.post_norm else nn.Identity()

    def flops(self, tokens: int, past: int, *, mlp: bool = True) -> int:
        """Return the FLOPs on `tokens` new tokens after `past` cached ones; see `Mixer.flops`."""
        return self.mixer.flops(tokens, past) + (tokens * linear_flops(self.mlp) if mlp and self.mlp is not None else 0)

    def forward(self, x: Tensor, fast: Any, window: Any, positions: Positions, *, mlp: bool = True) -> tuple[Tensor, Any, Any]:
        """Run the block. With `mlp` false the MLP is skipped, for callers that read only the state."""
        y, fast, window = self.mixer(self.mixer_norm(x), fast, window, positions)
        x = x + self.mixer_post_norm(y)
        if mlp and self.mlp is not None:
            x = x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))
        return x, fast, window
