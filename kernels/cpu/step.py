"""Recurrences for one token on a CPU without gradients, which read and write the state once: for `zoo.kernels.dispatch.in_place`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.dispatch import kernels

Form = Callable[..., tuple[Tensor, Tensor]]


def _step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Run `torch.ops.zoo.step_`, for which `build` must have returned, on inputs [B, 1, ...] of any dtype.

    Returns o [B, 1, H, V] in v's dtype, and the state.
    """
    inputs = (None if x is None else x[:, 0].float() for x in (q, k, v, decay, beta))
    return torch.ops.zoo.step_(state, *inputs, scale)[:, None].to(v.dtype), state


def _gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    return _step(state, q, k, v, g.float().exp(), beta, scale)


def _ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    y, state = _step(state, C, B, x.float() * dt.float()[..., None], (dt.float() * A.float()).exp())
    return y.to(x.dtype), state


def _in_place(operator: str, step: Form) -> Form:
    """Return a form that runs `step` where it can, and the operator's definition elsewhere."""

    def run(*inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, state, cu_seqlens = inputs
        if state.dtype == torch.float32 and tensors[0].shape[1] == 1 and cu_seqlens is None:
            return step(*tensors, state)
        return kernels.get(f"{operator}.reference")(*inputs)

    return run


_STEPS: dict[str, Form] = {"gated_delta_rule": _gated_delta_rule, "kda": _gated_delta_rule, "ssd": _ssd}
STEPS = {operator: _in_place(operator, step) for operator, step in _STEPS.items()}
