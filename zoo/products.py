"""Matrix multiplication on a CPU: which of torch's libraries, which dtype and which weight layout is fastest, found by measurement."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.blocks.linear import ColumnLinear, one_row
from zoo.blocks.tied_head import TiedHead
from zoo.errors import ZooError
from zoo.inputs import check_count
from zoo.model import Model
from zoo.system import release_threads

FASTER = 1.3  # least speedup for which the precision is changed
SAVED = 30e-6  # and the least number of seconds that it must save: oneDNN is slower at the smaller products around those of weights
BY_COLUMNS = 1.1  # least speedup of one row for which weights are stored by columns
SLOWER = 1.2  # largest slowdown of many rows for which they are
EXACT = 1e-6  # largest error, relative to the largest entry in float64
ROUNDS = 10
BATCH = 1024  # tokens that are multiplied at once where batches of sequences are evaluated
MOST_ROWS = 4096  # that are timed
MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)


def matmul_precision(width: int = 512, rows: int = 64) -> str:
    """Return the setting for `torch.set_float32_matmul_precision` under which this CPU multiplies faster without losing accuracy.

    With "medium", torch sends products to oneDNN. On some CPUs that is twice as fast as MKL and as accurate; on others it rounds to
    bfloat16. Both settings are timed on a weight [2 W, W], W = min(width, 512), in a few milliseconds, or in a fraction of a second
    for many rows.

    Args:
        width: d_model of the model.
        rows: number of tokens that are multiplied at once: those of a piece of a prompt, or of a batch. At most 4,096 are timed.
    Returns:
        "medium" if it is at least 1.3 times and 30 us faster, with an error below 1e-6; otherwise, and if the process has been set to
        anything but "highest", the current setting, which is not changed.
    Raises:
        ZooError: a width or a number of rows that is not at least 1.
    """
    check_count("width", width)
    check_count("rows", rows)
    before, width, rows = torch.get_float32_matmul_precision(), min(width, 512), min(rows, MOST_ROWS)
    if before != "highest":
        return before
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, width, generator=generator, device="cpu") for count in (rows, 2 * width))
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
    highest, medium = map(min, seconds.values())
    return "medium" if highest >= FASTER * medium and highest - medium >= SAVED and error < EXACT else before


def bfloat16_products() -> str:
    """Return "float32" if this CPU multiplies bfloat16 matrices at least 1.3 times faster in that dtype, otherwise "bfloat16".

    A CPU without instructions for bfloat16 is 5 to 30 times faster in float32, conversions included. Measured on 64 rows in a few
    milliseconds.
    """
    x, weight = torch.ones(64, 256, dtype=torch.bfloat16, device="cpu"), torch.ones(256, 256, dtype=torch.bfloat16, device="cpu")
    seconds = {"bfloat16": math.inf, "float32": math.inf}
    for _ in range(ROUNDS // 2):
        for dtype in seconds:
            with torch.no_grad(), set_products(torch.get_float32_matmul_precision(), dtype):
                started = time.perf_counter()
                F.linear(x, weight)
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return "float32" if seconds["bfloat16"] / seconds["float32"] >= FASTER else "bfloat16"


class Float32Products(TorchDispatchMode):
    """Multiplies bfloat16 matrices in float32 and rounds the results, as tensor cores do: in this thread, forward and backward."""

    def __torch_dispatch__(
        self, operator: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operator in MATRIX_PRODUCTS and args[0].dtype == torch.bfloat16:
            return operator(*(operand.float() for operand in args), **(kwargs or {})).bfloat16()
        return operator(*args, **(kwargs or {}))


@torch.inference_mode(False)  # weights that are rearranged may be trained later
def arrange_weights(model: nn.Module, *, compile: bool = False) -> bool:
    """Store the weights of linear layers and of the head by columns, if this CPU multiplies one row faster that way. In place.

    Decoding multiplies one row per stream, which takes as long as reading the weights: by columns they are read up to twice as fast
    (`zoo.blocks.linear.one_row`). Only strides change, and `nn.Linear` layers become a subclass. Names, shapes, values and what
    `zoo.save` writes stay as they are, and nothing is stored twice; training, hooks and later changes of the weights work as before.
    Code that expects contiguous weights or exactly `nn.Linear` does not, such as safetensors' `save_file`, `parameters_to_vector`, LBFGS,
    torch.fx and torch's own `quantize_dynamic`; and a fused optimizer must be made afterwards: torch pairs weights and moments by their
    place in memory. Weights of other modules, those shared between processes or made in inference mode, and quantised, parametrised or
    non-float32 ones are not touched.

    Args:
        compile: for sessions with `compile=True`, whose own kernel reads weights by rows: store them by rows.
    Returns:
        True if the weights are stored by columns now. Both layouts are timed for a few milliseconds.
    Raises:
        ZooError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise ZooError(f"model: {type(model).__name__}; want a torch.nn.Module, such as a zoo.Model")
    columns = not compile and by_columns_is_faster()
    for module in model.modules():
        if type(module) in (nn.Linear, ColumnLinear, TiedHead):
            weight: Any = module.weight
            other = weight if columns else weight.t()
            plain = type(weight) is nn.Parameter and weight.is_cpu and weight.dtype == torch.float32
            plain = plain and not weight.is_shared() and not weight.is_inference()
            if plain and other.is_contiguous():
                weight.data = weight.data.t().contiguous().t() if columns else weight.data.contiguous()
            if plain and not isinstance(module, TiedHead):
                module.__class__ = ColumnLinear if columns else nn.Linear
    return columns


