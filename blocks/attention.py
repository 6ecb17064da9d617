"""Grouped-query attention with rotary positions: `attn` over everything cached, `swa` over a sliding window."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.blocks import mixer
from zoo.blocks.growing import append, newest, tight
from zoo.blocks.mixer import Mixer, mixers
from zoo.blocks.norm import norms
from zoo.blocks.one_query import one_query, takes_one_query
from zoo.blocks.positions import Positions
from zoo.blocks.rotary import RopeScaling, rope
from zoo.errors import ZooError
from zoo.kernels.common.attention import attend_by_mkl
from zoo.kernels.common.precision import is_highest
from zoo.kernels.common.recording import pure, transformed, watched

SCORES = 1 << 17
"""Maximum number of scores of a stream for which attention is computed as products on a CPU."""

SHORT = 256
"""Maximum number of keys for which MKL trains attention: oneDNN is up to 10 times slower there, and up to 1.8 times faster beyond."""


class KV(NamedTuple):
    """Keys (after rotation) and values of the cached tokens, oldest first: [B, Hkv, S, D] each."""

    key: Tensor
    value: Tensor

    def empty(self) -> KV:
        return self.keep(0)

    def keep(self, tokens: int) -> KV:
        return KV(tight(self.key, tokens), tight(self.value, tokens))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, reach: int | None, scale: float | None = None
    ) -> tuple[Tensor, KV]:
        """Attend from new tokens q [B, H, T, D] to the cached and the new k, v [B, Hkv, T, D].

        Args:
            scale: factor of the products of queries and keys; default D^-0.5.
        Returns:
            [B, H, T, D] and the cache of the tokens that later tokens can still see.
        """
        if positions.cu_seqlens is not None:
            return self._attend_packed(q, k, v, positions, reach, scale)
        past, T = self.key.shape[2], q.shape[2]
        cache = KV(append(self.key, k), append(self.value, v)) if past else KV(k, v)
        if T == 1 and (reach is None or past < reach) and not positions.ragged:
            y = attention(q, *cache, scale=scale)
        elif past == 0 and (reach is None or reach >= T):
            y = attention(q, *cache, causal=True, scale=scale)
        else:
            y = attention(q, *cache, positions.band(past, reach), scale=scale)
        return y, cache if reach is None else KV(newest(cache.key, reach - 1), newest(cache.value, reach - 1))

    def _attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, reach: int | None, scale: float | None
    ) -> tuple[Tensor, KV]:
        """Run `attend` on each packed sequence. The caches are aligned at the end, with zeros before shorter ones."""
        lengths, past = [own.length for own in positions.sequences], self.key.shape[2]
        outputs, caches = [], []
        qs, ks, vs = (x.split(lengths, dim=2) for x in (q, k, v))
        for s, own in enumerate(positions.sequences):
            empty = max(0, past - int(own.start))
            cached = KV(self.key[s : s + 1, :, empty:], self.value[s : s + 1, :, empty:])
            y, cache = cached.attend(qs[s], ks[s], vs[s], own, reach, scale)
            outputs.append(y)
            caches.append(cache)
        longest = max(cache.key.shape[2] for cache in caches)
        aligned = [[F.pad(x, (0, 0, longest - x.shape[2], 0)) for x in cache] for cache in caches]
        return torch.cat(outputs, dim=2), KV(*(torch.cat(parts) for parts in zip(*aligned, strict=True)))


def kept(tokens: int, reach: int | None) -> int:
    """Return how many of this many cached tokens later tokens can see."""
    return tokens if reach is None else min(tokens, reach - 1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Attend from q [B, H, T, D] to k, v [B, Hkv, S, D]. Returns [B, H, T, D].

    Args:
        visible: mask of keys, bool [T, S] or [B, 1, T, S].
        causal: S = T, and a query sees the keys up to its own.
        scale: factor of the products of queries and keys; default D^-0.5.
    """
    if _multiplies_slowly(q, k, v):
        if q.shape[2] == 1 and takes_one_query(k, v):
            return one_query(q, k, v, visible, scale=scale)
        if q.shape[0] == 1 and q.shape[1] * q.shape[2] * k.shape[2] <= SCORES:
            return in_products(q, k, v, visible, causal=causal, scale=scale)
    if _trains_slowly(q, k, v, visible):
        return attend_by_mkl(q, k, v, visible, causal=causal, scale=scale)
    gqa = q.shape[1] != k.shape[1]
    # torch's only implementation that has all derivatives of torch.func
    with sdpa_kernel(SDPBackend.MATH) if transformed() else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=gqa, scale=scale)


