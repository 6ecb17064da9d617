"""The selective scan over many tokens at once.

Every channel and state has its own decay, so no matrix product does it. A segment of up to 64 tokens is cut into
about 8 runs of about 8 tokens: all runs advance together from zero, token by token; then the state at each run's
start is carried through them. Decays are only ever multiplied, never divided by, so strong ones vanish safely.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SEGMENT = 64  # tokens whose states are held at once


def chunked(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Same result as `reference.recurrent`, up to rounding; same shapes and arguments."""
    outputs = []
    for start in range(0, u.shape[1], SEGMENT):
        piece = slice(start, start + SEGMENT)
        y, state = _segment(u[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _segment(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    T = u.shape[1]
    length = 1 << (T.bit_length() + 1) // 2
    # zeros past the end neither decay nor write; [B, runs, length, D or N]
    u, dt, B, C = (F.pad(x, (0, 0, 0, -T % length)).unflatten(1, (-1, length)) for x in (u, dt, B, C))
    decay = (dt[..., None] * A).exp()
    write = (dt * u)[..., None] * B[..., None, :]
    since_start = (dt.cumsum(2)[..., None] * A).exp()

    local = [write[:, :, 0]]
    for t in range(1, length):
        local.append(torch.addcmul(write[:, :, t], decay[:, :, t], local[-1]))
    within = torch.stack(local, dim=2)
    starts = []
    for run in range(u.shape[1]):
        starts.append(state)
        state = torch.addcmul(within[:, run, -1], since_start[:, run, -1], state)
    states = torch.addcmul(within, since_start, torch.stack(starts, dim=1)[:, :, None])
    y = (states * C[..., None, :]).sum(-1)
    return y.flatten(1, 2)[:, :T], state
