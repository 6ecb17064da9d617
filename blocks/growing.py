"""Caches of tokens, [B, H, S, D], to which tokens are appended without copying those before them."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.common.recording import pure

SPARE = 16
"""Least number of tokens for which a new buffer has room."""
END = "_end"
"""Attribute of a buffer: a set with the position after its last token, where a cache may continue; empty while one does."""


def append(cache: Tensor, new: Tensor) -> Tensor:
    """Return the tokens of `cache`, [B, H, S, D], followed by those of `new`, [B, H, T, D]. Changes neither.

    Without gradients, the result is a view of a buffer that has room for further tokens: to append to it copies only those.
    If several caches continue from one, the first takes the room and the others are copies.
    """
    if torch.is_grad_enabled() or pure() or cache.dtype != new.dtype:
        return torch.cat([cache, new], dim=2)
    S, T, buffer = cache.shape[2], new.shape[2], cache._base
    start = cache.storage_offset() // cache.shape[3]
    if buffer is None or not _in_buffer(cache) or not _claim(buffer, start + S, T):
        buffer, start = _new_buffer(cache, S + T), 0
        buffer.narrow(2, 0, S).copy_(cache)
    buffer.narrow(2, start + S, T).copy_(new)
    setattr(buffer, END, {start + S + T})
    return buffer.narrow(2, start, S + T)


def newest(cache: Tensor, tokens: int) -> Tensor:
    """Return the newest tokens of `cache`, at most `tokens`, in memory for at most twice as many."""
    dropped = cache.shape[2] - tokens
    if dropped > 0 and tokens and _in_buffer(cache) and cache._base.shape[2] <= 2 * (tokens + SPARE):  # type: ignore[union-attr]
        return cache.narrow(2, dropped, tokens)
    return cache if dropped <= 0 else cache.narrow(2, dropped, tokens).clone()


def tight(cache: Tensor, tokens: int) -> Tensor:
    """Return the newest tokens of `cache`, at most `tokens`, in memory for no others."""
    dropped = max(0, cache.shape[2] - tokens)
    return cache.narrow(2, dropped, cache.shape[2] - dropped).clone() if dropped or _in_buffer(cache) else cache


@torch.inference_mode(False)  # it may be used in inference mode and outside
def _new_buffer(like: Tensor, tokens: int) -> Tensor:
    """Return a buffer for `tokens` tokens and a quarter more, so that each token is copied five times on average as a cache grows."""
    B, H, _, D = like.shape
    return torch.empty(B, H, tokens + max(SPARE, tokens // 4), D, dtype=like.dtype, device=like.device)


def _in_buffer(cache: Tensor) -> bool:
    """Return whether a cache is a view of a buffer, of all its streams and heads."""
    buffer = None if pure() else cache._base
    if buffer is None or not hasattr(buffer, END):
        return False
    return cache.stride() == buffer.stride() and cache.shape[:2] == buffer.shape[:2] and cache.shape[3] == buffer.shape[3]


def _claim(buffer: Tensor, position: int, tokens: int) -> bool:
    """Return whether tokens may be written at a position of the buffer: there is room, and no other cache continues from there."""
    if position + tokens > buffer.shape[2]:
        return False
    try:
        getattr(buffer, END).remove(position)  # atomic: sessions of several threads may continue from one cache
    except KeyError:
        return False
    return True
