"""Example inputs of the short causal convolution."""

from __future__ import annotations

from zoo.kernels.common.examples import Inputs, Random

WIDE = ()


def inputs(random: Random, batch: int, T: int, *, D: int = 96, W: int = 4) -> Inputs:
    return {"x": random(batch, T, D), "weight": random(D, W), "bias": random(D), "initial_state": random(batch, D, W - 1)}
