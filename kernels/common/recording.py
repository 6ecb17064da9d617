"""Whether what is computed is recorded."""

from __future__ import annotations

import torch
from torch import Tensor


def taped(*tensors: Tensor) -> bool:
    """Whether gradients or a graph are made of what is done with the tensors. If not, results may be changed in place."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
