"""The window cache of mixers with a short convolution."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zoo.blocks.positions import Positions
from zoo.kernels.causal_conv1d.op import causal_conv1d


class ConvTail(NamedTuple):
    """The last K-1 inputs of a short convolution, oldest first: [B, C, K-1]."""

    conv_state: Tensor

    def empty(self) -> ConvTail:
        return ConvTail(torch.zeros_like(self.conv_state))

    def keep(self, tokens: int) -> ConvTail:
        return self

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, positions: Positions, *, activation: Literal["silu"] | None = "silu"
    ) -> tuple[Tensor, ConvTail]:
        """Convolve new inputs with those before them; see `causal_conv1d`. Returns the outputs, x: [B, T, C], and the next tail."""
        y, tail = causal_conv1d(
            x,
            weight,
            bias,
            activation=activation,
            initial_state=self.conv_state,
            output_final_state=True,
            cu_seqlens=positions.cu_seqlens,
        )
        return y, ConvTail(positions.tail(x, self.conv_state, tail))
