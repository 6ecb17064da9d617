"""The real-gated linear recurrent unit of Griffin (arXiv 2402.19427, section 2.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.blocks import mixer
from zoo.blocks.conv_tail import ConvTail
from zoo.blocks.mixer import Mixer, mixers
from zoo.blocks.positions import Positions
from zoo.errors import ZooError
from zoo.kernels.selective_scan.op import selective_scan

TINY = 1e-30  # keeps the derivative of the square root finite


class RGLRUOptions(mixer.Options):
    width: int | None = Field(None, ge=1, description="recurrent channels; default: d_model")
    heads: int = Field(4, ge=1, description="blocks of the block-diagonal gates")
    conv_size: int = Field(4, ge=2, description="taps of the short convolution")


@mixers.register("rglru")
class RGLRU(Mixer):
    """Recurrence S <- a S + sqrt(1 - a^2) (i u) with log a = -8 r softplus(decay), and gates r, i of u = conv(W_x x).

    Returns W_o (S gelu(W_y x)). Fast weights S: [B, W], float32. The first token of a stream has no history: S = i u, without
    the square root. S is zero only before it, so later windows, and later passes over the first one, follow the usual rule.
    """

    Options = RGLRUOptions
    packs = True
    wide = ("decay",)

    def __init__(self, d_model: int, options: RGLRUOptions, reach: int | None) -> None:
        super().__init__(d_model, options, reach)
        self.width, self.heads, self.taps = options.width or d_model, options.heads, options.conv_size
        size, rest = divmod(self.width, self.heads)
        if rest:
            raise ZooError(f"heads: {self.heads} does not divide the width: {self.width}")
        self.x_proj = nn.Linear(d_model, self.width)
        self.y_proj = nn.Linear(d_model, self.width)
        self.conv_weight = nn.Parameter(torch.empty(self.width, self.taps))
        self.conv_bias = nn.Parameter(torch.empty(self.width))
        self.input_gate = nn.Parameter(torch.empty(self.heads, size, size))
        self.input_bias = nn.Parameter(torch.empty(self.heads, size))
        self.recurrence_gate = nn.Parameter(torch.empty(self.heads, size, size))
        self.recurrence_bias = nn.Parameter(torch.empty(self.heads, size))
        self.decay = nn.Parameter(torch.empty(self.width))
        self.o_proj = nn.Linear(self.width, d_model)

    def init_weights(self, generator: torch.Generator) -> None:
        mixer.init_conv(self.conv_weight, self.taps, generator)
        mixer.init_conv(self.conv_bias, self.taps, generator)
        for gate in (self.input_gate, self.recurrence_gate):
            nn.init.normal_(gate, std=gate.shape[1] ** -0.5, generator=generator)
        for bias in (self.input_bias, self.recurrence_bias):
            nn.init.zeros_(bias)
        # a^2 is uniform in [0.9^2, 0.999^2] where the recurrence gate is open
        square = nn.init.uniform_(self.decay, 0.9**2, 0.999**2, generator=generator)
        self.decay.copy_((-square.log() / 16).expm1().log())

    def new_fast(self, batch: int) -> Tensor:
        return self.zeros(batch, self.width, fast=True)

    def new_window(self, batch: int) -> ConvTail:
        return ConvTail(self.zeros(batch, self.width, self.taps - 1))

    def flops(self, tokens: int, past: int) -> int:
        # the gates; the convolution; write and read
        return super().flops(tokens, past) + tokens * self.width * (4 * self.width // self.heads + 2 * self.taps + 4)

    def forward(self, x: Tensor, fast: Tensor, window: ConvTail, positions: Positions) -> tuple[Tensor, Tensor, ConvTail]:
        u, window = window.convolve(self.x_proj(x), self.conv_weight, self.conv_bias, positions, activation=None)
        blocks = u.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(0, 1)  # [H, B T, W / H]
        write, recurrence = (
            torch.baddbmm(bias[:, None], blocks, gate).transpose(0, 1).reshape(u.shape).sigmoid()
            for gate, bias in ((self.input_gate, self.input_bias), (self.recurrence_gate, self.recurrence_bias))
        )
        rate = 8 * recurrence.to(fast.dtype) * F.softplus(self.decay.to(fast.dtype))  # -log a
        gain = (-torch.expm1(-2 * rate)).clamp(min=TINY).sqrt()
        gain = torch.where(self._first(fast, positions)[..., None], torch.ones_like(gain), gain)
        # a selective scan of one fast weight per channel, which multiplies its input by the step size
        u = gain * (write * u).to(fast.dtype) / rate.clamp(min=TINY)
        one = torch.ones_like(rate[..., :1])
        y, final = selective_scan(
            u,
            positions.without_padding(rate),
            -torch.ones_like(self.decay, dtype=fast.dtype)[:, None],
            one,
            one,
            initial_state=fast[..., None],
            output_final_state=True,
            cu_seqlens=positions.cu_seqlens,
        )
        assert final is not None
        y = y.to(x.dtype) * F.gelu(self.y_proj(x), approximate="tanh")
        return self.o_proj(y), final.squeeze(-1), window

    def _first(self, fast: Tensor, positions: Positions) -> Tensor:
        """Mark the first tokens of new streams: bool [B, T]."""
        fresh = (fast == 0).all(-1)
        if positions.cu_seqlens is None:
            return fresh[:, None] & (positions.index == 0)
        return ((positions.index[:, None] == positions.cu_seqlens[:-1]) & fresh).any(-1)[None]
