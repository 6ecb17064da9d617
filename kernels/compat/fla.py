"""Operators with the names and arguments of flash-linear-attention (fla 0.6), as drop-in replacements.

    from fla.ops.gated_delta_rule import chunk_gated_delta_rule    ->  from zoo.kernels.compat.fla import chunk_gated_delta_rule

Unsupported arguments that would change the result are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.causal_conv1d.op import causal_conv1d as _causal_conv1d
from zoo.kernels.common import packed
from zoo.kernels.compat.refuse import refuse
from zoo.kernels.gated_delta_rule.op import gated_delta_rule
from zoo.kernels.l2norm.op import l2norm


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **unsupported: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run `zoo.kernels.gated_delta_rule`. q, k: [B, T, H, K]. v: [B, T, HV, V]. g, beta: [B, T, HV]. State: [N, HV, K, V]."""
    refuse("chunk_gated_delta_rule", unsupported)
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    return gated_delta_rule(
        q, k, v, g=g, beta=beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **unsupported: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run `chunk_gated_delta_rule`; the fifth argument here is gk. Defaults: g = 0 (no decay), beta = 1."""
    refuse("fused_recurrent_gated_delta_rule", {"gk": gk, "gv": gv, **unsupported})
    if beta is not None and beta.ndim != 3:
        raise ValueError(f"fused_recurrent_gated_delta_rule: beta {list(beta.shape)}: want [B, T, HV]")
    heads = v.shape[:3]
    return chunk_gated_delta_rule(
        q,
        k,
        v,
        v.new_zeros(heads, dtype=torch.float32) if g is None else g,
        v.new_ones(heads) if beta is None else beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
    )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    backend: str | None = "triton",
    cu_seqlens: Tensor | None = None,
    **unsupported: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run `zoo.kernels.causal_conv1d`. x, residual (added to the result): [B, T, D]. weight: [D, W].

    State: [N, D, W], the last W inputs. `backend` is ignored; choose the form with `zoo.kernels.use`.
    """
    refuse("causal_conv1d", unsupported)
    W = weight.shape[-1]
    before = None if initial_state is None else initial_state[..., 1:]
    y, _ = _causal_conv1d(x, weight, bias, activation=_silu(activation), initial_state=before, cu_seqlens=cu_seqlens)
    final = None
    if output_final_state:
        streams = packed.streams(x.shape[0], x.shape[1], cu_seqlens)
        final = packed.newest(x, x.new_zeros(streams, x.shape[2], W) if initial_state is None else initial_state, cu_seqlens)
    return y if residual is None else y + residual, final


def _silu(activation: str | None) -> Any:
    return "silu" if activation == "swish" else activation
