"""State-space duality as matrix products over chunks of at most 64 tokens (Mamba-2, arXiv 2405.21060, section 6).

The heads of a group share B and C, so their values are concatenated into one product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.common.compiled import one_operator
from zoo.kernels.common.decay import decays
from zoo.kernels.common.recording import recorded

CHUNK = 64
PIECE = 1 << 16  # elements of x that are computed at a time where no gradients are wanted: their intermediates stay in the cache


@one_operator("ssd_chunked", result_like="x")
def chunked(x: Tensor, g: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same as `reference.recurrent`, up to rounding; same shapes and arguments."""
    T, size = B.shape[1], max(CHUNK, PIECE // (x[:, 0].numel() * CHUNK) * CHUNK)
    if size >= T or not x.is_cpu or recorded(x, g, B, C, state):
        return _chunked(x, g, B, C, state)
    outputs = []
    for x_p, g_p, B_p, C_p in zip(*(y.split(size, dim=1) for y in (x, g, B, C)), strict=True):
        y, state = _chunked(x_p, g_p, B_p, C_p, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _chunked(x: Tensor, g: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    T, G = B.shape[1:3]
    size = -(-T // -(-T // CHUNK))  # as short as the number of chunks allows

    def by_chunk(x: Tensor) -> Tensor:  # [B, T, ...] -> [n, B, size, ...]; zeros past the end change nothing
        padded: Tensor = F.pad(x, (*[0] * 2 * (x.ndim - 2), 0, -T % size)) if T % size else x
        return padded.unflatten(1, (-1, size)).transpose(0, 1)

    x, g = (by_chunk(y.unflatten(2, (G, -1))) for y in (x, g))  # [n, B, size, G, heads of a group, P], [n, B, size, G, heads]
    B, C = (by_chunk(y).transpose(2, 3) for y in (B, C))  # [n, B, G, size, N]
    g = g.permute(0, 1, 3, 4, 2)  # [n, B, G, heads, size]
    decay = decays(g.cumsum(-1))  # from the chunk's start to each token
    # summed from each token: a difference of cumulative sums would lose small steps that follow a large one
    between = decays(g[..., None].expand(*g.shape, size).tril(-1).cumsum(-2)).tril()
    within = ((C @ B.mT)[:, :, :, None] * between) @ x.permute(0, 1, 3, 4, 2, 5)  # [n, B, G, heads, size, P]
    left = x.transpose(2, 3) * between[..., -1, :].mT[..., None]  # [n, B, G, size, heads, P]
    written = B.mT @ left.flatten(-2)  # [n, B, G, N, heads P]

    S = state.unflatten(1, (G, -1)).transpose(2, 3)  # [B, G, N, heads, P]
    starts = []
    for written_c, decay_c in zip(written, decay[..., None, :, -1, None], strict=True):
        starts.append(S.flatten(-2))
        S = torch.addcmul(written_c.view_as(S), decay_c, S)
    read = (C @ torch.stack(starts)).unflatten(-1, (-1, x.shape[-1]))  # [n, B, G, size, heads, P]
    y = torch.addcmul(within.transpose(3, 4), decay.mT[..., None], read)
    y = y.permute(1, 0, 3, 2, 4, 5).flatten(1, 2)[:, :T].flatten(2, 3)
    return y, S.transpose(2, 3).flatten(1, 2).contiguous()
