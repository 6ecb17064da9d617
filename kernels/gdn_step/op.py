"""Public API of the decode step of Gated DeltaNet."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.dispatch import choose, kernels, operators, triton_form
from zoo.kernels.gdn_step.reference import composed


def gdn_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Tensor | None = None,
    *,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    window: Tensor,
    state: Tensor,
    beta_scale: float = 1.0,
    eps: float = 1e-5,
    form: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Process one token of a Gated DeltaNet mixer between its projections (arXiv 2412.06464, figure 1), in one launch. No gradients.

    Short convolution and SiLU of q, k and v, unit q and k, log decay -exp(A_log) softplus(a + dt_bias), write strength
    beta_scale sigmoid(b), gated delta rule with queries scaled by K ** -0.5, norm of each head, times silu(gate).

    Args:
        q, k: [B, 1, H * K]. v, gate: [B, 1, HV * V], HV a multiple of H. a, b: [B, 1, HV]. All are projections of x.
        q_conv, k_conv: [H * K, taps]. v_conv: [HV * V, taps]. A_log, dt_bias: [HV]. norm_weight: [V].
        window: the last taps - 1 inputs of the convolution, oldest first; channels of q, then k, then v: [B, 2 H K + HV V, taps - 1].
        state: [B, HV, K, V], float32, or float64 for float64 input.
        form: "reference" or "triton"; default: the form set by `zoo.kernels.use`, else the fastest that can run.
    Returns:
        y [B, 1, HV * V] in v's dtype, state and window after the token.
    Raises:
        ValueError: the shapes do not match.
        ZooError: the form does not exist or cannot run here.
    """
    B, HV, K, V = state.shape
    keys, values = q.shape[-1], HV * V
    if keys % K or HV % (keys // K) or q.shape != (B, 1, keys) or k.shape != q.shape or v.shape != (B, 1, values):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, state {list(state.shape)}: "
            "want [B, 1, H * K] twice, [B, 1, HV * V], [B, HV, K, V], HV a multiple of H"
        )
    if a.shape != (B, 1, HV) or b.shape != a.shape or (gate is not None and gate.shape != v.shape):
        raise ValueError(f"a {list(a.shape)} and b {list(b.shape)}: want {[B, 1, HV]}, and gate of v's shape {list(v.shape)}")
    want = (B, 2 * keys + values, q_conv.shape[-1] - 1)
    if window.shape != want:
        raise ValueError(f"window {list(window.shape)}: want {list(want)}")
    run = choose("gdn_step", v, "reference", form)
    y, state, window = run(
        q, k, v, a, b, gate, q_conv, k_conv, v_conv, A_log, dt_bias, norm_weight, window, state, float(beta_scale), float(eps)
    )
    return y, state, window


def one_launch(x: Tensor) -> bool:
    """Return whether `gdn_step` should mix the tokens x [B, T, D]: there is one token, no gradients are wanted, and Triton can run."""
    return x.shape[1] == 1 and not torch.is_grad_enabled() and choose("gdn_step", x, "reference") is kernels.get("gdn_step.triton")


operators.register("gdn_step", gdn_step)
kernels.register("gdn_step.reference", composed)
kernels.register("gdn_step.triton", triton_form("gdn_step"))
