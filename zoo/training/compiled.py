"""Training with blocks compiled by `torch.compile`, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoo.blocks.block import Block
from zoo.blocks.positions import Positions
from zoo.errors import ZooError, first_line
from zoo.model import Model
from zoo.stack import with_blocks

FORMS = 64  # maximum number of graphs, such as those of the kinds of blocks, with and without gradients of the state


@contextmanager
def compile_errors() -> Iterator[None]:
    """Raise a ZooError in place of an error of torch.compile, such as a damaged file in its cache."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise _failed(error) from error


def _failed(error: Exception) -> ZooError:
    return ZooError(f"compile: true; torch.compile fails: {first_line(error)}; want false")


def with_compiled_blocks(model: Model, rows: int | None) -> Model:
    """Return a copy of `model` for training, which shares its weights, and whose blocks are compiled as they are first run.

    Equal blocks share their code. Code for a fixed size is faster, but a size that occurs once would be compiled for nothing.

    Args:
        rows: number of sequences whose whole windows get code of their own; all other sizes share one. None: every size has its own.
    Raises:
        ZooError: a model that cannot be compiled, or torch.compile fails, as without a C++ compiler.
    """
    if not model.embed.weight.is_cpu:
        raise ZooError(f"compile: true; only training on a CPU is compiled, not on {model.embed.weight.device}; want device: cpu, or false")
    if "moe" in model.config.mlp_pattern:
        raise ZooError(f"compile: true; {model.config.name} has a mixture of experts (mlp: moe), which is not compiled; want false")
    try:
        torch.compile(torch.sin)(torch.ones(1))
    except Exception as error:  # no C++ compiler, for example
        raise _failed(error) from None
    limits: Any = {"recompile_limit": FORMS, "isolate_recompiles": True}
    fixed, any_size = (torch.compile(_run, dynamic=dynamic, **limits) for dynamic in (False, True))
    whole = rows, model.config.window

    def run(block: Block, x: Tensor, *arguments: Any) -> tuple[Tensor, Any, Any]:
        return (fixed if rows is None or x.shape[:2] == whole else any_size)(block, x, *arguments)

    return with_blocks(model, lambda block: _Compiled(block, run))


class _Compiled(nn.Module):
    def __init__(self, block: nn.Module, run: Any) -> None:
        super().__init__()
        self.block, self.mixer, self.run = block, block.mixer, run

    def forward(self, x: Tensor, fast: Any, window: Any, positions: Positions, *, keep: int | None = None) -> tuple[Tensor, Any, Any]:
        return self.run(self.block, x, fast, window, positions, keep)


def _run(block: Block, x: Tensor, fast: Any, window: Any, positions: Positions, keep: int | None) -> tuple[Tensor, Any, Any]:
    return block(x, fast, window, positions, keep=keep)
