"""Public API of the gated delta rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.kernels.common import packed
from zoo.kernels.common.checks import given_or_zeros
from zoo.kernels.dispatch import choose, kernels, operators, triton_form
from zoo.kernels.gated_delta_rule.chunked import chunked
from zoo.kernels.gated_delta_rule.reference import recurrent


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
    cu_seqlens: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule (Gated Delta Networks, arXiv 2412.06464, section 3).

    Args:
        q, k: [B, T, H, K], normalised by the caller. v: [B, T, HV, V] with HV a multiple of H;
            key head j serves the value heads j*HV/H .. (j+1)*HV/H - 1.
        g: log decay <= 0, [B, T, HV]. beta: write strength in [0, 2], [B, T, HV].
        scale: factor applied to the queries, default K ** -0.5.
        initial_state: [S, HV, K, V], S the number of sequences (B, or those of `cu_seqlens`); default zeros.
        cu_seqlens: [S + 1] int32 or int64, boundaries of S sequences packed into one row (B = 1).
        form: "reference", "chunked" or "triton"; default: the form set by `zoo.kernels.use`, else the fastest that can run.
    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [S, HV, K, V] if `output_final_state`, else None.
        The state and the arithmetic are float32, or float64 for float64 input.
    Raises:
        ValueError: the shapes do not match.
        ZooError: the form does not exist or cannot run here.
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
    state = given_or_zeros("initial_state", initial_state, (packed.streams(B, T, cu_seqlens), HV, K, V), v, dtype)
    # one token is one step of the recurrence; a chunk would be mostly padding
    kernel = choose("gated_delta_rule", v, "reference" if T == 1 else "chunked", form)
    o, final = kernel(q, k, v, g, beta, K**-0.5 if scale is None else scale, state, cu_seqlens)
    return o, final if output_final_state else None


def in_pytorch(form: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Adapt a form that takes inputs in the state's dtype, one key head per value head and one row per sequence."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if (repeats := v.shape[2] // q.shape[2]) > 1:
            q, k = (x.repeat_interleave(repeats, dim=2) for x in (q, k))
        o, final = form(*(packed.unpack(x.to(state.dtype), cu_seqlens) for x in (q, k, v, g, beta)), scale, state)
        return packed.pack(o.to(v.dtype), cu_seqlens), final

    return run


operators.register("gated_delta_rule", gated_delta_rule)
kernels.register("gated_delta_rule.chunked", in_pytorch(chunked))
kernels.register("gated_delta_rule.reference", in_pytorch(recurrent))
kernels.register("gated_delta_rule.triton", triton_form("gated_delta_rule"))
