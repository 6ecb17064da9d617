"""The costs of a model: parameters, bytes of state per stream, FLOPs of a wake pass and of a sleep."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor

from zoo.blocks.block import Block
from zoo.blocks.mixer import linear_flops
from zoo.blocks.mlp import MLP
from zoo.config import ModelConfig
from zoo.errors import counted
from zoo.factory import create
from zoo.loss import chunks, predicted
from zoo.model import Model, Pass


@dataclass(frozen=True)
class Description:
    """Costs of one stream. Bytes are for the model's own dtype; FLOPs count a multiply-add as two."""

    config: ModelConfig
    parameters: int
    weight_bytes: int
    """Parameters, at the model's dtype."""
    active_parameters: int
    """Parameters that one token uses: all but the experts that it is not routed to."""
    state_bytes: int
    """Fast weights; independent of the stream's length."""
    kv_bytes_per_token: int
    """Growth of the window cache per cached token."""
    window_bytes: int | None
    """Window cache when the window is full; None without a window."""
    flops_per_token: int
    """FLOPs to predict the first token of a stream; `zoo.blocks.mixer.Mixer.flops` says which operations are counted."""
    flops_per_sleep: int | None
    """FLOPs to consolidate the first full window of a stream; None if the model never sleeps."""

    def __str__(self) -> str:
        config = self.config
        rows = [
            ("layers", f"{len(config.pattern)}: {config.layers}"),
            (
                "parameters",
                f"{count(self.parameters)} ({size(self.weight_bytes)})"
                + (f", {count(self.active_parameters)} active" if self.active_parameters < self.parameters else ""),
            ),
            ("fast weights", f"{size(self.state_bytes)} per stream"),
            (
                "window cache",
                f"{size(self.kv_bytes_per_token)} per token"
                + (f", {size(self.window_bytes)} when full" if self.window_bytes is not None else ""),
            ),
            ("awake", f"{count(self.flops_per_token)} FLOPs per token"),
        ]
        if self.flops_per_sleep is None:
            rows.append(("asleep", f"never (evict: {config.evict})"))
        else:
            loops = counted(config.loops, "pass")
            span = f"layers {config.looped.start}-{config.looped.stop - 1}"
            rows.append(
                (
                    "asleep",
                    f"{count(self.flops_per_sleep)} FLOPs per window of {config.window} ({loops} of {span})",
                )
            )
            rows.append(("evict", config.evict))
        lines = [config.name, *wrap(config.about, 80)]
        for name, value in rows:
            lines += wrap(value, 80, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16)
        return "\n".join(lines)


def describe(
    model: str | Path | Mapping[str, Any] | ModelConfig | Model, *, dtype: torch.dtype | str | None = None, **overrides: Any
) -> Description:
    """Return the costs of a model, or of the model that `zoo.create` would build from the same arguments, without allocating it.

    `print` the result for a table; its `.config.yaml()` is YAML from which `zoo.create` builds the same model. Raises ZooError.
    """
    if dtype is None:
        dtype = model.embed.weight.dtype if isinstance(model, Model) else torch.float32
    config = model.config if isinstance(model, Model) else model
    blank = create(config, device="meta", dtype=dtype, **overrides)
    config = blank.config
    one = window_bytes(blank, 1)
    return Description(
        config=config,
        parameters=sum(p.numel() for p in blank.parameters()),
        weight_bytes=sum(p.nbytes for p in blank.parameters()),
        active_parameters=sum(p.numel() for p in blank.parameters()) - sum(mlp.idle_parameters() for mlp in _mlps(blank)),
        state_bytes=sum(fast.nbytes for fast in blank.init_state().fast if fast is not None),
        kv_bytes_per_token=one - window_bytes(blank, 0),
        window_bytes=None if config.window is None else window_bytes(blank, config.window),
        flops_per_token=_awake(blank),
        flops_per_sleep=None if config.window is None else _asleep(blank, config.window),
    )


def training_flops(model: Model, loss_mask: Tensor, *, loops: int | None = None) -> int:
    """Return the FLOPs of one training step on sequences with this mask, [B, T] bool, with `loops` passes per sleep (default: the
    model's).

    Counts the forward pass of `Model.answers`, and twice as much for the backward pass. Recomputation is not counted.
    """
    config, plan = model.config, chunks(loss_mask, model.config)
    forward = int(predicted(loss_mask, plan).sum()) * _head(model)
    for chunk in plan:
        tokens, past = chunk.read - chunk.start, 0 if model.eviction.restarts else chunk.start
        streams = len(chunk.of(loss_mask))
        if chunk.awake:
            forward += streams * _blocks(model, model.passes(config.wake_loops), tokens, past)
        if chunk.asleep:
            passes = model.passes((loops or config.loops) * config.wake_loops, asleep=True)
            done = 1 if chunk.awake and model.wakes_as_it_sleeps else 0
            forward += streams * _blocks(model, passes[done:], tokens, past)
    return 3 * forward


def _awake(model: Model) -> int:
    """Return the FLOPs of the first token of a stream."""
    return _blocks(model, model.passes(model.config.wake_loops)) + _head(model)


def _asleep(model: Model, window: int) -> int:
    """Return the FLOPs of a sleep on a stream's first window."""
    return _blocks(model, model.passes(model.config.loops * model.config.wake_loops, asleep=True), window)


def _blocks(model: Model, passes: list[Pass], tokens: int = 1, past: int = 0) -> int:
    """Return the operations of `passes` on tokens of one stream that has `past` cached."""
    blocks: list[Block] = list(model.blocks)  # type: ignore[arg-type]
    return sum(blocks[i].flops(tokens, past, keep=keep) for each in passes for i, keep in each)


def _mlps(model: Model) -> list[MLP]:
    return [block.mlp for block in model.blocks if block.mlp is not None]  # type: ignore[misc]


def _head(model: Model) -> int:
    """Return the operations of the head for one token."""
    loops, exit = model.config.wake_loops, model.exit
    gate = loops * linear_flops(exit) if loops > 1 and exit is not None and exit.loop is None else 0
    return gate + 2 * model.embed.weight.numel()


def window_bytes(model: Model, tokens: int) -> int:
    """Return the bytes of one stream's window caches when they hold `tokens` tokens."""
    return model.config.wake_loops * sum(block.mixer.window_bytes(tokens) for block in model.blocks)  # type: ignore[union-attr, operator]


def count(number: float) -> str:
    """Return a number with three significant digits, such as "1.96 B" for 1,960,270,848."""
    if number < 1000:
        return f"{number:.3g}"
    for unit in ("K", "M", "B", "T"):
        number /= 1000
        if float(f"{number:.3g}") < 1000:
            return f"{number:#.3g}".removesuffix(".") + f" {unit}"
    return f"{number:,.0f} T"


def size(number: float) -> str:
    """Return a number of bytes with three significant digits, such as "54 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if float(f"{number:.3g}") < 1000 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.3g} {unit}"


PEAKS = {
    "A100": 312e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165.2e12,
}
"""Peak bfloat16 FLOPs per second without sparsity, from NVIDIA's data sheets, by words in torch's name for the GPU; the first
match is used."""


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOPs per second of a GPU, or None if it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)
