"""The gated delta rule as matrix products over chunks of at most 64 tokens. README.md has the derivation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
BASE = 4  # rows inverted by the nilpotent series; larger blocks lose digits on correlated keys


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """Same result as `reference.recurrent`, up to rounding; same shapes and arguments."""
    T = q.shape[1]
    C = min(CHUNK, max(BASE, 1 << (T - 1).bit_length()))
    pad = -T % C

    def by_chunk(x: Tensor) -> Tensor:  # [B, T, H, D] -> [B, H, T/C, C, D]; zeros past the end change nothing
        x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x
        return x.transpose(1, 2).unflatten(2, (-1, C))

    q, k, v = by_chunk(q), by_chunk(k), by_chunk(v)
    g, beta = by_chunk(g[..., None]).squeeze(-1), by_chunk(beta[..., None])  # [B, H, n, C], [B, H, n, C, 1]

    decay = g.cumsum(-1)  # log of the decay from the chunk's start to each token
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    # log of the decay from token j to token i; a difference of `decay` would lose the small steps after a large one
    after = g[..., None].masked_fill(~causal.tril(-1), 0.0).cumsum(-2)
    # mask before exp, so that what stands above the diagonal is exactly zero
    between = after.masked_fill(~causal, float("-inf")).exp()
    A = (beta * (k @ k.mT) * between).tril(-1)
    solve = unit_lower_inverse(A)
    scores = q @ k.mT * between
    q_decayed, k_decayed = q * decay.exp()[..., None], k * decay.exp()[..., None]
    k_left = k * between[..., -1, :, None]
    chunk_decay = decay[..., -1].exp()[..., None, None]

    outputs = []
    for c in range(q.shape[2]):
        update = solve[:, :, c] @ (beta[:, :, c] * (v[:, :, c] - k_decayed[:, :, c] @ state))
        outputs.append(q_decayed[:, :, c] @ state + scores[:, :, c] @ update)
        state = chunk_decay[:, :, c] * state + k_left[:, :, c].mT @ update
    o = torch.cat(outputs, dim=2)[:, :, :T] * scale
    return o.transpose(1, 2), state


def unit_lower_inverse(A: Tensor) -> Tensor:
    """(I + A)^-1 of strictly lower triangular A: [..., C, C], C = 4 * 2^n.

    Inverts 4 x 4 diagonal blocks by (I - A)(I + A^2), then merges pairs of blocks:
    [[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]]. Keeps float32 accuracy on correlated keys,
    where the series over all C rows explodes.
    """
    if A.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _UnitLowerInverse.apply(A)
    return _invert(A)


class _UnitLowerInverse(torch.autograd.Function):
    """dA = -X^T dX X^T: two products instead of the backward pass of every merge."""

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        X = _invert(A)
        ctx.save_for_backward(X)
        return X

    @staticmethod
    def backward(ctx: Any, dX: Tensor) -> Tensor:
        (X,) = ctx.saved_tensors
        return -(X.mT @ dX @ X.mT).tril(-1)


def _invert(A: Tensor) -> Tensor:
    C = A.shape[-1]
    blocks = A.unflatten(-1, (-1, BASE)).unflatten(-3, (-1, BASE))  # [..., n, 4, n, 4]
    D = torch.stack([blocks[..., i, :, i, :] for i in range(C // BASE)], dim=-3)
    eye = torch.eye(BASE, dtype=A.dtype, device=A.device)
    X = (eye - D) @ (eye + D @ D)
    size = BASE
    while size < C:
        blocks = A.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
        R = torch.stack([blocks[..., i + 1, :, i, :] for i in range(0, C // size, 2)], dim=-3)
        P, Q = X[..., 0::2, :, :], X[..., 1::2, :, :]
        top = F.pad(P, (0, size))
        bottom = torch.cat([-Q @ R @ P, Q], dim=-1)
        X = torch.cat([top, bottom], dim=-2)
        size *= 2
    return X.squeeze(-3)
