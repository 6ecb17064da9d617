"""Example inputs of the L2 norm."""

from __future__ import annotations

from zoo.kernels.common.examples import Inputs, Random

WIDE = ()


def inputs(random: Random, batch: int, T: int, *, N: int = 96) -> Inputs:
    return {"x": random(batch, T, N)}
