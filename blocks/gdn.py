"""Gated DeltaNet (arXiv 2412.06464)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.blocks import mixer
from zoo.blocks.mixer import Mixer, mixers
from zoo.blocks.norm import RMSNorm, l2norm
from zoo.blocks.steps import Steps
from zoo.kernels.causal_conv1d.op import causal_conv1d
from zoo.kernels.gated_delta_rule.op import gated_delta_rule


class ConvTail(NamedTuple):
    """The newest K-1 inputs of a short convolution, oldest first: [B, C, K-1]."""

    conv_state: Tensor

    def empty(self) -> ConvTail:
        return ConvTail(torch.zeros_like(self.conv_state))

    def keep(self, tokens: int) -> ConvTail:
        return self


class GatedDeltaNetOptions(mixer.Options):
    heads: int = Field(4, ge=1)
    head_dim: int | None = Field(None, ge=1, description="of keys and queries; default: d_model / heads")
    expand_v: float = Field(2.0, gt=0, description="value head size / key head size")
    conv_size: int = Field(4, ge=2, description="taps of the short convolution on q, k and v")
    decay_init: float = Field(16.0, gt=0, description="exp(A_log) starts uniform in (0, decay_init): smaller remembers longer")


@mixers.register("gdn")
class GatedDeltaNet(Mixer):
    """Short convolution and SiLU on q, k, v; gated delta rule per head; normed, gated output.

    Fast weights S: [B, H, K, V]. Section 3.3 and figure 1 of the paper; gates as in Mamba-2:
    log decay g = -exp(A_log) softplus(W_a x + dt_bias), write strength beta = sigmoid(W_b x).
    """

    Options = GatedDeltaNetOptions

    def __init__(self, d_model: int, options: GatedDeltaNetOptions, reach: int | None) -> None:
        super().__init__(d_model, options, reach)
        self.heads = options.heads
        self.key_dim = options.head_dim or mixer.split_evenly(d_model, options.heads)
        self.value_dim = int(self.key_dim * options.expand_v)
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.g_proj = nn.Linear(d_model, values, bias=False)
        self.a_proj = nn.Linear(d_model, self.heads, bias=False)
        self.b_proj = nn.Linear(d_model, self.heads, bias=False)
        self.decay_init = options.decay_init
        self.conv_weight = nn.Parameter(torch.empty(2 * keys + values, options.conv_size))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.o_norm = RMSNorm(self.value_dim, eps=1e-5)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound, generator=generator)
        self.A_log.copy_(nn.init.uniform_(self.A_log, 1e-3 * self.decay_init, self.decay_init, generator=generator).log())
        init_step_bias(self.dt_bias, generator)

    def new_fast(self, batch: int) -> Tensor:
        return self._zeros(batch, self.heads, self.key_dim, self.value_dim, fast=True)

    def new_window(self, batch: int) -> ConvTail:
        channels, taps = self.conv_weight.shape
        return ConvTail(self._zeros(batch, channels, taps - 1))

    def forward(self, x: Tensor, fast: Tensor, window: ConvTail, steps: Steps) -> tuple[Tensor, Tensor, ConvTail]:
        mixed = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        convolved = causal_conv1d(mixed, self.conv_weight, tail=window.conv_state)
        q, k, v = convolved.split([self.q_proj.out_features, self.k_proj.out_features, self.v_proj.out_features], dim=-1)
        q, k = l2norm(q.unflatten(-1, (self.heads, -1))), l2norm(k.unflatten(-1, (self.heads, -1)))
        v, gate = v.unflatten(-1, (self.heads, -1)), self.g_proj(x).unflatten(-1, (self.heads, -1))
        g = -self.A_log.to(fast.dtype).exp() * F.softplus(self.a_proj(x).to(fast.dtype) + self.dt_bias)
        beta = self.b_proj(x).to(fast.dtype).sigmoid()
        # padding neither decays nor writes
        g, beta = steps.without_padding(g), steps.without_padding(beta)
        o, fast = gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=fast, output_final_state=True)
        y = self.o_proj((self.o_norm(o) * F.silu(gate)).flatten(2))
        return y, fast, ConvTail(steps.tail(mixed, window.conv_state))


@torch.no_grad()
def init_step_bias(bias: Tensor, generator: torch.Generator) -> None:
    """softplus(bias) log-uniform in [0.001, 0.1] (Mamba, arXiv 2312.00752, section 3.6)."""
    step = nn.init.uniform_(bias, math.log(1e-3), math.log(1e-1), generator=generator).exp().clamp(min=1e-4)
    bias.copy_(step + torch.log(-torch.expm1(-step)))
