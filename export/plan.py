"""What is asked of an export, and whether it can be done here: checked before any work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from zoo.blocks.attention import KV
from zoo.errors import ZooError
from zoo.eviction import evictions
from zoo.export.ring import PAST, pack, with_rings
from zoo.model import Model

PRECISIONS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
GRAPHS_BYTES = 32 << 20  # more than the graphs of any model take


class Plan(BaseModel):
    """Which graphs a bundle has, and how they are written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dialect: Literal["portable", "ort"] = Field(
        default="portable", description="standard operators, or onnxruntime's own where it has them"
    )
    prefill: int | None = Field(default=None, ge=2, description="tokens that a second prediction graph reads at once")
    sleep: Literal["loop", "unroll", "per-pass"] = Field(default="loop", description="how the passes of a sleep are written")
    max_length: int | None = Field(default=None, ge=1, description="tokens of a stream whose window nothing bounds (evict 'none')")
    weights: Literal["int8", "int4"] | None = Field(
        default=None, description="of linear layers, stored so; activations keep their precision"
    )


def slots(model: Model, plan: Plan) -> int:
    """Tokens that a window cache holds. Raises ZooError if nothing bounds them, or two things do."""
    config = model.config
    if config.window is not None:
        if plan.max_length is not None:
            raise ZooError(f"max_length: {plan.max_length}; windows of {config.name} hold {config.window} tokens (evict '{config.evict}')")
        return config.window
    if plan.max_length is None:
        raise ZooError(
            f"{config.name}: evict: 'none' bounds no window, and graphs have fixed caches; allowed: hard, sliding, or a max_length"
        )
    return plan.max_length


def check(model: Model, plan: Plan, out: Path, verified: bool) -> None:
    """ZooError for a model that graphs cannot hold, a plan that does not fit it, or a disk or memory too small for the work."""
    config = model.config
    if config.evict not in ("none", "hard", "sliding"):
        raise ZooError(f"{config.name}: evict: graphs know nothing of '{config.evict}'; allowed: none, hard, sliding")
    if not config.carry:
        raise ZooError(f"{config.name}: carry: False is for comparisons; graphs carry fast weights from pass to pass")
    held = slots(model, plan)
    if plan.prefill is not None and plan.prefill > held:
        raise ZooError(f"prefill: {plan.prefill} tokens are more than a window of {held}")
    if not evictions.get(config.evict).uses_window and plan.sleep != "loop":
        raise ZooError(f"sleep: '{plan.sleep}'; {config.name} never sleeps (evict 'none')")
    for kind, cache in zip(config.pattern, model.init_state().window, strict=False):
        if cache is not None and not isinstance(cache, KV) and not all(tensor.numel() for tensor in cache):
            raise ZooError(f"{config.name}: block '{kind}' keeps a cache that grows, which no graph can hold; allowed: KV, or a fixed size")
    for name, tensor in model.named_parameters():
        if tensor.dtype not in PRECISIONS:
            raise ZooError(f"{config.name}: {name} is {tensor.dtype}; allowed: {', '.join(PRECISIONS.values())}")
    weights = sum(tensor.nbytes for tensor in model.parameters())
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < weights + GRAPHS_BYTES:
        raise ZooError(f"{out}: the bundle takes up to {weights + GRAPHS_BYTES:,} bytes, and {parent} has {free:,} left")
    if verified and (need := verify_bytes(model)) > (left := available_bytes()):
        raise ZooError(f"{config.name}: comparing with PyTorch takes about {need:,} bytes of memory, {left:,} are free; see --no-verify")


def state_bytes(model: Model, plan: Plan) -> int:
    """What a stream carries from call to call."""
    fresh = with_rings(model.init_state(), slots(model, plan))
    return sum(tensor.nbytes for tensor in pack(fresh, PAST).values())


def verify_bytes(model: Model) -> int:
    """Memory that comparing graphs with PyTorch takes: float32 weights here, in onnxruntime, and there once more as it packs them."""
    count = sum(tensor.numel() for tensor in model.parameters())
    here = 0 if model.embed.weight.dtype == torch.float32 else 4 * count
    return here + 8 * count


def available_bytes() -> float:
    """Memory that is free, as far as the system says."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
