"""The interface of a mixer, and the registry of mixers. To add a mixer, add a file beside this one."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zoo.blocks.positions import Positions
from zoo.errors import ZooError
from zoo.registry import Registry


class Options(BaseModel):
    """Options of one kind of mixer, set in a config under `blocks: {kind: {...}}`. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mlp: bool = Field(True, description="whether the block has an MLP after its mixer")
    pre_norm: bool = Field(True, description="normalise the inputs of the mixer and the MLP")
    post_norm: bool = Field(False, description="normalise the outputs of the mixer and the MLP; with pre_norm: sandwich norms")
    residual_scale: float = Field(1.0, description="factor of what the mixer and the MLP add to the residual stream")
    residual_in_fp32: bool = Field(False, description="a 16-bit model adds up the residual stream in float32, in all blocks")
    inserted: bool = Field(False, description="not in the upstream model: starts with a zero output projection, so it has no effect")


class WindowCache(Protocol):
    """A mixer's cache of the current window: a NamedTuple of tensors, or of such caches, with these methods."""

    def empty(self) -> Self:
        """Return the cache of an empty window."""
        ...

    def keep(self, tokens: int) -> Self:
        """Return the cache of at most the newest `tokens` tokens."""
        ...


def parts(cache: Any) -> tuple[Any, ...]:
    """Return the NamedTuples of tensors in a window cache: itself, or those of which it is made; none for None."""
    if cache is None:
        return ()
    return (cache,) if isinstance(cache[0], Tensor) else tuple(cache)


def replace_parts(cache: Any, replace: Callable[[Any], Any]) -> Any:
    """Return the window cache with `replace` applied to each of its `parts`."""
    if cache is None:
        return None
    return replace(cache) if isinstance(cache[0], Tensor) else cache._make(map(replace, cache))


class Mixer(nn.Module):
    """The part of a block that mixes tokens.

    Args:
        d_model: width D of the residual stream.
        options: this class's own `Options`.
        reach: number of tokens that attention may see under the eviction policy, the current one included; None: no limit.
    """

    Options: ClassVar[type[Options]] = Options
    packs: ClassVar[bool] = False
    """True if the mixer keeps packed sequences (`positions.cu_seqlens`) separate."""
    wide: ClassVar[tuple[str, ...]] = ()
    """Parameters that stay float32 in a 16-bit model, such as rates of decay."""

    def __init__(self, d_model: int, options: Any, reach: int | None) -> None:
        super().__init__()
        self.dtype = torch.get_default_dtype()
        """Dtype of activations and window caches. Like parameters it follows `.to(dtype)`, but not a replaced or quantised weight."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    def new_fast(self, batch: int) -> Tensor | None:
        """Return the fast weights of `batch` new streams: zeros, float32 (float64 in a float64 model). None: the mixer has none."""
        return None

    def new_window(self, batch: int) -> WindowCache | None:
        """Return the window cache of `batch` streams before their first token. None: the mixer caches no tokens."""
        return None

    def forward(self, x: Tensor, fast: Any, window: Any, positions: Positions) -> tuple[Tensor, Any, Any]:
        """Mix the tokens of x: [B, T, D], given the state before them.

        Returns y [B, T, D], the fast weights and the window cache after the last token. Must not change its inputs.
        If `positions.cu_seqlens` marks S packed sequences, B is 1, and fast weights and window cache belong to S streams.
        """
        raise NotImplementedError

    def window_bytes(self, tokens: int) -> int:
        """Return the bytes of one stream's window cache after `tokens` tokens. Override it if the cache grows."""
        return sum(tensor.nbytes for tensor in tree_leaves(self.new_window(1)) if isinstance(tensor, Tensor))

    def flops(self, tokens: int, past: int) -> int:
        """Return the FLOPs on `tokens` new tokens of one stream with `past` cached tokens. A multiply-add counts as two.

        Count matrix products, outer products and convolutions, as in the step recurrence, but no element-wise operations.
        This method counts the Linear layers; override it if the mixer has other products.
        """
        return tokens * linear_flops(self)

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise the parameters that are not weights of a Linear, and the Linear weights that need a special initialisation."""

    def zeros(self, *shape: int, fast: bool = False) -> Tensor:
        """Return zeros on the mixer's device, in its dtype or, for fast weights, in float32 or wider."""
        dtype = torch.promote_types(self.dtype, torch.float32) if fast else self.dtype
        # not new_zeros: weights may be sharded (FSDP2), states never are; a mixer quantised by torch.ao, for CPUs, has no tensors
        device = next((tensor.device for tensor in chain(self.parameters(), self.buffers())), torch.device("cpu"))
        return torch.zeros(shape, dtype=dtype, device=device)


def linear_flops(module: nn.Module) -> int:
    """Return the FLOPs of the Linear layers of `module` on one token."""
    return sum(2 * part.in_features * part.out_features for part in module.modules() if isinstance(part, nn.Linear))


def split_evenly(d_model: int, heads: int, even: bool = False) -> int:
    """Return d_model / heads, the default head size. Raises ZooError if it is not an (even) integer."""
    if d_model % heads or (even and d_model // heads % 2):
        raise ZooError(f"heads: {heads} does not divide d_model: {d_model}{' into even heads' if even else ''}; set head_dim")
    return d_model // heads


@torch.no_grad()
def init_conv(weight: Tensor, taps: int, generator: torch.Generator) -> None:
    """Initialise uniformly in +-taps^-0.5, as torch does for convolutions with `taps` inputs per output."""
    nn.init.uniform_(weight, -(taps**-0.5), taps**-0.5, generator=generator)


@torch.no_grad()
def init_conv_as_identity(weight: Tensor, taps: int, generator: torch.Generator) -> None:
    """Initialise weight [C, taps] close to the identity: a tenth of `init_conv`, plus 1 on the last tap."""
    init_conv(weight, taps, generator)
    weight.mul_(0.1)[:, -1] += 1


CONV_INIT = {"uniform": init_conv, "identity": init_conv_as_identity}


@torch.no_grad()
def init_step_bias(bias: Tensor, generator: torch.Generator) -> None:
    """Initialise so that softplus(bias) is log-uniform in [0.001, 0.1] (Mamba, arXiv 2312.00752, section 3.6)."""
    step = nn.init.uniform_(bias, math.log(1e-3), math.log(1e-1), generator=generator).exp().clamp(min=1e-4)
    bias.copy_(step + torch.log(-torch.expm1(-step)))


mixers: Registry[type[Mixer]] = Registry("block", "blocks", "zoo.blocks.*")
