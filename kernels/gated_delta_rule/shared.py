"""Parts that the Triton forms of the gated delta rule and of Kimi Delta Attention share: where a program works, sums of decays, the
inverse within a chunk, sizes and strides of a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels import tuning

STRONGEST = tl.constexpr(-1e4)  # exp of it is 0 even in float64
GRAIN = tl.constexpr(16.0)  # the coarse half of a decay counts in units of 1 / GRAIN
SAVE_AT_MOST = 2**28  # bytes of states that a call may keep for its backward pass instead of computing them again
PLAIN_SCAN = {"BV": 16, "num_warps": 8, "num_stages": 1}


# --- program locations --------------------------------------------------------------------------------------------------------


@triton.jit
def sequence(cu_seqlens, n, T, SEQUENCES: tl.constexpr, C: tl.constexpr):
    """Return the first token, number of tokens and first chunk of sequence n. SEQUENCES: a power of two, at least their number."""
    if cu_seqlens is None:
        return n.to(tl.int64) * T, T, n.to(tl.int64) * tl.cdiv(T, C)
    else:
        i = tl.arange(0, SEQUENCES)
        lengths = tl.load(cu_seqlens + i + 1, mask=i < n, other=0) - tl.load(cu_seqlens + i, mask=i < n, other=0)
        first, end = tl.load(cu_seqlens + n), tl.load(cu_seqlens + n + 1)
        return first.to(tl.int64), (end - first).to(tl.int32), tl.sum((lengths + C - 1) // C, 0).to(tl.int64)


@triton.jit
def chunk(cu_seqlens, c, T, sequences, SEQUENCES: tl.constexpr, C: tl.constexpr):
    """Return the first token and number of tokens of the sequence of chunk c, and its place in it; no tokens past the last chunk."""
    if cu_seqlens is None:
        chunks = tl.cdiv(T, C)
        return (c // chunks).to(tl.int64) * T, T, c % chunks
    else:
        i = tl.arange(0, SEQUENCES)
        known = i < sequences
        lengths = tl.load(cu_seqlens + i + 1, mask=known, other=0) - tl.load(cu_seqlens + i, mask=known, other=0)
        chunks = ((lengths + C - 1) // C).to(tl.int32)
        n = tl.sum((tl.cumsum(chunks, 0) <= c).to(tl.int32), 0)
        first = tl.load(cu_seqlens + n, mask=n < sequences, other=0)
        end = tl.load(cu_seqlens + n + 1, mask=n < sequences, other=0)
        return first.to(tl.int64), (end - first).to(tl.int32), c - tl.sum(tl.where(i < n, chunks, 0), 0)


# --- within a chunk -----------------------------------------------------------------------------------------------------------


@triton.jit
def accumulated(log_decay):
    """Return sums of log decays from the first token on, in a coarse and a fine half.

    Sums of the coarse half are exact, so differences keep the small steps that follow a large one.
    """
    log_decay = tl.maximum(log_decay, STRONGEST)
    coarse = tl.floor(log_decay * GRAIN) / GRAIN
    return tl.cumsum(coarse, 0), tl.cumsum(log_decay - coarse, 0)


@triton.jit
def _merged(tau, L, b, row, column, SIZE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Merge tau of blocks of SIZE rows into 2 SIZE: tau - (I + tau diag(b)) R (I + diag(b) tau), R the new entries of L."""
    R = tl.where((row // SIZE == column // SIZE + 1) & ((row // SIZE) % 2 == 1), L, 0.0)
    R += tl.dot(R, b * tau, input_precision=PRECISION, out_dtype=ACC)
    return tau - R - tl.dot(tau, b * R, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _blocks(A, C: tl.constexpr, SIZE: tl.constexpr):
    """Return the diagonal blocks of [C, C]: [C / SIZE, SIZE, SIZE]."""
    i = tl.arange(0, C) // SIZE
    inside = tl.where(i[:, None] == i[None, :], A, 0.0)
    return tl.sum(tl.reshape(inside, (C // SIZE, SIZE, C // SIZE, SIZE)), 2)


@triton.jit
def _diagonal(X, C: tl.constexpr, SIZE: tl.constexpr):
    """Undo `_blocks`: return [C, C] with these diagonal blocks."""
    spread = tl.broadcast_to(tl.reshape(X, (C // SIZE, SIZE, 1, SIZE)), (C // SIZE, SIZE, C // SIZE, SIZE))
    i = tl.arange(0, C) // SIZE
    return tl.where(i[:, None] == i[None, :], tl.reshape(spread, (C, C)), 0.0)


@triton.jit
def correction(L, b, i, C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Return tau = -L (I + diag(b) L)^-1, for L strictly lower triangular."""
    # pairs of rows by hand, then blocks of 4, 8, 16, 32, 64; a power series over 16 rows would lose every digit on equal keys
    # with beta near 2
    r, s = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    bs, D = tl.reshape(b, (C // 16, 16, 1)), _blocks(L, C, 16)
    x = tl.where((r == s + 1) & (r % 2 == 1), -D, 0.0)
    x = _merged(x, D, bs, r, s, 2, PRECISION, ACC)
    x = _merged(x, D, bs, r, s, 4, PRECISION, ACC)
    x = _merged(x, D, bs, r, s, 8, PRECISION, ACC)
    x = _diagonal(x, C, 16)
    x = _merged(x, L, b[:, None], i[:, None], i[None, :], 16, PRECISION, ACC)
    if C > 32:
        x = _merged(x, L, b[:, None], i[:, None], i[None, :], 32, PRECISION, ACC)
    return x


# --- launches -----------------------------------------------------------------------------------------------------------------


def launch_options(v: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> dict[str, object]:
    """Return the constants that launches share."""
    narrow = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}[v.dtype]
    wide = tl.float64 if state.dtype == torch.float64 else tl.float32
    return {
        "SEQUENCES": 1 if cu_seqlens is None else triton.next_power_of_2(len(state)),
        "ACC": wide,
        "DT": narrow,
        "PRECISION": "ieee" if v.dtype == torch.float64 else "tf32x3",
    }


def chunk_length(q: Tensor) -> int:
    """Return 64, or 32 where 64 rows would not fit into registers: on an A100, whose operands are in registers, and for large keys."""
    return 32 if q.shape[3] > 128 or tuning.target(q) == 80 else 64


def number_of_chunks(v: Tensor, cu_seqlens: Tensor | None, C: int) -> int:
    """Return an upper bound on the number of chunks: reading `cu_seqlens` would synchronise."""
    B, T = v.shape[:2]
    return B * -(-T // C) if cu_seqlens is None else T // C + len(cu_seqlens) - 1


def by_token(x: Tensor) -> Tensor:
    """Return [B, T, H, D] with one stride between tokens, across rows too. A slice of a wider tensor need not be copied."""
    usual = x.stride()[2:] == (x.shape[3], 1) and (len(x) == 1 or x.stride(0) == x.shape[1] * stride(x))
    return x if usual else x.contiguous()


def stride(x: Tensor) -> int:
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def power(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
