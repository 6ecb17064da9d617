"""Inputs of every operator such as a model gives it, at any head sizes: for the self-check, the compile gate and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Random = Callable[..., Tensor]
Inputs = dict[str, Any]  # arguments of the operator by name


def example(
    operator: str, *, T: int, batch: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, **sizes: int
) -> Inputs:
    """Arguments of `operator` but for `output_final_state`. Floating inputs are leaves that require gradients.

    Args:
        sizes: as in the rows of tuned.json: K and V of gated_delta_rule, N of selective_scan, P and N of ssd, D and W of
            the convolutions; and H, HV, G or D where the operator has heads, groups or channels.
    """
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    inputs = EXAMPLES[operator](random, batch, T, **sizes)
    narrow = {name: x if name in WIDE else x.to(dtype) for name, x in inputs.items()}
    if dtype == torch.float64:
        narrow = {name: x.to(dtype) for name, x in narrow.items()}
    return {name: x.detach().requires_grad_() for name, x in narrow.items()}


def _gated_delta_rule(random: Random, batch: int, T: int, *, K: int, V: int, H: int = 2, HV: int = 2) -> Inputs:
    return {
        "q": F.normalize(random(batch, T, H, K), dim=-1),
        "k": F.normalize(random(batch, T, H, K), dim=-1),
        "v": random(batch, T, HV, V),
        "g": -0.1 * random(batch, T, HV).exp(),
        "beta": random(batch, T, HV).sigmoid(),
        "initial_state": 0.1 * random(batch, HV, K, V),
    }


def _selective_scan(random: Random, batch: int, T: int, *, N: int, D: int = 256) -> Inputs:
    return {
        "u": random(batch, T, D),
        "dt": 0.1 * random(batch, T, D).exp(),
        "A": -random(D, N).exp(),
        "B": random(batch, T, N),
        "C": random(batch, T, N),
        "initial_state": random(batch, D, N),
    }


def _ssd(random: Random, batch: int, T: int, *, P: int, N: int, H: int = 2, G: int = 1) -> Inputs:
    return {
        "x": random(batch, T, H, P),
        "dt": 0.1 * random(batch, T, H).exp(),
        "A": -random(H).exp(),
        "B": random(batch, T, G, N),
        "C": random(batch, T, G, N),
        "initial_state": random(batch, H, N, P),
    }


def _causal_conv1d(random: Random, batch: int, T: int, *, D: int, W: int) -> Inputs:
    return {"x": random(batch, T, D), "weight": random(D, W), "bias": random(D), "initial_state": random(batch, D, W - 1)}


def _dynamic_conv1d(random: Random, batch: int, T: int, *, D: int, W: int) -> Inputs:
    return {"x": random(batch, T, D), "weight": random(batch, T, D, W), "initial_state": random(batch, D, W - 1)}


def _rmsnorm(random: Random, batch: int, T: int, *, N: int) -> Inputs:
    return {"x": random(batch, T, N), "weight": random(N)}


def _gated_rmsnorm(random: Random, batch: int, T: int, *, N: int) -> Inputs:
    return {"x": random(batch, T, N), "gate": random(batch, T, N), "weight": random(N)}


def _gdn_step(random: Random, batch: int, T: int, *, K: int, V: int, H: int = 2, HV: int = 2, W: int = 4) -> Inputs:
    keys, values = H * K, HV * V  # of one token, whatever T
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


def _l2norm(random: Random, batch: int, T: int, *, N: int) -> Inputs:
    return {"x": random(batch, T, N)}


# inputs that stay float32 under a narrower dtype, as models keep them
WIDE = ("A", "g", "beta", "dt", "initial_state", "state")

EXAMPLES: dict[str, Callable[..., Inputs]] = {
    "causal_conv1d": _causal_conv1d,
    "dynamic_conv1d": _dynamic_conv1d,
    "gated_delta_rule": _gated_delta_rule,
    "gated_rmsnorm": _gated_rmsnorm,
    "gdn_step": _gdn_step,
    "l2norm": _l2norm,
    "rmsnorm": _rmsnorm,
    "selective_scan": _selective_scan,
    "ssd": _ssd,
}

# of each operator, for a self-check: small enough for a CPU, large enough to take several tiles
SIZES: dict[str, dict[str, int]] = {
    "causal_conv1d": {"D": 96, "W": 4},
    "dynamic_conv1d": {"D": 96, "W": 4},
    "gated_delta_rule": {"K": 64, "V": 96},
    "gated_rmsnorm": {"N": 96},
    "gdn_step": {"K": 64, "V": 96},
    "l2norm": {"N": 96},
    "rmsnorm": {"N": 96},
    "selective_scan": {"D": 96, "N": 16},
    "ssd": {"N": 64, "P": 64},
}
