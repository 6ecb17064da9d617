"""Short causal convolutions in one launch forward and one backward, with one kernel for all tokens or one per token.

A program processes some tokens of one sequence for BC channels. Inputs before a sequence's first token are read row by row
from its initial state. README.md has the maths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.fused import Fused
from zoo.kernels.tuning import configuration


@triton.jit
def _sequence(cu_seqlens, T, S, early, PACKED: tl.constexpr, SIZE: tl.constexpr, BS: tl.constexpr):
    """Locate this program: its sequence, its first place of SIZE in it (the first of all is -`early`), the sequence's row of
    the batch, its first token in that row, and its length.

    A packed sequence whose first token is c owns the programs from (c + s early) / SIZE + s on, rounded down: never too few.
    """
    block = tl.program_id(0)
    if PACKED:
        s = tl.arange(0, BS)
        first = (tl.load(cu_seqlens + s, mask=s < S, other=0).to(tl.int32) + s * early) // SIZE + s
        seq = tl.sum(((s < S) & (first <= block)).to(tl.int32), 0) - 1
        begin = tl.load(cu_seqlens + seq).to(tl.int32)
        place = (block - (begin + seq * early) // SIZE - seq) * SIZE - early
        return seq, place, block * 0, begin, tl.load(cu_seqlens + seq + 1).to(tl.int32) - begin
    else:
        blocks = tl.cdiv(T + early, SIZE)
        return block // blocks, (block % blocks) * SIZE - early, block // blocks, block * 0, block * 0 + T


@triton.jit
def _inputs(x, x_token, state, state_token, state_channel, at, c, inside, K: tl.constexpr):
    """Load the inputs of the sequence at the places `at`; the K-1 places before 0 come from its state."""
    row = tl.where(at >= 0, x + at.to(tl.int64) * x_token, state + (at + K - 1).to(tl.int64) * state_token)
    channel = tl.where((at >= 0)[:, None], c[None, :], (c * state_channel)[None, :])
    return tl.load(row[:, None] + channel, mask=inside, other=0.0)


@triton.jit
def _weights(weight, t, c, inside, C, tap, K: tl.constexpr, DYNAMIC: tl.constexpr, ACC: tl.constexpr):
    if DYNAMIC:
        return tl.load(weight + (t.to(tl.int64) * C * K)[:, None] + (c * K)[None, :] + tap, mask=inside, other=0.0).to(ACC)
    else:
        return tl.load(weight + c * K + tap, mask=c < C, other=0.0).to(ACC)[None, :]


@triton.jit
def forward(
    x, weight, bias, state, cu_seqlens, y, final, T, S, C, x_row, x_token, state_seq, state_token, state_channel,
    K: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, DYNAMIC: tl.constexpr, ACC: tl.constexpr,
    BS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute y [B, T, C] and the last K-1 inputs, final [S, K-1, C]."""
    seq, start, batch, begin, length = _sequence(cu_seqlens, T, S, 0, PACKED, BT, BS)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    t = start + tl.arange(0, BT)
    inside = (t < length)[:, None] & (c < C)[None, :]
    token = batch.to(tl.int64) * T + begin
    x += batch.to(tl.int64) * x_row + begin.to(tl.int64) * x_token
    state += seq.to(tl.int64) * state_seq
    final += seq.to(tl.int64) * (K - 1) * C
    if DYNAMIC:
        weight += token * C * K
    z = tl.zeros([BT, BC], ACC)
    if BIASED:
        z += tl.load(bias + c, mask=c < C, other=0.0).to(ACC)[None, :]
    for tap in tl.static_range(K):
        v = _inputs(x, x_token, state, state_token, state_channel, t - (K - 1) + tap, c, inside, K)
        z += _weights(weight, t, c, inside, C, tap, K, DYNAMIC, ACC) * v.to(ACC)
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + ((token + t) * C)[:, None] + c[None, :], z.to(y.dtype.element_ty), mask=inside)
    # the last K-1 tokens are the final state; with fewer, the newest of the initial state come before them
    place = t - length + K - 1
    tl.store(final + (place * C)[:, None] + c[None, :], v, mask=inside & (place >= 0)[:, None])
    if length < K - 1:
        for old in tl.static_range(1, K - 1):
            kept = (c < C) & (start == 0) & (old >= length)
            newest = tl.load(state + old * state_token + c * state_channel, mask=kept, other=0.0)
            tl.store(final + (old - length) * C + c, newest, mask=kept)


