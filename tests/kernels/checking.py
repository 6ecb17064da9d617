"""Helpers of the tests of every operator's Triton form: comparisons with the step recurrence in float64.

Allocations inside are NaN and fenced, and so is every input; the interpreter (interpreter.py) checks addresses and races.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# relative error (L2) that outputs, final state and gradients may have
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
FENCE = 1024  # bytes before and after a tensor
POISON = 0xFF  # every byte of a fence and of fresh memory: NaN in each floating dtype, -1 in each integer one


class Fences(TorchFunctionMode):
    """Inside, tensors from torch.empty, empty_like and new_empty are NaN with fences on both sides; the exit checks the fences."""

    def __init__(self) -> None:
        super().__init__()
        self.stores: list[tuple[Tensor, int, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.empty, torch.empty_like, Tensor.new_empty, torch.empty_strided):
            with torch._C.DisableTorchFunction():
                return self.fenced(result)
        return result

    def __exit__(self, kind: Any, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        if kind is None:
            self.check()

    def fenced(self, like: Tensor) -> Tensor:
        size = sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True)) + 1 if like.numel() else 0
        store = torch.full((FENCE + size * like.element_size() + FENCE,), POISON, dtype=torch.uint8)
        x = torch.empty(0, dtype=like.dtype)
        x.set_(store.untyped_storage(), FENCE // like.element_size(), like.shape, like.stride())
        self.stores.append((store, size * like.element_size(), x.detach()))
        return x

    def check(self) -> None:
        for store, size, x in self.stores:
            clean = bool((store[:FENCE] == POISON).all()) and bool((store[FENCE + size :] == POISON).all())
            assert clean, f"written outside of a tensor {list(x.shape)}"


def fenced(x: Tensor) -> Tensor:
    """Return a copy of x between fences, a leaf."""
    with torch.no_grad():
        return Fences().fenced(x).copy_(x)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted| (L2); |found| if `wanted` is 0."""
    found, wanted = found.detach().double(), wanted.detach().double()
    size = wanted.norm().item()
    return (found - wanted).norm().item() / (size if size > 0 else 1.0)


def errors(
    run: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float64,
    wide: tuple[str, ...] = (),
) -> dict[str, float]:
    """Return the relative errors of each result of `run(**inputs)` and of its gradients, against `reference`
    in float64 on the same numbers.

    Args:
        run, reference: return a tensor or a tuple of tensors; the gradient is that of all of them, weighted at random.
        inputs: by name; floating tensors are cast to `dtype` and get a gradient; everything else is passed unchanged.
        wide: inputs that stay float32 if dtype is narrower (a state, a decay).
    """
    narrow: dict[str, Any] = {}
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            to = torch.promote_types(dtype, torch.float32) if name in wide else dtype
            x = fenced(x.detach().to(to)).requires_grad_()
        elif isinstance(x, Tensor):
            x = fenced(x)
        narrow[name] = x
    is_leaf = {name: isinstance(x, Tensor) and x.requires_grad for name, x in narrow.items()}
    exact = {name: x.detach().double().requires_grad_() if is_leaf[name] else x for name, x in narrow.items()}
    wanted = _tuple(reference(**exact))
    weights = [torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i, y in enumerate(wanted)]
    with Fences():
        found = _tuple(run(**narrow))
        rounded = [fenced(w.to(y.dtype)) for w, y in zip(weights, found, strict=True)]
        torch.autograd.backward(found, rounded)
    torch.autograd.backward(wanted, [w.double() for w in rounded])
    measured = {f"result {i}": relative(y, z) for i, (y, z) in enumerate(zip(found, wanted, strict=True))}
    for name, x in narrow.items():
        if is_leaf[name] and exact[name].grad is not None:
            assert x.grad is not None, f"no gradient of {name}"
            assert x.grad.dtype == x.dtype
            measured[f"d{name}"] = relative(x.grad, exact[name].grad)
    return measured


def check_operator(run: Callable[..., Any], reference: Callable[..., Any], inputs: Mapping[str, Any], **options: Any) -> None:
    """Assert that every error measured by `errors` (same arguments) is within `tolerance`, by default that of the dtype."""
    tolerance = options.pop("tolerance", TOLERANCE[options.get("dtype", torch.float64)])
    measured = errors(run, reference, inputs, **options)
    assert all(error <= tolerance for error in measured.values()), measured  # false for NaN, too


def check_gradients(run: Callable[..., Any], inputs: Mapping[str, Any]) -> None:
    """Compare gradients with torch's finite differences along random directions, in float64."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    rest = {name: x for name, x in inputs.items() if name not in leaves}
    function = lambda *values: _tuple(run(**dict(zip(leaves, values, strict=True)), **rest))  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


def check_compiled(run: Callable[..., Any], inputs: Mapping[str, Any]) -> None:
    """Assert that torch.compile in one graph gives the results and gradients of the eager call."""
    outcomes = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        values = {name: _leaf(x) for name, x in inputs.items()}
        found = _tuple(function(**values))
        leaves = [x for x in values.values() if isinstance(x, Tensor) and x.requires_grad]
        outcomes.append((found, torch.autograd.grad(sum(y.float().square().sum() for y in found), leaves)))
    torch.testing.assert_close(outcomes[1], outcomes[0])


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(x for x in found if x is not None)
