"""The stack of blocks that a config describes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from zoo.blocks.block import Block
from zoo.blocks.mixer import mixers
from zoo.blocks.mlp import mlps
from zoo.blocks.norm import norms
from zoo.config import ModelConfig, validate
from zoo.registry import Registry


def build_blocks(config: ModelConfig, reach: int | None) -> Iterator[Block]:
    """Build the blocks of a model, each with its mixer and MLP; `reach` is that of the eviction. Raises ZooError."""
    mixer_options = _options(mixers, config.pattern, config.blocks, f"{config.name}: blocks")
    mlp_options = _options(mlps, (kind for kind in config.mlp_pattern if kind != "none"), config.mlps, f"{config.name}: mlps")
    norm = partial(norms[config.norm], eps=config.norm_eps)
    for kind, mlp_kind in zip(config.pattern, config.mlp_pattern, strict=True):
        options, mlp = mixer_options[kind], None
        mixer = mixers.get(kind)(config.d_model, options, reach)
        if options.mlp and mlp_kind != "none":
            mlp = mlps.get(mlp_kind)(config.d_model, config.mlp_width, mlp_options[mlp_kind])
        yield Block(mixer, options, mlp, config.d_model, norm)


def _options(registry: Registry[Any], used: Iterable[str], given: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return the options of every kind that is used or given, checked."""
    return {kind: validate(registry.get(kind).Options, given.get(kind, {}), f"{label}.{kind}") for kind in dict.fromkeys((*used, *given))}
