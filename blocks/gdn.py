"""Gated DeltaNet (arXiv 2412.06464)."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from zoo.blocks.conv_tail import ConvTail
from zoo.blocks.delta_rule import DeltaRule, DeltaRuleOptions
from zoo.blocks.mixer import mixers
from zoo.blocks.positions import Positions
from zoo.kernels.gdn_step.op import gdn_step, one_launch


class GatedDeltaNetOptions(DeltaRuleOptions):
    value_heads: int | None = Field(None, ge=1, description="a multiple of heads; default: heads")
    gate: bool = Field(True, description="multiply the normed output by silu(W_g x)")
    write_bias: bool = Field(False, description="bias of the write strength")
    neg_eigval: bool = Field(False, description="write strength up to 2, which allows negative eigenvalues (arXiv 2411.12537)")

    @model_validator(mode="after")
    def _divides(self) -> GatedDeltaNetOptions:
        if self.value_heads is not None and self.value_heads % self.heads:
            raise ValueError(f"value_heads: {self.value_heads} is not a multiple of heads: {self.heads}")
        return self


@mixers.register("gdn")
class GatedDeltaNet(DeltaRule):
    """Short convolution and SiLU on q, k, v; gated delta rule per head; normed, gated output (section 3.3, figure 1)."""

    Options = GatedDeltaNetOptions

    def __init__(self, d_model: int, options: GatedDeltaNetOptions, reach: int | None) -> None:
        super().__init__(d_model, options, reach, options.value_heads or options.heads, options.gate, options.write_bias)
        self.beta_scale = 2.0 if options.neg_eigval else 1.0
        self.q_conv = nn.Parameter(torch.empty(self.keys, options.conv_size))
        self.k_conv = nn.Parameter(torch.empty(self.keys, options.conv_size))
        self.v_conv = nn.Parameter(torch.empty(self.values, options.conv_size))

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            self.init_conv(conv, conv.shape[1], generator)

    def new_window(self, batch: int) -> ConvTail:
        return ConvTail(self.zeros(batch, 2 * self.keys + self.values, self.q_conv.shape[1] - 1))

    def flops(self, tokens: int, past: int) -> int:
        return super().flops(tokens, past) + tokens * 2 * sum(conv.numel() for conv in (self.q_conv, self.k_conv, self.v_conv))

    def forward(self, x: Tensor, fast: Tensor, window: ConvTail, positions: Positions) -> tuple[Tensor, Tensor, ConvTail]:
        if positions.valid is None and one_launch(x):
            return self._step(x, fast, window)
        mixed = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        weight = torch.cat([self.q_conv, self.k_conv, self.v_conv])
        convolved, window = window.convolve(mixed, weight, None, positions)
        q, k, v = convolved.split([self.keys, self.keys, self.values], dim=-1)
        y, fast = self.update(x, q, k, v, fast, positions, self.beta_scale)
        return y, fast, window

    def _step(self, x: Tensor, fast: Tensor, window: ConvTail) -> tuple[Tensor, Tensor, ConvTail]:
        y, fast, tail = gdn_step(
            self.q_proj(x), self.k_proj(x), self.v_proj(x), self.a_proj(x), self.b_proj(x), None if self.g_proj is None else self.g_proj(x),
            q_conv=self.q_conv, k_conv=self.k_conv, v_conv=self.v_conv, A_log=self.A_log, dt_bias=self.dt_bias,
            norm_weight=self.o_norm.weight, window=window.conv_state, state=fast, beta_scale=self.beta_scale, eps=self.o_norm.eps,
        )  # fmt: skip
        return self.o_proj(y), fast, ConvTail(tail)
