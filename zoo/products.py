"""Products of float32 matrices on a CPU by the faster library of torch, found by measurement."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F

FASTER = 1.3  # least speedup for which the precision is changed
EXACT = 1e-6  # largest error, relative to the largest entry in float64
ROUNDS = 10


def matmul_precision(width: int = 512) -> str:
    """Return the setting for `torch.set_float32_matmul_precision` under which this CPU multiplies faster without loss.

    With "medium", torch sends products to oneDNN. On some CPUs that is twice as fast as MKL and as exact, on others it rounds to
    bfloat16. Both settings are timed on 16 rows and a weight [2 W, W], W = min(width, 512), in a few milliseconds.

    Args:
        width: d_model of the model.
    Returns:
        "medium" if it is at least 1.3 times faster with an error below 1e-6; otherwise, and if the process has been set to anything
        but "highest", the present setting, which is not changed.
    """
    before, width = torch.get_float32_matmul_precision(), min(width, 512)
    if before != "highest":
        return before
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, width, generator=generator, device="cpu") for rows in (16, 2 * width))
    exact = F.linear(x.double(), weight.double())
    seconds: dict[str, list[float]] = {"highest": [], "medium": []}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for precision, taken in seconds.items():
                with set_precision(precision):
                    started = time.perf_counter()
                    y = F.linear(x, weight)
                    taken.append(time.perf_counter() - started)
    error = (y.double() - exact).abs().max() / exact.abs().max()
    faster = min(seconds["highest"]) / min(seconds["medium"])
    return "medium" if faster >= FASTER and error < EXACT else before


@contextmanager
def set_precision(precision: str) -> Iterator[None]:
    """Set torch's float32 matmul precision for the whole process until the context ends."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def fast_products(width: int, device: str) -> Iterator[None]:
    """Set what `matmul_precision(width)` finds until the context ends, if `device` is the CPU."""
    with set_precision(announced(matmul_precision(width))) if device == "cpu" else nullcontext():
        yield


def announced(precision: str) -> str:
    """Return `precision`, after a line on stderr if it differs from the present setting."""
    if precision != torch.get_float32_matmul_precision():
        print(f"float32 matmul precision: {precision}, which this CPU was found to compute faster without loss", file=sys.stderr)
    return precision
