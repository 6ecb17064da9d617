"""Linear layers that multiply a single row at the memory bandwidth of a CPU."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.common.recording import pure, watched

CHUNK = 256
"""Number of inputs in a partial sum."""
SMALLEST = 1 << 14
"""Weights with fewer entries are left to BLAS."""
NARROWEST = 128
"""Least number of outputs of a part of a weight that a thread sums."""


class ColumnLinear(nn.Linear):
    """`nn.Linear` whose weight is stored by columns. `zoo.arrange_weights` turns the layers of a model into it and back."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b: x [..., K], W [N, K], b [N] -> [..., N], with `one_row` where it can compute the same."""
    if x.numel() == weight.shape[1] and not torch.is_grad_enabled() and _is_plain(x, weight):
        values = weight.detach()  # one reading: another thread may rearrange the weight
        if values.stride(0) == 1 and values.stride(1) == values.shape[0]:
            y = one_row(x, values)
            return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def one_row(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T: x [..., K] of one row, W [N, K] stored by columns -> [..., N], float32. None of them requires gradients.

    The columns are the rows of a table, and `torch.embedding_bag` sums them with the weights x: on x86, its kernels reach the
    memory bandwidth, and BLAS half of it. The sums do not depend on the number of threads.
    """
    N, K = weight.shape
    chunks = -(-K // CHUNK)
    parts = _parts(N, torch.get_num_threads() // chunks)
    table = weight.as_strided((K * parts, N // parts), (N // parts, 1))
    row = x.reshape(-1)
    sums = torch.embedding_bag(table, *_bags(K, parts), False, 0, False, row if parts == 1 else row.repeat(parts))[0]
    return (sums if chunks == 1 else sums.view(parts, chunks, -1).sum(1)).view(*x.shape[:-1], N)


@lru_cache
def _parts(outputs: int, threads: int) -> int:
    """Return into how many equal parts the outputs are split, at most one for each thread that has nothing to do."""
    parts = 1
    while 2 * parts <= threads and outputs % (2 * parts) == 0 and outputs // (2 * parts) >= NARROWEST:
        parts *= 2
    return parts


@lru_cache
def _bags(inputs: int, parts: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a table [inputs x parts, ...] by part and input, and where the chunks of each part begin."""
    part = torch.arange(parts, device="cpu")[:, None]
    rows = torch.arange(inputs, device="cpu") * parts + part
    starts = torch.arange(0, inputs, CHUNK, device="cpu") + part * inputs
    return rows.flatten(), starts.flatten()


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Return True for large float32 weights on a CPU, and where nothing but values depends on the product."""
    if weight.numel() < SMALLEST or type(weight) is not nn.Parameter or type(x) is not Tensor or pure() or weight.is_inference():
        return False
    return x.is_cpu and x.dtype == weight.dtype == torch.float32 and not watched()
