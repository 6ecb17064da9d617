"""Families of upstream checkpoints: their config, translated in both directions, and their tensor names, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.blocks.mixer import Options, mixers
from zoo.config import BETWEEN_PASSES, ModelConfig
from zoo.errors import ZooError, counted
from zoo.model import Model
from zoo.registry import Registry


class Stacked(NamedTuple):
    """Our tensors that upstream stores as one, concatenated along rows; with `per`, interleaved head by head."""

    ours: tuple[str, ...]
    per: str | None = None
    """Attribute of the mixer that holds the number of those heads."""


class Ones(NamedTuple):
    """A vector of ones that upstream stores but never uses; this attribute of the mixer is its length."""

    attribute: str


class Taps(NamedTuple):
    """Kernels of a depthwise convolution, concatenated along channels: ours [C, K], upstream's [C, 1, K]."""

    ours: tuple[str, ...]


class Heads(NamedTuple):
    """A number for each head: ours [H], upstream's [1, 1, H, 1]."""

    ours: tuple[str, ...]


UNITS: Mapping[type, tuple[int, ...]] = {Taps: (1,), Heads: (0, 1, 3)}
"""Axes of size 1 of upstream's tensors, which ours lack."""


class FirstOf(NamedTuple):
    """The first of several of our names that the block has."""

    ours: tuple[str, ...]


Names = Mapping[str | tuple[str, ...], str | Stacked | Taps | Heads | Ones | FirstOf]
"""Upstream name to our name. Entries whose tensor a model does not have are skipped.

Several upstream names are tensors of one shape; concatenated along rows, they are ours. `{}` in them stands for the number of an
expert: those of the first expert, then those of the second, and so on.
"""


def renamed(names: Names, rename: Callable[[str], str]) -> Names:
    """Return `names` with `rename` applied to the upstream names."""
    return {rename(name) if isinstance(name, str) else tuple(map(rename, name)): ours for name, ours in names.items()}


def under(prefix: str, names: Names) -> Names:
    """Return `names` with a prefix before the upstream names."""
    return renamed(names, lambda name: prefix + name)


@dataclass(frozen=True)
class Family:
    """One format of upstream checkpoints."""

    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Translates config.json into fields of ModelConfig. A KeyError names a required field that is missing."""
    write: Callable[[ModelConfig], dict[str, Any]] | None
    """Inverse of `read`; None: the model is written in the format of the family that `read` names."""
    top: Names
    layer: str
    """Prefix of a layer's names; `{}` stands for its number."""
    block: Names
    mixers: Mapping[str, Names]
    """Names within a layer, for each kind of mixer; ours are relative to the mixer."""
    mlps: Mapping[str, Names] = field(default_factory=dict)
    """Names within a layer, for each kind of MLP; ours are relative to the block."""
    mlp_apart: bool = False
    """True if upstream counts the MLP of a block as a separate layer, after that of the mixer."""
    forms: Mapping[str, Family] = field(default_factory=dict)
    """Other ways in which the tensors are stored, by name. A folder is written in the form it was read in."""
    stores_tied_head: bool = False
    unused: str = r"(?!)"
    """Regular expression that matches the names of stored tensors a language model does not need."""


