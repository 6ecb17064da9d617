"""Depthwise causal convolution over a whole chunk at once, tap by tap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels.common.recording import pure, recorded
from zoo.kernels.common.second_order import gradients

PIECE = 1 << 17  # elements that are computed at a time


def chunked(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    """Compute the same as `reference.stepwise`; same shapes and arguments.

    A few fused multiply-adds: on a CPU the backward pass of a grouped convolution takes ten times as long for short kernels.
    """
    if pure():
        return _definition(x, weight, tail)
    if recorded(x, weight, tail):
        y: Tensor = _Convolve.apply(x, weight, tail)
        return y
    return _convolve(torch.cat([tail.mT, x], dim=1), weight.mT.contiguous())


def one_token(x: Tensor, weight: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for x [B, 1, C], and the next tail, which is stored by tokens: the next call concatenates it at once."""
    inputs = torch.cat([tail.mT, x], dim=1)
    return (inputs * weight.mT).sum(1, keepdim=True), inputs[:, 1:].clone().mT


def _definition(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    """Compute it without changing a tensor in place."""
    T, taps = x.shape[1], weight.mT.contiguous()
    inputs = torch.cat([tail.mT, x], dim=1)
    y = inputs[:, :T] * taps[0]
    for tap in range(1, len(taps)):
        y = torch.addcmul(y, inputs[:, tap : tap + T], taps[tap])
    return y


def _convolve(inputs: Tensor, taps: Tensor) -> Tensor:
    """Convolve inputs [B, K - 1 + T, C] with taps [K, C], a few tokens at a time, which stay in the cache from tap to tap."""
    B, length, C = inputs.shape
    T, size = length - len(taps) + 1, max(1, PIECE // (B * C))
    if size < T:
        y = inputs.new_empty(B, T, C)
        for start in range(0, T, size):
            y[:, start : start + size] = _convolve(inputs[:, start : start + size + len(taps) - 1], taps)
        return y
    y = inputs[:, :T] * taps[0]
    for tap in range(1, len(taps)):
        y.addcmul_(inputs[:, tap : tap + T], taps[tap])
    return y


class _Convolve(torch.autograd.Function):
    """A hand-written gradient: autograd would pad and add a tensor for each tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
        inputs, taps = torch.cat([tail.mT, x], dim=1), weight.mT.contiguous()
        ctx.save_for_backward(x, weight, tail, inputs, taps)
        return _convolve(inputs, taps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, tail, inputs, taps = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return gradients(lambda *given: [_definition(*given)], (x, weight, tail), (dy,))  # type: ignore[return-value]
        T, before, dinputs, dtaps = x.shape[1], tail.shape[-1], torch.zeros_like(inputs), torch.empty_like(taps)
        for tap in range(len(taps)):
            reached = slice(tap, tap + T)
            dinputs[:, reached].addcmul_(dy, taps[tap])
            torch.sum(dy * inputs[:, reached], dim=(0, 1), out=dtaps[tap])
        return dinputs[:, before:], dtaps.mT, dinputs[:, :before].mT
