"""Decay factors from their logarithms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def decays(log: Tensor) -> Tensor:
    """Return exp(log), with values below tiny ** 0.8 (4e-31 in float32) set to zero.

    Products with smaller values would be subnormal, and a CPU is up to a hundred times slower on subnormal numbers.
    """
    return F.threshold(log, 0.8 * math.log(torch.finfo(log.dtype).tiny), -math.inf).exp_()
