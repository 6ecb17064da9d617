"""A run of consecutive tokens in a stream, and what its place in the stream decides: rotary angles, masks, padding."""

from __future__ import annotations

import torch
from torch import Tensor


class Steps:
    """T tokens starting at a position. One object serves every layer and every pass, so its tables are made once.

    Args:
        start: position of the first token (int, or an int64 scalar tensor in an exported graph).
        length: T.
        valid: how many of the T tokens count (int64 scalar tensor); the rest is padding at the end. None: all.
    """

    def __init__(self, start: int | Tensor, length: int, device: torch.device, valid: Tensor | None = None) -> None:
        self.start = start
        self.length = length
        self.valid = valid
        self.index = torch.arange(length, device=device)
        self._tables: dict[object, Tensor | tuple[Tensor, Tensor]] = {}

    def rotary(self, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [T, dim / 2] of the rotary angles (RoFormer, arXiv 2104.09864, eq. 15), made in float32 or wider."""
        key = ("rotary", dim, theta, dtype)
        if key not in self._tables:
            wide = torch.promote_types(dtype, torch.float32)
            frequency = theta ** -(torch.arange(0, dim, 2, device=self.index.device, dtype=wide) / dim)
            angle = (self.start + self.index).to(wide)[:, None] * frequency
            self._tables[key] = angle.cos().to(dtype), angle.sin().to(dtype)
        return self._tables[key]  # type: ignore[return-value]

    def band(self, past: int, reach: int | None) -> Tensor:
        """Which of `past` cached tokens and the T new ones each new token sees: bool [T, past + T].

        A token sees itself and what came before it, `reach` tokens in all (None: everything).
        """
        key = ("band", past, reach)
        if key not in self._tables:
            behind = (past + self.index)[:, None] - torch.arange(past + self.length, device=self.index.device)
            self._tables[key] = (behind >= 0) & (behind < reach) if reach is not None else behind >= 0
        return self._tables[key]  # type: ignore[return-value]

    def without_padding(self, x: Tensor) -> Tensor:
        """x [B, T, ...] with zeros past the last token that counts."""
        if self.valid is None:
            return x
        return torch.where((self.index < self.valid).reshape(-1, *[1] * (x.ndim - 2)), x, torch.zeros((), dtype=x.dtype))

    def tail(self, x: Tensor, before: Tensor) -> Tensor:
        """The newest K-1 inputs of a short convolution after x [B, T, C], `before` [B, C, K-1] preceding it."""
        inputs = torch.cat([before, x.mT.to(before.dtype)], dim=-1)
        if self.valid is None:
            return inputs[..., self.length :]
        return inputs.index_select(-1, self.valid + torch.arange(before.shape[-1], device=x.device))
