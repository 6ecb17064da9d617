"""Public face of state-space duality."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import given_or_zeros
from zoo.kernels.dispatch import choose, kernels
from zoo.kernels.ssd.chunked import chunked
from zoo.kernels.ssd.reference import recurrent

kernels.register("ssd.chunked", chunked)
kernels.register("ssd.reference", recurrent)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The scan of Mamba-2 (arXiv 2405.21060, section 6), without the skip connection D x.

    Args:
        x: [B, T, H, P]. dt: step sizes >= 0, [B, T, H]; a step of 0 leaves the state alone.
        A: < 0, [H]. B, C: [B, T, G, N], H a multiple of G; group j serves the heads j*H/G .. (j+1)*H/G - 1.
        initial_state: [B, H, N, P], default zeros.
    Returns:
        y [B, T, H, P] in x's dtype, and the final state [B, H, N, P] if `output_final_state`, else None.
        State and arithmetic are float32, or float64 for float64 input.
    Raises:
        ValueError: shapes that do not fit.
    """
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    if dt.shape != (batch, T, H) or A.shape != (H,):
        raise ValueError(f"dt {list(dt.shape)} and A {list(A.shape)}: want {[batch, T, H]} and {[H]}")
    if B.shape[:2] != (batch, T) or C.shape != B.shape or H % G:
        raise ValueError(f"B {list(B.shape)} and C {list(C.shape)}: want [B, T, G, N] twice, and G to divide {H} heads")
    dtype = torch.promote_types(x.dtype, torch.float32)
    state = given_or_zeros("initial_state", initial_state, (batch, H, N, P), x, dtype)
    step = dt.to(dtype)
    B, C = (y.to(dtype).repeat_interleave(H // G, dim=2) for y in (B, C))
    kernel = choose("ssd", "reference" if T == 1 else "chunked")
    y, final = kernel(x.to(dtype) * step[..., None], step * A.to(dtype), B, C, state)
    return y.to(x.dtype), final if output_final_state else None
