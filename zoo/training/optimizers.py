"""Optimisers: registry, parameter groups, float32 master weights, and the states that checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zoo.errors import ZooError
from zoo.model import Model
from zoo.registry import Registry
from zoo.training.parallel import shard_like

MakeOptimizer = Callable[[list[dict[str, Any]], float, float], torch.optim.Optimizer]
"""Creates an optimiser from parameter groups (`params`, `lr`, `weight_decay`), the default learning rate and weight decay."""

optimizers: Registry[MakeOptimizer] = Registry("optimizer", "optimizers")


@optimizers.register("adamw")
def adamw(groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    plain = all(type(p) is nn.Parameter and p.is_cpu for group in groups for p in group["params"])  # a third of the time on a CPU
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=plain or None)


@optimizers.register("muon")
class Muon(torch.optim.Muon):
    """torch's Muon, extended to sharded matrices (FSDP2).

    Momentum and parameters stay sharded. Every process gathers the update of one matrix at a time and orthogonalises it, which
    gives the result of a single process.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            settings = {name: value for name, value in group.items() if name in self.defaults}
            alone = {**settings, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                change = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=p.device))
                change.grad = update.full_tensor()
                torch.optim.Muon([change], **alone).step()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(shard_like(change, p))
        return loss


class Weights:
    """The parameters that the optimisers update, by name: the model's own, or float32 master copies of 16-bit ones."""

    def __init__(self, model: Model) -> None:
        self.of_model = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.wide = {name: p if p.itemsize >= 4 else nn.Parameter(p.detach().float()) for name, p in self.of_model.items()}
        self.copied = {name: p for name, p in self.wide.items() if p is not self.of_model[name]}

    def take_gradients(self) -> None:
        """Move the gradients of 16-bit parameters to their float32 copies, adding to the gradients already there."""
        for name, copy in self.copied.items():
            if (grad := self.of_model[name].grad) is not None:
                copy.grad = grad.float() if copy.grad is None else copy.grad + grad
                self.of_model[name].grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the float32 copies into the parameters of the model."""
        for name, copy in self.copied.items():
            self.of_model[name].copy_(copy)


def freeze(model: Model, patterns: Iterable[str]) -> None:
    """Freeze the parameters whose names match a pattern. Raises ZooError."""
    for pattern in patterns:
        for name in _matching(model, pattern, "frozen"):
            model.get_parameter(name).requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ZooError("frozen: no parameter is left to train")


def exempt_from_decay(model: Model, patterns: Iterable[str] = ()) -> list[str]:
    """Return the names of the parameters without weight decay.

    Only matrices of linear layers, embeddings and adapters decay. Norms, biases, A_log, D, dt_bias, convolutions, gates and
    learned positions set rates, scales and positions, for which zero is not a neutral value.

    Args:
        patterns: name patterns of further parameters.
    Raises:
        ZooError: a pattern matches nothing.
    """
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    matrices |= {name for name, _ in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))}
    matrices -= {"positions.weight", "exit.gate.weight"}
    matrices.difference_update(*(_matching(model, pattern, "no_decay") for pattern in patterns))
    return [name for name, _ in model.named_parameters() if name not in matrices]


def make_optimizers(
    model: Model,
    weights: Weights,
    *,
    lr: float,
    muon_lr: float | None = None,
    weight_decay: float = 0.0,
    optimizer: str = "adamw",
    lr_scale: Mapping[str, float] | None = None,
    exempt: Collection[str] = (),
) -> list[torch.optim.Optimizer]:
    """Create Muon for the matrices of the blocks if `muon_lr` is given, and `optimizer` for everything else.

    Args:
        exempt: names of the parameters without weight decay.
        lr_scale: learning-rate multipliers by parameter-name pattern; the first match counts.
    Raises:
        ZooError: an unknown optimiser, or a pattern that matches nothing.
    """
    scale: dict[str, float] = {}
    for pattern, factor in (lr_scale or {}).items():
        scale = {**dict.fromkeys(_matching(model, pattern, "lr_scale"), factor), **scale}
    linear = {f"blocks.{name}.weight" for name, m in model.blocks.named_modules() if isinstance(m, nn.Linear)} if muon_lr else set()
    made = []
    for kind, rate, chosen in (
        (optimizer, lr, [n for n in weights.wide if n not in linear]),
        ("muon", muon_lr, [n for n in weights.wide if n in linear]),
    ):
        if rate is not None and chosen:
            groups: dict[tuple[float, float], dict[str, Any]] = {}
            for name in chosen:
                factor, decay = scale.get(name, 1.0), 0.0 if name in exempt else weight_decay
                group = groups.setdefault((factor, decay), {"params": [], "lr": rate * factor, "weight_decay": decay})
                group["params"].append(weights.wide[name])
            made.append(optimizers.get(kind, "optimizer")(list(groups.values()), rate, weight_decay))
    for one in made:
        for group in one.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def _matching(model: Model, pattern: str, field: str) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ZooError(f"{field}: '{pattern}' matches no parameter; there are, for example, {names[0]} and {names[-1]}")
    return found


def state_of(made: list[torch.optim.Optimizer], weights: Weights, *, complete: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimiser states as tensors and as plain numbers, each under `<entry>/<parameter>`.

    Args:
        complete: with all parameters that are trained, not only the copies; for adapters, which no checkpoint of a model holds.
    """
    names: dict[Tensor, str] = {p: name for name, p in weights.wide.items()}
    kept = weights.wide if complete else weights.copied
    tensors: dict[str, Tensor] = {f"float32/{name}": copy.detach() for name, copy in kept.items()}
    numbers: dict[str, Any] = {}
    for optimizer in made:
        for parameter, state in optimizer.state.items():
            for entry, value in state.items():
                (tensors if isinstance(value, Tensor) else numbers)[f"{entry}/{names[parameter]}"] = value
    return tensors, numbers


@torch.no_grad()
def restore(made: list[torch.optim.Optimizer], weights: Weights, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Restore the optimiser states that `state_of` returned, and the parameters among them."""
    names = {p: name for name, p in weights.wide.items()}
    states: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        entry, _, name = key.partition("/")
        states.setdefault(name, {})[entry] = value
    for name, p in weights.wide.items():
        stored = states.get(name, {}).pop("float32", None)  # older runs also have copies of what is float32 in the model now
        if stored is not None:
            p.copy_(stored)
        elif name in weights.copied:
            raise KeyError(name)
    weights.write_back()
    for optimizer in made:
        order = [names[p] for group in optimizer.param_groups for p in group["params"]]
        state = {i: states[name] for i, name in enumerate(order) if states.get(name)}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
