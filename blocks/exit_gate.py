"""The exit gate of a model that loops while awake (Ouro, arXiv 2510.25741, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExitGate(nn.Module):
    """Chooses, per token, which loop's states the head reads.

    lambda_u = sigmoid(w s_u + b) is the chance to leave after loop u having come so far; the last loop takes what is left.

    Args:
        loop: read this loop (from 0), whatever the gate says.
        threshold: read the first loop by which the chance to have left reaches this; None: no threshold.
        weighted: without a threshold, read the mean of all loops, weighted by their chance; else the last.
    """

    def __init__(self, d_model: int, loop: int | None, threshold: float | None, weighted: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, 1)
        self.loop, self.threshold, self.weighted = loop, threshold, weighted

    def forward(self, states: Tensor) -> Tensor:
        """states: normed states after every loop, [..., U, D]. Returns [..., D]."""
        if self.loop is not None:
            return states[..., self.loop, :]
        if self.threshold is not None:
            reached = (self.chances(states).cumsum(-1) >= self.threshold).to(torch.int64)
            reached[..., -1] = 1
            first = reached.argmax(-1)[..., None, None].expand(*states.shape[:-2], 1, states.shape[-1])
            return states.gather(-2, first).squeeze(-2)
        if self.weighted:
            return (self.chances(states).to(states.dtype)[..., None] * states).sum(-2)
        return states[..., -1, :]

    def chances(self, states: Tensor) -> Tensor:
        """Chance to leave after each loop, [..., U], float32 or wider."""
        logits = self.gate(states).squeeze(-1)
        leave = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        here = [torch.ones_like(leave[..., 0])]
        for u in range(leave.shape[-1] - 1):  # no cumprod, which ONNX lacks
            here.append(here[-1] * (1 - leave[..., u]))
        return torch.cat([leave[..., :-1], here[0][..., None]], dim=-1) * torch.stack(here, dim=-1)
