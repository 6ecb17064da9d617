"""The gated delta rule in Triton: two launches forward, two backward, one for a single token. README.md has the derivation.

Names in the kernels: C tokens of a chunk; K, V sizes of a key and a value; BK, BV block sizes of K and V; PK the next power
of two of K. ACC is the dtype of sums, DT that of the operands of products, PRECISION the precision of float32 products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import tuning
from zoo.kernels.fused import Fused
from zoo.kernels.gated_delta_rule import shared
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


@triton.jit
def _decay(decay, row, mask, ACC: tl.constexpr):
    """Return the coarse and fine half of the log decay since the chunk's start."""
    coarse = tl.load(decay + 2 * row, mask=mask, other=0.0).to(ACC)
    return coarse, tl.load(decay + 2 * row + 1, mask=mask, other=0.0).to(ACC)


@triton.jit
def _between(coarse, fine, mask):
    """Return exp of the log decay from column to row where `mask` is set, else 0."""
    after = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    return tl.where(mask, tl.exp(tl.where(mask, after, 0.0)), 0.0)


@triton.jit
def _between_columns(coarse, fine, mask):
    """Return the transpose of `_between`: from row to column."""
    after = (coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None])
    return tl.where(mask, tl.exp(tl.where(mask, after, 0.0)), 0.0)


# --- parts of a chunk that depend on no other chunk ----------------------------------------------------------------------------


