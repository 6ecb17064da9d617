"""Initial weights: of a whole model, or of what was added to a trained one."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from zoo.blocks.block import Block
from zoo.blocks.experts import Experts
from zoo.blocks.mixer import Mixer
from zoo.blocks.moe import Router
from zoo.blocks.norm import RMSNorm
from zoo.model import Model


def initialise(model: Model, device: torch.device, seed: int = 0) -> None:
    """Allocate and initialise the parameters on the meta device: all of them, or those that a checkpoint has not filled."""
    if device.type == "meta":
        return
    blocks = [module for module in model.blocks if isinstance(module, Block)]
    added = [block for block in blocks if any(parameter.is_meta for parameter in block.parameters())]
    if not added and not any(parameter.is_meta for parameter in model.parameters(recurse=False)) and not model.embed.weight.is_meta:
        return
    whole = model.embed.weight.is_meta
    _allocate(model, device)
    init_weights(model, torch.Generator(device).manual_seed(seed), None if whole else added)


@torch.no_grad()
def init_weights(model: Model, generator: torch.Generator, added: Collection[Block] | None = None) -> None:
    """Initialise every parameter, or only those of blocks added to a trained model, and of the injection.

    Weights are normal with a standard deviation of fan_in^-0.5; those of block outputs are smaller by the square root of the
    number of residual branches. Anything inserted into a trained model has no effect at first.
    """
    config, blocks = model.config, [module for module in model.blocks if isinstance(module, Block)]
    branches = sum(1 if block.mlp is None else 2 for block in blocks)
    chosen = [model] if added is None else added
    # children first, so that a mixer can override the initialisation of its projections
    for name, module in reversed([named for part in chosen for named in part.named_modules()]):
        if isinstance(module, Block):
            if module.inserted:
                outputs = [weight for own, weight in module.named_parameters() if own.endswith(".o_proj.weight")]
                for weight in outputs if module.mlp is None else [*outputs, module.get_parameter("mlp.down_proj.weight")]:
                    nn.init.zeros_(weight)
        elif isinstance(module, Mixer):
            module.init_weights(generator)
        elif isinstance(module, Experts):
            module.init_weights(generator, branches**-0.5)
        elif isinstance(module, Router) and module.correction is not None:
            nn.init.zeros_(module.correction)
        elif isinstance(module, nn.Linear):
            scale = branches**-0.5 if name.endswith(("o_proj", "down_proj", "latent_out")) else 1.0
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # token and position embeddings start at different sizes, so that neither hides the other
            std = 0.5 if name == "positions" else config.d_model**-0.5 if config.tie_embeddings else 1.0
            nn.init.normal_(module.weight, std=std, generator=generator)
        elif isinstance(module, RMSNorm):
            nn.init.constant_(module.weight, module.neutral)
    if config.residual_gates:
        nn.init.zeros_(model.residual_gates)
    if config.inject:
        nothing, much = (-8.0, 0.0) if config.inject == "bounded" else (0.0, 1.0)  # the bounded gate is a sigmoid of these
        nn.init.constant_(model.inject, much if added is None else nothing)


def _allocate(model: Model, device: torch.device) -> None:
    """Allocate the parameters and buffers that are still on the meta device."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(_new(parameter, device)))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, _new(buffer, device))


def _new(like: Tensor, device: torch.device) -> Tensor:
    # torch.empty_like of a tensor on the meta device imports sympy, in more than a second
    return torch.empty(like.shape, dtype=like.dtype, device=device)
