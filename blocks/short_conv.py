"""The gated short convolution of LFM2 (arXiv 2511.23404)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.blocks import mixer
from zoo.blocks.conv_tail import ConvTail
from zoo.blocks.mixer import Mixer, mixers
from zoo.blocks.positions import Positions


class ShortConvOptions(mixer.Options):
    conv_size: int = Field(3, ge=2, description="taps of the convolution")
    bias: bool = Field(False, description="bias of the projections and of the convolution")


@mixers.register("conv")
class ShortConv(Mixer):
    """Gated convolution W_out (c * conv(b * u)) with b, c, u = W_in x. It has no fast weights: it sees only the taps of the convolution."""

    Options = ShortConvOptions
    packs = True

    def __init__(self, d_model: int, options: ShortConvOptions, reach: int | None) -> None:
        super().__init__(d_model, options, reach)
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=options.bias)
        self.conv_weight = nn.Parameter(torch.empty(d_model, options.conv_size))
        self.conv_bias = nn.Parameter(torch.empty(d_model)) if options.bias else None
        self.o_proj = nn.Linear(d_model, d_model, bias=options.bias)

    def init_weights(self, generator: torch.Generator) -> None:
        for weight in (self.conv_weight, self.conv_bias):
            if weight is not None:
                mixer.init_conv(weight, self.conv_weight.shape[1], generator)

    def new_window(self, batch: int) -> ConvTail:
        channels, taps = self.conv_weight.shape
        return ConvTail(self.zeros(batch, channels, taps - 1))

    def flops(self, tokens: int, past: int) -> int:
        return super().flops(tokens, past) + tokens * 2 * self.conv_weight.numel()

    def forward(self, x: Tensor, fast: None, window: ConvTail, positions: Positions) -> tuple[Tensor, None, ConvTail]:
        b, c, u = self.in_proj(x).chunk(3, dim=-1)
        y, window = window.convolve(b * u, self.conv_weight, self.conv_bias, positions, activation=None)
        return self.o_proj(c * y), None, window
