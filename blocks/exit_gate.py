"""The exit gate of a model that loops while awake (Ouro, arXiv 2510.25741, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExitGate(nn.Module):
    """Select, for each token, the loop whose states the head reads.

    lambda_u = sigmoid(w s_u + b) is the probability of exiting after loop u, given that no earlier loop was the exit; the last
    loop takes the remaining probability.

    Args:
        loop: read this loop (from 0) and ignore the gate.
        threshold: read the first loop at which the cumulative exit probability reaches this; None: no threshold.
        weighted: without a threshold, read the mean of all loops weighted by exit probability; if False, the last loop.
    """

    def __init__(self, d_model: int, loop: int | None, threshold: float | None, weighted: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, 1)
        self.loop, self.threshold, self.weighted = loop, threshold, weighted

    def forward(self, states: Tensor) -> Tensor:
        """Reduce the normed states after each loop, [..., U, D], to [..., D]."""
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
        """Return the probability of exiting after each loop, [..., U], float32 or wider."""
        logits = self.gate(states).squeeze(-1)
        leave = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        here = [torch.ones_like(leave[..., 0])]
        for u in range(leave.shape[-1] - 1):  # no cumprod, which ONNX lacks
            here.append(here[-1] * (1 - leave[..., u]))
        return torch.cat([leave[..., :-1], here[0][..., None]], dim=-1) * torch.stack(here, dim=-1)
