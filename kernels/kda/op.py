"""Public API of Kimi Delta Attention."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.common import packed
from zoo.kernels.common.checks import given_or_zeros
from zoo.kernels.dispatch import choose, kernels, operators, triton_form
from zoo.kernels.gated_delta_rule.op import in_pytorch
from zoo.kernels.kda.chunked import chunked
from zoo.kernels.kda.reference import recurrent


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention (Kimi Linear, arXiv 2510.26692, section 3): the gated delta rule with a decay for each key channel.

    Args:
        q, k: [B, T, H, K], normalised by the caller. v: [B, T, H, V].
        g: log decay <= 0 of each key channel, [B, T, H, K]. beta: write strength in [0, 2], [B, T, H].
        scale: factor applied to the queries, default K ** -0.5.
        initial_state: [S, H, K, V], S the number of sequences (B, or those of `cu_seqlens`); default zeros.
        cu_seqlens: [S + 1] int32 or int64, boundaries of S sequences packed into one row (B = 1).
        form: "reference", "chunked" or "triton"; default: the form set by `zoo.kernels.use`, else the fastest that can run.
    Returns:
        o [B, T, H, V] in v's dtype, and the final state [S, H, K, V] if `output_final_state`, else None.
        The state and the arithmetic are float32, or float64 for float64 input.
    Raises:
        ValueError: the shapes do not match.
        ZooError: the form does not exist or cannot run here.
    """
    B, T, H, K = q.shape
    if k.shape != q.shape or v.shape[:3] != (B, T, H):
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}: want [B, T, H, K] twice and [B, T, H, V]")
    if g.shape != q.shape or beta.shape != (B, T, H):
        raise ValueError(f"g {list(g.shape)} and beta {list(beta.shape)}: want {[B, T, H, K]} and {[B, T, H]}")
    dtype = torch.promote_types(v.dtype, torch.float32)
    state = given_or_zeros("initial_state", initial_state, (packed.streams(B, T, cu_seqlens), H, K, v.shape[3]), v, dtype)
    # one token is one step of the recurrence; a chunk would be mostly padding
    kernel = choose("kda", v, "reference" if T == 1 else "chunked", form)
    o, final = kernel(q, k, v, g, beta, K**-0.5 if scale is None else scale, state, cu_seqlens)
    return o, final if output_final_state else None


operators.register("kda", kda)
kernels.register("kda.chunked", in_pytorch(chunked))
kernels.register("kda.reference", in_pytorch(recurrent))
kernels.register("kda.triton", triton_form("kda"))
