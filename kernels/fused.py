"""Make a hand-written pair of forward and backward functions one differentiable operator, in eager and in traced code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.kernels.common.recording import transformed

_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "float": "float", "int": "SymInt", "bool": "bool"}


class Fused:
    """A function that autograd, torch.compile and torch.export see as one operator, `torch.ops.zoo.<name>`.

    Eager calls use torch.autograd.Function; traced calls use torch.library, whose dispatch costs three times as much.

    Args:
        name: name of the operator.
        allocate: (*inputs) -> empty tensors for everything `forward` writes: the results, then tensors that only `backward` reads.
            It also serves as the operator's shape function, so it may only look at shapes, dtypes and devices.
        forward: (outputs, *inputs) -> None; fills the outputs. Its annotated inputs define the operator's signature.
        backward: (grads, outputs, *inputs) -> the gradients of the inputs in `differentiable`, in that order. `grads` are the
            gradients of the results, None for an unused result. For an absent optional input, return any tensor.
        results: number of outputs that are results.
        differentiable: names of the inputs that get a gradient.
    """

    def __init__(
        self,
        name: str,
        *,
        allocate: Callable[..., tuple[Tensor, ...]],
        forward: Callable[..., None],
        backward: Callable[..., tuple[Tensor, ...]],
        results: int,
        differentiable: tuple[str, ...],
    ) -> None:
        signature = list(inspect.signature(forward).parameters.values())[1:]
        self.allocate, self.launch, self.backward, self.results = allocate, forward, backward, results
        self.slots = tuple([parameter.name for parameter in signature].index(field) for field in differentiable)
        self.name = name
        self.function = _autograd_function(self)
        self.op = _library_op(self, name, ", ".join(f"{_TYPES[parameter.annotation]} {parameter.name}" for parameter in signature))

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        if transformed():
            raise ZooError(self.refusal("torch.func and forward-mode AD"))
        run = self.op if torch.compiler.is_compiling() else self.function.apply
        return tuple(run(*inputs)[: self.results])

    def refusal(self, what: str) -> str:
        return f"{self.name}: the Triton form does not support {what}; use the PyTorch forms: zoo.kernels.use('chunked') or 'reference'"

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = self.allocate(*inputs)
        with torch.cuda.device_of(outputs[0]):  # Triton launches on the current GPU
            self.launch(outputs, *inputs)
        return outputs

    def gradients(self, grads: Sequence[Tensor | None], outputs: Sequence[Tensor], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        with torch.cuda.device_of(outputs[0]):
            return self.backward(grads, outputs, *inputs)

    def one_per_input(self, grads: Sequence[Tensor], inputs: Sequence[Any]) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(inputs)
        for slot, grad in zip(self.slots, grads, strict=True):
            found[slot] = None if inputs[slot] is None else grad
        return tuple(found)


def _save(ctx: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.save_for_backward(*(value for value, kept in zip(inputs, is_tensor, strict=True) if kept), *outputs)
    ctx.rest = [None if kept else value for value, kept in zip(inputs, is_tensor, strict=True)]
    ctx.is_tensor = is_tensor
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    saved = list(ctx.saved_tensors)
    inputs = [saved.pop(0) if kept else value for kept, value in zip(ctx.is_tensor, ctx.rest, strict=True)]
    return inputs, saved


def _autograd_function(fused: Fused) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            outputs = fused.forward(*inputs)
            _save(ctx, inputs, outputs)
            return outputs[: fused.results]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():  # create_graph=True
                raise ZooError(fused.refusal("second derivatives"))
            inputs, outputs = _saved(ctx)
            if all(grad is None for grad in grads):
                return (None,) * len(inputs)
            return fused.one_per_input(fused.gradients(grads, outputs, inputs), inputs)

    return Function


def _library_op(fused: Fused, name: str, fields: str) -> Callable[..., list[Tensor]]:
    def forward(*inputs: Any) -> list[Tensor]:
        return list(fused.forward(*inputs))

    def backward(grads: list[Tensor | None], outputs: list[Tensor], *inputs: Any) -> list[Tensor]:
        found = zip(fused.slots, fused.gradients(grads, outputs, inputs), strict=True)
        return [outputs[0].new_empty(0) if inputs[slot] is None else grad for slot, grad in found]

    def backward_shapes(grads: list[Tensor | None], outputs: list[Tensor], *inputs: Any) -> list[Tensor]:
        present = (inputs[slot] for slot in fused.slots)
        return [outputs[0].new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in present]

    op = torch.library.custom_op(f"zoo::{name}", forward, mutates_args=(), schema=f"({fields}) -> Tensor[]")
    op.register_fake(lambda *inputs: list(fused.allocate(*inputs)))
    gradient = torch.library.custom_op(
        f"zoo::{name}_backward", backward, mutates_args=(), schema=f"(Tensor?[] grads, Tensor[] outputs, {fields}) -> Tensor[]"
    )
    gradient.register_fake(backward_shapes)

    def differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        inputs, outputs = _saved(ctx)
        return fused.one_per_input(gradient(list(grads[: fused.results]), outputs, *inputs), inputs)

    op.register_autograd(differentiate, setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output))
    return op
