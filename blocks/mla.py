"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), without positions as in Kimi Linear (arXiv 2510.26692)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.blocks import mixer
from zoo.blocks.attention import KV, kept
from zoo.blocks.mixer import Mixer, mixers
from zoo.blocks.norm import RMSNorm
from zoo.blocks.positions import Positions


class LatentAttentionOptions(mixer.Options):
    heads: int = Field(4, ge=1)
    rank: int = Field(64, ge=1, description="width of the latents from which the keys and values of all heads are computed")
    head_dim: int | None = Field(None, ge=1, description="entries of a key that differ from head to head; default: d_model / heads")
    shared_dim: int = Field(16, ge=0, description="further entries of a key, which all heads share")
    value_dim: int | None = Field(None, ge=1, description="size of the values of a head; default: head_dim")
    norm_eps: float = Field(1e-6, gt=0, description="eps of the norm of the latents")
    bias: bool = Field(False, description="bias of the projections to the latents and of the output")


@mixers.register("mla")
class LatentAttention(Mixer):
    """Causal attention whose keys and values are linear functions of one latent per token: k_h = [U_h c | s], v_h = V_h c.

    Runs in the absorbed form (section 2.1.2): q_h^T k_h = (U_h^T q_h)^T c + ..., so all heads attend to the latents themselves,
    and V_h is applied to the result. One head of keys [c | s] and values c is cached, however many heads there are.
    """

    Options = LatentAttentionOptions
    packs = True

    def __init__(self, d_model: int, options: LatentAttentionOptions, reach: int | None) -> None:
        super().__init__(d_model, options, reach)
        self.heads, self.rank, self.shared_dim, self.reach = options.heads, options.rank, options.shared_dim, reach
        self.head_dim = options.head_dim or mixer.split_evenly(d_model, options.heads)
        self.value_dim = options.value_dim or self.head_dim
        self.q_proj = nn.Linear(d_model, self.heads * (self.head_dim + self.shared_dim), bias=False)
        self.kv_proj = nn.Linear(d_model, self.rank + self.shared_dim, bias=options.bias)
        self.kv_norm = RMSNorm(self.rank, eps=options.norm_eps)
        self.key_up = nn.Parameter(torch.empty(self.heads * self.head_dim, self.rank))
        self.value_up = nn.Parameter(torch.empty(self.heads * self.value_dim, self.rank))
        self.o_proj = nn.Linear(self.heads * self.value_dim, d_model, bias=options.bias)

    def init_weights(self, generator: torch.Generator) -> None:
        for weight in (self.key_up, self.value_up):
            nn.init.normal_(weight, std=self.rank**-0.5, generator=generator)

    def new_window(self, batch: int) -> KV:
        return KV(self.zeros(batch, 1, 0, self.rank + self.shared_dim), self.zeros(batch, 1, 0, self.rank))

    def window_bytes(self, tokens: int) -> int:
        return (2 * self.rank + self.shared_dim) * kept(tokens, self.reach) * self.dtype.itemsize

    def flops(self, tokens: int, past: int) -> int:
        seen = tokens + kept(past, self.reach)
        absorbed = 2 * (self.key_up.numel() + self.value_up.numel())
        return super().flops(tokens, past) + tokens * (absorbed + seen * 2 * self.heads * (2 * self.rank + self.shared_dim))

    def forward(self, x: Tensor, fast: None, window: KV, positions: Positions) -> tuple[Tensor, None, KV]:
        q, shared_q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).split([self.head_dim, self.shared_dim], dim=-1)
        latent, shared = self.kv_proj(x)[:, None].split([self.rank, self.shared_dim], dim=-1)
        latent = self.kv_norm(latent)
        q = torch.cat([q @ self.key_up.unflatten(0, (self.heads, -1)), shared_q], dim=-1)
        scale = (self.head_dim + self.shared_dim) ** -0.5
        y, window = window.attend(q, torch.cat([latent, shared], dim=-1), latent, positions, self.reach, scale)
        y = y @ self.value_up.unflatten(0, (self.heads, -1)).mT
        return self.o_proj(y.transpose(1, 2).flatten(2)), None, window
