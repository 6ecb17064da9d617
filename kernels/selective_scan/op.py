"""Public face of the selective scan."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import given_or_zeros
from zoo.kernels.dispatch import choose, kernels
from zoo.kernels.selective_scan.chunked import chunked
from zoo.kernels.selective_scan.reference import recurrent

kernels.register("selective_scan.chunked", chunked)
kernels.register("selective_scan.reference", recurrent)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Selective scan of Mamba (arXiv 2312.00752, algorithm 2), without the skip connection D u.

    Args:
        u: [B, T, D]. dt: step sizes >= 0, [B, T, D]; a step of 0 leaves the state alone.
        A: < 0, [D, N]. B, C: [B, T, N].
        initial_state: [B, D, N], default zeros.
    Returns:
        y [B, T, D] in u's dtype, and the final state [B, D, N] if `output_final_state`, else None.
        State and arithmetic are float32, or float64 for float64 input.
    Raises:
        ValueError: shapes that do not fit.
    """
    batch, T, D = u.shape
    N = A.shape[-1]
    if dt.shape != u.shape or A.shape != (D, N):
        raise ValueError(f"u {list(u.shape)}, dt {list(dt.shape)} and A {list(A.shape)}: want [B, T, D] twice and [D, N]")
    if B.shape != (batch, T, N) or C.shape != B.shape:
        raise ValueError(f"B {list(B.shape)} and C {list(C.shape)}: want {[batch, T, N]}")
    dtype = torch.promote_types(u.dtype, torch.float32)
    state = given_or_zeros("initial_state", initial_state, (batch, D, N), u, dtype)
    # the steps of a large state keep it in a CPU's cache, 3 times faster; a traced graph must not grow with T
    steps_are_faster = T == 1 or (u.is_cpu and not torch.compiler.is_compiling() and state.numel() >= 2**15)
    kernel = choose("selective_scan", "reference" if steps_are_faster else "chunked")
    y, final = kernel(*(x.to(dtype) for x in (u, dt, A, B, C)), state)
    return y.to(u.dtype), final if output_final_state else None
