"""The residual block: norm, mixer, residual; norm, MLP, residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from zoo.blocks.mixer import Mixer, Options
from zoo.blocks.mlp import MLP
from zoo.blocks.norm import RMSNorm
from zoo.blocks.positions import Positions


class Block(nn.Module):
    """Residual block around any mixer and, if there is one, an MLP. x: [B, T, D]; `fast` and `window` are the mixer's state."""

    def __init__(self, mixer: Mixer, options: Options, mlp: MLP | None, d_model: int, norm: Callable[[int], RMSNorm]) -> None:
        super().__init__()
        self.d_model = d_model
        self.inserted, self.residual_in_fp32 = options.inserted, options.residual_in_fp32
        self.residual_scale = options.residual_scale
        before, after = (norm if flag else nn.Identity for flag in (options.pre_norm, options.post_norm))
        self.mixer_norm = before(d_model)
        self.mixer = mixer
        self.mixer_post_norm = after(d_model)
        self.mlp = mlp
        if mlp is not None:
            self.mlp_norm = before(d_model)
            self.mlp_post_norm = after(d_model)

    def flops(self, tokens: int, past: int, *, keep: int | None = None) -> int:
        """Return the FLOPs on `tokens` new tokens after `past` cached ones; see `Mixer.flops` and `forward`."""
        return self.mixer.flops(tokens, past) + (0 if self.mlp is None else self.mlp.flops(tokens if keep is None else keep))

    def forward(self, x: Tensor, fast: Any, window: Any, positions: Positions, *, keep: int | None = None) -> tuple[Tensor, Any, Any]:
        """Run the block.

        x may be wider than the mixer's dtype (`residual_in_fp32`) and stays so; norms, mixer and MLP compute in that dtype.

        Args:
            keep: number of last tokens that are returned, [B, keep, D], with an MLP that runs on no others; default: all.
        """
        dtype = self.mixer.dtype
        y, fast, window = self.mixer(self.mixer_norm(x.to(dtype)), fast, window, positions)
        if keep is not None:
            x, y = last(x, keep), last(y, keep)
        x = self._add(x, self.mixer_post_norm(y))
        if self.mlp is not None and keep != 0:
            x = self._add(x, self.mlp_post_norm(self.mlp(self.mlp_norm(x.to(dtype)))))
        return x, fast, window

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + (y if self.residual_scale == 1 else y * self.residual_scale)


def last(x: Tensor, tokens: int) -> Tensor:
    """Return the last tokens of x [B, T, ...]."""
    return x[:, x.shape[1] - tokens :]
