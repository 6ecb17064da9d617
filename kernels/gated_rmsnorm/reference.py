"""The definition of the gated root mean square norm, which is also its form for CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.common.recording import recorded
from zoo.kernels.rmsnorm.reference import scaled


def norm_then_gate(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute weight * norm(x) * silu(gate). x, gate: [..., N] or [..., G, N]. weight: [N] or [G, N]."""
    y, gates = scaled(x, weight, eps, x.dtype), F.silu(gate)
    return (y * gates if y.dtype != gate.dtype or recorded(y, gates) else y.mul_(gates)).to(gate.dtype)


def gate_then_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute weight * norm(x * silu(gate)), shapes as above."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return scaled(x.to(wide) * F.silu(gate.to(wide)), weight, eps, gate.dtype)


def normed(x: Tensor, gate: Tensor, weight: Tensor, eps: float, gate_first: bool) -> Tensor:
    return (gate_then_norm if gate_first else norm_then_gate)(x, gate, weight, eps).to(gate.dtype)