@triton.jit
def backward(
    x, weight, bias, state, cu_seqlens, dy, dfinal, dx, dweight, dstate, T, S, C, x_row, x_token, state_seq, state_token, state_channel,
    dy_row, dy_token, dfinal_seq, dfinal_token, dfinal_channel,
    K: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, DYNAMIC: tl.constexpr, FINAL: tl.constexpr,
    ACC: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute dx [B, T, C], dstate [S, K-1, C], and dweight: [B, T, C, K] if DYNAMIC, else [programs, K + 1, C], the last for the bias.

    BR runs of BL places are processed side by side, each from last to first. `pending` holds what the K-1 inputs before the current
    one have gathered so far from the tokens that see them. The initial state is the K-1 inputs before place 0.
    """
    seq, start, batch, begin, length = _sequence(cu_seqlens, T, S, K - 1, PACKED, BR * BL, BS)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    token = batch.to(tl.int64) * T + begin
    x += batch.to(tl.int64) * x_row + begin.to(tl.int64) * x_token
    dy += batch.to(tl.int64) * dy_row + begin.to(tl.int64) * dy_token
    dx += token * C
    state += seq.to(tl.int64) * state_seq
    dstate += seq.to(tl.int64) * (K - 1) * C
    if FINAL:
        dfinal += seq.to(tl.int64) * dfinal_seq
    if DYNAMIC:
        weight += token * C * K
        dweight += token * C * K
    zero = tl.zeros([BR, BC], ACC)
    b = zero
    if BIASED:
        b += tl.load(bias + c, mask=c < C, other=0.0).to(ACC)[None, :]
    pending = (zero,)
    sums = (zero,)  # for each tap, then for the bias
    for _ in tl.static_range(K - 1):
        pending = pending + (zero,)
        sums = sums + (zero,)
    sums = sums + (zero,)
    for back in tl.range(0, BL + K - 1):
        t = start + tl.arange(0, BR) * BL + (BL + K - 2 - back)
        inside = ((t >= 0) & (t < length))[:, None] & (c < C)[None, :]
        d = tl.load(dy + (t.to(tl.int64) * dy_token)[:, None] + c[None, :], mask=inside, other=0.0).to(ACC)
        z = b
        seen = ()
        for tap in tl.static_range(K):
            v = _inputs(x, x_token, state, state_token, state_channel, t - (K - 1) + tap, c, inside, K).to(ACC)
            z += _weights(weight, t, c, inside, C, tap, K, DYNAMIC, ACC) * v
            seen = seen + (v,)
        if SILU:
            sigmoid = tl.sigmoid(z)
            d = d * sigmoid * (1.0 + z * (1.0 - sigmoid))
        gathered = (zero,)
        for tap in tl.static_range(K):
            gathered = gathered + (pending[tap] + _weights(weight, t, c, inside, C, tap, K, DYNAMIC, ACC) * d,)
        pending = gathered[:K]
        total = gathered[K]
        own = (back >= K - 1) & (t < length)[:, None] & (c < C)[None, :]  # until then, tokens of the next run
        if DYNAMIC:
            for tap in tl.static_range(K):
                at = (t.to(tl.int64) * C * K)[:, None] + (c * K)[None, :] + tap
                tl.store(dweight + at, (d * seen[tap]).to(dweight.dtype.element_ty), mask=own & (t >= 0)[:, None])
        else:
            d = tl.where(own, d, 0.0)
            added = ()
            for tap in tl.static_range(K):
                added = added + (sums[tap] + d * seen[tap],)
            sums = added + (sums[K] + d,)
        own &= (t > -K)[:, None]
        if FINAL:
            place = t - length + K - 1
            at = (place.to(tl.int64) * dfinal_token)[:, None] + (c * dfinal_channel)[None, :]
            total += tl.load(dfinal + at, mask=own & (place >= 0)[:, None], other=0.0).to(ACC)
        row = tl.where(t >= 0, dx + t.to(tl.int64) * C, dstate + (t + K - 1).to(tl.int64) * C)
        tl.store(row[:, None] + c[None, :], total.to(dx.dtype.element_ty), mask=own)
    if not DYNAMIC:
        part = dweight + tl.program_id(0).to(tl.int64) * (K + 1) * C + c
        for tap in tl.static_range(K + 1):
            tl.store(part + tap * C, tl.sum(sums[tap], 0), mask=c < C)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    y, final = convolution(x, weight, bias, state, cu_seqlens, silu)
    return y, final.mT


def _allocate(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None, silu: bool) -> tuple[Tensor, ...]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(state.mT, memory_format=torch.contiguous_format)


def _launch_forward(
    outputs: tuple[Tensor, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> None:
    B, T, C = x.shape
    S, _, K = *state.shape[:2], weight.shape[-1]
    x, weight, state = _rows(x), weight.contiguous(), _state_rows(state, T)
    BC = min(128, triton.next_power_of_2(C))
    config = configuration(
        "causal_conv1d.forward", x, {"BT": min(2048 // BC, triton.next_power_of_2(T)), "BC": BC, "num_warps": 4}, D=C, W=K
    )
    forward[(_programs(B, T, cu_seqlens, 0, config["BT"]), triton.cdiv(C, config["BC"]))](
        x, weight, bias, state, cu_seqlens, *outputs, T, S, C, *x.stride()[:2], *state.stride(), K, bias is not None, silu,
        cu_seqlens is not None, weight.ndim == 4, _accumulator(x), triton.next_power_of_2(S), **config,
    )  # fmt: skip


def _launch_backward(
    grads: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, ...]:
    B, T, C = x.shape
    S, _, K = *state.shape[:2], weight.shape[-1]
    dynamic = weight.ndim == 4
    dy = torch.zeros_like(x) if grads[0] is None else grads[0]
    dfinal = outputs[1] if grads[1] is None else grads[1]
    dx, dstate = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x, state.mT))
    x, weight, state, dy = _rows(x), weight.contiguous(), _state_rows(state, T), _rows(dy)
    # registers hold, for each number of a program, three for each tap
    BC = min(128 if K <= 4 else 64, triton.next_power_of_2(C))
    config = configuration(
        "causal_conv1d.backward", x, {"BR": 1024 // BC if K <= 4 else 512 // BC, "BL": 16, "BC": BC, "num_warps": 4}, D=C, W=K
    )
    programs = _programs(B, T, cu_seqlens, K - 1, config["BR"] * config["BL"])
    dtype = torch.promote_types(x.dtype, torch.float32)
    dweight = torch.empty_like(weight) if dynamic else x.new_empty(programs, K + 1, C, dtype=dtype)
    backward[(programs, triton.cdiv(C, config["BC"]))](
        x, weight, bias, state, cu_seqlens, dy, dfinal, dx, dweight, dstate, T, S, C, *x.stride()[:2], *state.stride(), *dy.stride()[:2],
        *dfinal.stride(), K, bias is not None, silu, cu_seqlens is not None, dynamic, grads[1] is not None, _accumulator(x),
        triton.next_power_of_2(S), **config,
    )  # fmt: skip
    if dynamic:
        return dx, dweight, dx, dstate.mT.contiguous()
    total = dweight.sum(0)
    dbias = dx if bias is None else total[K].to(bias.dtype)
    return dx, total[:K].T.to(weight.dtype).contiguous(), dbias, dstate.mT.contiguous()


def _programs(B: int, T: int, cu_seqlens: Tensor | None, early: int, size: int) -> int:
    """Return an upper bound on the number of programs that cover the T + early places of every sequence, `size` each."""
    if cu_seqlens is None:
        return B * triton.cdiv(T + early, size)
    S = len(cu_seqlens) - 1
    return (T + S * early) // size + S


def _rows(x: Tensor) -> Tensor:
    """Return x with a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _state_rows(state: Tensor, T: int) -> Tensor:
    """Return [S, C, K-1] as [S, K-1, C]: contiguous where many tokens are loaded, a view for a single step."""
    return state.mT if T == 1 else state.mT.contiguous()


def _accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


convolution = Fused(
    "causal_conv1d",
    allocate=_allocate,
    forward=_launch_forward,
    backward=_launch_backward,
    results=2,
    differentiable=("x", "weight", "bias", "state"),
)
