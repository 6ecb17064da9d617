"""The decode step of Gated DeltaNet in one launch: a program for each value head of each stream.

One pass over the state S: with S' = decay S and u = beta (v - S'^T k), the new state is S' + k u^T and reads S'^T q + (k . q) u.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.fused import Fused
from zoo.kernels.tuning import configuration


@triton.jit
def _convolved(
    x, weight, window, window_after, channel, place, inside, window_channel, window_token, writes, TAPS: tl.constexpr, ACC: tl.constexpr
):
    """Return silu of the convolution at the new token, for `channel` of x at `place` in the window; shifts the window."""
    new = tl.load(x + channel, mask=inside, other=0.0)
    z = tl.load(weight + channel * TAPS + TAPS - 1, mask=inside, other=0.0).to(ACC) * new.to(ACC)
    for tap in tl.static_range(TAPS - 1):
        old = tl.load(window + place * window_channel + tap * window_token, mask=inside, other=0.0)
        z += tl.load(weight + channel * TAPS + tap, mask=inside, other=0.0).to(ACC) * old.to(ACC)
        if tap > 0:
            tl.store(window_after + place * (TAPS - 1) + tap - 1, old, mask=inside & writes)
    tl.store(window_after + place * (TAPS - 1) + TAPS - 2, new.to(window_after.dtype.element_ty), mask=inside & writes)
    return z * tl.sigmoid(z)


@triton.jit
def _softplus(x):
    """Return log(1 + e^x), accurate where e^x is small."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def step(
    q, k, v, a, b, gate, q_conv, k_conv, v_conv, A_log, dt_bias, norm_weight, window, state, y, state_after, window_after,
    q_row, k_row, v_row, a_row, b_row, gate_row, window_row, window_channel, window_token, scale, beta_scale, eps,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TAPS: tl.constexpr, GATED: tl.constexpr, ACC: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // HV).to(tl.int64)
    head = tl.program_id(0) % HV
    key_head = head // (HV // H)
    i = tl.arange(0, BK)
    window += row * window_row
    window_after += row * (2 * H * K + HV * V) * (TAPS - 1)
    writes = head % (HV // H) == 0  # one of the value heads that share a key head
    channel = key_head * K + i
    bq = _convolved(q + row * q_row, q_conv, window, window_after, channel, channel, i < K, window_channel, window_token, writes, TAPS, ACC)
    bk = _convolved(
        k + row * k_row, k_conv, window, window_after, channel, H * K + channel, i < K, window_channel, window_token, writes, TAPS, ACC
    )
    bq = bq * (scale / tl.sqrt(tl.sum(bq * bq, 0) + 1e-6))
    bk = bk * (1.0 / tl.sqrt(tl.sum(bk * bk, 0) + 1e-6))
    step_size = _softplus(tl.load(a + row * a_row + head).to(ACC) + tl.load(dt_bias + head).to(ACC))
    decay = tl.exp(-tl.exp(tl.load(A_log + head).to(ACC)) * step_size)
    beta = beta_scale * tl.sigmoid(tl.load(b + row * b_row + head).to(ACC))
    both = tl.sum(bq * bk, 0)
    outputs = ()
    squares = both * 0.0
    for block in tl.static_range((V + BV - 1) // BV):
        j = block * BV + tl.arange(0, BV)
        channel = head * V + j
        bv = _convolved(
            v + row * v_row,
            v_conv,
            window,
            window_after,
            channel,
            2 * H * K + channel,
            j < V,
            window_channel,
            window_token,
            True,
            TAPS,
            ACC,
        )
        at = (row * HV + head) * K * V + i[:, None] * V + j[None, :]
        inside = (i < K)[:, None] & (j < V)[None, :]
        S = decay * tl.load(state + at, mask=inside, other=0.0).to(ACC)
        u = beta * (bv - tl.sum(S * bk[:, None], 0))
        o = tl.sum(S * bq[:, None], 0) + both * u
        tl.store(state_after + at, (S + bk[:, None] * u[None, :]).to(state_after.dtype.element_ty), mask=inside)
        squares += tl.sum(o * o, 0)
        outputs = outputs + (o,)
    unit = 1.0 / tl.sqrt(squares / V + eps)
    for block in tl.static_range((V + BV - 1) // BV):
        j = block * BV + tl.arange(0, BV)
        o = outputs[block] * unit * tl.load(norm_weight + j, mask=j < V, other=0.0).to(ACC)
        if GATED:
            z = tl.load(gate + row * gate_row + head * V + j, mask=j < V, other=0.0).to(ACC)
            o = o * z * tl.sigmoid(z)
        tl.store(y + (row * HV + head) * V + j, o.to(y.dtype.element_ty), mask=j < V)


def run(*inputs: Any) -> tuple[Tensor, ...]:
    return fused(*inputs)


def _allocate(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gate: Tensor | None, q_conv: Tensor, k_conv: Tensor, v_conv: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, window: Tensor, state: Tensor, beta_scale: float, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, state, window))


def _launch(
    outputs: tuple[Tensor, ...],
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
) -> None:
    B, HV, K, V = state.shape
    q, k, v, a, b = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v, a, b))
    gate = gate if gate is None or gate.stride(2) == 1 else gate.contiguous()
    BK = triton.next_power_of_2(K)
    plain = {"BK": BK, "BV": min(triton.next_power_of_2(V), max(16, 8192 // BK)), "num_warps": 8}
    config = configuration("gdn_step.step", v, plain, K=K, V=V)
    step[(B * HV,)](
        q, k, v, a, b, gate, q_conv.contiguous(), k_conv.contiguous(), v_conv.contiguous(), A_log, dt_bias, norm_weight, window,
        state.contiguous(), *outputs, *(x.stride(0) for x in (q, k, v, a, b, v if gate is None else gate)), *window.stride(),
        K**-0.5, beta_scale, eps, q.shape[2] // K, HV, K, V, window.shape[2] + 1, gate is not None,
        tl.float64 if state.dtype == torch.float64 else tl.float32, **config,
    )  # fmt: skip


def _no_gradients(*_: Any) -> NoReturn:
    raise NotImplementedError("gdn_step has no gradients: call it under torch.no_grad()")


fused = Fused("gdn_step", allocate=_allocate, forward=_launch, backward=_no_gradients, results=3, differentiable=())
