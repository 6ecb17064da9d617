"""Public face of the gated delta rule."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import given_or_zeros
from zoo.kernels.dispatch import choose, kernels
from zoo.kernels.gated_delta_rule.chunked import chunked
from zoo.kernels.gated_delta_rule.reference import recurrent

kernels.register("gated_delta_rule.chunked", chunked)
kernels.register("gated_delta_rule.reference", recurrent)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule (Gated Delta Networks, arXiv 2412.06464, section 3).

    Args:
        q, k: [B, T, H, K], already normalised. v: [B, T, HV, V] with HV a multiple of H;
            key head j serves the value heads j*HV/H .. (j+1)*HV/H - 1.
        g: log decay <= 0, [B, T, HV]. beta: write strength in [0, 2], [B, T, HV].
        scale: of the queries, default K ** -0.5.
        initial_state: [B, HV, K, V], default zeros.
    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [B, HV, K, V] if `output_final_state`, else None.
        State and arithmetic are float32, or float64 for float64 input.
    Raises:
        ValueError: shapes that do not fit.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if k.shape != q.shape or v.shape[:2] != (B, T) or HV % H:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}: want [B, T, H, K] twice and [B, T, HV, V], HV a multiple of H"
        )
    if g.shape != (B, T, HV) or beta.shape != (B, T, HV):
        raise ValueError(f"g {list(g.shape)} and beta {list(beta.shape)}: want {[B, T, HV]}")
    dtype = torch.promote_types(v.dtype, torch.float32)
    state = given_or_zeros("initial_state", initial_state, (B, HV, K, V), v, dtype)
    if HV != H:
        q, k = (x.repeat_interleave(HV // H, dim=2) for x in (q, k))
    # one token is one step of the recurrence; a chunk would be padding
    kernel = choose("gated_delta_rule", "reference" if T == 1 else "chunked")
    o, final = kernel(*(x.to(dtype) for x in (q, k, v, g, beta)), K**-0.5 if scale is None else scale, state)
    return o.to(v.dtype), final if output_final_state else None
