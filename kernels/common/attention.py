"""Torch's attention on a CPU under another float32 matmul precision than the rest of the model, with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.common.precision import highest_precision


def attend_by_mkl(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, *, causal: bool, scale: float | None) -> Tensor:
    """Compute `zoo.blocks.attention.attention` with MKL, float32 and once differentiable.

    With few keys, products are small, and MKL computes them up to ten times faster than oneDNN.
    """
    mask = None if visible is None else torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
    y: Tensor = torch.ops.zoo.attention(q, k, v, mask, causal, scale)[0]
    return y


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    y, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return y, sums


def _gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = backward(dy, q, k, v, y, sums, 0.0, causal, attn_mask=mask, scale=scale)
    return dq, dk, dv


def _by_mkl(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        with highest_precision():
            return run(*inputs)

    return call


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, mask)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.zoo.attention_backward(dy, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *gradients, None, None, None


_FORWARD = "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor sums, Tensor? mask, bool causal, float? scale) -> (Tensor, Tensor, Tensor)"
)
for _name, _fields, _run in (("attention", _FORWARD, _forward), ("attention_backward", _BACKWARD, _gradients)):
    torch.library.define(f"zoo::{_name}", _fields)
    torch.library.impl(f"zoo::{_name}", "CPU", _by_mkl(_run))
    torch.library.register_fake(f"zoo::{_name}", _run)
torch.library.register_autograd("zoo::attention", _backward, setup_context=_save)
