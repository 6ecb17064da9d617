"""Attention and Mamba-2 side by side in one block (Falcon-H1, arXiv 2507.22448, section 2.1)."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field, model_validator
from torch import Tensor

from zoo.blocks import mixer
from zoo.blocks.attention import KV, Attention, AttentionOptions
from zoo.blocks.conv_tail import ConvTail
from zoo.blocks.mamba2 import Mamba2, Mamba2Options
from zoo.blocks.mixer import Mixer, mixers
from zoo.blocks.positions import Positions


class ParallelCache(NamedTuple):
    """The window caches of both mixers."""

    attn: KV
    mamba2: ConvTail

    def empty(self) -> ParallelCache:
        return ParallelCache(self.attn.empty(), self.mamba2.empty())

    def keep(self, tokens: int) -> ParallelCache:
        return ParallelCache(self.attn.keep(tokens), self.mamba2.keep(tokens))


class ParallelOptions(mixer.Options):
    attn: AttentionOptions = Field({}, validate_default=True, description="options of the attention, as of a block `attn`")
    mamba2: Mamba2Options = Field({}, validate_default=True, description="options of the Mamba-2, as of a block `mamba2`")
    attn_in_scale: float = Field(1.0, description="factor of what the attention reads")
    attn_out_scale: float = Field(1.0, description="factor of what the attention returns")
    mamba2_in_scale: float = Field(1.0, description="factor of what the Mamba-2 reads")
    mamba2_out_scale: float = Field(1.0, description="factor of what the Mamba-2 returns")

    @model_validator(mode="after")
    def _one_block(self) -> ParallelOptions:
        for name, half in (("attn", self.attn), ("mamba2", self.mamba2)):
            if of_block := sorted(half.model_fields_set & mixer.Options.model_fields.keys()):
                raise ValueError(f"{name}: {of_block[0]} is an option of the whole block; set it beside '{name}'")
        return self


@mixers.register("parallel")
class Parallel(Mixer):
    """The sum of attention and Mamba-2, which read the same tokens. Fast weights S: those of Mamba-2, [B, H, N, P], float32."""

    Options = ParallelOptions
    packs = True

    def __init__(self, d_model: int, options: ParallelOptions, reach: int | None) -> None:
        super().__init__(d_model, options, reach)
        self.reach = reach
        self.attn = Attention(d_model, options.attn, reach)
        self.mamba2 = Mamba2(d_model, options.mamba2, reach)
        self.attn_scales = options.attn_in_scale, options.attn_out_scale
        self.mamba2_scales = options.mamba2_in_scale, options.mamba2_out_scale

    def new_fast(self, batch: int) -> Tensor:
        return self.mamba2.new_fast(batch)

    def new_window(self, batch: int) -> ParallelCache:
        return ParallelCache(self.attn.new_window(batch), self.mamba2.new_window(batch))

    def window_bytes(self, tokens: int) -> int:
        return self.attn.window_bytes(tokens) + self.mamba2.window_bytes(tokens)

    def flops(self, tokens: int, past: int) -> int:
        return self.attn.flops(tokens, past) + self.mamba2.flops(tokens, past)

    def forward(self, x: Tensor, fast: Tensor, window: ParallelCache, positions: Positions) -> tuple[Tensor, Tensor, ParallelCache]:
        (attn_in, attn_out), (mamba2_in, mamba2_out) = self.attn_scales, self.mamba2_scales
        a, _, kv = self.attn(scaled(x, attn_in), None, window.attn, positions)
        m, fast, tail = self.mamba2(scaled(x, mamba2_in), fast, window.mamba2, positions)
        return scaled(a, attn_out) + scaled(m, mamba2_out), fast, ParallelCache(kv, tail)


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale
