"""Example inputs of the selective scan."""

from __future__ import annotations

from zoo.kernels.common.examples import Inputs, Random

WIDE = ("dt", "A", "initial_state")


def inputs(random: Random, batch: int, T: int, *, N: int = 16, D: int = 96) -> Inputs:
    return {
        "u": random(batch, T, D),
        "dt": 0.1 * random(batch, T, D).exp(),
        "A": -random(D, N).exp(),
        "B": random(batch, T, N),
        "C": random(batch, T, N),
        "initial_state": random(batch, D, N),
    }
