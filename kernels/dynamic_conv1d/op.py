"""Public API of the dynamic causal convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.common import packed
from zoo.kernels.common.checks import given_or_zeros
from zoo.kernels.dispatch import choose, kernels, operators, triton_form
from zoo.kernels.dynamic_conv1d.chunked import chunked
from zoo.kernels.dynamic_conv1d.reference import stepwise


def dynamic_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise causal convolution with a separate kernel for every token and channel, then SiLU (arXiv 2508.15884, section 2.3).

    Args:
        x: [B, T, C]. weight: [B, T, C, K], the last tap belongs to the current token.
        initial_state: the K-1 inputs before x, oldest first, [S, C, K-1], S the number of sequences (B, or those of
            `cu_seqlens`); default zeros.
        cu_seqlens: [S + 1] int32 or int64, boundaries of S sequences packed into one row (B = 1).
        form: "reference", "chunked" or "triton"; default: the form set by `zoo.kernels.use`, else the fastest that can run.
    Returns:
        y [B, T, C] in x's dtype, and the last K-1 inputs of each sequence [S, C, K-1] if `output_final_state`, else None.
    Raises:
        ValueError: the shapes do not match.
        ZooError: the form does not exist or cannot run here.
    """
    B, T, C = x.shape
    if weight.ndim != 4 or weight.shape[:3] != x.shape:
        raise ValueError(f"weight {list(weight.shape)}: want [B, T, C, K] for x {list(x.shape)}")
    S, K = packed.streams(B, T, cu_seqlens), weight.shape[3]
    state = given_or_zeros("initial_state", initial_state, (S, C, K - 1), x, x.dtype)
    y, final = choose("dynamic_conv1d", x, "chunked", form)(x, weight.to(x.dtype), state, cu_seqlens)
    return y, final if output_final_state else None


def _in_pytorch(form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Adapt a form that takes one row per sequence and applies no activation."""

    def run(x: Tensor, weight: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        y = F.silu(form(packed.unpack(x, cu_seqlens), packed.unpack(weight, cu_seqlens), state))
        return packed.pack(y, cu_seqlens), packed.newest(x, state, cu_seqlens)

    return run


operators.register("dynamic_conv1d", dynamic_conv1d)
kernels.register("dynamic_conv1d.chunked", _in_pytorch(chunked))
kernels.register("dynamic_conv1d.reference", _in_pytorch(stepwise))
kernels.register("dynamic_conv1d.triton", triton_form("dynamic_conv1d"))
