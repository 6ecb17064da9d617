"""The feed-forward part of a block, and the registry of its kinds. To add a kind, add a file beside this one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from zoo.blocks.mixer import linear_flops
from zoo.kernels.common.recording import recorded
from zoo.registry import Registry


class Options(BaseModel):
    """Options of one kind of MLP, set in a config under `mlps: {kind: {...}}`. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    width: int | None = Field(None, ge=1, description="hidden width; default: d_ff of the model")
    bias: bool = Field(False, description="bias of every projection")


class MLP(nn.Module):
    """The part of a block that processes each token independently.

    Args:
        d_model: width D of the residual stream.
        d_ff: hidden width, unless the options set another.
        options: this class's own `Options`.
    """

    Options: ClassVar[type[Options]] = Options

    def __init__(self, d_model: int, d_ff: int, options: Any) -> None:
        super().__init__()
        self.width: int = options.width or d_ff

    def forward(self, x: Tensor) -> Tensor:
        """Return y [B, T, D] for x: [B, T, D]."""
        raise NotImplementedError

    def flops(self, tokens: int) -> int:
        """Return the FLOPs on `tokens` tokens; see `zoo.blocks.mixer.Mixer.flops`."""
        return tokens * linear_flops(self)

    def idle_parameters(self) -> int:
        """Return the number of parameters that one token does not use."""
        return 0


mlps: Registry[type[MLP]] = Registry("MLP", "mlps", "zoo.blocks.*")


class GatedOptions(Options):
    gate_scale: float = Field(1.0, description="factor of the gate, before its activation")
    scale: float = Field(1.0, description="factor of the output")


class GatedMLP(MLP):
    """Gated MLP: down(activation(gate(x)) * up(x)) (arXiv 2002.05202)."""

    Options = GatedOptions

    def __init__(self, d_model: int, d_ff: int, options: GatedOptions) -> None:
        super().__init__(d_model, d_ff, options)
        self.gate_scale, self.scale = options.gate_scale, options.scale
        self.gate_proj = nn.Linear(d_model, self.width, bias=options.bias)
        self.up_proj = nn.Linear(d_model, self.width, bias=options.bias)
        self.down_proj = nn.Linear(self.width, d_model, bias=options.bias)

    def activation(self, gate: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate_proj(x)
        gate, up = self.activation(gate if self.gate_scale == 1 else gate * self.gate_scale), self.up_proj(x)
        y: Tensor = self.down_proj(gate * up if recorded(gate, up) else gate.mul_(up))
        return y if self.scale == 1 else y * self.scale


@mlps.register("swiglu")
class SwiGLU(GatedMLP):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def activation(self, gate: Tensor) -> Tensor:
        return F.silu(gate)


@mlps.register("gelu")
class GeGLU(GatedMLP):
    """GeGLU: down(gelu(gate(x)) * up(x)) with the tanh approximation of GELU (arXiv 2002.05202, 1606.08415)."""

    def activation(self, gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh")


@mlps.register("relu2")
class ReLU2(MLP):
    """MLP with squared ReLU: down(relu(up(x))^2) (arXiv 2109.08668)."""

    def __init__(self, d_model: int, d_ff: int, options: Options) -> None:
        super().__init__(d_model, d_ff, options)
        self.up_proj = nn.Linear(d_model, self.width, bias=options.bias)
        self.down_proj = nn.Linear(self.width, d_model, bias=options.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.relu(self.up_proj(x)).square())
        return y
