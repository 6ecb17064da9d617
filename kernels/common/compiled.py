"""PyTorch forms as single operators of compiled graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Form = Callable[..., tuple[Tensor, Tensor]]


def one_operator(
    name: str, result_like: str, keep: Callable[..., list[Tensor]] | None = None, gradients: Callable[..., list[Tensor]] | None = None
) -> Callable[[Form], Form]:
    """Make torch.compile see a chunked form as the operator `torch.ops.zoo.<name>`.

    Traced, a loop over chunks would give one graph for each number of chunks. An exported graph still contains the loop.

    Args:
        name: name of the operator.
        result_like: input of the shape and dtype of the first result; the second result is like the input `state`.
        keep: returns the results followed by intermediates, as contiguous tensors of their own.
        gradients: returns the gradients of the tensors among the inputs, from the gradients of the results, a list of these
            intermediates, and the inputs. Without these two, and where a size is dynamic, the gradient computes the form again.
    """

    def decorate(run: Form) -> Form:
        signature = inspect.signature(run).parameters
        names = list(signature)
        fields = ", ".join(f"{parameter.annotation} {field}" for field, parameter in signature.items())
        like, state = names.index(result_like), names.index("state")
        torch.library.define(f"zoo::{name}", f"({fields}) -> (Tensor, Tensor)")
        torch.library.define(f"zoo::{name}_backward", f"(Tensor dresult, Tensor dfinal, {fields}) -> Tensor[]")

        @torch.library.impl(f"zoo::{name}", "CompositeExplicitAutograd")
        @torch.no_grad()
        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            return tuple(x.contiguous() for x in run(*inputs))

        @torch.library.impl(f"zoo::{name}_backward", "CompositeExplicitAutograd")
        def backward(dresult: Tensor, dfinal: Tensor, *inputs: Any) -> list[Tensor]:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
                found = torch.autograd.grad(run(*leaves), [x for x in leaves if isinstance(x, Tensor)], (dresult, dfinal))
            return [x.contiguous() for x in found]

        def shapes(*inputs: Any) -> tuple[Tensor, Tensor]:
            return inputs[like].new_empty(inputs[like].shape), inputs[state].new_empty(inputs[state].shape)

        def gradient_shapes(dresult: Tensor, dfinal: Tensor, *inputs: Any) -> list[Tensor]:
            return [x.new_empty(x.shape) for x in inputs if isinstance(x, Tensor)]

        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
            ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]

        def differentiate(ctx: Any, dresult: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
            saved = iter(ctx.saved_tensors)
            inputs = [next(saved) if x is None else x for x in ctx.inputs]
            found = iter(getattr(torch.ops.zoo, f"{name}_backward")(dresult, dfinal, *inputs))
            return tuple(next(found) if x is None else None for x in ctx.inputs)

        if keep is not None and gradients is not None:
            _keeping(name, fields, names, keep, gradients)

        torch.library.register_fake(f"zoo::{name}", shapes)
        torch.library.register_fake(f"zoo::{name}_backward", gradient_shapes)
        torch.library.register_autograd(f"zoo::{name}", differentiate, setup_context=save)

        def form(*inputs: Any) -> tuple[Tensor, Tensor]:
            if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
                return getattr(torch.ops.zoo, name if keep is None else f"{name}_or_kept")(*inputs)
            return run(*inputs)

        return form

    return decorate


def _keeping(name: str, fields: str, names: list[str], keep: Callable[..., list[Tensor]], gradients: Callable[..., list[Tensor]]) -> None:
    """Define `zoo::<name>_or_kept`, which is traced as an operator that keeps intermediates for its gradient, where that is needed."""
    torch.library.define(f"zoo::{name}_or_kept", f"({fields}) -> (Tensor, Tensor)")
    torch.library.define(f"zoo::{name}_kept", f"({fields}) -> Tensor[]")
    torch.library.define(f"zoo::{name}_kept_backward", f"(Tensor dresult, Tensor dfinal, Tensor[] kept, {fields}) -> Tensor[]")
    operators = torch.ops.zoo

    @torch.library.impl(f"zoo::{name}_or_kept", "CompositeImplicitAutograd")
    def choose(*inputs: Any) -> tuple[Tensor, Tensor]:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        static = all(isinstance(size, int) for x in tensors for size in x.shape)
        if static and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            result, final, *_ = getattr(operators, f"{name}_kept")(*inputs)
            return result, final
        return getattr(operators, name)(*inputs)

    @torch.library.impl(f"zoo::{name}_kept", "CompositeExplicitAutograd")
    @torch.no_grad()
    def forward(*inputs: Any) -> list[Tensor]:
        return [x.contiguous() for x in keep(*inputs)]

    @torch.library.impl(f"zoo::{name}_kept_backward", "CompositeExplicitAutograd")
    @torch.no_grad()
    def backward(*inputs: Any) -> list[Tensor]:
        return [x.contiguous() for x in gradients(*inputs)]

    def gradient_shapes(dresult: Tensor, dfinal: Tensor, kept: list[Tensor], *inputs: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in inputs if isinstance(x, Tensor)]

    def save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output[2:])
        ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]

    def differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if x is None else x for x in ctx.inputs]
        found = iter(getattr(operators, f"{name}_kept_backward")(grads[0], grads[1], list(saved), *inputs))
        return tuple(next(found) if x is None else None for x in ctx.inputs)

    torch.library.register_fake(f"zoo::{name}_kept", forward)
    torch.library.register_fake(f"zoo::{name}_kept_backward", gradient_shapes)
    torch.library.register_autograd(f"zoo::{name}_kept", differentiate, setup_context=save)
