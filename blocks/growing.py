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
    S, T, buffer = cache.shape[2], new.shape[2], _buffer(cache)
    start = cache.storage_offset() // cache.shape[3]
    if buffer is None or not _claim(buffer, start + S, T):
        buffer, start = _new_buffer(cache, S + T), 0
        buffer.narrow(2, 0, S).copy_(cache)
    buffer.narrow(2, start + S, T).copy_(new)
    setattr(buffer, END, {start + S + T})
    return buffer.narrow(2, start, S + T)


def newest(cache: Tensor, tokens: int) -> Tensor:
    """Return the newest tokens of `cache`, at most `tokens`, in memory for at most twice as many."""
    if cache.shape[2] <= tokens:
        return cache
    last, buffer = cache.narrow(2, cache.shape[2] - tokens, tokens), _buffer(cache)
    return last if tokens and buffer is not None and buffer.shape[2] <= 2 * (tokens + SPARE) else last.clone()


def tight(cache: Tensor, tokens: int) -> Tensor:
    """Return the newest tokens of `cache`, at most `tokens`, in memory for no others."""
    if cache.shape[2] <= tokens:
        return cache if _buffer(cache) is None else cache.clone()
    return cache.narrow(2, cache.shape[2] - tokens, tokens).clone()


@torch.inference_mode(False)  # it may be used in inference mode and outside
def _new_buffer(like: Tensor, tokens: int) -> Tensor:
    """Return a buffer for `tokens` tokens and a quarter more, so that each token is copied five times on average as a cache grows."""
    B, H, _, D = like.shape
    return torch.empty(B, H, tokens + max(SPARE, tokens // 4), D, dtype=like.dtype, device=like.device)


def _buffer(cache: Tensor) -> Tensor | None:
    """Return the buffer of which a cache is a view, with all its streams and heads; None if there is none."""
    buffer = None if pure() else cache._base
    if buffer is None or not hasattr(buffer, END):
        return None
    whole = cache.stride() == buffer.stride() and cache.shape[:2] == buffer.shape[:2] and cache.shape[3] == buffer.shape[3]
    return buffer if whole else None


def _claim(buffer: Tensor, position: int, tokens: int) -> bool:
    """Return whether tokens may be written at a position of the buffer: there is room, and no other cache continues from there."""
    if position + tokens > buffer.shape[2]:
        return False
    try:
        getattr(buffer, END).remove(position)  # atomic: sessions of several threads may continue from one cache
    except KeyError:
        return False
    return True
