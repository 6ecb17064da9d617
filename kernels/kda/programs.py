"""The Triton kernels of Kimi Delta Attention, which triton.py launches. README.md has the derivation.

Names are those of the gated delta rule: C tokens of a chunk; K, V sizes of a key and a value; BK, BV block sizes; PK the next power
of two of K. ACC is the dtype of sums, DT that of the operands of products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.gated_delta_rule import shared


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
    first, length, c = shared.chunk(cu_seqlens, tl.program_id(0), T, sequences, SEQUENCES, C)
    if length == 0:
        return
    i, ik = tl.arange(0, C), block * BK + tl.arange(0, BK)
    t = c * C + i
    row = (first + t) * H + head
    mask = (t < length)[:, None] & (ik < K)[None, :]
    at = row[:, None] * K + ik[None, :]
    coarse, fine = shared.accumulated(tl.load(g + at, mask=mask, other=0.0).to(ACC))
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
    first, length, c = shared.chunk(cu_seqlens, tl.program_id(0), T, sequences, SEQUENCES, C)
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
    tl.store(tau + at, shared.correction(L, b, i, C, PRECISION, ACC).to(tau.dtype.element_ty), mask=inside[:, None])


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
    first, length, first_chunk = shared.sequence(cu_seqlens, n, T, SEQUENCES, C)
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
    first, length, c = shared.chunk(cu_seqlens, tl.program_id(0), T, sequences, SEQUENCES, C)
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
        below = tl.where(rows, P, 0.0).to(DT)
        x = tl.dot(below, ke, input_precision=PRECISION, out_dtype=ACC)
        if DT.primitive_bitwidth == 16:  # nearly equal keys cancel in dq: add the rounding error, too
            x += tl.dot(below, (bk * e - ke.to(ACC)).to(DT), input_precision=PRECISION, out_dtype=ACC)
        x *= e
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
