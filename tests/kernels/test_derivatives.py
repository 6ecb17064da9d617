"""Derivatives of every PyTorch form: second order, forward mode, and the transforms of torch.func."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from torch import Tensor

from zoo.kernels.common.examples import example
from zoo.kernels.dispatch import kernels, operators

SIZES = {"K": 3, "V": 4, "N": 4, "P": 3, "D": 3, "W": 3}
FORMS = [name for name in kernels.names() if not name.endswith(".triton") and name.split(".")[0] in operators.names()]


@pytest.mark.parametrize("name", FORMS)
def test_derivatives(name: str) -> None:
    operator, form = name.split(".")
    run, parameters = operators.get(operator), inspect.signature(operators.get(operator)).parameters
    accepted = inspect.signature(importlib.import_module(f"zoo.kernels.{operator}.example").inputs).parameters
    given = example(operator, T=9, batch=2, dtype=torch.float64, **{size: n for size, n in SIZES.items() if size in accepted})
    options = {"form": form} | ({"output_final_state": True} if "output_final_state" in parameters else {})

    def results(*values: Tensor) -> tuple[Tensor, ...]:
        found = run(**dict(zip(given, values, strict=True)), **options)
        return (found,) if isinstance(found, Tensor) else found

    def score(*values: Tensor) -> Tensor:
        return sum(y.square().sum() for y in results(*values))  # type: ignore[return-value]

    leaves = tuple(given.values())
    assert torch.autograd.gradcheck(results, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(results, leaves, fast_mode=True)
    values = tuple(x.detach() for x in leaves)
    want = torch.autograd.grad(score(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(score, argnums=tuple(range(len(leaves))))(*values), want)
    _, change = torch.func.jvp(score, values, tuple(torch.ones_like(x) for x in values))
    torch.testing.assert_close(change, sum(x.sum() for x in want))
    for place in (0, len(values) - 1):  # one input alone is batched
        batch = torch.stack([values[place], 2 * values[place]])
        axes = tuple(0 if i == place else None for i in range(len(values)))
        got = torch.func.vmap(torch.func.grad(score, argnums=place), in_dims=axes)(*values[:place], batch, *values[place + 1 :])
        torch.testing.assert_close(got[0], want[place])
