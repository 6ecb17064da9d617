"""Checks shared by the public functions of the operators."""

from __future__ import annotations

import torch
from torch import Tensor


def given_or_zeros(name: str, given: Tensor | None, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the given tensor, or zeros on `like`'s device, as `dtype`. Raises ValueError if it is not of `shape`."""
    if given is None:
        return like.new_zeros(shape, dtype=dtype)
    if given.shape != shape:
        raise ValueError(f"{name} {list(given.shape)}: want {list(shape)}")
    return given.to(dtype)
