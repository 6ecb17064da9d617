"""What a family of upstream checkpoints is: its config, translated both ways, and its names, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.blocks.mixer import Options, mixers
from zoo.config import ModelConfig
from zoo.errors import ZooError
from zoo.model import Model
from zoo.registry import Registry


class Stacked(NamedTuple):
    """Tensors of ours that upstream stacks in one: the rows of each, or, with `per`, its rows for one head after another."""

    ours: tuple[str, ...]
    per: str | None = None
    """Attribute of the mixer that counts those heads."""


class Ones(NamedTuple):
    """A vector that upstream stores and never uses: ones, as many as this attribute of the mixer says."""

    attribute: str


class Taps(NamedTuple):
    """Kernels of a depthwise convolution, stacked: ours [C, K], theirs [C, 1, K]."""

    ours: tuple[str, ...]


Names = Mapping[str, str | Stacked | Taps | Ones]
"""Upstream's name to ours. Entries whose tensor of ours a model does not have are left out."""


@dataclass(frozen=True)
class Family:
    """Upstream checkpoints of one form."""

    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """config.json to fields of ModelConfig. A KeyError names a field that config.json must have."""
    write: Callable[[ModelConfig], dict[str, Any]] | None
    """The way back; None: `read` names the family in whose form such a model is written."""
    top: Names
    layer: str
    """Prefix of a layer's names, `{}` its number."""
    block: Names
    mixers: Mapping[str, Names]
    """By kind of mixer, the names within a layer; ours are relative to the mixer."""
    stores_tied_head: bool = False
    unused: str = r"(?!)"
    """Regular expression of names that upstream stores and a language model has no use for."""


class Link(NamedTuple):
    """One upstream tensor and what it holds of ours."""

    theirs: str
    ours: tuple[str, ...]
    groups: int = 1
    depthwise: bool = False
    ones: int = 0

    def pack(self, ours: list[Tensor]) -> Tensor:
        """Our tensors as upstream's one."""
        if self.ones:
            return torch.ones(self.ones)
        if self.depthwise:
            ours = [x[:, None] for x in ours]
        if self.groups == 1:
            return torch.cat(ours) if len(ours) > 1 else ours[0]
        return torch.cat([x.unflatten(0, (self.groups, -1)) for x in ours], dim=1).flatten(0, 1)

    def unpack(self, theirs: Tensor, rows: list[int]) -> list[Tensor]:
        """Upstream's tensor as our tensors of so many rows each."""
        if self.ones:
            return []
        if self.depthwise:
            theirs = theirs.squeeze(1)
        if len(rows) == 1:
            return [theirs]
        parts = theirs.unflatten(0, (self.groups, -1)).split([n // self.groups for n in rows], dim=1)
        return [part.flatten(0, 1) for part in parts]


def links(family: Family, model: Model) -> list[Link]:
    """Every upstream tensor of `model` (on any device) but for what was added to it. Covers each parameter of the others."""
    shapes = dict(model.state_dict())

    def of(names: Names, theirs: str, ours: str, counts: object = None) -> Iterator[Link]:
        for their_name, our_names in names.items():
            if isinstance(our_names, Ones):
                yield Link(theirs + their_name, (), ones=getattr(counts, our_names.attribute))
                continue
            if isinstance(our_names, str):
                our_names = Stacked((our_names,))
            whole = tuple(ours + name for name in our_names.ours)
            if all(name in shapes for name in whole):
                groups = getattr(counts, our_names.per) if isinstance(our_names, Stacked) and our_names.per else 1
                yield Link(theirs + their_name, whole, groups, isinstance(our_names, Taps))

    found = list(of(family.top, "", ""))
    kept = [i for i, block in enumerate(model.blocks) if not block.inserted]
    for number, i in enumerate(kept):
        prefix, kind = family.layer.format(number), model.config.pattern[i]
        if kind not in family.mixers:
            raise ZooError(f"{model.config.name}: layer {i}: this form of checkpoint has no '{kind}'; it has {', '.join(family.mixers)}")
        found += of(family.block, prefix, f"blocks.{i}.")
        found += of(family.mixers[kind], prefix, f"blocks.{i}.mixer.", model.blocks[i].mixer)
    added = ("inject", *(f"blocks.{i}." for i, block in enumerate(model.blocks) if block.inserted))
    covered = {name for link in found for name in link.ours}
    if left := [name for name in shapes if name not in covered and not name.startswith(added)]:
        raise ZooError(f"{model.config.name}: this form of checkpoint has no place for '{left[0]}' ({len(left)} such tensors)")
    if model.head is None and family.stores_tied_head:
        found.append(Link("lm_head.weight", ("embed.weight",)))
    return found


families: Registry[Family] = Registry("model_type", "checkpoints", "zoo.checkpoints.*")


def expect(config: Mapping[str, Any], key: str, *allowed: Any, default: Any = None) -> Any:
    """config[key] (or the default), which must be one of the values that are implemented."""
    value = config.get(key, default)
    if value not in allowed:
        raise ZooError(f"{key}: {value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")
    return value


def compact(kinds: list[str]) -> str:
    """A layer pattern for the mixers of every layer: 'jet jet attn' is written 'jet*2 attn'."""
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
    return " ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)


def options(config: ModelConfig, kind: str) -> Any:
    """The options of a kind of block, defaults filled in."""
    made: Options = mixers.get(kind).Options(**config.blocks.get(kind, {}))
    return made


def truncated_ratio(ratio: float) -> float:
    """A ratio for upstream code that cuts off the fraction of its product, where rounding may have left it just too small."""
    return math.ceil(ratio * 1e10) / 1e10


def rope(config: Mapping[str, Any], theta: float = 10_000.0, part: float | None = None) -> dict[str, Any]:
    """Rotary options from either spelling: fields of their own (transformers 4), or `rope_parameters` (transformers 5).

    Args:
        theta: upstream's default.
        part: upstream's default for the part of a head that is rotated; None: upstream always rotates whole heads.
    """
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    for key in ("rope_type", "type"):
        expect(stated, key, "default", default="default")
    if nested := [key for key, value in stated.items() if isinstance(value, Mapping)]:
        raise ZooError(f"rope_parameters: {', '.join(nested)}: angles of their own for some layers are not supported")
    find = {**config, **stated}
    fields = {"rope_theta": find.get("rope_theta", theta)}
    if part is None:
        expect(find, "partial_rotary_factor", 1, None)
        return fields
    return {**fields, "rotary": find.get("partial_rotary_factor", part)}


def layer_kinds(config: Mapping[str, Any], words: Mapping[str, str], default: Callable[[int], str]) -> list[str]:
    """The kind of mixer of every layer: `layer_types`, word for word, or the default of each layer."""
    count = config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:
        return [default(i) for i in range(count)]
    if len(types) != count:
        raise ZooError(f"layer_types: has {len(types)} entries, num_hidden_layers is {count}")
    return [words[expect({"layer_types": name}, "layer_types", *words)] for name in types]


def attention_kinds(config: Mapping[str, Any], window: int | None) -> list[str]:
    """`attn` or `swa` of each layer, from `layer_types` or, without them, from `max_window_layers`."""
    full = config.get("max_window_layers", 28)
    words = {"full_attention": "attn", "sliding_attention": "swa"}
    kinds = layer_kinds(config, words, lambda i: "attn" if window is None or i < full else "swa")
    if "swa" in kinds and window is None:
        raise ZooError("layer_types: 'sliding_attention' needs use_sliding_window and a sliding_window")
    return kinds
