"""Example inputs of Kimi Delta Attention."""

from __future__ import annotations

import torch.nn.functional as F

from zoo.kernels.common.examples import Inputs, Random

WIDE = ("g", "beta", "initial_state")


def inputs(random: Random, batch: int, T: int, *, K: int = 64, V: int = 96, H: int = 2) -> Inputs:
    return {
        "q": F.normalize(random(batch, T, H, K), dim=-1),
        "k": F.normalize(random(batch, T, H, K), dim=-1),
        "v": random(batch, T, H, V),
        "g": -0.1 * random(batch, T, H, K).exp(),
        "beta": random(batch, T, H).sigmoid(),
        "initial_state": 0.1 * random(batch, H, K, V),
    }
