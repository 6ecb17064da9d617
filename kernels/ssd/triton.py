"""State-space duality in Triton, chunk by chunk with matrix products (README.md has the equations).

Forward: one launch; a program carries a block of a head's state through one sequence. Backward: one launch for two scans that
do not depend on each other, of the states and of their gradients, and one for all gradients, in which chunks are independent.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.fused import Fused
from zoo.kernels.tuning import configuration

PROGRAMS = 264  # programs to split the gradients of B and C over, if there are enough heads: two per multiprocessor of an H100


@triton.jit
def _bounds(cu, s, T, VARLEN: tl.constexpr, BT: tl.constexpr):
    """Return the first token and number of tokens of sequence s, and the index of its first chunk."""
    first, length, chunk = s.to(tl.int64) * T, T, s.to(tl.int64) * tl.cdiv(T, BT)
    if VARLEN:
        first = tl.load(cu + s).to(tl.int64)
        length = (tl.load(cu + s + 1) - first).to(tl.int32)
        chunk = first // BT + s  # at least as far from the next one as the chunks need
    return first, length, chunk


@triton.jit
def _log_decays(dt, A, h, i, H, inside, ACC: tl.constexpr):
    """Return dt, the log decay from the chunk's start to each token, in float64, and to its end."""
    step = tl.load(dt + h + i * H, mask=inside, other=0.0)
    fall = step.to(tl.float64) * tl.load(A + h).to(tl.float64)
    return step.to(ACC), tl.cumsum(fall, 0), tl.sum(fall, 0)


@triton.jit
def _between(down, up, allowed, ACC: tl.constexpr):
    """Return exp(down_i - up_j) where allowed, else 0. The high parts cancel exactly, so small steps survive a large one."""
    high, low = down.to(ACC), (down - down.to(ACC).to(tl.float64)).to(ACC)
    high_up, low_up = up.to(ACC), (up - up.to(ACC).to(tl.float64)).to(ACC)
    gap = (high[:, None] - high_up[None, :]) + (low[:, None] - low_up[None, :])
    return tl.where(allowed, tl.exp(tl.where(allowed, gap, 0.0)), 0.0)


