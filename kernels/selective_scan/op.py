"""Public API of the selective scan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.kernels.common import packed
from zoo.kernels.common.checks import given_or_zeros
from zoo.kernels.dispatch import choose, kernels, operators, triton_form
from zoo.kernels.selective_scan.chunked import chunked
from zoo.kernels.selective_scan.reference import recurrent


def selective_scan(
    u: Tensor,
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
    """Selective scan of Mamba (arXiv 2312.00752, algorithm 2), without the skip connection D u.

    Args:
        u: [B, T, D]. dt: step sizes >= 0, [B, T, D]; a step of 0 leaves the state unchanged.
        A: < 0, [D, N]. B, C: [B, T, N].
        initial_state: [S, D, N], S the number of sequences (B, or those of `cu_seqlens`); default zeros.
        cu_seqlens: [S + 1] int32 or int64, boundaries of S sequences packed into one row (B = 1).
        form: "reference", "chunked" or "triton"; default: the form set by `zoo.kernels.use`, else the fastest that can run.
    Returns:
        y [B, T, D] in u's dtype, and the final state [S, D, N] if `output_final_state`, else None.
        The state and the arithmetic are float32, or float64 for float64 input.
    Raises:
        ValueError: the shapes do not match.
        ZooError: the form does not exist or cannot run here.
    """
    batch, T, D = u.shape
    N = A.shape[-1]
    if dt.shape != u.shape or A.shape != (D, N):
        raise ValueError(f"u {list(u.shape)}, dt {list(dt.shape)} and A {list(A.shape)}: want [B, T, D] twice and [D, N]")
    if B.shape != (batch, T, N) or C.shape != B.shape:
        raise ValueError(f"B {list(B.shape)} and C {list(C.shape)}: want {[batch, T, N]}")
    dtype = torch.promote_types(u.dtype, torch.float32)
    state = given_or_zeros("initial_state", initial_state, (packed.streams(batch, T, cu_seqlens), D, N), u, dtype)
    kernel = choose("selective_scan", u, "reference" if T == 1 else "chunked", form)
    y, final = kernel(u, dt, A, B, C, state, cu_seqlens)
    return y, final if output_final_state else None


def _in_pytorch(form: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Adapt a form that takes inputs in the state's dtype and one row per sequence."""

    def run(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        steps = [packed.unpack(x.to(state.dtype), cu_seqlens) for x in (u, dt, B, C)]
        y, final = form(steps[0], steps[1], A.to(state.dtype), steps[2], steps[3], state)
        return packed.pack(y.to(u.dtype), cu_seqlens), final

    return run


operators.register("selective_scan", selective_scan)
kernels.register("selective_scan.chunked", _in_pytorch(chunked))
kernels.register("selective_scan.reference", _in_pytorch(recurrent))
kernels.register("selective_scan.triton", triton_form("selective_scan"))
