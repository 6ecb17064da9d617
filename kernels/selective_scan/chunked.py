"""The selective scan over many tokens at once.

Every channel and state has its own decay, so matrix products do not apply.
Decays are multiplied, never divided by, so strong decays underflow to zero safely. There are two variants.

Segments, where the number of launches dominates the cost: up to 64 tokens are cut into about 8 runs of about 8.
All runs advance together from zero, token by token; then the state at each run's start is carried through them.

Blocks, on a CPU without gradients: the decays and writes of a few tokens are computed at once, then accumulated in place,
token by token, while they are in the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.common.compiled import one_operator
from zoo.kernels.common.recording import recorded

SEGMENT = 64  # tokens whose states are held at once
BLOCK = 2**17  # entries of the states that fit into a CPU's cache


@one_operator("selective_scan_chunked", result_like="u")
def chunked(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same as `reference.recurrent`, up to rounding; same shapes and arguments."""
    in_place = u.is_cpu and not recorded(u, dt, A, B, C, state)
    size, run = (max(4, BLOCK // state.numel()), _block) if in_place else (SEGMENT, _segment)
    outputs = []
    for u_c, dt_c, B_c, C_c in zip(*(x.split(size, dim=1) for x in (u, dt, B, C)), strict=True):
        y, state = run(u_c, dt_c, A, B_c, C_c, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _block(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    decay = torch.einsum("btd,dn->tbdn", dt, A).exp_()
    states = torch.einsum("btd,btn->tbdn", dt * u, B)  # first the write of each token, then the state after it
    for t in range(len(states)):
        state = torch.addcmul(states[t], decay[t], state, out=states[t])
    y = states @ C.transpose(0, 1)[..., None]
    return y.squeeze(-1).transpose(0, 1), state.clone()


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
