"""The stack of blocks that a config describes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zoo.blocks.block import Block
from zoo.blocks.mixer import mixers
from zoo.blocks.mlp import mlps
from zoo.blocks.norm import norms
from zoo.config import ModelConfig, validate
from zoo.errors import ZooError
from zoo.registry import Registry

if TYPE_CHECKING:
    from zoo.model import Model


def check_fits(config: ModelConfig, restarts: bool, has_fast: bool) -> None:
    """Refuse an eviction, learned positions or wake loops that do not fit blocks with or without fast weights."""
    name, evict = config.name, config.evict
    if config.learned_positions and not restarts:
        raise ZooError(f"{name}: learned_positions: windows under evict '{evict}' do not restart; allowed: hard")
    if config.wake_loops > 1 and has_fast:
        raise ZooError(f"{name}: wake_loops: {config.wake_loops} needs blocks without fast weights; these leak later tokens")
    if restarts and not has_fast:
        raise ZooError(f"{name}: evict: '{evict}' empties the window, and no block of '{config.layers}' has fast weights")


def embedding(rows: int, width: int) -> nn.Embedding:
    """Return an embedding without the default initialisation, which spends seconds on imports on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def build_blocks(config: ModelConfig, reach: int | None) -> Iterator[Block]:
    """Build the blocks of a model, each with its mixer and MLP; `reach` is that of the eviction. Raises ZooError."""
    mixer_options = _options(config.name, mixers, "layers", config.pattern, "blocks", config.blocks)
    mlp_options = _options(config.name, mlps, "mlp", [kind for kind in config.mlp_pattern if kind != "none"], "mlps", config.mlps)
    norm = partial(norms[config.norm], eps=config.norm_eps)
    for kind, mlp_kind in zip(config.pattern, config.mlp_pattern, strict=True):
        options, mlp = mixer_options[kind], None
        mixer = mixers.get(kind)(config.d_model, options, reach)
        if options.mlp and mlp_kind != "none":
            mlp = mlps.get(mlp_kind)(config.d_model, config.mlp_width, mlp_options[mlp_kind])
        yield Block(mixer, options, mlp, config.d_model, norm)


def _options(
    name: str, registry: Registry[Any], pattern: str, used: Collection[str], options: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of every kind that the field `pattern` uses or the field `options` gives, checked."""
    checked = {}
    for kind in dict.fromkeys((*used, *given)):
        form = registry.get(kind, f"{name}: {pattern if kind in used else options}").Options
        checked[kind] = validate(form, given.get(kind, {}), f"{name}: {options}.{kind}")
    return checked


def with_blocks(model: Model, wrap: Callable[[nn.Module], nn.Module]) -> Model:
    """Return a copy of `model`, which shares its weights, with `wrap(block)` in place of each block."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, "blocks": nn.ModuleList(map(wrap, model.blocks))}
    return twin
