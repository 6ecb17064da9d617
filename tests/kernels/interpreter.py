"""Triton's CPU interpreter made to tell the truth. Importing this repairs it; import it before any kernel.

What the interpreter of Triton 3.6 to 3.9 gets wrong, or lets pass, and what happens here instead:

- bfloat16 is kept as raw bits, on which it multiplies, adds and compares. Here `tl.dot` decodes its operands, casts round to
  nearest even (not towards zero), and any other bfloat16 arithmetic is an error: upcast right after the load.
- float32 operands of `tl.dot` are not rounded as a tensor core does; with `rehearse(tf32=True)` they are. `ieee` products of
  float32, which spill every register on a GPU, are an error.
- A load or store out of bounds touches other memory. Here every address must lie in an argument of the launch.
- A masked load without `other` gives zeros, on a GPU anything. Here it gives NaN.
- Programs run one after another, so races never show. Here two programs that touch one element, at least one of them writing,
  are an error, and with `rehearse(backwards=True)` programs run in reversed order.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as upstream

assert os.environ.get("TRITON_INTERPRET") == "1", "tests/conftest.py sets it before triton is imported"

Builder, Handle = upstream.InterpreterBuilder, upstream.TensorHandle


@dataclasses.dataclass
class Rehearsal:
    tf32: bool = False
    backwards: bool = False
    strict: bool = True


now = Rehearsal()


@contextmanager
def rehearse(**changes: bool) -> Iterator[None]:
    """Inside, float32 dots round their operands (tf32=True), the last program runs first (backwards=True), or third-party kernels
    run (strict=False): bfloat16 arithmetic rounds each result, and addresses and races are not checked.
    """
    global now
    before, now = now, dataclasses.replace(now, **changes)
    try:
        yield
    finally:
        now = before


# --- bfloat16 and tf32 ---------------------------------------------------------------------------------------------------------


def is_bf16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def decoded(handle: Any) -> Any:
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bf16(handle) else handle


def encoded(x: np.ndarray) -> Any:
    """Return the bits of x in bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(x), np.uint16(0x7FC0), rounded), tl.bfloat16)


