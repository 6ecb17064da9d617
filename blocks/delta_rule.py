"""The base of Gated DeltaNet and the JetBlock: gates, fast weights, and the normed and gated output of the gated delta rule."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.blocks import mixer
from zoo.blocks.mixer import Mixer
from zoo.blocks.norm import GatedRMSNorm
from zoo.blocks.positions import Positions
from zoo.errors import ZooError
from zoo.kernels.gated_delta_rule.op import gated_delta_rule
from zoo.kernels.l2norm.op import l2norm


class DeltaRuleOptions(mixer.Options):
    heads: int = Field(4, ge=1, description="number of query and key heads")
    head_dim: int | None = Field(None, ge=1, description="head size of keys and queries; default: d_model / heads")
    expand_v: float = Field(2.0, gt=0, description="value head size / key head size")
    conv_size: int = Field(4, ge=2, description="taps of the short convolution")
    norm_eps: float = Field(1e-5, gt=0, description="eps of the output norm")
    conv_init: Literal["uniform", "identity"] = Field(
        "uniform", description="initialisation of the convolution: a random mixture, or close to the identity"
    )
    decay_init: float = Field(16.0, gt=0, description="exp(A_log) is initialised uniformly in (0, decay_init); smaller: longer memory")


def value_size(key_dim: int, options: DeltaRuleOptions) -> int:
    """Return the size of a value head. Raises ZooError if it is 0."""
    size = round(key_dim * options.expand_v)
    if size < 1:
        raise ZooError(f"expand_v: {options.expand_v} times {key_dim}, the size of a key head, is less than one entry")
    return size


class DeltaRule(Mixer):
    """Gated delta rule over the q, k, v computed by a subclass. Fast weights S: [B, HV, K, V], float32.

    Gates as in Mamba-2: log decay g = -exp(A_log) softplus(W_a x + dt_bias), write strength beta = sigmoid(W_b x).
    """

    packs = True
    wide = ("A_log", "dt_bias")

    def __init__(
        self, d_model: int, options: DeltaRuleOptions, reach: int | None, value_heads: int, gated: bool = True, write_bias: bool = False
    ) -> None:
        super().__init__(d_model, options, reach)
        self.heads, self.value_heads = options.heads, value_heads
        self.decay_init, self.init_conv = options.decay_init, mixer.CONV_INIT[options.conv_init]
        self.key_dim = options.head_dim or mixer.split_evenly(d_model, options.heads)
        self.value_dim = value_size(self.key_dim, options)
        self.keys, self.values = self.heads * self.key_dim, value_heads * self.value_dim
        self.q_proj = nn.Linear(d_model, self.keys, bias=False)
        self.k_proj = nn.Linear(d_model, self.keys, bias=False)
        self.v_proj = nn.Linear(d_model, self.values, bias=False)
        self.g_proj = nn.Linear(d_model, self.values, bias=False) if gated else None
        self.a_proj = nn.Linear(d_model, value_heads, bias=False)
        self.b_proj = nn.Linear(d_model, value_heads, bias=write_bias)
        self.A_log = nn.Parameter(torch.empty(value_heads))
        self.dt_bias = nn.Parameter(torch.empty(value_heads))
        self.o_norm = GatedRMSNorm(self.value_dim, eps=options.norm_eps)
        self.o_proj = nn.Linear(self.values, d_model, bias=False)

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.uniform_(self.A_log, 1e-3 * self.decay_init, self.decay_init, generator=generator).log_()
        mixer.init_step_bias(self.dt_bias, generator)

    def new_fast(self, batch: int) -> Tensor:
        return self.zeros(batch, self.value_heads, self.key_dim, self.value_dim, fast=True)

    def flops(self, tokens: int, past: int) -> int:
        # predict, write, read
        return super().flops(tokens, past) + tokens * 6 * self.value_heads * self.key_dim * self.value_dim

    def update(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, fast: Tensor, positions: Positions, beta_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Write k: [B, T, keys] and v: [B, T, values] into the fast weights and read them with q; the gates depend on x: [B, T, D].

        Returns y [B, T, D] and the fast weights after the last token.
        """
        q, k = l2norm(q.unflatten(-1, (self.heads, -1))), l2norm(k.unflatten(-1, (self.heads, -1)))
        g = -self.A_log.to(fast.dtype).exp() * F.softplus(self.a_proj(x).to(fast.dtype) + self.dt_bias)
        beta = beta_scale * self.b_proj(x).to(fast.dtype).sigmoid()
        # padding neither decays nor writes
        g, beta = positions.without_padding(g), positions.without_padding(beta)
        v = v.unflatten(-1, (self.value_heads, -1))
        o, final = gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=fast, output_final_state=True, cu_seqlens=positions.cu_seqlens)
        assert final is not None
        gate = None if self.g_proj is None else self.g_proj(x).unflatten(-1, (self.value_heads, -1))
        return self.o_proj(self.o_norm(o, gate).flatten(2)), final
