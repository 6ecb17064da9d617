"""PyTorch forms as single operators of compiled graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
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

        def shapes(*inputs: Any) -> list[Tensor]:
            return [inputs[place].new_empty(inputs[place].shape) for place in (like, state)]

        def gradients_again(dresult: Tensor, dfinal: Tensor, kept: list[Tensor], *inputs: Any) -> Sequence[Tensor]:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
                return torch.autograd.grad(run(*leaves), [x for x in leaves if isinstance(x, Tensor)], (dresult, dfinal))

        _define(name, fields, run, gradients_again, shapes)
        if keep is not None and gradients is not None:
            # compiled graphs are cached on disk by the names of their operators: if the shapes of `keep` change, so must this name
            _define(f"{name}_recorded", fields, keep, gradients, keep)
        torch.library.define(f"zoo::{name}_or_recorded", f"({fields}) -> (Tensor, Tensor)")

        @torch.library.impl(f"zoo::{name}_or_recorded", "CompositeImplicitAutograd")  # here, sizes and gradients are known while tracing
        def choose(*inputs: Any) -> tuple[Tensor, Tensor]:
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            fixed = all(isinstance(size, int) for x in tensors for size in x.shape)
            differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
            chosen = f"{name}_recorded" if keep is not None and fixed and differentiated else name
            result, final, *_ = getattr(torch.ops.zoo, chosen)(*inputs)
            return result, final

        def form(*inputs: Any) -> tuple[Tensor, Tensor]:
            if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
                return getattr(torch.ops.zoo, f"{name}_or_recorded")(*inputs)
            return run(*inputs)

        return form

    return decorate


def _define(
    name: str,
    fields: str,
    run: Callable[..., Sequence[Tensor]],
    gradients: Callable[..., Sequence[Tensor]],
    shapes: Callable[..., Sequence[Tensor]],
) -> None:
    """Define the operator `zoo::<name>` and its gradient.

    Args:
        fields: inputs, as in a schema of torch.
        run: returns the two results, and then what the gradient reads besides the inputs.
        gradients: returns the gradients of the tensors among the inputs, from those of the results, that list, and the inputs.
        shapes: returns tensors of the shapes and dtypes of those of `run`.
    """
    torch.library.define(f"zoo::{name}", f"({fields}) -> Tensor[]")
    torch.library.define(f"zoo::{name}_backward", f"(Tensor dresult, Tensor dfinal, Tensor[] kept, {fields}) -> Tensor[]")

    @torch.library.impl(f"zoo::{name}", "CompositeExplicitAutograd")
    @torch.no_grad()
    def forward(*inputs: Any) -> list[Tensor]:
        return [x.contiguous() for x in run(*inputs)]

    @torch.library.impl(f"zoo::{name}_backward", "CompositeExplicitAutograd")
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
        found = iter(getattr(torch.ops.zoo, f"{name}_backward")(grads[0], grads[1], list(saved), *inputs))
        return tuple(next(found) if x is None else None for x in ctx.inputs)

    torch.library.register_fake(f"zoo::{name}", lambda *inputs: [x.contiguous() for x in shapes(*inputs)])
    torch.library.register_fake(f"zoo::{name}_backward", gradient_shapes)
    torch.library.register_autograd(f"zoo::{name}", differentiate, setup_context=save)
