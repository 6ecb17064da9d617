"""Public API of state-space duality."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.kernels.common import packed
from zoo.kernels.common.checks import given_or_zeros
from zoo.kernels.dispatch import choose, kernels, operators, triton_form
from zoo.kernels.ssd.chunked import chunked
from zoo.kernels.ssd.reference import recurrent


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The scan of Mamba-2 (arXiv 2405.21060, section 6), without the skip connection D x.

    Args:
        x: [B, T, H, P]. dt: step sizes >= 0, [B, T, H]; a step of 0 leaves the state unchanged.
        A: < 0, [H]. B, C: [B, T, G, N], H a multiple of G; group j serves the heads j*H/G .. (j+1)*H/G - 1.
        initial_state: [S, H, N, P], S the number of sequences (B, or those of `cu_seqlens`); default zeros.
        cu_seqlens: [S + 1] int32 or int64, boundaries of S sequences packed into one row (B = 1).
        form: "reference", "chunked" or "triton"; default: the form set by `zoo.kernels.use`, else the fastest that can run.
    Returns:
        y [B, T, H, P] in x's dtype, and the final state [S, H, N, P] if `output_final_state`, else None.
        The state and the arithmetic are float32, or float64 for float64 input.
    Raises:
        ValueError: the shapes do not match.
        ZooError: the form does not exist or cannot run here.
    """
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    if dt.shape != (batch, T, H) or A.shape != (H,):
        raise ValueError(f"dt {list(dt.shape)} and A {list(A.shape)}: want {[batch, T, H]} and {[H]}")
    if B.shape[:2] != (batch, T) or C.shape != B.shape or H % G:
        raise ValueError(f"B {list(B.shape)} and C {list(C.shape)}: want [B, T, G, N] twice, and G to divide {H} heads")
    dtype = torch.promote_types(x.dtype, torch.float32)
    state = given_or_zeros("initial_state", initial_state, (packed.streams(batch, T, cu_seqlens), H, N, P), x, dtype)
    kernel = choose("ssd", x, "reference" if T == 1 else "chunked", form)
    y, final = kernel(x, dt, A, B, C, state, cu_seqlens)
    return y, final if output_final_state else None


def _in_pytorch(form: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Adapt a form of (dt x, dt A, B, C, state) that takes inputs in the state's dtype and one row per sequence."""

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        step, B, C = (y.to(state.dtype) for y in (dt, B, C))
        inputs = (x.to(state.dtype) * step[..., None], step * A.to(state.dtype), B, C)
        y, final = form(*(packed.unpack(value, cu_seqlens) for value in inputs), state)
        return packed.pack(y.to(x.dtype), cu_seqlens), final

    return run


operators.register("ssd", ssd)
kernels.register("ssd.chunked", _in_pytorch(chunked))
kernels.register("ssd.reference", _in_pytorch(recurrent))
kernels.register("ssd.triton", triton_form("ssd"))
