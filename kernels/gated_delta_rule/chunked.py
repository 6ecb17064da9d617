"""The gated delta rule as matrix products over chunks of at most 64 tokens, with a hand-written gradient. README.md has the derivation.

Inside, tensors are [n, M, C, D]: n chunks, M = B H streams of one head each, C tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.common.compiled import one_operator
from zoo.kernels.common.decay import decays
from zoo.kernels.common.recording import pure, recorded
from zoo.kernels.common.second_order import gradients

CHUNK = 64
BASE = 4  # rows inverted by the nilpotent series; larger blocks lose digits on correlated keys
SEGMENT = 64  # chunk matrices (n M) per segment: more do not fit into a CPU's cache


def _keep(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor) -> list[Tensor]:
    """Return o, the final state, and ten intermediates for each segment, which `_gradients` reads."""
    outputs, kept = [], []
    for q_n, k_n, v_n, g_n, beta_n in _segments(q, k, v, g, beta):
        o, state, W, written, *others = _forward(q_n, k_n, v_n, g_n, beta_n, scale, state)
        outputs.append(o)
        kept += [W, written.clone(), *others]  # not a view of beta
    return [torch.cat(outputs, dim=1), state, *kept]


def _gradients(
    do: Tensor, dstate: Tensor, kept: list[Tensor], q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> list[Tensor]:
    """Return the gradients of the tensors among the inputs of `_keep`."""
    found: list[list[Any]] = []
    each = len(kept) // len(list(_segments(q)))
    for n, (do_n, q_n, k_n) in reversed(list(enumerate(_segments(do, q, k)))):
        grads: list[Any] = list(_backward(do_n, dstate, q_n, k_n, scale, *kept[n * each : (n + 1) * each]))
        dstate = grads.pop()
        found.append(grads[:-1])  # without that of scale
    return [torch.cat(parts, dim=1) for parts in zip(*reversed(found), strict=True)] + [dstate]


@one_operator("gated_delta_rule_chunked", result_like="v", keep=_keep, gradients=_gradients)
def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same as `reference.recurrent`, up to rounding; same shapes and arguments."""
    if pure():
        o, state, *_ = _forward(q, k, v, g, beta, scale, state, in_place=False)
        return o, state
    run: Callable[..., tuple[Tensor, ...]] = _Chunked.apply if recorded(q, k, v, g, beta, state) else partial(_forward, keep=False)
    outputs = []
    for segment in _segments(q, k, v, g, beta):
        o, state, *_ = run(*segment, scale, state)
        outputs.append(o)
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else o, state


