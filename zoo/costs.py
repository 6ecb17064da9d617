"""What a model is and what it costs: parameters, bytes a stream carries, operations awake and asleep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from zoo.config import ModelConfig
from zoo.model import Model
from zoo.weights import create


@dataclass(frozen=True)
class Description:
    """Costs of one stream. Bytes are for the model's own dtype; operations count a multiply-add as two."""

    config: ModelConfig
    parameters: int
    state_bytes: int
    """Fast weights, whatever the stream's length."""
    kv_bytes_per_token: int
    """Growth of the window cache per token held."""
    window_bytes: int | None
    """Window cache of a full window; None without a window."""
    flops_per_token: int
    """One predicted token, awake, the first of its window: matrix products alone."""
    flops_per_sleep: int | None
    """Consolidation of one full window, matrix products alone; None if the model never sleeps."""

    def __str__(self) -> str:
        config = self.config
        rows = [
            ("layers", f"{len(config.pattern)}: {config.layers}"),
            ("parameters", f"{self.parameters:,}"),
            ("fast weights", f"{_bytes(self.state_bytes)} per stream"),
            (
                "window cache",
                f"{_bytes(self.kv_bytes_per_token)} per token"
                + (f", {_bytes(self.window_bytes)} when full" if self.window_bytes is not None else ""),
            ),
            ("awake", f"{self.flops_per_token:,} FLOPs per token"),
        ]
        if self.flops_per_sleep is None:
            rows.append(("asleep", f"never (evict: {config.evict})"))
        else:
            span = f"layers {config.looped.start}-{config.looped.stop - 1}"
            rows.append(("asleep", f"{self.flops_per_sleep:,} FLOPs per window of {config.window} ({config.loops} passes of {span})"))
            rows.append(("evict", config.evict))
        head = f"{config.name}\n{config.about}".strip()
        return "\n".join([head, *(f"  {name:<13} {value}" for name, value in rows)])


def describe(model: str | Path | Mapping[str, Any] | ModelConfig | Model, **overrides: Any) -> Description:
    """Costs of a model, or of the model that `zoo.create` would make of the same arguments. Reserves no memory.

    `print` it for a table; `.config.yaml()` is YAML that `zoo.create` makes the same model of. Raises ZooError.
    """
    dtype = model.embed.weight.dtype if isinstance(model, Model) else torch.float32
    config = model.config if isinstance(model, Model) else model
    blank = create(config, device="meta", dtype=dtype, **overrides)
    config = blank.config
    token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    fresh = blank.init_state()
    window = None if config.window is None else token.expand(1, config.window)
    with torch.no_grad():
        first = blank(token).state
        full = None if window is None else _size(blank(window).state.window)
    return Description(
        config=config,
        parameters=sum(p.numel() for p in blank.parameters()),
        state_bytes=_size(fresh.fast),
        kv_bytes_per_token=_size(first.window) - _size(fresh.window),
        window_bytes=full,
        flops_per_token=_flops(lambda: blank(token)),
        flops_per_sleep=None if window is None else _flops(lambda: blank.consolidate(window)),
    )


def _size(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return int(counter.get_total_flops())


def _bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count = count / 1024  # type: ignore[assignment]
    return f"{count:.3g} GiB"
