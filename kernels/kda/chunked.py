"""Kimi Delta Attention as matrix products over chunks of at most 64 tokens. README.md has the derivation.

Inside, tensors are [n, M, C, D]: n chunks, M = B H streams of one head each, C tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.common.compiled import one_operator
from zoo.kernels.common.decay import decays
from zoo.kernels.common.recording import pure, recorded
from zoo.kernels.gated_delta_rule.chunked import BASE, CHUNK, SEGMENT, by_chunk, by_token, scan, scan_in_place, unit_lower_inverse


@one_operator("kda_chunked", result_like="v")
def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same as `reference.recurrent`, up to rounding; same shapes and arguments."""
    # the number of segments must not depend on the batch size of a traced graph
    tokens = q.shape[1] if pure() else max(1, SEGMENT // (q.shape[0] * q.shape[2])) * CHUNK
    run = scan if recorded(q, k, v, g, beta, state) else scan_in_place
    outputs = []
    for q_s, k_s, v_s, g_s, beta_s in zip(*(x.split(tokens, dim=1) for x in (q, k, v, g, beta[..., None])), strict=True):
        B, T, H = q_s.shape[:3]
        C = min(CHUNK, max(BASE, 1 << (T - 1).bit_length()))
        q_c, k_c, v_c, g_c, beta_c = (by_chunk(x, C).flatten(1, 2) for x in (q_s, k_s, v_s, g_s, beta_s))
        attention, correlation, since_start, until_end = products(q_c, k_c, g_c)
        solve = unit_lower_inverse(beta_c * correlation) * beta_c.mT
        left = (k_c * until_end).mT
        S_0, _, U, S = run(state.flatten(0, 1), k_c * since_start, v_c, solve, left, since_start[..., -1, :, None])
        o = (q_c * since_start) @ S_0 + attention @ U
        outputs.append(by_token((scale * o).contiguous(), B, T))
        state = S.unflatten(0, (B, H))
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state


def products(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the decayed products of q and k, and of k and k, on and below the diagonal, zeros above: [n, M, C, C] each.

        sum_c q_ic k_jc exp(g_{j+1,c} + ... + g_ic)   for j <= i

    Also returns exp of the log decays from the chunk's start to each token, and from each token to the chunk's end: [n, M, C, K].
    Pairs of blocks of 1, 2, 4, ... tokens are merged. What lies between a token of the second and one of the first is decayed from
    the boundary of the two to either side: sums of non-positive numbers, without a difference.
    """
    C = q.shape[-2]
    # diagonal blocks of both products: [n, M, C / size, 2, size, size]
    X = torch.stack([(q * k).sum(-1), (k * k).sum(-1)], dim=-1)[..., None, None]
    since, until = g, torch.zeros_like(g)  # log decays from the start of a token's block to the token, and from it to the block's end
    size = 1
    while size < C:
        since_1, since_2 = since.unflatten(-2, (-1, 2, size)).unbind(-3)  # [n, M, C / (2 size), size, K]
        until_1, until_2 = until.unflatten(-2, (-1, 2, size)).unbind(-3)
        (k_1, k_2), q_2 = k.unflatten(-2, (-1, 2, size)).unbind(-3), q.unflatten(-2, (-1, 2, size))[..., 1, :, :]
        decay = decays(since_2)
        across = torch.cat([q_2 * decay, k_2 * decay], dim=-2) @ (k_1 * decays(until_1)).mT
        X_1, X_2 = X.unflatten(2, (-1, 2)).unbind(3)
        X = torch.cat([F.pad(X_1, (0, size)), torch.cat([across.unflatten(-2, (2, size)), X_2], dim=-1)], dim=-2)
        since = torch.cat([since_1, since_2 + since_1[..., -1:, :]], dim=-2).flatten(-3, -2)
        until = torch.cat([until_1 + since_2[..., -1:, :], until_2], dim=-2).flatten(-3, -2)
        size *= 2
    attention, correlation = X.squeeze(2).unbind(2)
    return attention, correlation, decays(since), decays(until)
