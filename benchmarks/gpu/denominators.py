"""Limits of the machine, by which the other stages divide: bandwidth, matrix products, launches."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.graphs import captured
from benchmarks.gpu.models import DEVICE
from benchmarks.gpu.sheet import Case, Row, read
from benchmarks.measure import quartiles, seconds

TOOLS: tuple[str, ...] = ()
COPY, PRODUCT = "copy", "product"
KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32, "float64": torch.float64}


def cases(dry: bool, folder: Path) -> Iterator[Case]:
    yield COPY, partial(copy, (16 << 20) if dry else (4 << 30))
    for kind in KINDS:
        yield f"{PRODUCT}, {kind}", partial(product, kind, 128 if dry else 4096 if kind in ("float32", "float64") else 8192)
    yield "launch, eager", partial(launches, graph=False)
    yield "launch, node of a CUDA graph", partial(launches, graph=True)
    if shutil.which("nvidia-smi"):
        yield "clocks", clocks


def copy(size: int) -> Row:
    """Copy `size` bytes; a byte read and written counts twice."""
    x = torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return {"GB/s": 2 * size / median(lambda: y.copy_(x)) / 1e9}


def product(kind: str, size: int) -> Row:
    """Multiply two matrices of random numbers; zeros would be faster."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    try:
        a, b = (torch.randn(size, size, device=DEVICE).to(KINDS[kind]) for _ in range(2))
        return {"TFLOP/s": 2 * size**3 / median(lambda: a @ b) / 1e12, "size": size}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def launches(graph: bool, count: int = 200) -> Row:
    """Time kernels of one element, one after another."""
    x = torch.zeros(1, device=DEVICE)

    def step() -> None:
        for _ in range(count):
            x.add_(1)

    return {"us": 1e6 * median(captured(step) if graph else step) / count}


def clocks() -> Row:
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    return {"note": subprocess.run(query, capture_output=True, text=True).stdout.strip()}


def median(work: object, rounds: int = 7) -> float:
    """Return the median seconds of a call, after a few calls."""
    assert callable(work)
    calls = max(1, min(20, round(0.02 / max(1e-6, seconds(work)))))
    return float(quartiles([seconds(work, calls) for _ in range(rounds)])[1])


def limit(folder: Path, size: float, flops: float, kind: str = "bfloat16") -> float | None:
    """Return the least milliseconds in which this machine moves `size` bytes and computes `flops`; None before this stage has run."""
    rows = {row["case"]: row for row in (read(folder / "denominators.json") or {"rows": []})["rows"]}
    bandwidth, peak = rows.get(COPY, {}).get("GB/s"), rows.get(f"{PRODUCT}, {kind}", {}).get("TFLOP/s")
    return None if bandwidth is None or peak is None else 1e3 * max(size / bandwidth / 1e9, flops / peak / 1e12)
