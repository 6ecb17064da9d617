"""Attention of a token on a CPU, in one pass over the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float | None = None, **_: Any) -> Tensor:
    """Attend without a gradient from q [n, H, 1, D] to k, v [n, Hkv, S, D], float32. `build` must have returned.

    Args:
        visible: bool [n, 1, 1, S]; at least one slot of each stream.
        scale: factor of the products of queries and keys; default D^-0.5.
    Returns:
        [n, H, 1, D].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.zoo.attend(q[:, :, 0], k, v, visible[:, 0, 0], scale)[:, :, None]
