"""Rotary options in config.json, as transformers reads them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from zoo.checkpoints.family import expect
from zoo.errors import ZooError


def rope(config: Mapping[str, Any], theta: float = 10_000.0, part: float | None = None, context: int | None = None) -> dict[str, Any]:
    """Read rotary options from either spelling: top-level fields (transformers 4), or `rope_parameters` (transformers 5).

    Args:
        theta: upstream's default.
        part: upstream's default for the part of a head that is rotated; None: upstream always rotates whole heads.
        context: upstream's default for max_position_embeddings; None: scaled frequencies are not supported.
    """
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if nested := [key for key, value in stated.items() if isinstance(value, Mapping)]:
        raise ZooError(f"rope_parameters: {', '.join(nested)}: separate angles for some layers are not supported")
    key = "rope_type" if "rope_type" in stated else "type"
    kind = expect(stated, key, "default", *(() if context is None else SCALINGS), default="default")
    found = {**config, **stated}
    fields: dict[str, Any] = {"rope_theta": found.get("rope_theta", theta)}
    if kind != "default":
        fields["rope_scaling"] = SCALINGS[kind]({"max_position_embeddings": context, **config}, stated)
    if part is not None:
        fields["rotary"] = found.get("partial_rotary_factor", part)
    elif kind != "default" or context is None:
        expect(found, "partial_rotary_factor", 1, None)  # upstream fails
    elif found.get("partial_rotary_factor", 1) not in (1, None):
        warnings.warn(f"partial_rotary_factor: {found['partial_rotary_factor']} is ignored, as it is upstream", stacklevel=2)
    return fields


def _linear(config: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "linear", "factor": stated["factor"]}


def _dynamic(config: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "dynamic", "factor": stated["factor"], "original_length": config["max_position_embeddings"]}


def _llama3(config: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: stated[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
    return {"type": "llama3", "original_length": _original_length(config, stated), **fields}


def _yarn(config: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    length = _original_length(config, stated)
    factor = stated["factor"] or config["max_position_embeddings"] / length
    attention_factor = stated.get("attention_factor")
    scales: tuple[Any, Any] = (stated.get("mscale"), stated.get("mscale_all_dim"))
    if attention_factor is None and all(scales):
        above, below = (1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1 for scale in scales)
        attention_factor = above / below
    return {
        "type": "yarn",
        "factor": factor,
        "original_length": length,
        "beta_fast": stated.get("beta_fast") or 32,
        "beta_slow": stated.get("beta_slow") or 1,
        "truncate": stated.get("truncate", True),
        "attention_factor": attention_factor,
    }


def _original_length(config: Mapping[str, Any], stated: Mapping[str, Any]) -> Any:
    name = "original_max_position_embeddings"
    return config[name] if name in config else stated.get(name, config["max_position_embeddings"])


SCALINGS = {"linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "llama3": _llama3}
"""Read a `rope_type` as the fields of `RopeScaling`, from all of config.json and from its rotary fields."""


def write_rope(attention: Any) -> dict[str, Any]:
    """Write rotary options as top-level fields, which every version of transformers reads."""
    scaling = attention.rope_scaling
    if scaling is None:
        return {"rope_theta": attention.rope_theta, "rope_scaling": None}
    used = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor"),
    }
    stated = {"rope_type": scaling.type, "factor": scaling.factor, **{key: getattr(scaling, key) for key in used.get(scaling.type, ())}}
    if scaling.type == "dynamic":
        return {"rope_theta": attention.rope_theta, "rope_scaling": stated, "max_position_embeddings": scaling.original_length}
    if scaling.type != "linear":
        stated["original_max_position_embeddings"] = scaling.original_length
    return {"rope_theta": attention.rope_theta, "rope_scaling": stated}
