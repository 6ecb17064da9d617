"""Mixture of experts: a router chooses a few experts for each token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from zoo.blocks import mlp
from zoo.blocks.experts import Experts
from zoo.blocks.mlp import MLP, ReLU2, SwiGLU, mlps
from zoo.errors import counted


class MoEOptions(mlp.Options):
    width: int | None = Field(None, ge=1, description="hidden width of each expert; default: d_ff of the model")
    bias: bool = Field(False, description="bias of the shared expert and of the latent projections")
    experts: int = Field(8, ge=1, description="E, number of experts")
    top_k: int = Field(2, ge=1, description="experts chosen for each token")
    expert: Literal["swiglu", "relu2"] = Field("swiglu", description="kind of MLP of the experts and of the shared expert")
    score: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="score of an expert: softmax over all logits, or sigmoid of its own"
    )
    correction: bool = Field(False, description="add a stored bias to the scores when experts are chosen, but not to their weights")
    normalise: bool = Field(True, description="divide the weights of the chosen experts by their sum")
    normalise_eps: float = Field(0.0, ge=0, description="added to that sum")
    scale: float = Field(1.0, description="factor of the weights")
    wide_router: bool = Field(False, description="compute the router's logits in float32")
    shared: int | None = Field(None, ge=1, description="hidden width of a shared expert that processes every token; default: none")
    shared_gate: bool = Field(False, description="multiply the shared expert's output by sigmoid(w x)")
    latent: int | None = Field(None, ge=1, description="width in which the experts work, between two projections; default: d_model")

    @model_validator(mode="after")
    def _fits(self) -> MoEOptions:
        if self.top_k > self.experts:
            raise ValueError(f"top_k: {self.top_k} of {counted(self.experts, 'expert')}; want at most {self.experts}")
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate: there is no shared expert; set its width, shared")
        return self


class Route(NamedTuple):
    """The choice of one router for n tokens."""

    chances: Tensor
    """Scores of all experts, divided by their sum, [n, E]."""
    chosen: Tensor
    """Chosen experts, int64 [n, K]."""
    router: Router
    number: int
    """Index of the pass, from 0; a wake pass is pass 0."""


class Routes(list[Route]):
    """Routes in order: pass by pass, and layer by layer within a pass."""

    number = 0
    """Index of the pass in progress."""


_recorded: list[Routes] = []


def begin_pass(number: int) -> None:
    """Say which pass the routes that follow belong to."""
    for routes in _recorded:
        routes.number = number


@contextmanager
def recorded_routes() -> Iterator[Routes]:
    """Collect the `Route` of every call of a router within the block."""
    routes = Routes()
    _recorded.append(routes)
    try:
        yield routes
    finally:
        _recorded.remove(routes)


def balance_loss(routes: list[Route]) -> Tensor:
    """Return the load-balancing loss: E sum_e f_e p_e, averaged over the routes; 1 for K = 1 and equal loads, K in general.

    f_e: fraction of tokens that chose expert e. p_e: its mean probability (arXiv 2101.03961, eq. 4 to 6).
    """
    losses = []
    for route in routes:
        experts = route.chances.shape[-1]
        load = F.one_hot(route.chosen, experts).sum(-2).to(route.chances.dtype).mean(0)
        losses.append(experts * (load * route.chances.mean(0)).sum())
    return torch.stack(losses).mean()


def expert_loads(routes: list[Route]) -> dict[int, Tensor]:
    """Return the number of tokens that chose each of E experts of R routers, int64 [R, E], by index of the pass."""
    loads: dict[int, dict[Router, Tensor]] = {}
    for route in routes:
        of_pass, chosen = loads.setdefault(route.number, {}), route.chosen.flatten()
        load = chosen.new_zeros(route.chances.shape[-1]).scatter_add(0, chosen, torch.ones_like(chosen))  # bincount would synchronise
        of_pass[route.router] = of_pass.get(route.router, 0) + load
    return {number: torch.stack(list(of_pass.values())) for number, of_pass in loads.items()}


class WideLinear(nn.Linear):
    """Linear layer in float32 or wider."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype))


class Router(nn.Module):
    """Chooses experts: x [B, T, D] -> weights [B, T, K], heaviest score first, and indices int64 [B, T, K]."""

    wide: ClassVar[tuple[str, ...]] = ("correction",)
    correction: Tensor | None

    def __init__(self, d_model: int, options: MoEOptions) -> None:
        super().__init__()
        self.options = options
        self.proj = (WideLinear if options.wide_router else nn.Linear)(d_model, options.experts, bias=False)
        self.register_buffer("correction", torch.empty(options.experts) if options.correction else None)  # only affects the choice

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        options, logits = self.options, self.proj(x)
        if options.score == "softmax":
            scores = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        else:
            scores = logits.sigmoid()
        index = (scores if self.correction is None else scores + self.correction).topk(options.top_k, dim=-1).indices
        weight = scores.gather(-1, index)
        if options.normalise:
            weight = weight / (weight.sum(-1, keepdim=True) + options.normalise_eps)
        for routes in _recorded:
            chances = (scores / scores.sum(-1, keepdim=True)).flatten(0, 1)
            routes.append(Route(chances, index.flatten(0, 1), self, routes.number))
        return weight if options.scale == 1 else weight * options.scale, index


@mlps.register("moe")
class MoE(MLP):
    """Weighted sum of the chosen experts, plus a shared expert (arXiv 1701.06538, 2401.06066)."""

    Options = MoEOptions

    def __init__(self, d_model: int, d_ff: int, options: MoEOptions) -> None:
        super().__init__(d_model, d_ff, options)
        self.top_k, inside = options.top_k, options.latent or d_model
        self.router = Router(d_model, options)
        self.experts = Experts(options.experts, inside, self.width, options.expert == "swiglu")
        self.latent_in = nn.Linear(d_model, inside, bias=options.bias) if options.latent else nn.Identity()
        self.latent_out = nn.Linear(inside, d_model, bias=options.bias) if options.latent else nn.Identity()
        kind: type[MLP] = SwiGLU if options.expert == "swiglu" else ReLU2
        self.shared = kind(d_model, options.shared, kind.Options(width=options.shared, bias=options.bias)) if options.shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if options.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x)
        y: Tensor = self.latent_out(self.experts(self.latent_in(x), index, weight))
        if self.shared is None:
            return y
        shared = self.shared(x)
        return y + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)

    def flops(self, tokens: int) -> int:
        of_one = sum(weight[0].numel() for weight in self.experts.parameters())
        return super().flops(tokens) + tokens * 2 * self.top_k * of_one

    def idle_parameters(self) -> int:
        return sum((len(weight) - self.top_k) * weight[0].numel() for weight in self.experts.parameters())
