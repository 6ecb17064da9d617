"""Kimi Delta Attention in Triton: three launches forward, three backward, one for a single token. README.md has the derivation.

Names in the kernels are those of the gated delta rule: C tokens of a chunk; K, V sizes of a key and a value; BK, BV block sizes;
PK the next power of two of K. ACC is the dtype of sums, DT that of the operands of products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import tuning
from zoo.kernels.fused import Fused
from zoo.kernels.gated_delta_rule.triton import (
    GRAIN,
    SAVE_AT_MOST,
    STRONGEST,
    _by_token,
    _chunk,
    _chunk_length,
    _chunks,
    _common,
    _correction,
    _power,
    _sequence,
    _stride,
)

PLAIN_SCAN = {"BV": 16, "num_warps": 8, "num_stages": 1}


@triton.jit
def _decay(decay, row, ik, mask, K: tl.constexpr, ACC: tl.constexpr):
    """Return the coarse and fine half of the log decays since the chunk's start."""
    at = decay + row[:, None] * (2 * K) + ik[None, :]
    return tl.load(at, mask=mask, other=0.0).to(ACC), tl.load(at + K, mask=mask, other=0.0).to(ACC)


@triton.jit
def _to_boundary(
    decay, coarse, fine, first, length, c, head, i, ik, size, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr
):
    """Return exp of the log decays between each token and the end of the first block of its pair of blocks of `size` tokens."""
    boundary = c * C + i // (2 * size) * (2 * size) + size - 1
    mask = ((c * C + i < length) & (boundary < length))[:, None] & (ik < K)[None, :]
    coarse_b, fine_b = _decay(decay, (first + boundary) * H + head, ik, mask, K, ACC)
    after = (coarse - coarse_b) + (fine - fine_b)
    after = tl.where(((i // size) % 2 == 1)[:, None], after, -after)
    return tl.where(mask, tl.exp(tl.where(mask, after, 0.0)), 0.0)


@triton.jit
def _across(row, column, size):
    """Return whether row and column are in the second and the first block of one pair of blocks of `size` tokens."""
    return (row // size == column // size + 1) & ((row // size) % 2 == 1)


# --- parts of a chunk that depend on no other chunk ----------------------------------------------------------------------------


@triton.jit
def accumulate(
    q, k, g, decay, q_decayed, k_decayed, k_left, cu_seqlens, stride_q, stride_k, T, sequences,
    SEQUENCES: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute log decays since the chunk's start; q and k decayed since then, and k decayed until the chunk's end."""
    head, block = tl.program_id(1), tl.program_id(2)
    first, length, c = _chunk(cu_seqlens, tl.program_id(0), T, sequences, SEQUENCES, C)
    if length == 0:
        return
    i, ik = tl.arange(0, C), block * BK + tl.arange(0, BK)
    t = c * C + i
    row = (first + t) * H + head
    mask = (t < length)[:, None] & (ik < K)[None, :]
    at = row[:, None] * K + ik[None, :]
    log_decay = tl.maximum(tl.load(g + at, mask=mask, other=0.0).to(ACC), STRONGEST)
    # sums of the coarse half are exact, so differences keep the small steps that follow a large one
    coarse = tl.floor(log_decay * GRAIN) / GRAIN
    fine = tl.cumsum(log_decay - coarse, 0)
    coarse = tl.cumsum(coarse, 0)
    halves = decay + row[:, None] * (2 * K) + ik[None, :]
    tl.store(halves, coarse, mask=mask)
    tl.store(halves + K, fine, mask=mask)
    end = (i == C - 1)[:, None]  # past the last token nothing decays
    coarse_end, fine_end = tl.sum(tl.where(end, coarse, 0.0), 0), tl.sum(tl.where(end, fine, 0.0), 0)
    since_start = tl.exp(coarse + fine)
    until_end = tl.exp((coarse_end[None, :] - coarse) + (fine_end[None, :] - fine))
    key = (first + t)[:, None]
    bq = tl.load(q + key * stride_q + head * K + ik[None, :], mask=mask, other=0.0).to(ACC)
    bk = tl.load(k + key * stride_k + head * K + ik[None, :], mask=mask, other=0.0).to(ACC)
    tl.store(q_decayed + at, (bq * since_start).to(q_decayed.dtype.element_ty), mask=mask)
    tl.store(k_decayed + at, (bk * since_start).to(k_decayed.dtype.element_ty), mask=mask)
    tl.store(k_left + at, (bk * until_end).to(k_left.dtype.element_ty), mask=mask)


@triton.jit
def prepare(
    q, k, decay, beta, tau, within, cu_seqlens, stride_q, stride_k, T, sequences,
    SEQUENCES: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the decayed products of queries and keys, and tau = -L (I + diag(beta) L)^-1, L those of keys below the diagonal."""
    head = tl.program_id(1)
    first, length, c = _chunk(cu_seqlens, tl.program_id(0), T, sequences, SEQUENCES, C)
    if length == 0:
        return
    i = tl.arange(0, C)
    t = c * C + i
    inside = t < length
    row = (first + t) * H + head
    b = tl.load(beta + row, mask=inside, other=0.0).to(ACC)
    L, P, own = tl.zeros([C, C], ACC), tl.zeros([C, C], ACC), tl.zeros([C], ACC)
    for j in range(0, K, BK):
        ik = j + tl.arange(0, BK)
        mask = inside[:, None] & (ik < K)[None, :]
        key = head * K + ik[None, :]
        bq = tl.load(q + (first + t)[:, None] * stride_q + key, mask=mask, other=0.0).to(ACC)
        bk = tl.load(k + (first + t)[:, None] * stride_k + key, mask=mask, other=0.0).to(ACC)
        coarse, fine = _decay(decay, row, ik, mask, K, ACC)
        own += tl.sum(bq * bk, 1)
        for level in range(LEVELS):
            size = 1 << level
            e = _to_boundary(decay, coarse, fine, first, length, c, head, i, ik, size, H, K, C, ACC)
            across = _across(i[:, None], i[None, :], size)
            columns = tl.trans(bk * e)
            L += tl.where(across, tl.dot(bk * e, columns, input_precision=PRECISION, out_dtype=ACC), 0.0)
            P += tl.where(across, tl.dot(bq * e, columns, input_precision=PRECISION, out_dtype=ACC), 0.0)
    P = tl.where(i[:, None] == i[None, :], own[:, None], P)
    at = row[:, None] * C + i[None, :]
    tl.store(within + at, P.to(within.dtype.element_ty), mask=inside[:, None])
    tl.store(tau + at, _correction(L, b, i, C, PRECISION, ACC).to(tau.dtype.element_ty), mask=inside[:, None])


# --- from chunk to chunk -------------------------------------------------------------------------------------------------------


@triton.jit
def forward_scan(
    q_decayed, k_decayed, k_left, v, decay, beta, tau, within, state, o, final, states, y, cu_seqlens, stride_v, scale, T,
    SEQUENCES: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry the state through the chunks of a sequence. Writes o and final, states and y, or all four; None is skipped."""
    stream, tile = tl.program_id(0) // tl.cdiv(V, BV), tl.program_id(0) % tl.cdiv(V, BV)
    n, head = stream // H, stream % H
    first, length, first_chunk = _sequence(cu_seqlens, n, T, SEQUENCES, C)
    i, ik, iv = tl.arange(0, C), tl.arange(0, PK), tile * BV + tl.arange(0, BV)
    part = (ik < K)[:, None] & (iv < V)[None, :]
    place = stream.to(tl.int64) * K * V + ik[:, None] * V + iv[None, :]
    S = tl.load(state + place, mask=part, other=0.0).to(ACC)
    for c in range(0, tl.cdiv(length, C)):
        t = c * C + i
        inside = t < length
        row = (first + t) * H + head
        keys, values = inside[:, None] & (ik < K)[None, :], inside[:, None] & (iv < V)[None, :]
        at, square = row[:, None] * K + ik[None, :], row[:, None] * C + i[None, :]
        bk = tl.load(k_decayed + at, mask=keys, other=0.0).to(DT)
        bv = tl.load(v + (first + t)[:, None] * stride_v + head * V + iv[None, :], mask=values, other=0.0)
        bt = tl.load(tau + square, mask=inside[:, None], other=0.0).to(DT)
        b = tl.load(beta + row, mask=inside, other=0.0).to(ACC)
        end = decay + ((first + tl.minimum(c * C + C, length) - 1) * H + head) * (2 * K) + ik
        decay_end = tl.exp(tl.load(end, mask=ik < K, other=0.0).to(ACC) + tl.load(end + K, mask=ik < K, other=0.0).to(ACC))
        Sd = S.to(DT)
        r = bv.to(ACC) - tl.dot(bk, Sd, input_precision=PRECISION, out_dtype=ACC)
        by = r + tl.dot(bt, (b[:, None] * r).to(DT), input_precision=PRECISION, out_dtype=ACC)
        if states is not None:
            chunk = ((first_chunk + c) * H + head) * K * V
            tl.store(states + chunk + ik[:, None] * V + iv[None, :], Sd.to(states.dtype.element_ty), mask=part)
            tl.store(y + row[:, None] * V + iv[None, :], by.to(y.dtype.element_ty), mask=values)
        update = (b[:, None] * by).to(DT)
        if o is not None:
            bq = tl.load(q_decayed + at, mask=keys, other=0.0).to(DT)
            bp = tl.load(within + square, mask=inside[:, None], other=0.0).to(DT)
            bo = tl.dot(bq, Sd, input_precision=PRECISION, out_dtype=ACC)
            bo += tl.dot(bp, update, input_precision=PRECISION, out_dtype=ACC)
            tl.store(o + row[:, None] * V + iv[None, :], (scale * bo).to(o.dtype.element_ty), mask=values)
        left = tl.load(k_left + at, mask=keys, other=0.0).to(DT)
        S = S * decay_end[:, None] + tl.dot(tl.trans(left), update, input_precision=PRECISION, out_dtype=ACC)
    if final is not None:
        tl.store(final + place, S, mask=part)


@triton.jit
def backward_scan(
    q_decayed, k_decayed, k_left, decay, beta, tau, within, do, dfinal, dstates, dr, dstate, cu_seqlens, scale, T,
    SEQUENCES: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry the state's gradient back through the chunks. Writes it after each chunk to dstates, and the gradient of r to dr."""
    stream, tile = tl.program_id(0) // tl.cdiv(V, BV), tl.program_id(0) % tl.cdiv(V, BV)
    n, head = stream // H, stream % H
    first, length, first_chunk = _sequence(cu_seqlens, n, T, SEQUENCES, C)
    i, ik, iv = tl.arange(0, C), tl.arange(0, PK), tile * BV + tl.arange(0, BV)
    part = (ik < K)[:, None] & (iv < V)[None, :]
    place = stream.to(tl.int64) * K * V + ik[:, None] * V + iv[None, :]
    D = tl.zeros([PK, BV], ACC) if dfinal is None else tl.load(dfinal + place, mask=part, other=0.0).to(ACC)
    chunks = tl.cdiv(length, C)
    for back in range(0, chunks):
        c = chunks - 1 - back
        t = c * C + i
        inside = t < length
        row = (first + t) * H + head
        keys, values = inside[:, None] & (ik < K)[None, :], inside[:, None] & (iv < V)[None, :]
        at, square = row[:, None] * K + ik[None, :], row[:, None] * C + i[None, :]
        bd = tl.load(do + row[:, None] * V + iv[None, :], mask=values, other=0.0).to(DT)
        bt = tl.load(tau + square, mask=inside[:, None], other=0.0).to(DT)
        bp = tl.load(within + square, mask=inside[:, None], other=0.0).to(DT)
        b = tl.load(beta + row, mask=inside, other=0.0).to(ACC)
        end = decay + ((first + tl.minimum(c * C + C, length) - 1) * H + head) * (2 * K) + ik
        decay_end = tl.exp(tl.load(end, mask=ik < K, other=0.0).to(ACC) + tl.load(end + K, mask=ik < K, other=0.0).to(ACC))
        Dd = D.to(DT)
        chunk = ((first_chunk + c) * H + head) * K * V
        tl.store(dstates + chunk + ik[:, None] * V + iv[None, :], Dd.to(dstates.dtype.element_ty), mask=part)
        left = tl.load(k_left + at, mask=keys, other=0.0).to(DT)
        du = scale * tl.dot(tl.trans(bp), bd, input_precision=PRECISION, out_dtype=ACC)
        du += tl.dot(left, Dd, input_precision=PRECISION, out_dtype=ACC)
        bdr = du + tl.dot(tl.trans(bt), (b[:, None] * du).to(DT), input_precision=PRECISION, out_dtype=ACC)
        tl.store(dr + row[:, None] * V + iv[None, :], bdr.to(dr.dtype.element_ty), mask=values)
        bq = tl.load(q_decayed + at, mask=keys, other=0.0).to(DT)
        bk = tl.load(k_decayed + at, mask=keys, other=0.0).to(DT)
        D = D * decay_end[:, None] + scale * tl.dot(tl.trans(bq), bd, input_precision=PRECISION, out_dtype=ACC)
        D -= tl.dot(tl.trans(bk), (b[:, None] * bdr).to(DT), input_precision=PRECISION, out_dtype=ACC)
    tl.store(dstate + place, D, mask=part)


# --- gradients, chunk by chunk -------------------------------------------------------------------------------------------------


@triton.jit
def gradients(
    q, k, decay, beta, states, y, do, dstates, dr, dq, dk, dv, dg, dbeta, cu_seqlens, stride_q, stride_k, scale, T, sequences,
    SEQUENCES: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk, dg of a block of keys, and, in the programs of the first block, dv and dbeta."""
    head, block = tl.program_id(1), tl.program_id(2)
    first, length, c = _chunk(cu_seqlens, tl.program_id(0), T, sequences, SEQUENCES, C)
    if length == 0:
        return
    i, ik = tl.arange(0, C), block * BK + tl.arange(0, BK)
    t = c * C + i
    inside = t < length
    row = (first + t) * H + head
    keys = inside[:, None] & (ik < K)[None, :]
    b = tl.load(beta + row, mask=inside, other=0.0).to(ACC)
    bq = tl.load(q + (first + t)[:, None] * stride_q + head * K + ik[None, :], mask=keys, other=0.0).to(ACC)
    bk = tl.load(k + (first + t)[:, None] * stride_k + head * K + ik[None, :], mask=keys, other=0.0).to(ACC)
    coarse, fine = _decay(decay, row, ik, keys, K, ACC)
    last = tl.minimum(c * C + C, length) - 1
    end = decay + ((first + last) * H + head) * (2 * K) + ik
    coarse_end, fine_end = tl.load(end, mask=ik < K, other=0.0).to(ACC), tl.load(end + K, mask=ik < K, other=0.0).to(ACC)
    since_start = tl.exp(coarse + fine)
    until_end = tl.where(keys, tl.exp((coarse_end[None, :] - coarse) + (fine_end[None, :] - fine)), 0.0)
    chunk = (tl.program_id(0).to(tl.int64) * H + head) * K * V

    # through the state, and gradients of the products of queries and keys (P) and of keys (F); transposes are computed as separate
    # products, since compilers get transposes of products wrong
    read, predicted, written = tl.zeros([C, BK], ACC), tl.zeros([C, BK], ACC), tl.zeros([C, BK], ACC)
    P, PT, F, FT = tl.zeros([C, C], ACC), tl.zeros([C, C], ACC), tl.zeros([C, C], ACC), tl.zeros([C, C], ACC)
    bdbeta, kept = tl.zeros([C], ACC), tl.zeros([BK], ACC)
    for j in range(0, V, BV):
        iv = j + tl.arange(0, BV)
        values, part = inside[:, None] & (iv < V)[None, :], (ik < K)[:, None] & (iv < V)[None, :]
        at = row[:, None] * V + iv[None, :]
        bd = tl.load(do + at, mask=values, other=0.0).to(DT)
        by = tl.load(y + at, mask=values, other=0.0).to(DT)
        exact = tl.load(dr + at, mask=values, other=0.0).to(ACC)
        br = exact.to(DT)
        S = tl.load(states + chunk + ik[:, None] * V + iv[None, :], mask=part, other=0.0).to(DT)
        D = tl.load(dstates + chunk + ik[:, None] * V + iv[None, :], mask=part, other=0.0).to(DT)
        if block == 0:
            tl.store(dv + at, (exact * b[:, None]).to(dv.dtype.element_ty), mask=values)
        bdbeta += tl.sum(exact * by.to(ACC), 1)
        kept += tl.sum(S.to(ACC) * D.to(ACC), 1)
        read += tl.dot(bd, tl.trans(S), input_precision=PRECISION, out_dtype=ACC)
        predicted += tl.dot(br, tl.trans(S), input_precision=PRECISION, out_dtype=ACC)
        written += tl.dot(by, tl.trans(D), input_precision=PRECISION, out_dtype=ACC)
        P += tl.dot(bd, tl.trans(by), input_precision=PRECISION, out_dtype=ACC)
        PT += tl.dot(by, tl.trans(bd), input_precision=PRECISION, out_dtype=ACC)
        F += tl.dot(br, tl.trans(by), input_precision=PRECISION, out_dtype=ACC)
        FT += tl.dot(by, tl.trans(br), input_precision=PRECISION, out_dtype=ACC)
    if block == 0:
        tl.store(dbeta + row, bdbeta, mask=inside)
    bdq = scale * since_start * read
    predicted = -b[:, None] * since_start * predicted
    written = b[:, None] * until_end * written
    bdk = predicted + written
    bdg = bdq * bq + (predicted - written) * bk
    at_end = tl.sum(written * bk, 0) + tl.exp(coarse_end + fine_end) * kept
    own = tl.sum(tl.where(i[:, None] == i[None, :], P, 0.0), 1) * (scale * b)  # a token's own write, which nothing decays
    P, PT = scale * P * b[None, :], scale * PT * b[:, None]
    F, FT = -F * b[:, None] * b[None, :], -FT * b[:, None] * b[None, :]
    for level in range(LEVELS):
        size = 1 << level
        e = _to_boundary(decay, coarse, fine, first, length, c, head, i, ik, size, H, K, C, ACC)
        rows, columns = _across(i[:, None], i[None, :], size), _across(i[None, :], i[:, None], size)
        qe, ke = (bq * e).to(DT), (bk * e).to(DT)
        x = e * tl.dot(tl.where(rows, P, 0.0).to(DT), ke, input_precision=PRECISION, out_dtype=ACC)
        bdq += x
        bdg += x * bq
        x = e * tl.dot(tl.where(rows, F, 0.0).to(DT), ke, input_precision=PRECISION, out_dtype=ACC)
        bdk += x
        bdg += x * bk
        x = tl.dot(tl.where(columns, PT, 0.0).to(DT), qe, input_precision=PRECISION, out_dtype=ACC)
        x = e * (x + tl.dot(tl.where(columns, FT, 0.0).to(DT), ke, input_precision=PRECISION, out_dtype=ACC))
        bdk += x
        bdg -= x * bk
    at = row[:, None] * K + ik[None, :]
    tl.store(dq + at, (bdq + own[:, None] * bk).to(dq.dtype.element_ty), mask=keys)
    tl.store(dk + at, (bdk + own[:, None] * bq).to(dk.dtype.element_ty), mask=keys)
    bdg = tl.where(inside[:, None], bdg, 0.0) + tl.where((t == last)[:, None], at_end[None, :], 0.0)
    tl.store(dg + at, tl.cumsum(bdg, 0, reverse=True), mask=keys)


# --- one token -----------------------------------------------------------------------------------------------------------------


@triton.jit
def step(
    q, k, v, g, beta, state, o, final, stride_q, stride_k, stride_v, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Run the recurrence for one token of every stream."""
    stream, tile = tl.program_id(0) // tl.cdiv(V, BV), tl.program_id(0) % tl.cdiv(V, BV)
    n, head = (stream // H).to(tl.int64), stream % H
    ik, iv = tl.arange(0, PK), tile * BV + tl.arange(0, BV)
    part = (ik < K)[:, None] & (iv < V)[None, :]
    place = stream.to(tl.int64) * K * V + ik[:, None] * V + iv[None, :]
    bq = tl.load(q + n * stride_q + head * K + ik, mask=ik < K, other=0.0).to(ACC)
    bk = tl.load(k + n * stride_k + head * K + ik, mask=ik < K, other=0.0).to(ACC)
    bv = tl.load(v + n * stride_v + head * V + iv, mask=iv < V, other=0.0).to(ACC)
    decay = tl.exp(tl.load(g + stream.to(tl.int64) * K + ik, mask=ik < K, other=0.0).to(ACC))
    b = tl.load(beta + stream).to(ACC)
    S = tl.load(state + place, mask=part, other=0.0).to(ACC) * decay[:, None]
    S += bk[:, None] * (b * (bv - tl.sum(S * bk[:, None], 0)))[None, :]
    bo = scale * tl.sum(S * bq[:, None], 0)
    tl.store(o + stream.to(tl.int64) * V + iv, bo.to(o.dtype.element_ty), mask=iv < V)
    tl.store(final + place, S, mask=part)


# --- launches ------------------------------------------------------------------------------------------------------------------


def run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k = q.to(v.dtype), k.to(v.dtype)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta, state))
    if v.shape[1] == 1 and cu_seqlens is None and (not differentiable or tuning.forces("kda.step")):
        return one_token(q, k, v, g, beta, state, scale)
    states = _chunks(v, cu_seqlens, _chunk_length(q)) * state[0].numel() * v.element_size()
    o, final = whole(q, k, v, g, beta, state, cu_seqlens, scale, differentiable and states <= SAVE_AT_MOST)
    return o, final


def allocate(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, cu_seqlens: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, ...]:
    """Allocate o and the final state; tau and the products of queries and keys; and, if kept, the state before each chunk and y."""
    C = _chunk_length(q)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    tau, within = v.new_empty(*v.shape[:3], C), v.new_empty(*v.shape[:3], C)
    states = v.new_empty(_chunks(v, cu_seqlens, C) if keep else 0, *state.shape[1:])
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
    (q, k, v), (g, beta, state) = (_by_token(x) for x in (q, k, v)), (x.contiguous() for x in (g, beta, state))
    H, K = q.shape[2:]
    common = _common(v, state, cu_seqlens)
    decayed = _decayed(q, k, v, g, state, cu_seqlens, C)
    config = tuning.configuration("kda.prepare", v, {"BK": 32, "num_warps": 8, "num_stages": 1}, K=K, V=v.shape[3])
    shared = {name: common[name] for name in ("SEQUENCES", "ACC", "PRECISION")}
    prepare[(_chunks(v, cu_seqlens, C), H)](
        q, k, decayed[0], beta, tau, within, cu_seqlens, _stride(q), _stride(k), v.shape[1], len(state), H=H, K=K, C=C,
        LEVELS=C.bit_length() - 1, **shared, **config,
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
    (q, k, v), (g, beta, state) = (_by_token(x) for x in (q, k, v)), (x.contiguous() for x in (g, beta, state))
    T, H, K = q.shape[1:]
    V = v.shape[3]
    common, S, chunks = _common(v, state, cu_seqlens), len(state), _chunks(v, cu_seqlens, C)
    decayed = _decayed(q, k, v, g, state, cu_seqlens, C)
    dr, dstate, dstates = state.new_empty(v.shape), torch.empty_like(state), v.new_empty(chunks, *state.shape[1:])
    if not keep:
        states, y = torch.empty_like(dstates), torch.empty_like(outputs[0])
        _scan(decayed, v, beta, tau, within, state, cu_seqlens, scale, (None, None), (states, y))
    decay, *operands = decayed
    config = tuning.configuration("kda.backward_scan", v, PLAIN_SCAN, K=K, V=V)
    backward_scan[(triton.cdiv(V, config["BV"]) * S * H,)](
        *operands, decay, beta, tau, within, do, dfinal, dstates, dr, dstate, cu_seqlens, scale, T, H=H, K=K, V=V, PK=_power(K), C=C,
        **common, **config,
    )  # fmt: skip
    config = tuning.configuration("kda.gradients", v, {"BK": 32, "BV": 32, "num_warps": 8, "num_stages": 1}, K=K, V=V)
    dq, dk, dg = q.new_empty(q.shape), k.new_empty(k.shape), state.new_empty(q.shape)
    dv, dbeta = torch.empty_like(y), state.new_empty(beta.shape)
    gradients[(chunks, H, triton.cdiv(K, config["BK"]))](
        q, k, decay, beta, states, y, do, dstates, dr, dq, dk, dv, dg, dbeta, cu_seqlens, _stride(q), _stride(k), scale, T, S,
        H=H, K=K, V=V, C=C, LEVELS=C.bit_length() - 1, **common, **config,
    )  # fmt: skip
    return dq, dk, dv, dg.to(g.dtype), dbeta.to(beta.dtype), dstate


def _decayed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, cu_seqlens: Tensor | None, C: int) -> list[Tensor]:
    """Return the log decays since the chunk's start in two halves, and q, k decayed since then, k decayed until the chunk's end."""
    H, K = q.shape[2:]
    common = _common(v, state, cu_seqlens)
    decayed = [state.new_empty(*g.shape[:3], 2, K), *(v.new_empty(g.shape) for _ in range(3))]
    config = tuning.configuration("kda.accumulate", v, {"BK": 32, "num_warps": 4, "num_stages": 1}, K=K, V=v.shape[3])
    accumulate[(_chunks(v, cu_seqlens, C), H, triton.cdiv(K, config["BK"]))](
        q, k, g, *decayed, cu_seqlens, _stride(q), _stride(k), q.shape[1], len(state), SEQUENCES=common["SEQUENCES"], H=H, K=K, C=C,
        ACC=common["ACC"], **config,
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
        *operands, v, decay, beta, tau, within, state, *results, *kept, cu_seqlens, _stride(v), scale, v.shape[1],
        H=H, K=K, V=V, PK=_power(K), C=tau.shape[-1], **_common(v, state, cu_seqlens), **config,
    )  # fmt: skip


whole = Fused("kda", allocate=allocate, forward=forward, backward=backward, results=2, differentiable=("q", "k", "v", "g", "beta", "state"))


def one_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (q, k, v), (g, beta, state) = (_by_token(x) for x in (q, k, v)), (x.contiguous() for x in (g, beta, state))
    S, H, K, V = state.shape
    o, final = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(state)
    config = tuning.configuration("kda.step", v, {"BV": 16, "num_warps": 4, "num_stages": 1}, K=K, V=V, T=1)
    ACC = tl.float64 if state.dtype == torch.float64 else tl.float32
    step[(triton.cdiv(V, config["BV"]) * S * H,)](
        q, k, v, g, beta, state, o, final, _stride(q), _stride(k), _stride(v), scale, H=H, K=K, V=V, PK=_power(K), ACC=ACC, **config
    )  # fmt: skip
    return o, final
