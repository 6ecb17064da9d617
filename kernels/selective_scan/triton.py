"""The selective scan in Triton: each program carries the states of a block of channels through one sequence, token by token.

Nothing of size [B, T, D, N] is ever written. The forward pass saves the state every few tokens; the backward pass goes from the
last save to the first, recomputes the states between two saves in registers, and walks back through them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.fused import Fused
from zoo.kernels.tuning import configuration

EVERY = 8  # tokens from one saved state to the next: the backward pass holds this many in registers


@triton.jit
def _bounds(cu, s, T, VARLEN: tl.constexpr, EVERY: tl.constexpr):
    """Return the first token and number of tokens of sequence s, and the index of its first saved state."""
    first, length, save = s.to(tl.int64) * T, T, s.to(tl.int64) * tl.cdiv(T, EVERY)
    if VARLEN:
        first = tl.load(cu + s).to(tl.int64)
        length = (tl.load(cu + s + 1) - first).to(tl.int32)
        save = first // EVERY + s  # at least as far from the next sequence's as its saves need
    return first, length, save


@triton.jit
def scan(u, dt, A, B, C, start, y, final, saved, cu, T, D, N: tl.constexpr,
         BD: tl.constexpr, BN: tl.constexpr, EVERY: tl.constexpr, SAVE: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Compute y, the final state, and with SAVE the state before every EVERY-th token. Grid: blocks of channels x sequences."""
    s = tl.program_id(1)
    first, length, save = _bounds(cu, s, T, VARLEN, EVERY)
    d, n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    cell, place = (d < D)[:, None] & (n < N)[None, :], d[:, None] * N + n[None, :]
    rate = tl.load(A + place, mask=cell, other=0.0).to(ACC)
    state = tl.load(start + s.to(tl.int64) * D * N + place, mask=cell, other=0.0)
    slot = saved + save * D * N + place
    for begin in tl.range(0, length, EVERY):
        if SAVE:
            tl.store(slot, state, mask=cell)
            slot += D * N
        for i in tl.static_range(EVERY):
            inside = begin + i < length
            t = first + begin + i
            here = (d < D) & inside
            step = tl.load(dt + t * D + d, mask=here, other=0.0).to(ACC)
            value = tl.load(u + t * D + d, mask=here, other=0.0).to(ACC)
            write = tl.load(B + t * N + n, mask=(n < N) & inside, other=0.0).to(ACC)
            read = tl.load(C + t * N + n, mask=(n < N) & inside, other=0.0).to(ACC)
            state = state * tl.exp(step[:, None] * rate) + (step * value)[:, None] * write[None, :]
            tl.store(y + t * D + d, tl.sum(state * read[None, :], 1).to(y.dtype.element_ty), mask=here)
    tl.store(final + s.to(tl.int64) * D * N + place, state, mask=cell)


