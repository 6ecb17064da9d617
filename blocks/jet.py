"""The JetBlock of Jet-Nemotron (arXiv 2508.15884, section 2.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.blocks.conv_tail import ConvTail
from zoo.blocks.delta_rule import DeltaRule, DeltaRuleOptions
from zoo.blocks.mixer import mixers
from zoo.blocks.positions import Positions
from zoo.kernels.dynamic_conv1d.op import dynamic_conv1d


class JetOptions(DeltaRuleOptions):
    generator_reduction: int = Field(8, ge=1, description="width of the values / width of the kernel generator")


@mixers.register("jet")
class Jet(DeltaRule):
    """Gated delta rule whose values pass through a short convolution with a kernel generated for each token and channel.

    kernel_t = W_2 silu(W_1 x_t) + b_2, with the current token's tap last; q and k are silu(W x), without a convolution.
    """

    Options = JetOptions

    def __init__(self, d_model: int, options: JetOptions, reach: int | None) -> None:
        super().__init__(d_model, options, reach, options.heads)
        self.taps = options.conv_size
        hidden = max(1, self.values // options.generator_reduction)
        self.kernel_in = nn.Linear(d_model, hidden, bias=False)
        self.kernel_out = nn.Linear(hidden, self.values * self.taps)

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        # at initialisation, one static kernel for all tokens
        nn.init.zeros_(self.kernel_out.weight)
        self.init_conv(self.kernel_out.bias.view(-1, self.taps), self.taps, generator)

    def new_window(self, batch: int) -> ConvTail:
        return ConvTail(self.zeros(batch, self.values, self.taps - 1))

    def flops(self, tokens: int, past: int) -> int:
        return super().flops(tokens, past) + tokens * 2 * self.values * self.taps

    def forward(self, x: Tensor, fast: Tensor, window: ConvTail, positions: Positions) -> tuple[Tensor, Tensor, ConvTail]:
        values = self.v_proj(x)
        kernel = self.kernel_out(F.silu(self.kernel_in(x))).unflatten(-1, (-1, self.taps))
        v, tail = dynamic_conv1d(values, kernel, initial_state=window.conv_state, output_final_state=True, cu_seqlens=positions.cu_seqlens)
        y, fast = self.update(x, F.silu(self.q_proj(x)), F.silu(self.k_proj(x)), v, fast, positions)
        return y, fast, ConvTail(positions.tail(values, window.conv_state, tail))
