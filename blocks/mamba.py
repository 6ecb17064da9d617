"""Mamba (arXiv 2312.00752)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.blocks import mixer
from zoo.blocks.conv_tail import ConvTail
from zoo.blocks.mixer import Mixer, mixers
from zoo.blocks.norm import RMSNorm, UnitRMSNorm
from zoo.blocks.positions import Positions
from zoo.kernels.selective_scan.op import selective_scan


class MambaOptions(mixer.Options):
    expand: int = Field(2, ge=1, description="inner channels / d_model")
    state_dim: int = Field(16, ge=1, description="N, fast weights per channel")
    dt_rank: int | None = Field(None, ge=1, description="default: d_model / 16, rounded up")
    conv_size: int = Field(4, ge=2, description="taps of the short convolution")
    conv_bias: bool = True
    bias: bool = Field(False, description="bias of the input and output projections")
    inner_norm: Literal["plain", "unit"] | None = Field(
        None, description="RMSNorm of B, C and the input of dt_proj; 'unit': without weights"
    )
    norm_eps: float = Field(1e-6, gt=0, description="eps of inner_norm")
    decay_init: float | None = Field(
        None, gt=0, description="exp(A_log) of a channel's fast weights rises in equal steps to this value; default: state_dim"
    )


@mixers.register("mamba")
class Mamba(Mixer):
    """Selective state space with a gate (section 3.4, figure 3). Fast weights S: [B, C, N] for C inner channels, float32."""

    Options = MambaOptions
    packs = True
    wide = ("A_log", "D")

    def __init__(self, d_model: int, options: MambaOptions, reach: int | None) -> None:
        super().__init__(d_model, options, reach)
        self.inner = options.expand * d_model
        self.state_dim, self.taps = options.state_dim, options.conv_size
        self.decay_init = options.decay_init or float(options.state_dim)
        self.dt_rank = options.dt_rank or -(-d_model // 16)
        self.in_proj = nn.Linear(d_model, 2 * self.inner, bias=options.bias)
        self.conv_weight = nn.Parameter(torch.empty(self.inner, self.taps))
        self.conv_bias = nn.Parameter(torch.empty(self.inner)) if options.conv_bias else None
        self.x_proj = nn.Linear(self.inner, self.dt_rank + 2 * self.state_dim, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.inner)
        kinds: dict[str | None, Callable[..., nn.Module]] = {None: nn.Identity, "unit": UnitRMSNorm, "plain": RMSNorm}
        norm = partial(kinds[options.inner_norm], eps=options.norm_eps)
        self.dt_norm, self.B_norm, self.C_norm = norm(self.dt_rank), norm(self.state_dim), norm(self.state_dim)
        self.A_log = nn.Parameter(torch.empty(self.inner, self.state_dim))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.o_proj = nn.Linear(self.inner, d_model, bias=options.bias)

    def init_weights(self, generator: torch.Generator) -> None:
        mixer.init_conv(self.conv_weight, self.taps, generator)
        if self.conv_bias is not None:
            mixer.init_conv(self.conv_bias, self.taps, generator)
        mixer.init_conv(self.dt_proj.weight, self.dt_rank, generator)
        mixer.init_step_bias(self.dt_proj.bias, generator)
        steps = torch.arange(1, self.state_dim + 1, dtype=self.A_log.dtype, device=self.A_log.device) * (self.decay_init / self.state_dim)
        self.A_log.copy_(steps.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def new_fast(self, batch: int) -> Tensor:
        return self.zeros(batch, self.inner, self.state_dim, fast=True)

    def new_window(self, batch: int) -> ConvTail:
        return ConvTail(self.zeros(batch, self.inner, self.taps - 1))

    def flops(self, tokens: int, past: int) -> int:
        # the convolution; write and read
        return super().flops(tokens, past) + tokens * self.inner * (2 * self.taps + 4 * self.state_dim)

    def forward(self, x: Tensor, fast: Tensor, window: ConvTail, positions: Positions) -> tuple[Tensor, Tensor, ConvTail]:
        mixed, gate = self.in_proj(x).chunk(2, dim=-1)
        u, window = window.convolve(mixed, self.conv_weight, self.conv_bias, positions)
        low, B, C = self.x_proj(u).split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        low, B, C = self.dt_norm(low), self.B_norm(B), self.C_norm(C)
        # padding has a step size of zero: it neither decays nor writes
        dt = positions.without_padding(F.softplus(self.dt_proj(low).to(fast.dtype)))
        A = -self.A_log.to(fast.dtype).exp()
        u = u.to(fast.dtype)
        y, final = selective_scan(u, dt, A, B, C, initial_state=fast, output_final_state=True, cu_seqlens=positions.cu_seqlens)
        assert final is not None
        y = (y + self.D * u) * F.silu(gate.to(fast.dtype))
        return self.o_proj(y.to(x.dtype)), final, window
