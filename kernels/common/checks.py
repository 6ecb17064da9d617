"""What the public faces of the operators check alike."""

from __future__ import annotations

import torch
from torch import Tensor


def given_or_zeros(name: str, given: Tensor | None, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor of `shape` that a caller gave, or zeros on `like`'s device, as `dtype`. Raises ValueError that names it."""
    if given is None:
        return like.new_zeros(shape, dtype=dtype)
    if given.shape != shape:
        raise ValueError(f"{name} {list(given.shape)}: want {list(shape)}")
    return given.to(dtype)