def rounded_to_tf32(x: np.ndarray) -> np.ndarray:
    """Return the nearest number with 10 mantissa bits, ties away from zero, as cvt.rna.tf32 has it."""
    return ((np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def create_dot(self, a, b, d, input_precision, *rest):
    name = str(input_precision).upper()
    if not is_bf16(a) and a.data.dtype == np.float32:
        if "IEEE" in name and now.strict:
            raise TypeError("tl.dot of float32 with input_precision='ieee': use 'tf32' or 'tf32x3'")
        if now.tf32 and "TF32" in name and "X3" not in name:
            a, b = (Handle(rounded_to_tf32(x.data), tl.float32) for x in (a, b))
    return upstream_dot(self, decoded(a), decoded(b), d, input_precision, *rest)


def cast_impl(self, value, to):
    if to.scalar == tl.bfloat16:
        return value if is_bf16(value) else encoded(value.data.astype(np.float32))
    return upstream_cast(self, decoded(value), to)


def no_bf16(operation):
    def checked(self, *operands):
        if not any(map(is_bf16, operands)):
            return operation(self, *operands)
        if now.strict:
            raise TypeError(f"arithmetic on bfloat16 ({getattr(operands[-1], '__name__', 'fma')}): upcast right after the load")
        found = operation(self, *map(decoded, operands)).data
        return Handle(found, tl.int1) if found.dtype == bool else encoded(found)

    return checked


upstream_dot, upstream_cast = Builder.create_dot, Builder.cast_impl
Builder.create_dot, Builder.cast_impl = create_dot, cast_impl
Builder.binary_op, Builder.unary_op, Builder.create_fma = map(no_bf16, (Builder.binary_op, Builder.unary_op, Builder.create_fma))
Builder.get_bf16 = lambda self, value: encoded(np.array([value], np.float32))
upstream_fp_to_fp = Builder.create_fp_to_fp
Builder.create_fp_to_fp = lambda self, value, to, mode: (
    self.cast_impl(value, to) if tl.bfloat16 in (value.dtype.scalar, to.scalar) else upstream_fp_to_fp(self, value, to, mode)
)


# --- memory --------------------------------------------------------------------------------------------------------------------


class Memory:
    """The tensors of one launch, with the programs that touched each element."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        spans = {_span(x) for x in tensors if x.numel()}
        self.starts, self.ends = map(list, zip(*sorted(spans), strict=True)) if spans else ([], [])
        self.touched: dict[int, dict[str, list[tuple[int, np.ndarray]]]] = {}
        self.program = 0

    def touch(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        if not now.strict:
            return
        active = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)]  # a conjunction of masks is of integers
        while active.size:  # one tensor after another
            low = int(active.min())
            at = bisect.bisect_right(self.starts, low) - 1
            if at < 0 or low + size > self.ends[at]:
                raise IndexError(f"{kind} outside of every tensor of the launch")
            here = active <= self.ends[at] - size
            self.touched.setdefault(at, {"load": [], "store": [], "atomic": []})[kind].append((self.program, active[here]))
            active = active[~here]

    def find_races(self) -> None:
        for at, kinds in self.touched.items():
            if not kinds["store"]:
                continue
            writer = np.zeros(self.ends[at] - self.starts[at], np.int64)  # one for each byte, so that any dtype fits
            for kind in ("store", "load", "atomic"):
                for program, pointers in kinds[kind]:
                    place = (pointers - np.uint64(self.starts[at])).astype(np.int64)
                    other = writer[place]
                    if ((other != 0) & (other != program)).any():
                        raise RuntimeError(f"race: program {program} has a {kind} where another one stores")
                    if kind == "store":
                        writer[place] = program


def _span(x: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


memory = Memory([])


def masked_load(self, pointers, mask, other, *rest):
    dtype = upstream._get_np_dtype(pointers.get_element_ty())
    memory.touch("load", pointers.data, mask.data, dtype.itemsize)
    if other is None and now.strict and not mask.data.all():
        other = _anything(pointers.data.shape, pointers.get_element_ty(), dtype)
    return upstream_load(self, pointers, mask, other, *rest)


def masked_store(self, pointers, value, mask, *rest):
    memory.touch("store", pointers.data, mask.data, upstream._get_np_dtype(pointers.get_element_ty()).itemsize)
    return upstream_store(self, pointers, value, mask, *rest)


def atomic_rmw(self, operation, pointers, value, mask, *rest):
    memory.touch("atomic", pointers.data, mask.data, upstream._get_np_dtype(pointers.get_element_ty()).itemsize)
    return upstream_atomic(self, operation, pointers, value, mask, *rest)


def _anything(shape, element, dtype):
    if element == tl.bfloat16:
        return Handle(np.full(shape, 0x7FC0, np.uint16), element)
    return Handle(np.full(shape, np.nan if element.is_floating() else np.iinfo(dtype).max // 3, dtype), element)


def launch(self, *arguments, **keywords):
    global memory
    if not now.strict:
        upstream_launch(self, *arguments, **keywords)
        return
    memory = Memory([x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor)])
    with np.errstate(over="ignore", invalid="ignore"):
        upstream_launch(self, *arguments, **keywords)
    memory.find_races()


def set_grid_idx(self, *place):
    if now.backwards:
        place = tuple(size - 1 - i for size, i in zip(self.grid_dim, place, strict=True))
    upstream_place(self, *place)
    memory.program = 1 + int(np.ravel_multi_index(place, self.grid_dim))


upstream_load, upstream_store = Builder.create_masked_load, Builder.create_masked_store
upstream_atomic, upstream_place = Builder.create_atomic_rmw, Builder.set_grid_idx
Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
Builder.create_atomic_rmw, Builder.set_grid_idx = atomic_rmw, set_grid_idx
upstream_launch, upstream.GridExecutor.__call__ = upstream.GridExecutor.__call__, launch

# --- time ----------------------------------------------------------------------------------------------------------------------
# A kernel's helper functions patch the language again at each call, and never undo it, which takes 1 ms; those of Triton need
# it once, since they use another module than the kernel. The table of dtypes is built anew for each operation.

patched: set[str] = set()
np_dtypes: dict[str, np.dtype] = {}


def call(self, *arguments, **keywords):
    module = self.fn.__module__
    if module.startswith("triton.") and module not in patched:
        patched.add(module)
        upstream._patch_lang(self.fn)
    return self.rewrite()(*arguments, **keywords)


def np_dtype(dtype):
    element = dtype.scalar
    if element.name not in np_dtypes:
        np_dtypes[element.name] = upstream_np_dtype(element)
    return np_dtypes[element.name]


upstream_np_dtype, upstream._get_np_dtype = upstream._get_np_dtype, np_dtype
upstream.InterpretedFunction.__call__ = call
