"""Checks of whether operations are recorded or transformed, in which case some must not work in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])


def transformed() -> bool:
    """Return whether a transform of torch.func (grad, vmap, jvp, ...) or forward-mode AD is active."""
    return not torch.compiler.is_compiling() and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def pure() -> bool:
    """Return whether operations must be free of in-place changes and of custom autograd functions."""
    return torch.compiler.is_compiling() or transformed()


def watched() -> bool:
    """Return whether a dispatch mode, tracing or autocast acts on the operators that are called on a CPU."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._is_tracing() or torch.is_autocast_enabled("cpu"))


def recorded(*tensors: Tensor) -> bool:
    """Return whether gradients or a graph depend on operations on these tensors. If not, their results may be changed in place."""
    return pure() or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def untraced(function: F) -> F:
    """Make torch.compile call `function` instead of tracing it, and take its result as a constant.

    torch.compiler.assume_constant_result does the same, but imports torch._dynamo, which takes a second even in eager use.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
