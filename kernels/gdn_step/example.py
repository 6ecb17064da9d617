"""Example inputs of the decode step of Gated DeltaNet."""

from __future__ import annotations

from zoo.kernels.common.examples import Inputs, Random

WIDE = ("state",)


def inputs(random: Random, batch: int, T: int, *, K: int = 64, V: int = 96, H: int = 2, HV: int = 2, W: int = 4) -> Inputs:
    keys, values = H * K, HV * V  # one token, for any T
    return {
        "q": random(batch, 1, keys),
        "k": random(batch, 1, keys),
        "v": random(batch, 1, values),
        "a": random(batch, 1, HV),
        "b": random(batch, 1, HV),
        "gate": random(batch, 1, values),
        "q_conv": random(keys, W),
        "k_conv": random(keys, W),
        "v_conv": random(values, W),
        "A_log": random(HV),
        "dt_bias": random(HV),
        "norm_weight": random(V),
        "window": random(batch, 2 * keys + values, W - 1),
        "state": random(batch, HV, K, V),
    }
