"""Tells whether autograd or a tracer records what is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def recorded(*tensors: Tensor) -> bool:
    """Return whether gradients or a graph depend on operations on these tensors. If not, their results may be changed in place."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
