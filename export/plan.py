"""The options of an export, and the checks that run before any work starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from zoo.blocks.attention import KV
from zoo.blocks.mixer import parts
from zoo.errors import ZooError
from zoo.eviction import evictions
from zoo.export.ring import PAST, pack, with_rings
from zoo.model import Model

PRECISIONS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
GRAPHS_BYTES = 32 << 20  # upper bound on the graphs of any model


class Plan(BaseModel):
    """Options of an export: the graphs of a bundle and their form."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dialect: Literal["portable", "ort"] = Field(
        default="portable", description="standard operators only, or onnxruntime's own where they exist"
    )
    prefill: int | None = Field(
        default=128, ge=2, description="largest piece of a prompt, read at once in a graph of its own; default: 128, at most a window"
    )
    sleep: Literal["loop", "unroll", "per-pass"] = Field(
        default="loop", description="passes of a sleep: one Loop, unrolled, or a graph each"
    )
    self_sleeping: bool = Field(default=False, description="add a graph that sleeps by itself, for hosts that only carry its states")
    max_length: int | None = Field(default=None, ge=1, description="maximum number of tokens in a stream, for models that never evict")
    weights: Literal["int8", "int4"] | None = Field(default=None, description="storage of linear layers, in groups of 32 inputs")
    exact_activations: bool = Field(
        default=False, description="products with integer weights use activations as they are, in place of rounding them to 8 bits"
    )

    def cut(self, window: int) -> Plan:
        """Return the plan for windows of this many tokens: pieces of a prompt are not longer, unless asked for.

        Raises:
            ZooError: `prefill` was given, and is more than a window.
        """
        if self.prefill is None or self.prefill <= window:
            return self
        if "prefill" in self.model_fields_set:
            raise ZooError(f"prefill: {self.prefill} tokens are more than a window of {window}")
        return self.model_copy(update={"prefill": window if window > 1 else None})

    @property
    def bits(self) -> int | None:
        """Bits of a stored weight of a linear layer, if it is an integer."""
        return None if self.weights is None else int(self.weights.removeprefix("int"))

    @property
    def accuracy_level(self) -> int | None:
        """Level of the MatMulNBits nodes, if products with integer weights are written as such."""
        if self.dialect == "portable" or (self.exact_activations and self.bits == 8):  # onnxruntime's 8 bits are slow at level 1
            return None
        return 1 if self.exact_activations else 4


def slots(model: Model, plan: Plan) -> int:
    """Return the number of tokens that a window cache holds.

    Raises:
        ZooError: the window is unbounded, or bounded by both the config and the plan.
    """
    config = model.config
    if config.window is not None:
        if plan.max_length is not None:
            raise ZooError(f"max_length: {plan.max_length}; windows of {config.name} hold {config.window} tokens (evict '{config.evict}')")
        return config.window
    if plan.max_length is None:
        raise ZooError(
            f"{config.name}: evict: 'none' does not bound the window, and graphs need fixed caches; allowed: hard, sliding, or a max_length"
        )
    return plan.max_length


def check(model: Model, plan: Plan, out: Path, verified: bool) -> None:
    """Check that the model can be exported with this plan on this machine.

    Raises:
        ZooError: graphs cannot represent the model, the plan does not fit it, or disk space or memory is insufficient.
    """
    config = model.config
    if config.evict not in ("none", "hard", "sliding"):
        raise ZooError(f"{config.name}: evict: graphs do not support '{config.evict}'; allowed: none, hard, sliding")
    if not config.carry:
        raise ZooError(f"{config.name}: carry: False is not supported by graphs, which carry fast weights from pass to pass; allowed: True")
    if not config.feed_back:
        raise ZooError(f"{config.name}: feed_back: False is not supported by graphs, which carry hidden states too; allowed: True")
    plan.cut(slots(model, plan))
    if not evictions.get(config.evict).uses_window and plan.sleep != "loop":
        raise ZooError(f"sleep: '{plan.sleep}'; {config.name} never sleeps (evict 'none')")
    if plan.self_sleeping and (plan.sleep == "per-pass" or not evictions.get(config.evict).uses_window):
        why = "sleeps pass by pass" if plan.sleep == "per-pass" else "never sleeps (evict 'none')"
        raise ZooError(f"self_sleeping: {config.name} {why}; allowed for models whose sleep is one graph")
    for kind, cache in zip(config.pattern, model.init_state().window, strict=False):
        if not all(isinstance(part, KV) or all(tensor.numel() for tensor in part) for part in parts(cache)):
            raise ZooError(f"{config.name}: block '{kind}' keeps a growing cache, which no graph can hold; allowed: KV, or a fixed size")
    for name, tensor in model.named_parameters():
        if tensor.dtype not in PRECISIONS:
            raise ZooError(f"{config.name}: {name} is {tensor.dtype}; allowed: {', '.join(PRECISIONS.values())}")
    weights = sum(tensor.nbytes for tensor in model.parameters())
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < weights + GRAPHS_BYTES:
        raise ZooError(f"{out}: the bundle needs up to {weights + GRAPHS_BYTES:,} bytes, and {parent} has {free:,} left")
    if verified and (need := verify_bytes(model)) > (left := available_bytes()):
        raise ZooError(f"{config.name}: comparing with PyTorch needs about {need:,} bytes of memory, {left:,} are free; see --no-verify")


def state_bytes(model: Model, plan: Plan) -> int:
    """Return the size of the state of one stream."""
    fresh = with_rings(model.init_state(), slots(model, plan))
    return sum(tensor.nbytes for tensor in pack(fresh, PAST).values())


def verify_bytes(model: Model) -> int:
    """Estimate the memory for comparing graphs with PyTorch: float32 weights here, and twice in onnxruntime, which packs them."""
    count = sum(tensor.numel() for tensor in model.parameters())
    here = 0 if model.embed.weight.dtype == torch.float32 else 4 * count
    return here + 8 * count


def available_bytes() -> float:
    """Return the available memory in bytes, or infinity if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