@triton.jit
def prepare(
    k, g, beta, decay, tau, cu_seqlens, stride_k, T, sequences,
    SEQUENCES: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute log decays since the chunk's start and tau = -L (I + diag(beta) L)^-1, L the decayed key products below the diagonal."""
    head = tl.program_id(1)
    first, length, c = shared.chunk(cu_seqlens, tl.program_id(0), T, sequences, SEQUENCES, C)
    if length == 0:
        return
    i = tl.arange(0, C)
    t = c * C + i
    inside = t < length
    row = (first + t) * HV + head
    b = tl.load(beta + row, mask=inside, other=0.0).to(ACC)
    coarse, fine = shared.accumulated(tl.load(g + row, mask=inside, other=0.0).to(ACC))
    tl.store(decay + 2 * row, coarse, mask=inside)
    tl.store(decay + 2 * row + 1, fine, mask=inside)
    L = tl.zeros([C, C], ACC)
    for j in range(0, K, BK):
        column = j + tl.arange(0, BK)
        bk = tl.load(
            k + (first + t)[:, None] * stride_k + (head // (HV // H)) * K + column[None, :],
            mask=inside[:, None] & (column < K)[None, :],
            other=0.0,
        )
        L += tl.dot(bk, tl.trans(bk), input_precision=PRECISION, out_dtype=ACC)
    L *= _between(coarse, fine, (i[:, None] > i[None, :]) & inside[:, None])
    x = shared.correction(L, b, i, C, PRECISION, ACC)
    tl.store(tau + row[:, None] * C + i[None, :], x.to(tau.dtype.element_ty), mask=inside[:, None])


# --- from chunk to chunk -------------------------------------------------------------------------------------------------------


@triton.jit
def _scan(
    q, k, v, decay, beta, tau, state, o, final, states, y, cu_seqlens, stride_q, stride_k, stride_v, scale, T,
    SEQUENCES: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry the state through the chunks of a sequence. Writes o and final, states and y, or all four; None is skipped."""
    stream, tile = tl.program_id(0) // tl.cdiv(V, BV), tl.program_id(0) % tl.cdiv(V, BV)
    n, head = stream // HV, stream % HV
    first, length, first_chunk = shared.sequence(cu_seqlens, n, T, SEQUENCES, C)
    i, ik, iv = tl.arange(0, C), tl.arange(0, PK), tile * BV + tl.arange(0, BV)
    part = (ik < K)[:, None] & (iv < V)[None, :]
    place = stream.to(tl.int64) * K * V + ik[:, None] * V + iv[None, :]
    S = tl.load(state + place, mask=part, other=0.0).to(ACC)
    for c in range(0, tl.cdiv(length, C)):
        t = c * C + i
        inside = t < length
        row = (first + t) * HV + head
        keys, values = inside[:, None] & (ik < K)[None, :], inside[:, None] & (iv < V)[None, :]
        key = (head // (HV // H)) * K + ik
        bk = tl.load(k + (first + t)[:, None] * stride_k + key[None, :], mask=keys, other=0.0).to(DT)
        bv = tl.load(v + (first + t)[:, None] * stride_v + head * V + iv[None, :], mask=values, other=0.0)
        bt = tl.load(tau + row[:, None] * C + i[None, :], mask=inside[:, None], other=0.0).to(DT)
        coarse, fine = _decay(decay, row, inside, ACC)
        b = tl.load(beta + row, mask=inside, other=0.0).to(ACC)
        last = (first + tl.minimum(c * C + C, length) - 1) * HV + head
        coarse_end, fine_end = tl.load(decay + 2 * last).to(ACC), tl.load(decay + 2 * last + 1).to(ACC)
        since_start = tl.exp(coarse + fine)
        Sd = S.to(DT)
        r = bv.to(ACC) - since_start[:, None] * tl.dot(bk, Sd, input_precision=PRECISION, out_dtype=ACC)
        by = r + tl.dot(bt, (b[:, None] * r).to(DT), input_precision=PRECISION, out_dtype=ACC)
        if states is not None:
            chunk = ((first_chunk + c) * HV + head) * K * V
            tl.store(states + chunk + ik[:, None] * V + iv[None, :], Sd.to(states.dtype.element_ty), mask=part)
            tl.store(y + row[:, None] * V + iv[None, :], by.to(y.dtype.element_ty), mask=values)
        update = b[:, None] * by
        if o is not None:
            bq = tl.load(q + (first + t)[:, None] * stride_q + key[None, :], mask=keys, other=0.0).to(DT)
            P = tl.dot(bq, tl.trans(bk), input_precision=PRECISION, out_dtype=ACC)
            P *= _between(coarse, fine, (i[:, None] >= i[None, :]) & inside[:, None])
            bo = since_start[:, None] * tl.dot(bq, Sd, input_precision=PRECISION, out_dtype=ACC)
            bo += tl.dot(P.to(DT), update.to(DT), input_precision=PRECISION, out_dtype=ACC)
            tl.store(o + row[:, None] * V + iv[None, :], (scale * bo).to(o.dtype.element_ty), mask=values)
        until_end = tl.where(inside, tl.exp((coarse_end - coarse) + (fine_end - fine)), 0.0)
        written = tl.dot(tl.trans(bk), (until_end[:, None] * update).to(DT), input_precision=PRECISION, out_dtype=ACC)
        S = S * tl.exp(coarse_end + fine_end) + written
    if final is not None:
        tl.store(final + place, S, mask=part)


@triton.jit
def _scan_back(
    q, k, decay, beta, tau, do, dfinal, dstates, dr, dstate, cu_seqlens, stride_q, stride_k, scale, T,
    SEQUENCES: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry the state's gradient back through the chunks. Writes it after each chunk to dstates, and the gradient of r to dr."""
    stream, tile = tl.program_id(0) // tl.cdiv(V, BV), tl.program_id(0) % tl.cdiv(V, BV)
    n, head = stream // HV, stream % HV
    first, length, first_chunk = shared.sequence(cu_seqlens, n, T, SEQUENCES, C)
    i, ik, iv = tl.arange(0, C), tl.arange(0, PK), tile * BV + tl.arange(0, BV)
    part = (ik < K)[:, None] & (iv < V)[None, :]
    place = stream.to(tl.int64) * K * V + ik[:, None] * V + iv[None, :]
    D = tl.zeros([PK, BV], ACC) if dfinal is None else tl.load(dfinal + place, mask=part, other=0.0).to(ACC)
    chunks = tl.cdiv(length, C)
    for back in range(0, chunks):
        c = chunks - 1 - back
        t = c * C + i
        inside = t < length
        row = (first + t) * HV + head
        keys, values = inside[:, None] & (ik < K)[None, :], inside[:, None] & (iv < V)[None, :]
        key = (head // (HV // H)) * K + ik
        bk = tl.load(k + (first + t)[:, None] * stride_k + key[None, :], mask=keys, other=0.0).to(DT)
        bq = tl.load(q + (first + t)[:, None] * stride_q + key[None, :], mask=keys, other=0.0).to(DT)
        bd = tl.load(do + row[:, None] * V + iv[None, :], mask=values, other=0.0).to(DT)
        bt = tl.load(tau + row[:, None] * C + i[None, :], mask=inside[:, None], other=0.0).to(DT)
        coarse, fine = _decay(decay, row, inside, ACC)
        b = tl.load(beta + row, mask=inside, other=0.0).to(ACC)
        last = (first + tl.minimum(c * C + C, length) - 1) * HV + head
        coarse_end, fine_end = tl.load(decay + 2 * last).to(ACC), tl.load(decay + 2 * last + 1).to(ACC)
        since_start = tl.exp(coarse + fine)
        until_end = tl.where(inside, tl.exp((coarse_end - coarse) + (fine_end - fine)), 0.0)
        Dd = D.to(DT)
        chunk = ((first_chunk + c) * HV + head) * K * V
        tl.store(dstates + chunk + ik[:, None] * V + iv[None, :], Dd.to(dstates.dtype.element_ty), mask=part)
        PT = tl.dot(bk, tl.trans(bq), input_precision=PRECISION, out_dtype=ACC)
        PT *= _between_columns(coarse, fine, (i[:, None] <= i[None, :]) & inside[None, :])
        du = scale * tl.dot(PT.to(DT), bd, input_precision=PRECISION, out_dtype=ACC)
        du += until_end[:, None] * tl.dot(bk, Dd, input_precision=PRECISION, out_dtype=ACC)
        bdr = du + tl.dot(tl.trans(bt), (b[:, None] * du).to(DT), input_precision=PRECISION, out_dtype=ACC)
        tl.store(dr + row[:, None] * V + iv[None, :], bdr.to(dr.dtype.element_ty), mask=values)
        read = bd.to(ACC) * (scale * since_start)[:, None]
        predicted = (bdr * (-b * since_start)[:, None]).to(DT)
        D = D * tl.exp(coarse_end + fine_end)
        D += tl.dot(tl.trans(bq), read.to(DT), input_precision=PRECISION, out_dtype=ACC)
        if DT.primitive_bitwidth == 16:  # most of the gradient of a state comes from here: add the rounding error, too
            D += tl.dot(tl.trans(bq), (read - read.to(DT).to(ACC)).to(DT), input_precision=PRECISION, out_dtype=ACC)
        D += tl.dot(tl.trans(bk), predicted, input_precision=PRECISION, out_dtype=ACC)
    tl.store(dstate + place, D, mask=part)


@triton.jit
def forward_scan(
    q, k, v, decay, beta, tau, state, o, final, states, y, cu_seqlens, stride_q, stride_k, stride_v, scale, T,
    SEQUENCES: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _scan(
        q, k, v, decay, beta, tau, state, o, final, states, y, cu_seqlens, stride_q, stride_k, stride_v, scale, T,
        SEQUENCES, H, HV, K, V, PK, BV, C, ACC, DT, PRECISION,
    )  # fmt: skip


@triton.jit
def backward_scan(
    q, k, decay, beta, tau, do, dfinal, dstates, dr, dstate, cu_seqlens, stride_q, stride_k, scale, T,
    SEQUENCES: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _scan_back(
        q, k, decay, beta, tau, do, dfinal, dstates, dr, dstate, cu_seqlens, stride_q, stride_k, scale, T,
        SEQUENCES, H, HV, K, V, PK, BV, C, ACC, DT, PRECISION,
    )  # fmt: skip


@triton.jit
def both_scans(
    q, k, v, decay, beta, tau, state, states, y, do, dfinal, dstates, dr, dstate, cu_seqlens, stride_q, stride_k, stride_v, scale, T,
    SEQUENCES: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scan the gradient backwards and, in separate programs, recompute the states that the forward pass did not keep."""
    if tl.program_id(1) == 0:
        _scan_back(
            q, k, decay, beta, tau, do, dfinal, dstates, dr, dstate, cu_seqlens, stride_q, stride_k, scale, T,
            SEQUENCES, H, HV, K, V, PK, BV, C, ACC, DT, PRECISION,
        )  # fmt: skip
    else:
        _scan(
            q, k, v, decay, beta, tau, state, None, None, states, y, cu_seqlens, stride_q, stride_k, stride_v, scale, T,
            SEQUENCES, H, HV, K, V, PK, BV, C, ACC, DT, PRECISION,
        )  # fmt: skip


# --- gradients, chunk by chunk -------------------------------------------------------------------------------------------------


@triton.jit
def gradients(
    q, k, decay, beta, states, y, do, dstates, dr, dq, dk, dv, dg, dbeta, cu_seqlens, stride_q, stride_k, scale, T, sequences, rows,
    SEQUENCES: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, ACC: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk of every value head, dv, dbeta, and the part of dg from this block of keys: [K / BK, tokens, HV].

    dg comes from products of q and k with the parts of their gradients that a decay multiplies. The shorter q.dq - v.dv is equal,
    but a difference of large sums under strong decay.
    """
    head, block = tl.program_id(1), tl.program_id(2)
    first, length, c = shared.chunk(cu_seqlens, tl.program_id(0), T, sequences, SEQUENCES, C)
    if length == 0:
        return
    i, ik = tl.arange(0, C), block * BK + tl.arange(0, BK)
    t = c * C + i
    inside = t < length
    row = (first + t) * HV + head
    last = tl.minimum(c * C + C, length) - 1
    coarse, fine = _decay(decay, row, inside, ACC)
    end = (first + last) * HV + head
    coarse_end, fine_end = tl.load(decay + 2 * end).to(ACC), tl.load(decay + 2 * end + 1).to(ACC)
    b = tl.load(beta + row, mask=inside, other=0.0).to(ACC)
    since_start = tl.where(inside, tl.exp(coarse + fine), 0.0)
    until_end = tl.where(inside, tl.exp((coarse_end - coarse) + (fine_end - fine)), 0.0)
    keys = inside[:, None] & (ik < K)[None, :]
    key = (head // (HV // H)) * K + ik
    bk = tl.load(k + (first + t)[:, None] * stride_k + key[None, :], mask=keys, other=0.0).to(DT)
    chunk = (tl.program_id(0).to(tl.int64) * HV + head) * K * V

    # through the state
    bdq, bdk = tl.zeros([C, BK], ACC), tl.zeros([C, BK], ACC)
    bdbeta, from_start, to_end, kept = tl.zeros([C], ACC), tl.zeros([C], ACC), tl.zeros([C], ACC), tl.zeros([BK], ACC)
    for j in range(0, V, BV):
        iv = j + tl.arange(0, BV)
        values, part = inside[:, None] & (iv < V)[None, :], (ik < K)[:, None] & (iv < V)[None, :]
        at = row[:, None] * V + iv[None, :]
        bd = tl.load(do + at, mask=values, other=0.0).to(DT)
        by = tl.load(y + at, mask=values, other=0.0).to(DT)
        wide = tl.load(dr + at, mask=values, other=0.0).to(ACC)
        br = wide.to(DT)
        S = tl.load(states + chunk + ik[:, None] * V + iv[None, :], mask=part, other=0.0).to(DT)
        D = tl.load(dstates + chunk + ik[:, None] * V + iv[None, :], mask=part, other=0.0).to(DT)
        if block == 0:
            tl.store(dv + at, (wide * b[:, None]).to(dv.dtype.element_ty), mask=values)
        bdbeta += tl.sum(wide * by.to(ACC), 1)
        kept += tl.sum(S.to(ACC) * D.to(ACC), 1)
        written = tl.dot(by, tl.trans(D), input_precision=PRECISION, out_dtype=ACC) * (until_end * b)[:, None]
        to_end += tl.sum(written * bk.to(ACC), 1)
        predicted = tl.dot(br, tl.trans(S), input_precision=PRECISION, out_dtype=ACC) * (-b * since_start)[:, None]
        from_start += tl.sum(predicted * bk.to(ACC), 1)
        bdk += written + predicted
        bdq += tl.dot(bd, tl.trans(S), input_precision=PRECISION, out_dtype=ACC)
    bdq *= (scale * since_start)[:, None]

    # within the chunk; transposes are computed as separate products, since compilers get transposes of products wrong
    P, PT, F, FT = tl.zeros([C, C], ACC), tl.zeros([C, C], ACC), tl.zeros([C, C], ACC), tl.zeros([C, C], ACC)
    for j in range(0, V, BV):
        iv = j + tl.arange(0, BV)
        values = inside[:, None] & (iv < V)[None, :]
        at = row[:, None] * V + iv[None, :]
        bd = tl.load(do + at, mask=values, other=0.0).to(DT)
        by = tl.load(y + at, mask=values, other=0.0).to(DT)
        br = tl.load(dr + at, mask=values, other=0.0).to(DT)
        P += tl.dot(bd, tl.trans(by), input_precision=PRECISION, out_dtype=ACC)
        PT += tl.dot(by, tl.trans(bd), input_precision=PRECISION, out_dtype=ACC)
        F += tl.dot(br, tl.trans(by), input_precision=PRECISION, out_dtype=ACC)
        FT += tl.dot(by, tl.trans(br), input_precision=PRECISION, out_dtype=ACC)
    below = _between(coarse, fine, (i[:, None] > i[None, :]) & inside[:, None])
    above = _between_columns(coarse, fine, (i[:, None] < i[None, :]) & inside[None, :])
    own = tl.sum(tl.where(i[:, None] == i[None, :], P, 0.0), 1) * (scale * b)  # a token's own write, which nothing decays
    bdg = from_start - to_end
    x = tl.dot((-F * below * b[:, None] * b[None, :]).to(DT), bk, input_precision=PRECISION, out_dtype=ACC)
    bdg += tl.sum(x * bk.to(ACC), 1)
    bdk += x
    x = tl.dot((-FT * above * b[:, None] * b[None, :]).to(DT), bk, input_precision=PRECISION, out_dtype=ACC)
    bdg -= tl.sum(x * bk.to(ACC), 1)
    bdk += x
    bq = tl.load(q + (first + t)[:, None] * stride_q + key[None, :], mask=keys, other=0.0).to(DT)
    x = tl.dot((PT * above * (scale * b)[:, None]).to(DT), bq, input_precision=PRECISION, out_dtype=ACC)
    bdg -= tl.sum(x * bk.to(ACC), 1)
    bdk += x + own[:, None] * bq.to(ACC)
    at = row[:, None] * K + ik[None, :]
    tl.store(dk + at, bdk.to(dk.dtype.element_ty), mask=keys)
    bdq += tl.dot((P * below * (scale * b)[None, :]).to(DT), bk, input_precision=PRECISION, out_dtype=ACC)
    bdg += tl.sum(bdq * bq.to(ACC), 1)
    bdq += own[:, None] * bk.to(ACC)
    tl.store(dq + at, bdq.to(dq.dtype.element_ty), mask=keys)
    at_end = tl.sum(to_end, 0) + tl.exp(coarse_end + fine_end) * tl.sum(kept, 0)
    bdg = tl.where(inside, bdg, 0.0) + tl.where(t == last, at_end, 0.0)
    tl.store(dg + block.to(tl.int64) * rows + row, tl.cumsum(bdg, 0, reverse=True), mask=inside)
    if block == 0:
        tl.store(dbeta + row, bdbeta, mask=inside)


# --- one token -----------------------------------------------------------------------------------------------------------------


@triton.jit
def step(
    q, k, v, g, beta, state, o, final, stride_q, stride_k, stride_v, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Run the recurrence for one token of every stream."""
    stream, tile = tl.program_id(0) // tl.cdiv(V, BV), tl.program_id(0) % tl.cdiv(V, BV)
    n, head = stream // HV, stream % HV
    ik, iv = tl.arange(0, PK), tile * BV + tl.arange(0, BV)
    part = (ik < K)[:, None] & (iv < V)[None, :]
    place = stream.to(tl.int64) * K * V + ik[:, None] * V + iv[None, :]
    key = (head // (HV // H)) * K + ik
    bq = tl.load(q + n.to(tl.int64) * stride_q + key, mask=ik < K, other=0.0).to(ACC)
    bk = tl.load(k + n.to(tl.int64) * stride_k + key, mask=ik < K, other=0.0).to(ACC)
    bv = tl.load(v + n.to(tl.int64) * stride_v + head * V + iv, mask=iv < V, other=0.0).to(ACC)
    b = tl.load(beta + stream).to(ACC)
    S = tl.load(state + place, mask=part, other=0.0).to(ACC) * tl.exp(tl.load(g + stream).to(ACC))
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
    if v.shape[1] == 1 and cu_seqlens is None and (not differentiable or tuning.forces("gated_delta_rule.step")):
        return one_token(q, k, v, g, beta, state, scale)
    states = number_of_chunks(v, cu_seqlens, chunk_length(q)) * state[0].numel() * v.element_size()
    keep = differentiable and states <= SAVE_AT_MOST and not tuning.forces("gated_delta_rule.both_scans")
    o, final = whole(q, k, v, g, beta, state, cu_seqlens, scale, keep)
    return o, final


def allocate(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, cu_seqlens: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, ...]:
    """Allocate o and the final state; decays and tau; and, if kept, the state before each chunk and y."""
    C = chunk_length(q)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    tau = v.new_empty(*v.shape[:3], C)
    decay = state.new_empty(*v.shape[:3], 2)
    states = v.new_empty(number_of_chunks(v, cu_seqlens, C) if keep else 0, *state.shape[1:])
    y = torch.empty_like(o) if keep else v.new_empty(0)
    return o, torch.empty_like(state, memory_format=torch.contiguous_format), decay, tau, states, y


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
    o, final, decay, tau, states, y = outputs
    C = tau.shape[-1]
    (q, k, v), (g, beta, state) = (by_token(x) for x in (q, k, v)), (x.contiguous() for x in (g, beta, state))
    T, H, K = q.shape[1:]
    HV, V = v.shape[2:]
    options, S = launch_options(v, state, cu_seqlens), len(state)
    config = tuning.configuration("gated_delta_rule.prepare", v, {"BK": 64, "num_warps": 4, "num_stages": 1}, K=K, V=V)
    some = {name: options[name] for name in ("SEQUENCES", "ACC", "PRECISION")}
    prepare[(number_of_chunks(v, cu_seqlens, C), HV)](
        k, g, beta, decay, tau, cu_seqlens, stride(k), T, S, H=H, HV=HV, K=K, C=C, **some, **config
    )  # fmt: skip
    config = tuning.configuration("gated_delta_rule.forward_scan", v, PLAIN_SCAN, K=K, V=V)
    forward_scan[(triton.cdiv(V, config["BV"]) * S * HV,)](
        q, k, v, decay, beta, tau, state, o, final, states if keep else None, y if keep else None, cu_seqlens,
        stride(q), stride(k), stride(v), scale, T, H=H, HV=HV, K=K, V=V, PK=power(K), C=C, **options, **config,
    )  # fmt: skip


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
    decay, tau, states, y = outputs[2:]
    C = tau.shape[-1]
    do, dfinal = grads
    do = torch.zeros_like(outputs[0]) if do is None else do.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    (q, k, v), (beta, state) = (by_token(x) for x in (q, k, v)), (x.contiguous() for x in (beta, state))
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    options, S, chunks = launch_options(v, state, cu_seqlens), len(state), number_of_chunks(v, cu_seqlens, C)
    dr, dstate, dstates = state.new_empty(v.shape), torch.empty_like(state), v.new_empty(chunks, *state.shape[1:])
    sizes = {"H": H, "HV": HV, "K": K, "V": V, "PK": power(K), "C": C}
    if keep:
        config = tuning.configuration("gated_delta_rule.backward_scan", v, PLAIN_SCAN, K=K, V=V)
        backward_scan[(triton.cdiv(V, config["BV"]) * S * HV,)](
            q, k, decay, beta, tau, do, dfinal, dstates, dr, dstate, cu_seqlens, stride(q), stride(k), scale, T,
            **sizes, **options, **config,
        )  # fmt: skip
    else:
        states, y = torch.empty_like(dstates), torch.empty_like(outputs[0])
        config = tuning.configuration("gated_delta_rule.both_scans", v, PLAIN_SCAN, K=K, V=V)
        both_scans[(triton.cdiv(V, config["BV"]) * S * HV, 2)](
            q, k, v, decay, beta, tau, state, states, y, do, dfinal, dstates, dr, dstate, cu_seqlens,
            stride(q), stride(k), stride(v), scale, T, **sizes, **options, **config,
        )  # fmt: skip
    plain = {"BK": 32 if C == 64 else 64, "BV": 64, "num_warps": 8, "num_stages": 1}
    config = tuning.configuration("gated_delta_rule.gradients", v, plain, K=K, V=V)
    blocks = triton.cdiv(K, config["BK"])
    # per value head; those that share a key head are summed below
    dq, dk = (q.new_empty(B, T, HV, K, dtype=q.dtype if HV == H else state.dtype) for _ in range(2))
    dv, dbeta, dg = torch.empty_like(y), state.new_empty(B, T, HV), state.new_empty(blocks, B, T, HV)
    gradients[(chunks, HV, blocks)](
        q, k, decay, beta, states, y, do, dstates, dr, dq, dk, dv, dg, dbeta, cu_seqlens, stride(q), stride(k), scale, T, S,
        B * T * HV, H=H, HV=HV, K=K, V=V, C=C, **options, **config,
    )  # fmt: skip
    if HV > H:
        dq, dk = (x.unflatten(2, (H, -1)).sum(3).to(q.dtype) for x in (dq, dk))
    dg = dg[0] if blocks == 1 else dg.sum(0)
    return dq, dk, dv, dg.to(g.dtype), dbeta.to(beta.dtype), dstate


whole = Fused(
    "gated_delta_rule",
    allocate=allocate,
    forward=forward,
    backward=backward,
    results=2,
    differentiable=("q", "k", "v", "g", "beta", "state"),
)


def one_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (q, k, v), (g, beta, state) = (by_token(x) for x in (q, k, v)), (x.contiguous() for x in (g, beta, state))
    H, K = q.shape[2:]
    HV, V = v.shape[2:]
    o, final = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(state)
    config = tuning.configuration("gated_delta_rule.step", v, {"BV": 16, "num_warps": 4, "num_stages": 1}, K=K, V=V, T=1)
    ACC = tl.float64 if state.dtype == torch.float64 else tl.float32
    step[(triton.cdiv(V, config["BV"]) * len(state) * HV,)](
        q, k, v, g, beta, state, o, final, stride(q), stride(k), stride(v), scale, H=H, HV=HV, K=K, V=V, PK=power(K), ACC=ACC, **config
    )  # fmt: skip
    return o, final
