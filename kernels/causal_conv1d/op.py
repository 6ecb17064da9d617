"""Public API of the short causal convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.causal_conv1d.chunked import chunked, one_token
from zoo.kernels.causal_conv1d.reference import stepwise
from zoo.kernels.common import packed
from zoo.kernels.common.checks import given_or_zeros
from zoo.kernels.common.recording import recorded
from zoo.kernels.dispatch import choose, kernels, operators, triton_form


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise causal convolution, then SiLU (Mamba, arXiv 2312.00752, section 3.4).

    Args:
        x: [B, T, C]. weight: [C, K], the last tap belongs to the current token. bias: [C].
        initial_state: the K-1 inputs before x, oldest first, [S, C, K-1], S the number of sequences (B, or those of
            `cu_seqlens`); default zeros.
        cu_seqlens: [S + 1] int32 or int64, boundaries of S sequences packed into one row (B = 1).
        form: "reference", "chunked" or "triton"; default: the form set by `zoo.kernels.use`, else the fastest that can run.
    Returns:
        y [B, T, C] in x's dtype, and the last K-1 inputs of each sequence [S, C, K-1] if `output_final_state`, else None.
    Raises:
        ValueError: the shapes do not match, or the activation does not exist.
        ZooError: the form does not exist or cannot run here.
    """
    B, T, C = x.shape
    if weight.ndim != 2 or weight.shape[0] != C:
        raise ValueError(f"weight {list(weight.shape)}: want [C, K] with C = {C}")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias {list(bias.shape)}: want {[C]}")
    if activation not in ("silu", None):
        raise ValueError(f"activation: '{activation}' is not one of: silu, None")
    S, K = packed.streams(B, T, cu_seqlens), weight.shape[1]
    state = given_or_zeros("initial_state", initial_state, (S, C, K - 1), x, x.dtype)
    y, final = choose("causal_conv1d", x, "chunked", form)(x, weight, bias, activation == "silu", state, cu_seqlens)
    return y, final if output_final_state else None


def _in_pytorch(
    form: Callable[[Tensor, Tensor, Tensor], Tensor], step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Adapt a form that takes one row per sequence and applies neither bias nor activation.

    Args:
        step: the same for one token, without gradients; also returns the next tail.
    """

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32  # rounded once, at the end
        if step is not None and x.shape[1] == 1 and cu_seqlens is None and not recorded(x, weight, state):
            y, final = step(x, weight.to(wide), state)
        else:
            y = form(packed.unpack(x.to(wide), cu_seqlens), weight.to(wide), state.to(wide))
            final = packed.newest(x, state, cu_seqlens)
        changeable = not recorded(y, y if bias is None else bias)
        if bias is not None:
            y = y.add_(bias) if changeable else y + bias
        y = F.silu(y, inplace=changeable) if silu else y
        return packed.pack(y, cu_seqlens).to(x.dtype), final

    return run


operators.register("causal_conv1d", causal_conv1d)
kernels.register("causal_conv1d.chunked", _in_pytorch(chunked, one_token))
kernels.register("causal_conv1d.reference", _in_pytorch(stepwise))
kernels.register("causal_conv1d.triton", triton_form("causal_conv1d"))
