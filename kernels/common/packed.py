"""Packed sequences: several sequences of different lengths concatenated in one row.

`cu_seqlens` [S + 1] int32 or int64: sequence s is tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1 of the only row.
None: every row is a sequence, and these functions change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ZooError


def streams(batch: int, total: int, cu_seqlens: Tensor | None) -> int:
    """Return the number of sequences, each with its own state.

    Raises:
        ValueError: no tokens at all.
        ZooError: `cu_seqlens` does not fit.
    """
    if not batch or not total:
        raise ValueError(f"inputs [{batch}, {total}, ...]: want at least one row and one token")
    if cu_seqlens is None:
        return batch
    if not isinstance(cu_seqlens, Tensor):
        raise ZooError(f"cu_seqlens: {type(cu_seqlens).__name__}; want a tensor, [S + 1] int32 or int64")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ZooError(f"cu_seqlens {list(cu_seqlens.shape)} {cu_seqlens.dtype}: want [S + 1] int32 or int64, S at least 1")
    if batch != 1:
        raise ZooError(f"cu_seqlens: packed sequences must be in one row, the batch has {batch}")
    # reading a tensor on a GPU would synchronise
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != total or sorted(set(ends)) != ends:
            raise ZooError(f"cu_seqlens {ends}: want strictly increasing from 0 to {total}, the number of tokens")
    return len(cu_seqlens) - 1


def unpack(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Pad packed sequences: [1, total, ...] -> [S, longest, ...], zeros after the end of each sequence."""
    if cu_seqlens is None:
        return x
    place, inside = _layout(cu_seqlens)
    return torch.where(inside.reshape(*inside.shape, *[1] * (x.ndim - 2)), x[0, place], 0)


def pack(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Undo `unpack`: [S, longest, ...] -> [1, total, ...]."""
    return x if cu_seqlens is None else x[_layout(cu_seqlens)[1]][None]


def newest(x: Tensor, before: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the last K-1 tokens of each sequence of x [B, T, C] preceded by `before` [S, C, K-1]: [S, C, K-1], oldest first."""
    size = before.shape[-1]
    if cu_seqlens is None:
        fresh = x[:, max(0, x.shape[1] - size) :].mT.to(before.dtype)
        return torch.cat([before[..., fresh.shape[-1] :], fresh], dim=-1)
    length = cu_seqlens.diff()
    back = torch.arange(-size, 0, device=x.device) + length[:, None]  # [S, K-1], index in the sequence; negative: in `before`
    fresh = x[0, (cu_seqlens[:-1, None] + back).clamp(min=0)].mT.to(before.dtype)
    kept = before.gather(-1, (back + size).clamp(max=size - 1)[:, None].expand_as(before))
    return torch.where((back >= 0)[:, None], fresh, kept)


def _layout(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each slot of the padded batch, the index of its packed token and whether it holds one: [S, longest] each."""
    length = cu_seqlens.diff()
    column = torch.arange(int(length.max()), device=cu_seqlens.device)
    inside = column < length[:, None]
    return torch.where(inside, cu_seqlens[:-1, None] + column, 0), inside