class Link(NamedTuple):
    """One upstream tensor and those of our tensors that it contains, or several upstream tensors and those that they contain together."""

    theirs: str
    ours: tuple[str, ...]
    groups: int = 1
    units: tuple[int, ...] = ()
    """See `UNITS`."""
    ones: int = 0
    others: tuple[str, ...] = ()
    """Further upstream tensors of the same shape, concatenated after the first."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all upstream tensors."""
        return (self.theirs, *self.others)

    def shapes(self, ours: Mapping[str, Tensor]) -> list[list[int]]:
        """Return the shape of each upstream tensor."""
        if self.ones:
            return [[self.ones]]
        rows, *rest = (sum(ours[name].shape[0] for name in self.ours), *ours[self.ours[0]].shape[1:])
        if self.others and not self.units:  # our rows are experts
            rows, rest = rows * rest[0], rest[1:]
        shape = [rows // len(self.names), *rest]
        for axis in self.units:
            shape.insert(axis, 1)
        return [shape] * len(self.names)

    def parts(self, ours: list[Tensor]) -> list[Tensor]:
        """Return upstream's tensors."""
        whole = self.pack(ours)
        if not self.others:
            return [whole]
        return list((whole if self.units else whole.flatten(0, 1)).unflatten(0, (len(self.names), -1)).unbind(0))

    def pack(self, ours: list[Tensor]) -> Tensor:
        """Combine our tensors into upstream's, or into the concatenation of several."""
        if self.ones:
            return torch.ones(self.ones)
        for axis in self.units:
            ours = [x.unsqueeze(axis) for x in ours]
        if self.groups == 1:
            return torch.cat(ours) if len(ours) > 1 else ours[0]
        return torch.cat([x.unflatten(0, (self.groups, -1)) for x in ours], dim=1).flatten(0, 1)

    def unpack(self, theirs: Tensor, rows: list[int]) -> list[Tensor]:
        """Split upstream's tensor, or the concatenation of several, into ours, given the number of rows of each."""
        if self.ones:
            return []
        if self.others and not self.units:
            return [theirs.unflatten(0, (rows[0], -1))]
        if self.units:
            theirs = theirs.squeeze(self.units)
        if len(rows) == 1:
            return [theirs]
        parts = theirs.unflatten(0, (self.groups, -1)).split([n // self.groups for n in rows], dim=1)
        return [part.flatten(0, 1) for part in parts]


def links(family: Family, model: Model) -> list[Link]:
    """Return the links to every parameter of `model` (on any device) except those of inserted blocks and `BETWEEN_PASSES`.

    Raises:
        ZooError: a block or a parameter that this format cannot represent.
    """
    shapes = dict(model.state_dict())

    def of(names: Names, theirs: str, ours: str, counts: object = None) -> Iterator[Link]:
        for their_names, our_names in names.items():
            first, *others = (theirs + name for name in ((their_names,) if isinstance(their_names, str) else their_names))
            if isinstance(our_names, Ones):
                yield Link(first, (), ones=getattr(counts, our_names.attribute))
                continue
            if isinstance(our_names, FirstOf):
                our_names = next((name for name in our_names.ours if ours + name in shapes), our_names.ours[0])
            if isinstance(our_names, str):
                our_names = Stacked((our_names,))
            whole = tuple(ours + name for name in our_names.ours)
            if all(name in shapes for name in whole):
                groups = getattr(counts, our_names.per) if isinstance(our_names, Stacked) and our_names.per else 1
                if "{}" in first:
                    experts = range(len(shapes[whole[0]]))
                    first, *others = (name.format(expert) for expert in experts for name in (first, *others))
                yield Link(first, whole, groups, UNITS.get(type(our_names), ()), others=tuple(others))

    found = list(of(family.top, "", ""))
    number = 0
    for i, block in enumerate(model.blocks):
        if block.inserted:
            continue
        prefix, kind, mlp = family.layer.format(number), model.config.pattern[i], model.config.mlp_pattern[i]
        if kind not in family.mixers:
            raise ZooError(f"{model.config.name}: layer {i}: this checkpoint format has no '{kind}'; it has {', '.join(family.mixers)}")
        found += of(family.block, prefix, f"blocks.{i}.")
        found += of(family.mixers[kind], prefix, f"blocks.{i}.mixer.", block.mixer)
        number += 1
        if family.mlp_apart and block.mlp is not None:
            prefix, number = family.layer.format(number), number + 1
        if block.mlp is not None:
            found += of(family.mlps.get(mlp, {}), prefix, f"blocks.{i}.")
    added = (*BETWEEN_PASSES, *(f"blocks.{i}." for i, block in enumerate(model.blocks) if block.inserted))
    covered = {name for link in found for name in link.ours}
    if left := [name for name in shapes if name not in covered and not name.startswith(added)]:
        raise ZooError(f"{model.config.name}: this checkpoint format cannot represent '{left[0]}' ({len(left)} such tensors)")
    if model.config.tie_embeddings and family.stores_tied_head:
        found.append(Link("lm_head.weight", ("embed.weight",)))
    return found


families: Registry[Family] = Registry("model_type", "checkpoints", "zoo.checkpoints.*")


def expect(config: Mapping[str, Any], key: str, *allowed: Any, default: Any = None) -> Any:
    """Return config[key], or the default. Raises ZooError unless it is one of the supported values."""
    value = config.get(key, default)
    if value not in allowed:
        raise ZooError(f"{key}: {value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")
    return value


def compact(kinds: list[str]) -> str:
    """Write the kinds of all layers as a layer pattern: 'jet jet attn' becomes 'jet*2 attn'."""
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
    return " ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)


def options(config: ModelConfig, kind: str) -> Any:
    """Return the options of a kind of block, with defaults filled in."""
    made: Options = mixers.get(kind).Options(**config.blocks.get(kind, {}))
    return made


def truncated_ratio(ratio: float) -> float:
    """Round a ratio up at the tenth decimal: upstream truncates its product with a width, which rounding could make just too small."""
    return math.ceil(ratio * 1e10) / 1e10


def layer_kinds(
    config: Mapping[str, Any], words: Mapping[str, str], default: Callable[[int], str], field: str = "layer_types"
) -> list[str]:
    """Return the kind of every layer: the list in `field` translated by `words`, or the default of each layer."""
    count = config["num_hidden_layers"]
    types = config.get(field)
    if types is None:
        return [default(i) for i in range(count)]
    if len(types) != count:
        raise ZooError(f"{field}: has {counted(len(types), 'entry')}, num_hidden_layers is {count}")
    return [words[expect({field: name}, field, *words)] for name in types]


def attention_kinds(config: Mapping[str, Any], window: int | None) -> list[str]:
    """Return `attn` or `swa` for each layer, from `layer_types` or, without it, from `max_window_layers`."""
    full = config.get("max_window_layers", 28)
    words = {"full_attention": "attn", "sliding_attention": "swa"}
    kinds = layer_kinds(config, words, lambda i: "attn" if window is None or i < full else "swa")
    if "swa" in kinds and window is None:
        raise ZooError("layer_types: 'sliding_attention' needs use_sliding_window and a sliding_window")
    return kinds
