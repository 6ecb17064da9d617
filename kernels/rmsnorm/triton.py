"""Norms of rows in one launch forward and one backward: RMS, with a gate before or after it, and L2. README.md has the maths.

Rows of N numbers are x [R, G, N]; group g of every row has weight g. A program processes BR rows of one group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.fused import Fused
from zoo.kernels.tuning import configuration

BEFORE, AFTER = 1, 2  # position of a gate: it multiplies the input of the norm, or its output
PARTIAL_SUMS = 512  # maximum number of partial sums of a weight's gradient, one per program


@triton.jit
def forward(
    x, gate, weight, y, R, x_row, x_group, gate_row, gate_group, weight_group, eps, divisor,
    GROUPS: tl.constexpr, N: tl.constexpr, GATE: tl.constexpr, WEIGHTED: tl.constexpr, CENTRED: tl.constexpr, ROUND: tl.constexpr,
    ACC: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    group, column = tl.program_id(1), tl.arange(0, BN)
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = (row < R)[:, None] & (column < N)[None, :]
    h = tl.load(x + (row * x_row + group * x_group)[:, None] + column[None, :], mask=inside, other=0.0).to(ACC)
    if GATE > 0:
        z = tl.load(gate + (row * gate_row + group * gate_group)[:, None] + column[None, :], mask=inside, other=0.0).to(ACC)
        z = z * tl.sigmoid(z)
        if GATE == 1:
            h = h * z
    h = h * (1.0 / tl.sqrt(tl.sum(h * h, 1) / divisor + eps))[:, None]
    if WEIGHTED:
        h = h.to(ROUND).to(ACC)
        w = tl.load(weight + group * weight_group + column, mask=column < N, other=0.0).to(ACC)
        h = h * (w + 1.0 if CENTRED else w)[None, :]
    if GATE == 2:
        h = h * z
    tl.store(y + ((row * GROUPS + group) * N)[:, None] + column[None, :], h.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    x, gate, weight, dy, dx, dgate, dweight, R, blocks, x_row, x_group, gate_row, gate_group, dy_row, dy_group, weight_group, eps, divisor,
    GROUPS: tl.constexpr, N: tl.constexpr, GATE: tl.constexpr, WEIGHTED: tl.constexpr, CENTRED: tl.constexpr,
    ACC: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute the gradients. A program processes `blocks` blocks of rows and writes its part of the weight's gradient to dweight
    [programs, G, N]."""
    part, group, column = tl.program_id(0), tl.program_id(1), tl.arange(0, BN)
    if WEIGHTED:
        w = tl.load(weight + group * weight_group + column, mask=column < N, other=0.0).to(ACC)
        if CENTRED:
            w = w + 1.0
        dw = tl.zeros([BN], ACC)
    for block in range(blocks):
        row = (part.to(tl.int64) * blocks + block) * BR + tl.arange(0, BR)
        inside = (row < R)[:, None] & (column < N)[None, :]
        out = ((row * GROUPS + group) * N)[:, None] + column[None, :]
        h = tl.load(x + (row * x_row + group * x_group)[:, None] + column[None, :], mask=inside, other=0.0).to(ACC)
        d = tl.load(dy + (row * dy_row + group * dy_group)[:, None] + column[None, :], mask=inside, other=0.0).to(ACC)
        if GATE > 0:
            z = tl.load(gate + (row * gate_row + group * gate_group)[:, None] + column[None, :], mask=inside, other=0.0).to(ACC)
            sigmoid = tl.sigmoid(z)
            slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
            z = z * sigmoid
        u = h * z if GATE == 1 else h
        scale = tl.where(row < R, 1.0 / tl.sqrt(tl.sum(u * u, 1) / divisor + eps), 0.0)[:, None]
        u = u * scale
        if GATE == 2:
            before = d * u
            if WEIGHTED:
                before = before * w[None, :]
            tl.store(dgate + out, (before * slope).to(dgate.dtype.element_ty), mask=inside)
            d = d * z
        if WEIGHTED:
            dw += tl.sum(d * u, 0)
            d = d * w[None, :]
        d = scale * (d - u * (tl.sum(d * u, 1) / divisor)[:, None])
        if GATE == 1:
            tl.store(dgate + out, (d * h * slope).to(dgate.dtype.element_ty), mask=inside)
            d = d * z
        tl.store(dx + out, d.to(dx.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(dweight + (part * GROUPS + group) * N + column, dw, mask=column < N)


def run(x: Tensor, weight: Tensor, eps: float, style: str) -> Tensor:
    return norm(x, None, weight, eps, True, False, style == "centred", style == "plain")[0]


def _allocate(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, mean: bool, gate_first: bool, centred: bool, cast_first: bool
) -> tuple[Tensor, ...]:
    dtype = x.dtype if gate is None else gate.dtype
    if cast_first and weight is not None and gate is None:
        dtype = torch.promote_types(dtype, weight.dtype)
    return (torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format),)


def _launch_forward(
    outputs: tuple[Tensor, ...],
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    mean: bool,
    gate_first: bool,
    centred: bool,
    cast_first: bool,
) -> None:
    """Normalise x [..., G, N], with the gate before or after. `mean`: divide by the mean of the squares, else by their sum.

    cast_first: round the normalised row to the narrower dtype, x's or that of a gate before the norm, before the weight is applied.
    """
    G, weight_group = _groups(weight)
    rounded = (gate.dtype if gate is not None and gate_first else x.dtype) if cast_first else _accumulator(x)
    x, gate = _rows(x, G), None if gate is None else _rows(gate, G)
    R, _, N = x.shape
    config = configuration("rmsnorm.forward", x, _plain(R, N), N=N)
    forward[(triton.cdiv(R, config["BR"]), G)](
        x, gate, weight, outputs[0], R, *x.stride()[:2], *(gate if gate is not None else x).stride()[:2], weight_group, eps,
        float(N if mean else 1), G, N, _place(gate, gate_first), weight is not None, centred, _triton(rounded),
        _triton(_accumulator(x)), **config,
    )  # fmt: skip


def _launch_backward(
    grads: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    mean: bool,
    gate_first: bool,
    centred: bool,
    cast_first: bool,
) -> tuple[Tensor, ...]:
    G, weight_group = _groups(weight)
    assert grads[0] is not None
    dy = _rows(grads[0], G)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate = dx if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    x, gate = _rows(x, G), None if gate is None else _rows(gate, G)
    R, _, N = x.shape
    config = configuration("rmsnorm.backward", x, _plain(R, N), N=N)
    programs = min(PARTIAL_SUMS, triton.cdiv(R, config["BR"]))
    parts = x.new_empty((programs, G, N) if weight is not None else (0,), dtype=_accumulator(x))
    backward[(programs, G)](
        x, gate, weight, dy, dx, dgate, parts, R, triton.cdiv(R, programs * config["BR"]), *x.stride()[:2],
        *(gate if gate is not None else x).stride()[:2], *dy.stride()[:2], weight_group, eps, float(N if mean else 1), G, N,
        _place(gate, gate_first), weight is not None, centred, _triton(_accumulator(x)), **config,
    )  # fmt: skip
    dweight = parts if weight is None else parts.sum(0).view(weight.shape).to(weight.dtype)
    return dx, dgate, dweight


def _rows(x: Tensor, groups: int) -> Tensor:
    """Return [..., G, N] as [R, G, N] with a contiguous last dimension."""
    x = x.reshape(-1, groups, x.shape[-1])
    return x if x.stride(2) == 1 else x.contiguous()


def _groups(weight: Tensor | None) -> tuple[int, int]:
    """Return the number of groups and the stride between their weights."""
    return (1, 0) if weight is None or weight.ndim == 1 else (weight.shape[0], weight.shape[1])


def _place(gate: Tensor | None, gate_first: bool) -> int:
    return 0 if gate is None else BEFORE if gate_first else AFTER


def _plain(R: int, N: int) -> dict[str, int]:
    """Return the default configuration: 4096 numbers per program, or one row."""
    BN = triton.next_power_of_2(N)
    return {"BR": min(max(1, 4096 // BN), triton.next_power_of_2(R)), "BN": BN, "num_warps": min(16, max(4, BN // 1024))}


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _triton(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


norm = Fused(
    "norm",
    allocate=_allocate,
    forward=_launch_forward,
    backward=_launch_backward,
    results=1,
    differentiable=("x", "gate", "weight"),
)