@torch.no_grad()
def by_columns_is_faster() -> bool:
    """Return True if one row is multiplied faster with a weight that is stored by columns, and many are hardly slower."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 512, generator=generator, device="cpu")
    columns = weight.t().contiguous().t()
    return _speedup(1, weight, columns, one_row) >= BY_COLUMNS and _speedup(64, weight, columns, F.linear) >= 1 / SLOWER


def _speedup(rows: int, weight: Tensor, columns: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Return how much faster than `F.linear` with the same weight by rows `multiply` is."""
    x, by_rows, by_columns = torch.ones(rows, weight.shape[1], device="cpu"), math.inf, math.inf
    for _ in range(ROUNDS):
        started = time.perf_counter()
        F.linear(x, weight)
        between = time.perf_counter()
        multiply(x, columns)
        by_columns = min(by_columns, time.perf_counter() - between)
        by_rows = min(by_rows, between - started)
    return by_rows / by_columns


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
def set_products(precision: str, bfloat16: str) -> Iterator[None]:
    """Set the float32 matmul precision of the process, and the dtype in which bfloat16 matrices are multiplied in this thread."""
    with set_precision(precision), Float32Products() if bfloat16 == "float32" else nullcontext():
        yield


@contextmanager
def fast_products(width: int, device: str, rows: int = 64) -> Iterator[None]:
    """Set what `matmul_precision(width, rows)` finds until the context ends, if `device` is the CPU."""
    with set_precision(announced(matmul_precision(width, rows))) if device == "cpu" else nullcontext():
        yield


@contextmanager
def fast_bfloat16(model: Model) -> Iterator[None]:
    """Multiply in float32 until the context ends, in this thread, if `model` is bfloat16 on a CPU where that is faster."""
    weight = model.embed.weight
    slow = weight.is_cpu and weight.dtype == torch.bfloat16 and bfloat16_products() == "float32"
    with Float32Products() if slow else nullcontext():
        yield


@contextmanager
def fast_decoding(model: object, *, compile: bool = False) -> Iterator[None]:
    """Run a session or a pool of `zoo.Model` on a CPU under `fast_products` and with `arrange_weights`; change nothing for others."""
    if not isinstance(model, Model) or not model.embed.weight.is_cpu:
        yield
        return
    with fast_products(model.config.d_model, "cpu"):
        arrange_weights(model, compile=compile)
        release_threads()  # the thread of a server loads the model and then waits
        yield


def announced(precision: str) -> str:
    """Return `precision`, after a line on stderr if it differs from the current setting."""
    if precision != torch.get_float32_matmul_precision():
        print(f"float32 matmul precision: {precision}, which this CPU was found to compute faster without loss", file=sys.stderr)
    return precision
