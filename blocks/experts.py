"""Experts: many small MLPs with stacked weights. A few of them process each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.common.recording import pure, recorded


class Experts(nn.Module):
    """Stack of E MLPs of hidden width F, SwiGLU or squared ReLU, without biases.

    `up` is [E, 2F, D] with the rows of the gate first, or [E, F, D] without a gate; `down` is [E, D, F].
    """

    def __init__(self, experts: int, d_model: int, width: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.up = nn.Parameter(torch.empty(experts, 2 * width if gated else width, d_model))
        self.down = nn.Parameter(torch.empty(experts, d_model, width))

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Return sum_k weight_k expert_{index_k}(x) for each token.

        Args:
            x: [B, T, D].
            index: chosen experts, int64 [B, T, K], all different.
            weight: their weights, [B, T, K].
        """
        if not (pure() or x.is_meta):
            y = self._sorted(x.flatten(0, 1), index.flatten(0, 1), weight.flatten(0, 1))
            return y.unflatten(0, x.shape[:2])
        return self._gathered(x, index, weight) if x.shape[1] == 1 else self._masked(x, index, weight)

    def _sorted(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Run each expert once, on the tokens that chose it. x: [n, D]; index, weight: [n, K]."""
        if len(x) == 1 and not torch.is_grad_enabled():
            y = torch.cat([F.linear(self._activated(F.linear(x, self.up[e])), self.down[e]) for e in index[0].tolist()])
            return (weight @ y.to(weight.dtype)).to(y.dtype)
        chosen = index.flatten()
        order = chosen.argsort(stable=True)
        rows, counts = order // index.shape[1], chosen.bincount(minlength=len(self.up))
        y = _grouped(self._activated(_grouped(x[rows], self.up, counts)), self.down, counts)
        wide = y * weight.flatten()[order, None]
        return wide.new_zeros(x.shape).index_add(0, rows, wide).to(y.dtype)

    def _gathered(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Gather the weights of the experts that each token chose: for graphs over one token. x: [B, 1, D]."""
        h = self._activated((self.up[index] @ x[..., None, :, None]).squeeze(-1))
        y = (self.down[index] @ h[..., None]).squeeze(-1)
        return (y * weight[..., None]).sum(-2).to(y.dtype)

    def _masked(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Run every expert on every token, and mask: for graphs over several tokens. x: [B, T, D]."""
        experts = torch.arange(len(self.up), device=x.device)
        gates = ((index[..., None] == experts) * weight[..., None]).sum(-2)  # [B, T, E]
        y = self._activated(x[:, None] @ self.up.mT) @ self.down.mT  # [B, E, T, D]
        return (y * gates.mT[..., None]).sum(1).to(y.dtype)

    def _activated(self, h: Tensor) -> Tensor:
        if not self.gated:
            return F.relu(h).square()
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    def init_weights(self, generator: torch.Generator, scale: float) -> None:
        """Initialise as Linear layers, `down` times `scale`."""
        nn.init.normal_(self.up, std=self.up.shape[2] ** -0.5, generator=generator)
        nn.init.normal_(self.down, std=scale * self.down.shape[2] ** -0.5, generator=generator)


def _grouped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply E groups of consecutive rows of x: [n, D], `counts` rows each, by the rows of weight: [E, F, D]. Returns [n, F]."""
    plain = x.is_cpu and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    aligned = weight.shape[1] % 4 == weight.shape[2] % 4 == 0  # grouped_mm wants rows of whole 16 bytes
    if plain and aligned and not recorded(x, weight):
        return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0).to(torch.int32))
    # unbind has one gradient of the whole, where indexing would make one for each expert
    groups = zip(x.split(counts.tolist()), weight.unbind(0), strict=True)
    return torch.cat([F.linear(part, own) for part, own in groups if len(part)])