@triton.jit
def scan(x, dt, A, B, C, start, y, final, cu, T, H, G, N: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
         BP: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Compute y and the final state. Grid: blocks of P x (sequence, head)."""
    s, h = tl.program_id(1) // H, tl.program_id(1) % H
    first, length, _ = _bounds(cu, s, T, VARLEN, BT)
    g = h // (H // G)
    i, n, p = tl.arange(0, BT), tl.arange(0, BN), tl.program_id(0) * BP + tl.arange(0, BP)
    cell, place = (n < N)[:, None] & (p < P)[None, :], n[:, None] * P + p[None, :]
    key, row = i[:, None] * (G * N) + n[None, :], i[:, None] * (H * P) + p[None, :]
    head = tl.program_id(1).to(tl.int64) * N * P
    state = tl.load(start + head + place, mask=cell, other=0.0)
    for begin in tl.range(0, length, BT):
        t, inside = first + begin, begin + i < length
        key_mask, row_mask = inside[:, None] & (n < N)[None, :], inside[:, None] & (p < P)[None, :]
        step, decay, total = _log_decays(dt + t * H, A, h, i, H, inside, ACC)
        b = tl.load(B + (t * G + g) * N + key, mask=key_mask, other=0.0).to(DT)
        c = tl.load(C + (t * G + g) * N + key, mask=key_mask, other=0.0).to(DT)
        w = tl.load(x + (t * H + h) * P + row, mask=row_mask, other=0.0).to(ACC) * step[:, None]
        scores = tl.dot(c, tl.trans(b), input_precision=PRECISION, out_dtype=ACC) * _between(decay, decay, i[:, None] >= i[None, :], ACC)
        out = tl.dot(c, state.to(DT), input_precision=PRECISION, out_dtype=ACC) * tl.exp(decay.to(ACC))[:, None]
        out += tl.dot(scores.to(DT), w.to(DT), input_precision=PRECISION, out_dtype=ACC)
        tl.store(y + (t * H + h) * P + row, out.to(y.dtype.element_ty), mask=row_mask)
        w *= tl.exp((total - decay).to(ACC))[:, None]
        state = state * tl.exp(total.to(ACC)) + tl.dot(tl.trans(b), w.to(DT), input_precision=PRECISION, out_dtype=ACC)
    tl.store(final + head + place, state, mask=cell)


@triton.jit
def scan_states(x, dt, A, B, C, start, dy, dfinal, states, dstates, dstart, cu, T, H, G, N: tl.constexpr, P: tl.constexpr,
                BT: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, VARLEN: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Compute the state at each chunk's start, and the gradient of the state at each chunk's end.

    Grid: blocks of P x (sequence, head) x which of the two.
    """
    s, h = tl.program_id(1) // H, tl.program_id(1) % H
    first, length, chunk = _bounds(cu, s, T, VARLEN, BT)
    g = h // (H // G)
    i, n, p = tl.arange(0, BT), tl.arange(0, BN), tl.program_id(0) * BP + tl.arange(0, BP)
    cell, place = (n < N)[:, None] & (p < P)[None, :], n[:, None] * P + p[None, :]
    key, row = i[:, None] * (G * N) + n[None, :], i[:, None] * (H * P) + p[None, :]
    head = tl.program_id(1).to(tl.int64) * N * P
    chunks = tl.cdiv(length, BT)
    if tl.program_id(2) == 0:
        state = tl.load(start + head + place, mask=cell, other=0.0)
        for k in tl.range(0, chunks):
            t, inside = first + k * BT, k * BT + i < length
            key_mask, row_mask = inside[:, None] & (n < N)[None, :], inside[:, None] & (p < P)[None, :]
            step, decay, total = _log_decays(dt + t * H, A, h, i, H, inside, ACC)
            tl.store(states + ((chunk + k) * H + h) * N * P + place, state.to(DT), mask=cell)
            b = tl.load(B + (t * G + g) * N + key, mask=key_mask, other=0.0).to(DT)
            w = tl.load(x + (t * H + h) * P + row, mask=row_mask, other=0.0).to(ACC) * (step * tl.exp((total - decay).to(ACC)))[:, None]
            state = state * tl.exp(total.to(ACC)) + tl.dot(tl.trans(b), w.to(DT), input_precision=PRECISION, out_dtype=ACC)
    else:
        dstate = tl.load(dfinal + head + place, mask=cell, other=0.0)
        for back in tl.range(0, chunks):
            k = chunks - 1 - back
            t, inside = first + k * BT, k * BT + i < length
            key_mask, row_mask = inside[:, None] & (n < N)[None, :], inside[:, None] & (p < P)[None, :]
            step, decay, total = _log_decays(dt + t * H, A, h, i, H, inside, ACC)
            tl.store(dstates + ((chunk + k) * H + h) * N * P + place, dstate.to(DT), mask=cell)
            c = tl.load(C + (t * G + g) * N + key, mask=key_mask, other=0.0).to(DT)
            dout = tl.load(dy + (t * H + h) * P + row, mask=row_mask, other=0.0).to(ACC) * tl.exp(decay.to(ACC))[:, None]
            dstate = dstate * tl.exp(total.to(ACC)) + tl.dot(tl.trans(c), dout.to(DT), input_precision=PRECISION, out_dtype=ACC)
        tl.store(dstart + head + place, dstate, mask=cell)


@triton.jit
def chunk_gradients(x, dt, A, B, C, dy, states, dstates, dx, ddt, dA, dB, dC, cu, S, T, TOTAL, H, G, HEADS, N: tl.constexpr,
                    P: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr, VARLEN: tl.constexpr,
                    ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Compute every gradient of one chunk; that of A per chunk, those of B and C per HEADS heads. Grid: chunks x blocks of HEADS heads."""
    chunk = tl.program_id(0)
    if VARLEN:
        k = tl.arange(0, BS)
        begins = tl.load(cu + k, mask=k < S, other=0) // BT + k
        s = tl.sum(((begins <= chunk) & (k < S)).to(tl.int32), 0) - 1
    else:
        s = chunk // tl.cdiv(T, BT)
    first, length, first_chunk = _bounds(cu, s, T, VARLEN, BT)
    begin = (chunk - first_chunk).to(tl.int32) * BT
    alive = begin < length  # with packed sequences some places may have no chunk
    i, n = tl.arange(0, BT), tl.arange(0, BN)
    t, inside = first + begin, begin + i < length
    key, key_mask = i[:, None] * (G * N) + n[None, :], inside[:, None] & (n < N)[None, :]
    first_head = tl.program_id(1) * HEADS
    g = first_head // (H // G)
    b = tl.load(B + (t * G + g) * N + key, mask=key_mask, other=0.0).to(DT)
    c = tl.load(C + (t * G + g) * N + key, mask=key_mask, other=0.0).to(DT)
    db, dc = tl.zeros([BT, BN], ACC), tl.zeros([BT, BN], ACC)
    for h in tl.range(first_head, first_head + HEADS):
        step, decay, total = _log_decays(dt + t * H, A, h, i, H, inside, ACC)
        read, written = tl.exp(decay.to(ACC)), tl.exp((total - decay).to(ACC))
        # row j, column i: what token i reads of what token j wrote
        later = _between(-decay, -decay, i[:, None] <= i[None, :], ACC)
        scores = tl.dot(b, tl.trans(c), input_precision=PRECISION, out_dtype=ACC) * later
        into, out_of = tl.zeros([BT, BT], ACC), tl.zeros([BT, BT], ACC)
        for block in tl.range(0, P, BP):
            p = block + tl.arange(0, BP)
            row, row_mask = i[:, None] * (H * P) + p[None, :], inside[:, None] & (p < P)[None, :]
            value = tl.load(x + (t * H + h) * P + row, mask=row_mask, other=0.0).to(DT)
            dout = tl.load(dy + (t * H + h) * P + row, mask=row_mask, other=0.0).to(DT)
            into += tl.dot(value, tl.trans(dout), input_precision=PRECISION, out_dtype=ACC)
            out_of += tl.dot(dout, tl.trans(value), input_precision=PRECISION, out_dtype=ACC)
        into *= step[:, None]
        db += tl.dot((into * later).to(DT), c, input_precision=PRECISION, out_dtype=ACC)
        out_of *= step[None, :] * _between(decay, decay, i[:, None] >= i[None, :], ACC)
        dc += tl.dot(out_of.to(DT), b, input_precision=PRECISION, out_dtype=ACC)
        # the decay of token t applies to what passes it: written before t, read at t or later
        passing = tl.cumsum(tl.where(i[:, None] < i[None, :], into * scores, 0.0), 1, reverse=True)
        dfall = tl.sum(tl.where(i[:, None] < i[None, :], passing, 0.0), 0)
        dstep, dread, dwritten, dkept = tl.zeros([BT], ACC), tl.zeros([BT], ACC), tl.zeros([BT], ACC), tl.zeros([BN], ACC)
        for block in tl.range(0, P, BP):
            p = block + tl.arange(0, BP)
            row, row_mask = i[:, None] * (H * P) + p[None, :], inside[:, None] & (p < P)[None, :]
            cell, place = ((n < N) & alive)[:, None] & (p < P)[None, :], n[:, None] * P + p[None, :]
            value = tl.load(x + (t * H + h) * P + row, mask=row_mask, other=0.0).to(DT)
            dout = tl.load(dy + (t * H + h) * P + row, mask=row_mask, other=0.0).to(DT)
            state = tl.load(states + (chunk.to(tl.int64) * H + h) * N * P + place, mask=cell, other=0.0)
            dstate = tl.load(dstates + (chunk.to(tl.int64) * H + h) * N * P + place, mask=cell, other=0.0)
            dkept += tl.sum(state.to(ACC) * dstate.to(ACC), 1)
            dread += tl.sum(tl.dot(c, state, input_precision=PRECISION, out_dtype=ACC) * dout.to(ACC), 1)
            dw = tl.dot(b, dstate, input_precision=PRECISION, out_dtype=ACC) * written[:, None]
            dwritten += tl.sum(dw * value.to(ACC), 1)
            dw += tl.dot(scores.to(DT), dout, input_precision=PRECISION, out_dtype=ACC)
            dstep += tl.sum(dw * value.to(ACC), 1)
            tl.store(dx + (t * H + h) * P + row, (dw * step[:, None]).to(dx.dtype.element_ty), mask=row_mask)
            db += tl.dot(value, tl.trans(dstate), input_precision=PRECISION, out_dtype=ACC) * (written * step)[:, None]
            dc += tl.dot(dout, tl.trans(state), input_precision=PRECISION, out_dtype=ACC) * read[:, None]
        dfall += tl.sum(tl.where(i[:, None] < i[None, :], (dwritten * step)[:, None], 0.0), 0)
        dfall += tl.cumsum(dread * read, 0, reverse=True) + tl.exp(total.to(ACC)) * tl.sum(dkept, 0)
        dstep += dfall * tl.load(A + h).to(ACC)
        tl.store(ddt + t * H + h + i * H, dstep.to(ddt.dtype.element_ty), mask=inside)
        tl.store(dA + chunk.to(tl.int64) * H + h, tl.sum(dfall * step, 0))
    part = ((first_head % (H // G)) // HEADS).to(tl.int64) * TOTAL * G * N
    tl.store(dB + part + (t * G + g) * N + key, db, mask=key_mask)
    tl.store(dC + part + (t * G + g) * N + key, dc, mask=key_mask)


@triton.jit
def scan_step(x, dt, A, B, C, start, y, final, H, G, N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
              ACC: tl.constexpr):  # fmt: skip
    """Process one token of every sequence. Grid: blocks of P x (sequence, head)."""
    row = tl.program_id(1).to(tl.int64)
    s, h = row // H, row % H
    n, p = tl.arange(0, BN), tl.program_id(0) * BP + tl.arange(0, BP)
    cell, place = (n < N)[:, None] & (p < P)[None, :], row * N * P + n[:, None] * P + p[None, :]
    at = (s * G + h // (H // G)) * N + n
    step = tl.load(dt + row).to(ACC)
    b = tl.load(B + at, mask=n < N, other=0.0).to(ACC)
    c = tl.load(C + at, mask=n < N, other=0.0).to(ACC)
    w = tl.load(x + row * P + p, mask=p < P, other=0.0).to(ACC) * step
    state = tl.load(start + place, mask=cell, other=0.0) * tl.exp(step * tl.load(A + h).to(ACC)) + b[:, None] * w[None, :]
    tl.store(y + row * P + p, tl.sum(state * c[:, None], 0).to(y.dtype.element_ty), mask=p < P)
    tl.store(final + place, state, mask=cell)


def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run the scan. Shapes as in `op.ssd`; state [S, H, N, P] float32 or float64, the dtype of the accumulators."""
    inputs = [value.contiguous() for value in (x, dt, A, B, C, state)]
    y, final = _ssd(*inputs, cu_seqlens)
    return y, final


def _allocate(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(state)


def _forward(
    outputs: tuple[Tensor, ...], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> None:
    T = x.shape[1]
    S, H, N, P = state.shape
    G = B.shape[2]
    if T == 1:
        BN, BP = triton.next_power_of_2(N), min(32, triton.next_power_of_2(P))
        config = configuration("ssd.scan_step", x, {"BP": BP, "num_warps": 4}, N=N, P=P, T=1)
        scan_step[triton.cdiv(P, config["BP"]), S * H](
            x, dt, A, B, C, state, *outputs, H, G, N, P, BN=BN, ACC=DTYPES[state.dtype], **config
        )
        return
    config = _config("scan", x, state, cu_seqlens)
    scan[triton.cdiv(P, config["BP"]), S * H](x, dt, A, B, C, state, *outputs, cu_seqlens, T, H, G, N, P, **config)


def _backward(
    grads: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    dy, dfinal = (torch.zeros_like(y) if grad is None else grad.contiguous() for grad, y in zip(grads, outputs, strict=True))
    batch, T = x.shape[:2]
    S, H, N, P = state.shape
    G = B.shape[2]
    config = _config("chunk_gradients", x, state, cu_seqlens)
    BT = config["BT"]
    chunks = S * triton.cdiv(T, BT) if cu_seqlens is None else T // BT + S
    states, dstates = (x.new_empty(chunks, H, N, P) for _ in range(2))
    dx, ddt, dstate = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(state)
    scans = _config("scan_states", x, state, cu_seqlens) | {"BT": BT}
    scan_states[triton.cdiv(P, scans["BP"]), S * H, 2](
        x, dt, A, B, C, state, dy, dfinal, states, dstates, dstate, cu_seqlens, T, H, G, N, P, **scans
    )
    heads = _heads_per_program(H, G, chunks)
    dA = state.new_empty(chunks, H)
    dB, dC = (state.new_empty(H // G // heads, batch, T, G, N) for _ in range(2))
    chunk_gradients[chunks, H // heads](
        x, dt, A, B, C, dy, states, dstates, dx, ddt, dA, dB, dC, cu_seqlens, S, T, batch * T, H, G, heads, N, P,
        BS=triton.next_power_of_2(S), **config,
    )  # fmt: skip
    return dx, ddt, dA.sum(0).to(A.dtype), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dstate


def _config(kernel: str, x: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """Return the constants of a launch."""
    N, P = state.shape[2:]
    BN = max(16, triton.next_power_of_2(N))
    narrow = x.element_size() == 2
    plain = {
        "scan": {"BT": 64, "BP": 64, "num_warps": 8, "num_stages": 1}
        if narrow and BN <= 128
        else {"BT": 16, "BP": 16, "num_warps": 4, "num_stages": 1},
        "scan_states": {"BP": 64 if narrow and BN <= 128 else 32, "num_warps": 4, "num_stages": 3},
        "chunk_gradients": {"BT": 64 if narrow and BN <= 64 else 32 if narrow else 16, "BP": 32, "num_warps": 8, "num_stages": 1},
    }[kernel]
    plain["BP"] = max(16, min(plain["BP"], triton.next_power_of_2(P)))
    return configuration(f"ssd.{kernel}", x, plain, N=N, P=P) | {
        "BN": BN,
        "VARLEN": cu_seqlens is not None,
        "ACC": DTYPES[state.dtype],
        "DT": DTYPES[x.dtype],
        "PRECISION": "ieee" if x.dtype == torch.float64 else "tf32x3",
    }


def _heads_per_program(H: int, G: int, chunks: int) -> int:
    """Return the number of heads per program that leaves PROGRAMS programs; gradients of B and C are summed over these heads."""
    wanted = max(1, chunks * H // PROGRAMS)
    return max(heads for heads in range(1, H // G + 1) if H // G % heads == 0 and heads <= wanted)


DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}

_ssd = Fused("ssd", allocate=_allocate, forward=_forward, backward=_backward, results=2, differentiable=("x", "dt", "A", "B", "C", "state"))