@triton.jit
def scan_gradients(u, dt, A, B, C, saved, dy, dfinal, du, ddt, dA, dB, dC, dstart, cu, T, TOTAL, D, N: tl.constexpr,
                   BD: tl.constexpr, BN: tl.constexpr, EVERY: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Compute every gradient; that of A per sequence, those of B and C per block of channels. Grid: blocks of channels x sequences."""
    s = tl.program_id(1)
    first, length, save = _bounds(cu, s, T, VARLEN, EVERY)
    d, n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    cell, place = (d < D)[:, None] & (n < N)[None, :], d[:, None] * N + n[None, :]
    rate = tl.load(A + place, mask=cell, other=0.0).to(ACC)
    part = tl.program_id(0).to(tl.int64) * TOTAL * N + n
    dstate = tl.load(dfinal + s.to(tl.int64) * D * N + place, mask=cell, other=0.0)
    drate = tl.zeros([BD, BN], ACC)
    saves = tl.cdiv(length, EVERY)
    slot = saved + (save + saves) * D * N + place
    for back in tl.range(0, saves):
        begin = (saves - 1 - back) * EVERY
        slot -= D * N
        state = tl.load(slot, mask=cell, other=0.0)
        before = ()
        for i in tl.static_range(EVERY):
            inside = begin + i < length
            t = first + begin + i
            here = (d < D) & inside
            step = tl.load(dt + t * D + d, mask=here, other=0.0).to(ACC)
            value = tl.load(u + t * D + d, mask=here, other=0.0).to(ACC)
            write = tl.load(B + t * N + n, mask=(n < N) & inside, other=0.0).to(ACC)
            before += (state,)
            state = state * tl.exp(step[:, None] * rate) + (step * value)[:, None] * write[None, :]
        for j in tl.static_range(EVERY):
            inside = begin + EVERY - 1 - j < length
            t = first + begin + EVERY - 1 - j
            here = (d < D) & inside
            step = tl.load(dt + t * D + d, mask=here, other=0.0).to(ACC)
            value = tl.load(u + t * D + d, mask=here, other=0.0).to(ACC)
            write = tl.load(B + t * N + n, mask=(n < N) & inside, other=0.0).to(ACC)
            read = tl.load(C + t * N + n, mask=(n < N) & inside, other=0.0).to(ACC)
            dout = tl.load(dy + t * D + d, mask=here, other=0.0).to(ACC)
            tl.store(dC + part + t * N, tl.sum(dout[:, None] * state, 0), mask=(n < N) & inside)
            dstate += dout[:, None] * read[None, :]
            tl.store(dB + part + t * N, tl.sum(dstate * (step * value)[:, None], 0), mask=(n < N) & inside)
            dwrite = tl.sum(dstate * write[None, :], 1)
            state = before[EVERY - 1 - j]
            dstate *= tl.exp(step[:, None] * rate)
            dexponent = dstate * state
            drate += dexponent * step[:, None]
            tl.store(du + t * D + d, (dwrite * step).to(du.dtype.element_ty), mask=here)
            tl.store(ddt + t * D + d, (dwrite * value + tl.sum(dexponent * rate, 1)).to(ddt.dtype.element_ty), mask=here)
    tl.store(dstart + s.to(tl.int64) * D * N + place, dstate, mask=cell)
    tl.store(dA + s.to(tl.int64) * D * N + place, drate, mask=cell)


@triton.jit
def scan_step(u, dt, A, B, C, start, y, final, D, N: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """Process one token of every sequence. Grid: blocks of channels x sequences."""
    s = tl.program_id(1).to(tl.int64)
    d, n = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    cell, place = (d < D)[:, None] & (n < N)[None, :], d[:, None] * N + n[None, :]
    rate = tl.load(A + place, mask=cell, other=0.0).to(ACC)
    state = tl.load(start + s * D * N + place, mask=cell, other=0.0)
    step = tl.load(dt + s * D + d, mask=d < D, other=0.0).to(ACC)
    value = tl.load(u + s * D + d, mask=d < D, other=0.0).to(ACC)
    write = tl.load(B + s * N + n, mask=n < N, other=0.0).to(ACC)
    read = tl.load(C + s * N + n, mask=n < N, other=0.0).to(ACC)
    state = state * tl.exp(step[:, None] * rate) + (step * value)[:, None] * write[None, :]
    tl.store(y + s * D + d, tl.sum(state * read[None, :], 1).to(y.dtype.element_ty), mask=d < D)
    tl.store(final + s * D * N + place, state, mask=cell)


def run(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run the scan. Shapes as in `op.selective_scan`; state [S, D, N] float32 or float64, the dtype of the arithmetic."""
    inputs = [x.contiguous() for x in (u, dt, A, B, C, state)]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, final = _scan(*inputs, cu_seqlens, save)
    return y, final


def _allocate(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: Tensor | None, save: bool
) -> tuple[Tensor, ...]:
    T, S = u.shape[1], len(state)
    saves = S * -(-T // EVERY) if cu_seqlens is None else T // EVERY + S
    return torch.empty_like(u), torch.empty_like(state), state.new_empty(saves if save and T > 1 else 0, *A.shape)


def _forward(
    outputs: tuple[Tensor, ...],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    save: bool,
) -> None:
    y, final, saved = outputs
    T, (D, N) = u.shape[1], A.shape
    if T == 1:
        config, grid = _config("scan_step", u, state, T=1)
        scan_step[grid](u, dt, A, B, C, state, y, final, D, N, **config)
        return
    config, grid = _config("scan", u, state)
    scan[grid](
        u, dt, A, B, C, state, y, final, saved, cu_seqlens, T, D, N, EVERY=EVERY, SAVE=save, VARLEN=cu_seqlens is not None, **config
    )  # fmt: skip


def _backward(
    grads: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, ...]:
    y, final, saved = outputs
    dy, dfinal = (torch.zeros_like(x) if grad is None else grad.contiguous() for grad, x in zip(grads, (y, final), strict=True))
    batch, T, D = u.shape
    N = A.shape[1]
    config, grid = _config("scan_gradients", u, state)
    du, ddt, dA, dstate = torch.empty_like(u), torch.empty_like(dt), torch.empty_like(state), torch.empty_like(state)
    dB, dC = (state.new_empty(grid[0], batch, T, N) for _ in range(2))
    scan_gradients[grid](
        u, dt, A, B, C, state if T == 1 else saved, dy, dfinal, du, ddt, dA, dB, dC, dstate, cu_seqlens, T, batch * T, D, N,
        EVERY=EVERY, VARLEN=cu_seqlens is not None, **config,
    )  # fmt: skip
    return du, ddt, dA.sum(0).to(A.dtype), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dstate


def _config(kernel: str, u: Tensor, state: Tensor, **shape: int) -> tuple[dict[str, Any], tuple[int, int]]:
    """Return the constants of a launch and its grid: blocks of channels x sequences."""
    S, D, N = state.shape
    BN = triton.next_power_of_2(N)
    BD = max(16, 256 // BN)
    # eight states per thread: the backward pass must hold those of EVERY tokens in registers
    config = configuration(f"selective_scan.{kernel}", u, {"BD": BD, "num_warps": min(8, BD * BN // 256)}, N=N, **shape)
    return {"BN": BN, "ACC": DTYPES[state.dtype], **config}, (triton.cdiv(D, config["BD"]), S)


DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

_scan = Fused(
    "selective_scan",
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
    results=2,
    differentiable=("u", "dt", "A", "B", "C", "state"),
)
