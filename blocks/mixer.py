"""What every mixer is, and the registry of mixers. Adding a mixer is one file beside this one."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zoo.blocks.positions import Positions
from zoo.errors import ZooError
from zoo.registry import Registry


class Options(BaseModel):
    """What a config may say about one kind of mixer under `blocks: {kind: {...}}`. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mlp: bool = Field(True, description="whether the block has an MLP after its mixer")
    post_norm: bool = Field(False, description="norm also what the mixer and the MLP add (sandwich norms)")
    inserted: bool = Field(False, description="not in the upstream model: starts with a zero output projection, so it changes nothing")


class WindowCache(Protocol):
    """What a mixer keeps of the tokens of the current window: a NamedTuple of tensors with these methods."""

    def empty(self) -> Self:
        """The cache of a window that holds no token."""
        ...

    def keep(self, tokens: int) -> Self:
        """The cache with at most the newest `tokens` tokens."""
        ...


class Mixer(nn.Module):
    """The part of a block that mixes tokens.

    Args:
        d_model: width D of the residual stream.
        options: this class's own `Options`.
        reach: tokens the eviction policy lets an attention look at, the current one included; None: no bound.
    """

    Options: ClassVar[type[Options]] = Options
    packs: ClassVar[bool] = False
    """Whether it keeps apart the sequences that `positions.cu_seqlens` marks in one row."""

    def __init__(self, d_model: int, options: Any, reach: int | None) -> None:
        super().__init__()

    def new_fast(self, batch: int) -> Tensor | None:
        """Fast weights of `batch` fresh streams, zeros, float32 (float64 in a float64 model); None: this mixer has none."""
        return None

    def new_window(self, batch: int) -> WindowCache | None:
        """Window cache of `batch` streams before their first token; None: this mixer keeps nothing of the window."""
        return None

    def forward(self, x: Tensor, fast: Any, window: Any, positions: Positions) -> tuple[Tensor, Any, Any]:
        """Mix the tokens of x: [B, T, D], given what came before them.

        Returns y [B, T, D], the fast weights and the window cache after the last token. Never changes its inputs.
        Where `positions.cu_seqlens` marks S packed sequences, B is 1, and fast weights and window cache are those of S streams.
        """
        raise NotImplementedError

    def window_bytes(self, tokens: int) -> int:
        """Bytes of one stream's window cache after `tokens` tokens. Here: of a cache that does not grow."""
        return sum(tensor.nbytes for tensor in tree_leaves(self.new_window(1)) if isinstance(tensor, Tensor))

    def flops(self, tokens: int, past: int) -> int:
        """Operations on `tokens` new tokens of one stream that has `past` cached, a multiply-add counted as two.

        Matrix and outer products, convolutions and the products of a recurrence's steps; nothing element-wise. Here: the
        Linear layers; a mixer that multiplies more adds it.
        """
        return tokens * linear_flops(self)

    def init_weights(self, generator: torch.Generator) -> None:
        """Set the parameters that are not the weights of a Linear, and those weights that start differently."""

    def zeros(self, *shape: int, fast: bool = False) -> Tensor:
        weight = next(module for module in self.modules() if isinstance(module, nn.Linear)).weight
        dtype = torch.promote_types(weight.dtype, torch.float32) if fast else weight.dtype
        return torch.zeros(shape, dtype=dtype, device=weight.device)  # not new_zeros: weights may be shared out (FSDP2), states never


def linear_flops(module: nn.Module) -> int:
    """Operations of the Linear layers of `module` on one token."""
    return sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def split_evenly(d_model: int, heads: int, even: bool = False) -> int:
    """Head size when a config does not give one."""
    if d_model % heads or (even and d_model // heads % 2):
        raise ZooError(f"heads: {heads} does not divide d_model: {d_model}{' into even heads' if even else ''}; set head_dim")
    return d_model // heads


@torch.no_grad()
def init_conv(weight: Tensor, taps: int, generator: torch.Generator) -> None:
    """Uniform in +-taps^-0.5, as torch starts convolutions of `taps` inputs per output."""
    nn.init.uniform_(weight, -(taps**-0.5), taps**-0.5, generator=generator)


@torch.no_grad()
def init_conv_as_identity(weight: Tensor, generator: torch.Generator) -> None:
    """Little more than the current token: 1 on the last tap of weight [C, K], and a tenth of `init_conv` on all."""
    init_conv(weight, weight.shape[1], generator)
    weight.mul_(0.1)[:, -1] += 1


@torch.no_grad()
def init_step_bias(bias: Tensor, generator: torch.Generator) -> None:
    """softplus(bias) log-uniform in [0.001, 0.1] (Mamba, arXiv 2312.00752, section 3.6)."""
    step = nn.init.uniform_(bias, math.log(1e-3), math.log(1e-1), generator=generator).exp().clamp(min=1e-4)
    bias.copy_(step + torch.log(-torch.expm1(-step)))


mixers: Registry[type[Mixer]] = Registry("block", "blocks", "zoo.blocks.*")
