"""Launches of Kimi Delta Attention in Triton: three forward, three or four backward, one for a single token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import tuning
from zoo.kernels.fused import Fused
from zoo.kernels.gated_delta_rule.shared import (
    PLAIN_SCAN,
    SAVE_AT_MOST,
    by_token,
    chunk_length,
    launch_options,
    number_of_chunks,
    power,
    stride,
)
from zoo.kernels.kda.programs import accumulate, backward_scan, forward_scan, gradients, prepare, step


def run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k = q.to(v.dtype), k.to(v.dtype)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta, state))
    if v.shape[1] == 1 and cu_seqlens is None and (not differentiable or tuning.forces("kda.step")):
        return one_token(q, k, v, g, beta, state, scale)
    states = number_of_chunks(v, cu_seqlens, chunk_length(q)) * state[0].numel() * v.element_size()
    o, final = whole(q, k, v, g, beta, state, cu_seqlens, scale, differentiable and states <= SAVE_AT_MOST)
    return o, final


def allocate(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, cu_seqlens: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, ...]:
    """Allocate o and the final state; tau and the products of queries and keys; and, if kept, the state before each chunk and y."""
    C = chunk_length(q)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    tau, within = v.new_empty(*v.shape[:3], C), v.new_empty(*v.shape[:3], C)
    states = v.new_empty(number_of_chunks(v, cu_seqlens, C) if keep else 0, *state.shape[1:])
    y = torch.empty_like(o) if keep else v.new_empty(0)
    return o, torch.empty_like(state, memory_format=torch.contiguous_format), tau, within, states, y


def forward(
    outputs: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
) -> None:
    o, final, tau, within, states, y = outputs
    C = tau.shape[-1]
    (q, k, v), (g, beta, state) = (by_token(x) for x in (q, k, v)), (x.contiguous() for x in (g, beta, state))
    H, K = q.shape[2:]
    options = launch_options(v, state, cu_seqlens)
    decayed = _decayed(q, k, v, g, state, cu_seqlens, C)
    config = tuning.configuration("kda.prepare", v, {"BK": 16, "num_warps": 4, "num_stages": 1}, K=K, V=v.shape[3])
    some = {name: options[name] for name in ("SEQUENCES", "ACC", "PRECISION")}
    prepare[(number_of_chunks(v, cu_seqlens, C), H)](
        q, k, decayed[0], beta, tau, within, cu_seqlens, stride(q), stride(k), v.shape[1], len(state), H=H, K=K, C=C,
        LEVELS=C.bit_length() - 1, **some, **config,
    )  # fmt: skip
    _scan(decayed, v, beta, tau, within, state, cu_seqlens, scale, (o, final), (states, y) if keep else (None, None))


def backward(
    grads: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    tau, within, states, y = outputs[2:]
    C = tau.shape[-1]
    do, dfinal = grads
    do = torch.zeros_like(outputs[0]) if do is None else do.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    (q, k, v), (g, beta, state) = (by_token(x) for x in (q, k, v)), (x.contiguous() for x in (g, beta, state))
    T, H, K = q.shape[1:]
    V = v.shape[3]
    options, S, chunks = launch_options(v, state, cu_seqlens), len(state), number_of_chunks(v, cu_seqlens, C)
    decayed = _decayed(q, k, v, g, state, cu_seqlens, C)
    dr, dstate, dstates = state.new_empty(v.shape), torch.empty_like(state), v.new_empty(chunks, *state.shape[1:])
    if not keep:
        states, y = torch.empty_like(dstates), torch.empty_like(outputs[0])
        _scan(decayed, v, beta, tau, within, state, cu_seqlens, scale, (None, None), (states, y))
    decay, *operands = decayed
    config = tuning.configuration("kda.backward_scan", v, PLAIN_SCAN, K=K, V=V)
    backward_scan[(triton.cdiv(V, config["BV"]) * S * H,)](
        *operands, decay, beta, tau, within, do, dfinal, dstates, dr, dstate, cu_seqlens, scale, T, H=H, K=K, V=V, PK=power(K), C=C,
        **options, **config,
    )  # fmt: skip
    config = tuning.configuration("kda.gradients", v, {"BK": 16, "BV": 16, "num_warps": 8, "num_stages": 1}, K=K, V=V)
    dq, dk, dg = q.new_empty(q.shape), k.new_empty(k.shape), state.new_empty(q.shape)
    dv, dbeta = torch.empty_like(y), state.new_empty(beta.shape)
    gradients[(chunks, H, triton.cdiv(K, config["BK"]))](
        q, k, decay, beta, states, y, do, dstates, dr, dq, dk, dv, dg, dbeta, cu_seqlens, stride(q), stride(k), scale, T, S,
        H=H, K=K, V=V, C=C, LEVELS=C.bit_length() - 1, **options, **config,
    )  # fmt: skip
    return dq, dk, dv, dg.to(g.dtype), dbeta.to(beta.dtype), dstate


def _decayed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, cu_seqlens: Tensor | None, C: int) -> list[Tensor]:
    """Return the log decays since the chunk's start in two halves, and q, k decayed since then, k decayed until the chunk's end."""
    H, K = q.shape[2:]
    options = launch_options(v, state, cu_seqlens)
    decayed = [state.new_empty(*g.shape[:3], 2, K), *(v.new_empty(g.shape) for _ in range(3))]
    config = tuning.configuration("kda.accumulate", v, {"BK": 32, "num_warps": 8, "num_stages": 1}, K=K, V=v.shape[3])
    accumulate[(number_of_chunks(v, cu_seqlens, C), H, triton.cdiv(K, config["BK"]))](
        q, k, g, *decayed, cu_seqlens, stride(q), stride(k), q.shape[1], len(state), SEQUENCES=options["SEQUENCES"], H=H, K=K, C=C,
        ACC=options["ACC"], **config,
    )  # fmt: skip
    return decayed


def _scan(
    decayed: list[Tensor],
    v: Tensor,
    beta: Tensor,
    tau: Tensor,
    within: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    results: tuple[Tensor | None, ...],
    kept: tuple[Tensor | None, ...],
) -> None:
    decay, *operands = decayed
    S, H, K, V = state.shape
    config = tuning.configuration("kda.forward_scan", v, PLAIN_SCAN, K=K, V=V)
    forward_scan[(triton.cdiv(V, config["BV"]) * S * H,)](
        *operands, v, decay, beta, tau, within, state, *results, *kept, cu_seqlens, stride(v), scale, v.shape[1],
        H=H, K=K, V=V, PK=power(K), C=tau.shape[-1], **launch_options(v, state, cu_seqlens), **config,
    )  # fmt: skip


whole = Fused("kda", allocate=allocate, forward=forward, backward=backward, results=2, differentiable=("q", "k", "v", "g", "beta", "state"))


def one_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (q, k, v), (g, beta, state) = (by_token(x) for x in (q, k, v)), (x.contiguous() for x in (g, beta, state))
    S, H, K, V = state.shape
    o, final = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(state)
    config = tuning.configuration("kda.step", v, {"BV": 16, "num_warps": 4, "num_stages": 1}, K=K, V=V, T=1)
    ACC = tl.float64 if state.dtype == torch.float64 else tl.float32
    step[(triton.cdiv(V, config["BV"]) * S * H,)](
        q, k, v, g, beta, state, o, final, stride(q), stride(k), stride(v), scale, H=H, K=K, V=V, PK=power(K), ACC=ACC, **config
    )  # fmt: skip
    return o, final
