"""Example inputs of the gated RMS norm."""

from __future__ import annotations

from zoo.kernels.common.examples import Inputs, Random

WIDE = ()


def inputs(random: Random, batch: int, T: int, *, N: int = 96) -> Inputs:
    return {"x": random(batch, T, N), "gate": random(batch, T, N), "weight": random(N)}
