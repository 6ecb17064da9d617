"""The definition: one token of a Gated DeltaNet mixer between its projections, composed of the other operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.causal_conv1d.op import causal_conv1d
from zoo.kernels.gated_delta_rule.op import gated_delta_rule
from zoo.kernels.gated_rmsnorm.op import gated_rmsnorm
from zoo.kernels.l2norm.op import l2norm
from zoo.kernels.rmsnorm.op import rmsnorm


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Tensor | None,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    window: Tensor,
    state: Tensor,
    beta_scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes in op.py. Returns y [B, 1, HV * V], the state and the window after the token."""
    _, heads, key_dim, value_dim = state.shape
    mixed, weight = torch.cat([q, k, v], dim=-1), torch.cat([q_conv, k_conv, v_conv])
    convolved, window_after = causal_conv1d(mixed, weight, initial_state=window, output_final_state=True, form="reference")
    q, k, v = convolved.split([q.shape[-1], k.shape[-1], v.shape[-1]], dim=-1)
    q, k = (l2norm(x.unflatten(-1, (-1, key_dim)), form="reference") for x in (q, k))
    g = -A_log.to(state.dtype).exp() * F.softplus(a.to(state.dtype) + dt_bias)
    beta = beta_scale * b.to(state.dtype).sigmoid()
    v = v.unflatten(-1, (heads, value_dim))
    o, final = gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, form="reference")
    if gate is None:
        y = rmsnorm(o, norm_weight, eps=eps, form="reference")
    else:
        y = gated_rmsnorm(o, gate.unflatten(-1, (heads, value_dim)), norm_weight, eps=eps, form="reference")
    assert final is not None
    assert window_after is not None
    return y.flatten(2), final, window_after
