"""Example inputs of the gated delta rule."""

from __future__ import annotations

import torch.nn.functional as F

from zoo.kernels.common.examples import Inputs, Random

WIDE = ("g", "beta", "initial_state")


def inputs(random: Random, batch: int, T: int, *, K: int = 64, V: int = 96, H: int = 2, HV: int = 2) -> Inputs:
    return {
        "q": F.normalize(random(batch, T, H, K), dim=-1),
        "k": F.normalize(random(batch, T, H, K), dim=-1),
        "v": random(batch, T, HV, V),
        "g": -0.1 * random(batch, T, HV).exp(),
        "beta": random(batch, T, HV).sigmoid(),
        "initial_state": 0.1 * random(batch, HV, K, V),
    }
