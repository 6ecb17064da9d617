"""Mamba-2 (arXiv 2405.21060)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from zoo.blocks import mixer
from zoo.blocks.conv_tail import ConvTail
from zoo.blocks.mixer import Mixer, mixers
from zoo.blocks.positions import Positions
from zoo.errors import ZooError, counted
from zoo.kernels.gated_rmsnorm.op import gated_rmsnorm
from zoo.kernels.ssd.op import ssd


class Mamba2Options(mixer.Options):
    expand: int = Field(2, ge=1, description="inner channels / d_model")
    heads: int | None = Field(None, ge=1, description="H, heads of head_dim inner channels each; default: expand * d_model / head_dim")
    head_dim: int = Field(64, ge=1, description="P, inner channels per head")
    state_dim: int = Field(128, ge=1, description="N, fast weights per channel")
    groups: int = Field(1, ge=1, description="groups of heads that share B and C; also the groups of the output norm")
    conv_size: int = Field(4, ge=2, description="taps of the short convolution")
    conv_bias: bool = True
    bias: bool = Field(False, description="bias of the input and output projections")
    o_bias: bool | None = Field(None, description="bias of the output projection; default: bias")
    scales: tuple[float, float, float, float, float] = Field(
        (1.0, 1.0, 1.0, 1.0, 1.0), description="factors of what the input projection returns: gate, inputs, B, C, step size"
    )
    dt_limit: tuple[float, Annotated[float, Field(allow_inf_nan=True)]] = Field(
        (0.0, math.inf), description="step sizes are clamped to this range"
    )
    norm: Literal["after_gate", "before_gate"] | None = Field("after_gate", description="output norm of each group; null: only the gate")
    norm_eps: float = Field(1e-5, gt=0, description="eps of the output norm")
    decay_init: float = Field(
        16.0, gt=0, description="exp(A_log) is initialised uniformly in (decay_init / 16, decay_init); smaller: longer memory"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Mamba2Options:
        if not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            raise ValueError(f"dt_limit: {list(self.dt_limit)} must be a range of step sizes >= 0")
        return self


@mixers.register("mamba2")
class Mamba2(Mixer):
    """State-space duality with one decay per head (section 7, figure 6). Fast weights S: [B, H, N, P], float32."""

    Options = Mamba2Options
    packs = True
    wide = ("A_log", "D", "dt_bias", "norm_weight")

    def __init__(self, d_model: int, options: Mamba2Options, reach: int | None) -> None:
        super().__init__(d_model, options, reach)
        self.inner = options.expand * d_model if options.heads is None else options.heads * options.head_dim
        self.heads, rest = divmod(self.inner, options.head_dim)
        self.groups, self.state_dim, self.taps, self.dt_limit = options.groups, options.state_dim, options.conv_size, options.dt_limit
        if rest or not self.heads:
            raise ZooError(f"head_dim: {options.head_dim} does not divide the {self.inner} inner channels (expand * d_model)")
        if self.heads % self.groups:
            raise ZooError(f"groups: {self.groups} does not divide the {counted(self.heads, 'head')}")
        self.convolved = self.inner + 2 * self.groups * self.state_dim
        self.in_proj = nn.Linear(d_model, self.inner + self.convolved + self.heads, bias=options.bias)
        self.conv_weight = nn.Parameter(torch.empty(self.convolved, self.taps))
        self.conv_bias = nn.Parameter(torch.empty(self.convolved)) if options.conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm_weight = nn.Parameter(torch.empty(self.inner)) if options.norm else None
        self.gate_first, self.norm_eps = options.norm == "after_gate", options.norm_eps
        self.scales, self.decay_init = options.scales, options.decay_init
        self.o_proj = nn.Linear(self.inner, d_model, bias=options.bias if options.o_bias is None else options.o_bias)

    def init_weights(self, generator: torch.Generator) -> None:
        mixer.init_conv(self.conv_weight, self.taps, generator)
        if self.conv_bias is not None:
            mixer.init_conv(self.conv_bias, self.taps, generator)
        nn.init.uniform_(self.A_log, self.decay_init / 16, self.decay_init, generator=generator).log_()
        mixer.init_step_bias(self.dt_bias, generator)
        nn.init.ones_(self.D)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def new_fast(self, batch: int) -> Tensor:
        return self.zeros(batch, self.heads, self.state_dim, self.inner // self.heads, fast=True)

    def new_window(self, batch: int) -> ConvTail:
        return ConvTail(self.zeros(batch, self.convolved, self.taps - 1))

    def flops(self, tokens: int, past: int) -> int:
        # the convolution; write and read
        return super().flops(tokens, past) + tokens * (2 * self.convolved * self.taps + 4 * self.inner * self.state_dim)

    def forward(self, x: Tensor, fast: Tensor, window: ConvTail, positions: Positions) -> tuple[Tensor, Tensor, ConvTail]:
        grouped = self.groups * self.state_dim
        projected = self.in_proj(x)
        if set(self.scales) != {1}:
            sections = projected.split([self.inner, self.inner, grouped, grouped, self.heads], dim=-1)
            projected = torch.cat([section * scale for section, scale in zip(sections, self.scales, strict=True)], dim=-1)
        gate, mixed, dt = projected.split([self.inner, self.convolved, self.heads], dim=-1)
        convolved, window = window.convolve(mixed, self.conv_weight, self.conv_bias, positions)
        u, B, C = convolved.to(fast.dtype).split([self.inner, grouped, grouped], dim=-1)
        u, B, C = u.unflatten(-1, (self.heads, -1)), B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))
        dt = F.softplus(dt.to(fast.dtype) + self.dt_bias)
        dt = dt if self.dt_limit == (0.0, math.inf) else dt.clamp(*self.dt_limit)
        dt = positions.without_padding(dt)  # padding has a step size of zero: it neither decays nor writes
        y, final = ssd(
            u, dt, -self.A_log.to(fast.dtype).exp(), B, C, initial_state=fast, output_final_state=True, cu_seqlens=positions.cu_seqlens
        )
        assert final is not None
        y = (y + self.D[:, None] * u).flatten(2)
        return self.o_proj(self._gated(y, gate)), final, window

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """Apply the gate, in its dtype, and the output norm. y, gate: [B, T, inner]."""
        if self.norm_weight is None:
            return (y * F.silu(gate.to(y.dtype))).to(gate.dtype)
        y, gate, weight = (part.unflatten(-1, (self.groups, -1)) for part in (y, gate, self.norm_weight))
        return gated_rmsnorm(y, gate, weight, eps=self.norm_eps, gate_first=self.gate_first).flatten(2)