def _segments(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split [B, T, H, ...] along T into segments that fit into a cache."""
    B, _, H = tensors[0].shape[:3]
    return zip(*(x.split(max(1, SEGMENT // (B * H)) * CHUNK, dim=1) for x in tensors), strict=True)


class _Chunked(torch.autograd.Function):
    """A hand-written gradient of a few large products; autograd of `_forward` would take many small ones."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
        o, final, *kept = _forward(q, k, v, g, beta, scale, state)
        ctx.save_for_backward(q, k, v, g, beta, state, *kept)
        ctx.scale = scale
        return o, final

    @staticmethod
    def backward(ctx: Any, do: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, state, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            form = partial(_forward, in_place=False)
            return gradients(lambda *inputs: form(*inputs)[:2], (q, k, v, g, beta, ctx.scale, state), (do, dstate))
        return _backward(do, dstate, q, k, ctx.scale, *kept)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor, *, keep: bool = True, in_place: bool = True
) -> tuple[Tensor, ...]:
    """Return o, the final state and the intermediates for `_backward`; unless `keep`, intermediates are overwritten to save memory.

    Without `in_place`, autograd, tracers and transforms can record it."""
    B, T, H = q.shape[:3]
    # in place, all chunks are as short as their number allows; `invert_by_blocks` needs BASE * 2^n tokens
    C = -(-T // -(-T // CHUNK)) if in_place else min(CHUNK, max(BASE, 1 << (T - 1).bit_length()))
    qk = torch.cat([by_chunk(q, C), by_chunk(k, C)], dim=-2).flatten(1, 2)  # one operand [n, M, 2C, K] of three products
    v, g, beta = (by_chunk(x, C).flatten(1, 2) for x in (v, g[..., None], beta[..., None]))
    decay = decays(g.cumsum(-2))  # from the chunk's start to each token
    # log of the decay from token j to token i; a difference of cumulative sums would lose small steps after a large one
    below = torch.ones(C, C, dtype=g.dtype, device=g.device).tril_(-1)
    between = decays((g.clamp(min=-1e4) * below).cumsum(-2))
    between = between.tril_() if in_place else between.tril()
    k = qk[..., C:, :]
    # in place, a view would fix the batch size of a traced graph
    times, plus = (Tensor.mul_, Tensor.baddbmm_) if in_place else (Tensor.mul, Tensor.baddbmm)
    over = Tensor.mul if keep or not in_place else Tensor.mul_
    attention, correlation = times((qk @ k.mT).unflatten(-2, (2, C)), between.unsqueeze(-3)).unbind(-3)
    solve = (by_substitution if in_place else unit_lower_inverse)(times(correlation, beta))
    k_left = k * between[..., -1, :, None]
    qk_decayed = over(qk.unflatten(-2, (2, C)), decay.unsqueeze(-3)).flatten(-3, -2)
    q_decayed, k_decayed = qk_decayed.split(C, dim=-2)

    run = scan_in_place if in_place else scan
    S_0, W, U, S = run(state.flatten(0, 1), k_decayed, v, over(solve, beta.mT), k_left.mT, decay[..., -1:, :])
    o = plus((q_decayed @ S_0).flatten(0, 1), attention.flatten(0, 1), U.flatten(0, 1), beta=scale, alpha=scale)
    o = by_token(o.unflatten(0, U.shape[:2]), B, T)
    return o, S.unflatten(0, (B, H)), W, beta, decay, between, solve, attention, qk_decayed, k_left, S_0, U


def scan(S: Tensor, k: Tensor, v: Tensor, solve: Tensor, left: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    """Scan the chunks: return the state at each start, W = v - k S, U = solve W, and the final state."""
    starts, wanted, updates = [], [], []
    for k_c, v_c, solve_c, left_c, decay_c in _chunks(k, v, solve, left, decay):
        starts.append(S)
        wanted.append(torch.baddbmm(v_c, k_c, S, alpha=-1))
        updates.append(torch.bmm(solve_c, wanted[-1]))
        S = torch.addcmul(torch.bmm(left_c, updates[-1]), decay_c, S)
    return torch.stack(starts), torch.stack(wanted), torch.stack(updates), S


def scan_in_place(S: Tensor, k: Tensor, v: Tensor, solve: Tensor, left: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    """Do the same as `scan`, writing into tensors allocated for all chunks."""
    S_0 = torch.empty((len(v), *S.shape), dtype=S.dtype, device=S.device)
    S_0[0] = S
    S = torch.empty_like(S)  # a stream keeps this state: it must not be a view of a larger tensor
    W, U = v.clone(memory_format=torch.contiguous_format), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    ends = [*S_0[1:].unbind(0), S]
    for end_c, (S_c, k_c, W_c, U_c, solve_c, left_c, decay_c) in zip(ends, _chunks(S_0, k, W, U, solve, left, decay), strict=True):
        W_c.baddbmm_(k_c, S_c, alpha=-1)
        torch.bmm(solve_c, W_c, out=U_c)
        torch.bmm(left_c, U_c, out=end_c).addcmul_(decay_c, S_c)
    return S_0, W, U, S


def _backward(do: Tensor, dstate: Tensor, q: Tensor, k: Tensor, scale: float, *kept: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, g, beta, scale (None) and the state."""
    W, beta, decay, between, solve, attention, qk_decayed, k_left, S_0, U = kept
    B, T = do.shape[:2]
    C = beta.shape[-2]
    q_decayed, k_decayed = qk_decayed.split(C, dim=-2)
    q, k, do = (by_chunk(x, C).flatten(1, 2) for x in (q, k, do * scale))

    dS = dstate.flatten(0, 1)
    dends, dwrites = [], []  # gradients of the state at each chunk's end, and of beta (v - k S)
    steps = _chunks(attention.mT @ do, k_left, solve, beta, decay[..., -1:, :], q_decayed.mT @ do, k_decayed)
    for dU_c, left_c, solve_c, beta_c, decay_c, dS_c, k_c in reversed(list(steps)):
        dends.append(dS)
        dwrites.append(solve_c.mT @ torch.baddbmm(dU_c, left_c, dS))
        dS = torch.baddbmm(torch.addcmul(dS_c, decay_c, dS), k_c.mT, beta_c * dwrites[-1], alpha=-1)
    dS_C, Z = torch.stack(dends[::-1]), torch.stack(dwrites[::-1])

    # the rows of q and those of k are multiplied by the same matrices
    both = torch.cat([do, Z], dim=-2)
    pairs = (both @ U.mT).unflatten(-2, (2, C)).mul_(between.unsqueeze(-3)).tril_(-1).flatten(-3, -2)  # gradients of q k^T and k k^T
    within = pairs @ k
    dq, reads = torch.addcmul(within, both @ S_0.mT, torch.cat([decay, decay], dim=-2)).split(C, dim=-2)
    solved, dk_reads = within[..., C:, :], beta * reads
    dk_written = pairs.mT @ torch.cat([q, -beta * k], dim=-2)
    left = U @ dS_C.mT * between[..., -1, :, None]
    dv = beta * Z
    dbeta = (Z * W).sum(-1) - (solved * k).sum(-1)
    # A token's decay scales what its q and k read from the past, and divides what its k leaves for later tokens. A token's own
    # write has no decay: its terms are omitted, since they would cancel and, under strong decay, swamp the remaining terms.
    dleft = (left * k).sum(-1)
    dleft[..., -1] = 0
    ddecay = (dq * q - (dk_reads + dk_written) * k).sum(-1) - dleft
    ddecay[..., -1] += dleft.sum(-1) + decay[..., -1, 0] * (S_0 * dS_C).sum((-1, -2))
    dg = ddecay.flip(-1).cumsum(-1).flip(-1)
    own = (do * U).sum(-1, keepdim=True)
    dq = dq + own * k
    dk = dk_written + left - dk_reads + own * q
    grads = (by_token(x, B, T) for x in (dq, dk, dv, dg[..., None], dbeta[..., None]))
    dq, dk, dv, dg, dbeta = grads
    return dq, dk, dv, dg.squeeze(-1), dbeta.squeeze(-1), None, dS.unflatten(0, (B, -1))


def by_chunk(x: Tensor, size: int) -> Tensor:
    """Rearrange [B, T, H, D] -> [n, B, H, size, D]; zeros past the end have no effect."""
    pad = -x.shape[1] % size
    x = F.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x  # F.pad by zero would still copy
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)


def by_token(x: Tensor, batch: int, length: int) -> Tensor:
    """Rearrange [n, B H, size, D] -> [B, T, H, D]."""
    return x.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.unbind(0) for x in tensors), strict=True)


def unit_lower_inverse(A: Tensor) -> Tensor:
    """Invert I + A, A strictly lower triangular: [..., C, C]; entries on and above the diagonal are ignored.

    By forward substitution. A traced graph may lack that operator: there, C must be 4 * 2^n; 4 x 4 diagonal blocks are inverted by
    (I - A)(I + A^2), then pairs of blocks are merged: [[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]].
    Both keep float32 accuracy on correlated keys, where the power series over all C rows overflows.
    """
    return invert_by_blocks(A) if torch.compiler.is_compiling() else by_substitution(A)


def by_substitution(A: Tensor) -> Tensor:
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve_triangular(A, eye.expand_as(A), upper=False, unitriangular=True)


def invert_by_blocks(A: Tensor) -> Tensor:
    C = A.shape[-1]
    D = _blocks(A, BASE, 0).tril(-1)
    eye = torch.eye(BASE, dtype=A.dtype, device=A.device)
    X = (eye - D) @ (eye + D @ D)
    size = BASE
    while size < C:
        P, Q = X[..., 0::2, :, :], X[..., 1::2, :, :]
        top = F.pad(P, (0, size))
        bottom = torch.cat([-Q @ _blocks(A, size, 1) @ P, Q], dim=-1)
        X = torch.cat([top, bottom], dim=-2)
        size *= 2
    return X.squeeze(-3)


def _blocks(A: Tensor, size: int, left: int) -> Tensor:
    """Return the diagonal blocks of A: [..., C, C] (`left` = 0), or the block left of every second one (1): [..., n, size, size]."""
    across = A.shape[-1] // size
    block = torch.arange(left, across, 1 + left, device=A.device)[:, None]
    row = block * size + torch.arange(size, device=A.device)
    # one gather; slicing out each block would add many operators to a graph
    rows = A.unflatten(-1, (across, size)).flatten(-3, -2).index_select(-2, (row * across + block - left).flatten())
    return rows.unflatten(-2, (-1, size))
