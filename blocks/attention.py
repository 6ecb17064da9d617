"""Grouped-query attention with rotary positions: `attn` over everything cached, `swa` over a sliding window."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from zoo.blocks import mixer
from zoo.blocks.mixer import Mixer, mixers
from zoo.blocks.steps import Steps


class KV(NamedTuple):
    """Keys (after rotation) and values of the cached tokens, oldest first: [B, Hkv, S, D] each."""

    key: Tensor
    value: Tensor

    def empty(self) -> KV:
        return self.keep(0)

    def keep(self, tokens: int) -> KV:
        start = max(0, self.key.shape[2] - tokens)
        return KV(self.key[:, :, start:], self.value[:, :, start:])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, steps: Steps, reach: int | None) -> tuple[Tensor, KV]:
        """Attention of new tokens q [B, H, T, D] to the cached and the new k, v [B, Hkv, T, D].

        Returns [B, H, T, D] and the cache of what a later token can still see.
        """
        past, T = self.key.shape[2], q.shape[2]
        cache = KV(torch.cat([self.key, k], dim=2), torch.cat([self.value, v], dim=2)) if past else KV(k, v)
        gqa = q.shape[1] != k.shape[1]
        if T == 1 and (reach is None or past < reach):
            y = F.scaled_dot_product_attention(q, *cache, enable_gqa=gqa)
        elif past == 0 and (reach is None or reach >= T):
            y = F.scaled_dot_product_attention(q, *cache, is_causal=True, enable_gqa=gqa)
        else:
            y = F.scaled_dot_product_attention(q, *cache, attn_mask=steps.band(past, reach), enable_gqa=gqa)
        return y, cache if reach is None else cache.keep(reach - 1)


class AttentionOptions(mixer.Options):
    heads: int = Field(4, ge=1)
    kv_heads: int | None = Field(None, ge=1, description="default: heads")
    head_dim: int | None = Field(None, ge=2, description="default: d_model / heads")
    rope_theta: float = Field(10_000.0, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> AttentionOptions:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads: {self.heads}")
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} must be even for rotary positions")
        return self


@mixers.register("attn")
class Attention(Mixer):
    """Causal grouped-query attention (arXiv 2305.13245), rotary positions on all of the head (arXiv 2104.09864)."""

    Options = AttentionOptions

    def __init__(self, d_model: int, options: AttentionOptions, reach: int | None) -> None:
        super().__init__(d_model, options, reach)
        self.heads = options.heads
        self.kv_heads = options.kv_heads or options.heads
        self.head_dim = options.head_dim or mixer.split_evenly(d_model, options.heads, even=True)
        self.theta = options.rope_theta
        self.reach = reach
        self.q_proj = nn.Linear(d_model, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, d_model, bias=False)

    def new_window(self, batch: int) -> KV:
        empty = self._zeros(batch, self.kv_heads, 0, self.head_dim)
        return KV(empty, empty)

    def forward(self, x: Tensor, fast: None, window: KV, steps: Steps) -> tuple[Tensor, None, KV]:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = steps.rotary(self.head_dim, self.theta, x.dtype)
        y, window = window.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, steps, self.reach)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None, window


class SlidingAttentionOptions(AttentionOptions):
    window: int = Field(2048, ge=1, description="tokens seen, the current one included")


@mixers.register("swa")
class SlidingAttention(Attention):
    """Attention that sees the newest `window` tokens, itself included, and caches no more than that."""

    Options = SlidingAttentionOptions

    def __init__(self, d_model: int, options: SlidingAttentionOptions, reach: int | None) -> None:
        super().__init__(d_model, options, options.window if reach is None else min(reach, options.window))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x_i, x_{i + D/2}) of x: [B, H, T, D] by the angles cos, sin: [T, D/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