def in_products(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Compute `attention` of one stream as two products, for few queries: torch's own multiplies block by block, one head at a time."""
    (_, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    if causal:
        bias = _causal_bias(T, H // Hkv)
    else:
        bias = q.new_zeros(T, S)
        if visible is not None:
            bias.masked_fill_(~visible.reshape(T, S), -torch.inf)
        bias = bias.repeat(H // Hkv, 1)
    scale = D**-0.5 if scale is None else scale
    scores = torch.baddbmm(bias, q.reshape(Hkv, -1, D), k[0].transpose(1, 2), alpha=scale)
    return (scores.softmax(-1) @ v[0]).view(1, H, T, -1)


@lru_cache(maxsize=1)  # the layers of a pass use the same
def _causal_bias(tokens: int, queries: int) -> Tensor:
    """Return what `queries` heads that read the same keys add to their scores, [queries * tokens, tokens]."""
    return torch.full((tokens, tokens), -torch.inf, dtype=torch.float32, device="cpu").triu_(1).repeat(queries, 1)


def _trains_slowly(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> bool:
    """Return True where oneDNN would multiply in torch's attention for CPUs, with gradients, and few keys at a time."""
    inputs = (q, k, v)
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs) or transformed() or torch.is_autocast_enabled("cpu"):
        return False
    plain = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in inputs) and (visible is None or visible.dtype == torch.bool)
    return plain and k.shape == v.shape and k.shape[2] <= SHORT and q.shape[2] > 0 and not is_highest()


def _multiplies_slowly(*inputs: Tensor) -> bool:
    """Return True where oneDNN would multiply one head and block at a time, without gradients: it needs 0.1 ms for any product."""
    if torch.is_grad_enabled() or pure() or watched():
        return False
    return all(x.is_cpu and x.dtype == torch.float32 for x in inputs) and not is_highest()


class AttentionOptions(mixer.Options):
    heads: int = Field(4, ge=1)
    kv_heads: int | None = Field(None, ge=1, description="default: heads")
    head_dim: int | None = Field(None, ge=2, description="default: d_model / heads")
    rope_theta: float = Field(10_000.0, ge=1)
    rope_scaling: RopeScaling | None = Field(None, description="scaling of the rotary frequencies to longer contexts")
    rotary: float = Field(1.0, ge=0, le=1, description="fraction of the head that is rotated, in whole pairs of entries; 0: no positions")
    bias: bool = Field(False, description="bias of the q, k, v and gate projections")
    o_bias: bool = Field(False, description="bias of the output projection")
    scale: float | None = Field(None, gt=0, description="factor of the products of queries and keys; default: head_dim^-0.5")
    qk_norm: Literal["plain", "wide", "centred"] | None = Field(None, description="RMSNorm of each query and key before rotation")
    qk_norm_whole: bool = Field(False, description="apply qk_norm to all heads of a token at once")
    norm_eps: float = Field(1e-6, gt=0, description="eps of qk_norm")
    gate: bool = Field(False, description="multiply the output by sigmoid(W_g x)")

    @model_validator(mode="after")
    def _divides(self) -> AttentionOptions:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads: {self.heads}")
        if self.head_dim is not None and (width := int(self.rotary * self.head_dim)) + width % 2 > self.head_dim:
            raise ValueError(f"head_dim: {self.head_dim} must be even for rotary positions")
        return self


@mixers.register("attn")
class Attention(Mixer):
    """Causal grouped-query attention (arXiv 2305.13245) with rotary positions (arXiv 2104.09864)."""

    Options: ClassVar[type[mixer.Options]] = AttentionOptions
    packs = True

    def __init__(self, d_model: int, options: AttentionOptions, reach: int | None) -> None:
        super().__init__(d_model, options, reach)
        self.heads = options.heads
        self.kv_heads = options.kv_heads or options.heads
        self.head_dim = options.head_dim or mixer.split_evenly(d_model, options.heads, even=True)
        rotated = int(options.rotary * self.head_dim)
        if options.rotary > 0 and not rotated:
            raise ZooError(f"rotary: {options.rotary} of head_dim {self.head_dim} is less than one entry; want 0, or a larger fraction")
        self.rope = rope(rotated, options.rope_theta, options.rope_scaling)
        self.reach = reach
        self.q_proj = nn.Linear(d_model, self.heads * self.head_dim, bias=options.bias)
        self.k_proj = nn.Linear(d_model, self.kv_heads * self.head_dim, bias=options.bias)
        self.v_proj = nn.Linear(d_model, self.kv_heads * self.head_dim, bias=options.bias)
        self.scale, self.qk_norm_whole = options.scale, options.qk_norm_whole
        q_width, k_width = (self.head_dim * (heads if options.qk_norm_whole else 1) for heads in (self.heads, self.kv_heads))
        self.q_norm = norms[options.qk_norm](q_width, eps=options.norm_eps) if options.qk_norm else nn.Identity()
        self.k_norm = norms[options.qk_norm](k_width, eps=options.norm_eps) if options.qk_norm else nn.Identity()
        self.g_proj = nn.Linear(d_model, self.heads * self.head_dim, bias=options.bias) if options.gate else None
        self.o_proj = nn.Linear(self.heads * self.head_dim, d_model, bias=options.o_bias)

    def new_window(self, batch: int) -> KV:
        empty = self.zeros(batch, self.kv_heads, 0, self.head_dim)
        return KV(empty, empty)

    def window_bytes(self, tokens: int) -> int:
        return 2 * self.kv_heads * self.head_dim * kept(tokens, self.reach) * self.dtype.itemsize

    def flops(self, tokens: int, past: int) -> int:
        seen = tokens + kept(past, self.reach)
        return super().flops(tokens, past) + tokens * seen * 4 * self.heads * self.head_dim  # scores and values

    def forward(self, x: Tensor, fast: None, window: KV, positions: Positions) -> tuple[Tensor, None, KV]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k = (self.q_norm(q), self.k_norm(k)) if self.qk_norm_whole else (q, k)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        q, k = (q, k) if self.qk_norm_whole else (self.q_norm(q), self.k_norm(k))
        cos, sin = positions.rotary(self.rope, x.dtype)
        y, window = window.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, positions, self.reach, self.scale)
        y = y.transpose(1, 2).flatten(2)
        return self.o_proj(y if self.g_proj is None else y * self.g_proj(x).sigmoid()), None, window


class SlidingAttentionOptions(AttentionOptions):
    window: int = Field(2048, ge=1, description="tokens visible to a query, the current one included")


@mixers.register("swa")
class SlidingAttention(Attention):
    """Attention over the last `window` tokens, the current one included. It caches at most that many."""

    Options = SlidingAttentionOptions

    def __init__(self, d_model: int, options: SlidingAttentionOptions, reach: int | None) -> None:
        super().__init__(d_model, options, options.window if reach is None else min(reach, options.window))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x_i, x_{i + R/2}) of the first R entries of x: [B, H, T, D] by the angles cos, sin: [T or B, 1, T, R/2]."""
    half = cos.shape[-1]
    a, b, *rest = x.split([half, half] if x.shape[-1] == 2 * half else [half, half, x.shape[-1] - 2 * half], dim=-1)
    if pure():
        return torch.cat([a * cos - b * sin, b * cos + a * sin, *rest], dim=-1)
    return torch.cat([(a * cos).addcmul_(b, sin, value=-1), (b * cos).addcmul_(a, sin), *rest], dim=-1)
