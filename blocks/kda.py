"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.blocks import mixer
from zoo.blocks.conv_tail import ConvTail
from zoo.blocks.delta_rule import DeltaRuleOptions, value_size
from zoo.blocks.mixer import Mixer, mixers
from zoo.blocks.norm import RMSNorm
from zoo.blocks.positions import Positions
from zoo.kernels.kda.op import kda
from zoo.kernels.l2norm.op import l2norm


class KimiDeltaOptions(DeltaRuleOptions):
    expand_v: float = Field(1.0, gt=0, description="value head size / key head size")


class SigmoidGatedRMSNorm(RMSNorm):
    """RMSNorm times sigmoid(gate), in float32 or wider up to the end. x, gate: [..., D]."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        wide = torch.promote_types(x.dtype, torch.float32)
        return (super().forward(x.to(wide)) * gate.to(wide).sigmoid()).to(x.dtype)


@mixers.register("kda")
class KimiDeltaAttention(Mixer):
    """Short convolution and SiLU on q, k, v; delta rule with a decay per key channel; normed, gated output (section 4).

    Log decay g = -exp(A_log) softplus(W_fb W_fa x + dt_bias), write strength beta = sigmoid(W_b x), output gate sigmoid(W_gb W_ga x).
    Fast weights S: [B, H, K, V], float32.
    """

    Options = KimiDeltaOptions
    packs = True
    wide = ("A_log", "dt_bias")

    def __init__(self, d_model: int, options: KimiDeltaOptions, reach: int | None) -> None:
        super().__init__(d_model, options, reach)
        self.heads, self.decay_init, self.init_conv = options.heads, options.decay_init, mixer.CONV_INIT[options.conv_init]
        self.key_dim = options.head_dim or mixer.split_evenly(d_model, options.heads)
        self.value_dim = value_size(self.key_dim, options)
        self.keys, self.values = self.heads * self.key_dim, self.heads * self.value_dim
        self.q_proj = nn.Linear(d_model, self.keys, bias=False)
        self.k_proj = nn.Linear(d_model, self.keys, bias=False)
        self.v_proj = nn.Linear(d_model, self.values, bias=False)
        self.q_conv = nn.Parameter(torch.empty(self.keys, options.conv_size))
        self.k_conv = nn.Parameter(torch.empty(self.keys, options.conv_size))
        self.v_conv = nn.Parameter(torch.empty(self.values, options.conv_size))
        self.f_a_proj = nn.Linear(d_model, self.value_dim, bias=False)
        self.f_b_proj = nn.Linear(self.value_dim, self.keys, bias=False)
        self.b_proj = nn.Linear(d_model, self.heads, bias=False)
        self.g_a_proj = nn.Linear(d_model, self.value_dim, bias=False)
        self.g_b_proj = nn.Linear(self.value_dim, self.values, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.keys))
        self.o_norm = SigmoidGatedRMSNorm(self.value_dim, eps=options.norm_eps)
        self.o_proj = nn.Linear(self.values, d_model, bias=False)

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.uniform_(self.A_log, 1e-3 * self.decay_init, self.decay_init, generator=generator).log_()
        mixer.init_step_bias(self.dt_bias, generator)
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            self.init_conv(conv, conv.shape[1], generator)

    def new_fast(self, batch: int) -> Tensor:
        return self.zeros(batch, self.heads, self.key_dim, self.value_dim, fast=True)

    def new_window(self, batch: int) -> ConvTail:
        return ConvTail(self.zeros(batch, 2 * self.keys + self.values, self.q_conv.shape[1] - 1))

    def flops(self, tokens: int, past: int) -> int:
        convolutions = 2 * sum(conv.numel() for conv in (self.q_conv, self.k_conv, self.v_conv))
        # predict, write, read
        return super().flops(tokens, past) + tokens * (convolutions + 6 * self.heads * self.key_dim * self.value_dim)

    def forward(self, x: Tensor, fast: Tensor, window: ConvTail, positions: Positions) -> tuple[Tensor, Tensor, ConvTail]:
        mixed = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        convolved, window = window.convolve(mixed, torch.cat([self.q_conv, self.k_conv, self.v_conv]), None, positions)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in convolved.split([self.keys, self.keys, self.values], dim=-1))
        step = F.softplus(self.f_b_proj(self.f_a_proj(x)).to(fast.dtype) + self.dt_bias)
        g = -self.A_log.to(fast.dtype).exp()[:, None] * step.unflatten(-1, (self.heads, -1))
        beta = self.b_proj(x).to(fast.dtype).sigmoid()
        # padding neither decays nor writes
        g, beta = positions.without_padding(g), positions.without_padding(beta)
        o, final = kda(
            l2norm(q), l2norm(k), v, g=g, beta=beta, initial_state=fast, output_final_state=True, cu_seqlens=positions.cu_seqlens
        )
        assert final is not None
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, (self.heads, -1))
        return self.o_proj(self.o_norm(o, gate).flatten(2)), final, window
