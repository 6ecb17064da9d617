"""The names of the models, filtered by facets: fast weights, checkpoint family, number of parameters, mixer."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from decimal import Decimal

from zoo.config import ModelConfig, models, resolve
from zoo.errors import ZooError
from zoo.registry import nearest

_NUMBER = r"(\d+(?:\.\d+)?)([kmbt]?)"
_RANGE = re.compile(rf"(?:{_NUMBER})?\.\.(?:{_NUMBER})?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def list_models(
    wildcard: str = "*", *, sleeps: bool = False, family: str | None = None, params: str | None = None, mixer: str | None = None
) -> list[str]:
    """Return the base names of the models that match everything given, sorted. Suffixes such as `-sleep<N>` may be added to each.

    Args:
        wildcard: pattern of names, such as "jet*".
        sleeps: only models with fast weights, into which a sleep consolidates.
        family: only models of this checkpoint family, the `model_type` in the upstream config.json, such as "bamba".
        params: only models whose number of parameters is in this range, both ends included: "1b..3b", "3b.." or "..500m". Units are
            k, m, b and t.
        mixer: only models with a layer of this kind, such as "mamba2", or with one that is made of it and others.
    Raises:
        ZooError: an unknown family or mixer, or `params` that is not a range.
    """
    facets: list[Callable[[ModelConfig], bool]] = []  # the cheapest first
    if family is not None:
        facets.append(lambda config: config.upstream.get("model_type") == family)
    if mixer is not None:
        facets.append(lambda config: mixer in config.pattern or mixer in _made_of(config))
    if sleeps:
        facets.append(_has_fast_weights)
    if params is not None:
        low, high = _range(params)
        facets.append(lambda config: low <= _parameters(config) <= high)

    names = [name for name in models.names() if fnmatch.fnmatchcase(name, wildcard)]
    found = [name for name in names if _matches(name, facets)] if facets else names
    if facets and not found:
        _check_known(family, mixer)
    return found


def _matches(name: str, facets: list[Callable[[ModelConfig], bool]]) -> bool:
    config = resolve(name)
    return all(facet(config) for facet in facets)


def _check_known(family: str | None, mixer: str | None) -> None:
    """Refuse a family or mixer that is not registered; one that no model has is merely absent."""
    from zoo.blocks.mixer import mixers
    from zoo.checkpoints.family import families

    for field, value, registry in (("family", family, families), ("mixer", mixer, mixers)):
        if value is not None and str(value) not in registry:
            raise ZooError(f"{field}: '{value}' is unknown; {nearest(str(value), registry.names())}")


def _range(text: str) -> tuple[Decimal, Decimal]:
    """Return the ends of a range of numbers such as "1b..3b"; an open end is 0 or infinity."""
    match = _RANGE.fullmatch(text) if isinstance(text, str) else None
    if match is None or text == "..":
        raise ZooError(f"params: {text!r}; want a range such as 1b..3b, 3b.. or ..500m")
    low, low_unit, high, high_unit = match.groups("")
    ends = Decimal(low or 0) * _UNITS[low_unit.lower()], Decimal(high or "inf") * _UNITS[high_unit.lower()]
    if ends[0] > ends[1]:
        raise ZooError(f"params: {text!r}; the first number must be at most the second")
    return ends


def _made_of(config: ModelConfig) -> set[str]:
    """Return the mixers that those in the layers are made of: a field of their options is named after each."""
    from zoo.blocks.mixer import mixers

    return {name for kind in config.pattern for name in mixers.get(kind).Options.model_fields if name in mixers}


def _has_fast_weights(config: ModelConfig) -> bool:
    """Return True if some layer of a model has fast weights; builds one block of each kind."""
    import torch

    from zoo.stack import build_blocks

    kinds = config.model_copy(update={"layers": " ".join(dict.fromkeys(config.pattern)), "mlp": "none"})
    with torch.device("meta"):
        return any(block.mixer.new_fast(1) is not None for block in build_blocks(kinds, None))


def _parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a model, which is built on the meta device."""
    from zoo.checkpoints.plain import empty_model

    return sum(parameter.numel() for parameter in empty_model(config).parameters())
