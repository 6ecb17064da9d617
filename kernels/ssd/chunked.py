"""State-space duality as matrix products over chunks of at most 64 tokens (Mamba-2, arXiv 2405.21060, section 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def chunked(x: Tensor, g: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Same result as `reference.recurrent`, up to rounding; same shapes and arguments."""
    T = x.shape[1]
    size = min(CHUNK, T)

    def by_chunk(x: Tensor) -> Tensor:  # [B, T, H, D] -> [B, H, T/size, size, D]; zeros past the end change nothing
        padded: Tensor = F.pad(x, (0, 0, 0, 0, 0, -T % size)).transpose(1, 2).unflatten(2, (-1, size))
        return padded

    x, B, C = by_chunk(x), by_chunk(B), by_chunk(C)
    g = by_chunk(g[..., None])
    decay = g.cumsum(-2)  # log of the decay from the chunk's start to each token
    causal = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    # summed from each token on: differences of `decay` lose the small steps that follow a large one
    after = g.expand(-1, -1, -1, -1, size).masked_fill(~causal.tril(-1), 0.0).cumsum(-2)
    between = after.masked_fill(~causal, float("-inf")).exp()
    within = (C @ B.mT * between) @ x
    written = (B * between[..., -1, :, None]).mT @ x
    read = C * decay.exp()
    chunk_decay = decay[..., -1:, :].exp()

    outputs = []
    for c in range(x.shape[2]):
        outputs.append(within[:, :, c] + read[:, :, c] @ state)
        state = chunk_decay[:, :, c] * state + written[:, :, c]
    return torch.cat(outputs, dim=2)[:, :, :T].transpose(1, 2), state
