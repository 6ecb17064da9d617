"""Example inputs of state-space duality."""

from __future__ import annotations

from zoo.kernels.common.examples import Inputs, Random

WIDE = ("dt", "A", "initial_state")


def inputs(random: Random, batch: int, T: int, *, P: int = 64, N: int = 64, H: int = 2, G: int = 1) -> Inputs:
    return {
        "x": random(batch, T, H, P),
        "dt": 0.1 * random(batch, T, H).exp(),
        "A": -random(H).exp(),
        "B": random(batch, T, G, N),
        "C": random(batch, T, G, N),
        "initial_state": random(batch, H, N, P),
    }
