"""Kernels with one mistake each, which the interpreter of the tests must catch."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, c, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@triton.jit
def rounded(x, y, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def bf16_sum(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def copied(x, y, shift, read, written, N: tl.constexpr):
    """y = x shifted, `read` elements of it loaded, `written` stored, with masks and nothing in their place."""
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + shift + i, mask=i < read), mask=i < written)


@triton.jit
def running(x, y):
    """Each program adds its x to what the program before it left: a race."""
    p = tl.program_id(0)
    tl.store(y + p, tl.load(x + p) + tl.load(y + p - 1, mask=p > 0, other=0.0))


@triton.jit
def last_wins(y):
    tl.store(y, tl.program_id(0).to(tl.float32))
