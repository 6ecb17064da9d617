"""Attention of one query per stream on a CPU, as products of single rows with the rows of a table."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from zoo.blocks.linear import CHUNK


def one_query(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    """Compute `attention` of one query per stream without a gradient: q [B, H, 1, D] to k, v [B, Hkv, S, D]. Returns [B, H, 1, D].

    BLAS and oneDNN read keys and values slowly, and oneDNN compiles code for each S, in .4 ms: at every token. `torch.embedding_bag`
    sums rows of a table with given weights, here values; its derivative with respect to the weights multiplies rows, here keys.

    Args:
        visible: mask of keys, bool [1, S] or [B, 1, 1, S].
    """
    (B, H, _, D), S = q.shape, k.shape[2]
    queries = (q * (D**-0.5 if scale is None else scale)).reshape(-1, D)
    own, starts = _bags(B * H, S)
    multiply = torch.ops.aten._embedding_bag_per_sample_weights_backward
    scores: Tensor = multiply(queries, _table(k), _seen(H, k.shape, k.stride()), starts, own, 0).view(B, H, 1, S)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).view(-1)
    sums = torch.embedding_bag(_table(v), _seen(H, v.shape, v.stride()), starts, False, 0, False, weights)[0]
    return (sums if S <= CHUNK else sums.view(B * H, -1, v.shape[3]).sum(1)).view(B, H, 1, -1)


def takes_one_query(k: Tensor, v: Tensor) -> bool:
    """Return True for keys and values whose vectors are contiguous, a whole number of vectors apart."""
    return all(x.stride(3) == 1 and not any(step % x.shape[3] for step in x.stride()[:3]) for x in (k, v))


def _table(x: Tensor) -> Tensor:
    """Return the memory of x [B, H, S, D], from its first vector to its last, as [R, D]."""
    D, *steps = x.shape[3], *x.stride()[:3]
    last = sum((size - 1) * step for size, step in zip(x.shape, steps, strict=False))
    return x.as_strided((last // D + 1, D), (D, 1))


@lru_cache(maxsize=4)  # the layers of a model share them at each token
def _seen(H: int, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Return the rows in the table of the tokens that each of H queries per stream sees, [B x H x S]."""
    (B, Hkv, S, D), (stream, head, token, _) = shape, stride
    streams, heads, tokens = (torch.arange(size, device="cpu") for size in (B, H, S))
    first = streams[:, None] * stream + heads // (H // Hkv) * head
    return (first[..., None] + tokens * token).flatten() // D


@lru_cache(maxsize=4)
def _bags(queries: int, S: int) -> tuple[Tensor, Tensor]:
    """Return which query sees each token, [queries x S], and where the chunks of the tokens of each query begin."""
    each = torch.arange(queries, device="cpu")
    return each.repeat_interleave(S), (each[:, None] * S + torch.arange(0, S, CHUNK, device="cpu")).flatten()
