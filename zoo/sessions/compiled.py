"""Blocks compiled by `torch.compile` for a token of one stream, or of each of several, in the background."""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import Lock, Thread
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from zoo.blocks.block import Block
from zoo.blocks.mixer import parts
from zoo.errors import ZooError
from zoo.kernels.cpu.build import build
from zoo.kernels.cpu.linear import few_rows
from zoo.kernels.dispatch import in_place
from zoo.model import Model
from zoo.sessions.rings import RingPart, SlotPositions
from zoo.stack import with_blocks

FORMS = 64  # maximum number of different blocks of a model that are compiled


class CompiledBlocks:
    """Copies of a model with compiled blocks, for one stream and for several. Weights are shared with the model.

    Equal blocks share their code, so compiling takes as long for many layers as for a few.
    """

    def __init__(self) -> None:
        self.ready: dict[tuple[bool, int], Model] = {}
        self.failed = False
        self._threads: dict[tuple[bool, int], Thread] = {}
        self._lock = Lock()
        """Held while blocks are compiled: one copy at a time."""

    def get(self, model: Model, several: bool, context: int, rehearse: Callable[[Model, bool], object]) -> Model | None:
        """Return `model` with compiled blocks. Returns None while they are being compiled, and if that has failed.

        Args:
            several: for two streams or more.
            context: size of the caches, which the code depends on.
            rehearse: reads a token of each stream with a model, on scratch states.
        """
        key = several, context
        if key not in self._threads and not self.failed:
            self._threads[key] = Thread(target=self._compile, args=(model, key, rehearse), name="zoo-compile", daemon=True)
            self._threads[key].start()
        return self.ready.get(key)

    def wait(self) -> None:
        """Wait until everything that has been asked for is compiled, or has failed."""
        for thread in list(self._threads.values()):
            thread.join()

    @torch.no_grad()
    def _compile(self, model: Model, key: tuple[bool, int], rehearse: Callable[[Model, bool], object]) -> None:
        with self._lock:
            try:
                if not self.failed:
                    build()
                    compiled = with_compiled_blocks(model)  # here, because it imports torch's compiler
                    rehearse(compiled, key[0])
                    for block in compiled.blocks:
                        block.rehearsed = True  # type: ignore[assignment]
                    self.ready[key] = compiled
            except Exception as error:  # no C++ compiler, for example
                self.failed = True
                why = str(error).strip().partition("\n")[0]
                print(f"compile: failed, so tokens are decoded without it: {type(error).__name__}: {why}", file=sys.stderr)


_COMPILED: WeakKeyDictionary[Model, CompiledBlocks] = WeakKeyDictionary()


def compiled_blocks(model: Any) -> CompiledBlocks:
    """Return the compiled blocks of a model, which its sessions and pools share. Raises ZooError: it cannot be compiled."""
    if not isinstance(model, Model) or model._compiled_call_impl is not None:
        raise ZooError(f"compile: True; want a zoo.Model that is not wrapped or compiled, not {type(model).__name__}")
    if not model.embed.weight.is_cpu:
        raise ZooError(f"compile: True; only tokens on a CPU are compiled, and the model is on {model.embed.weight.device}")
    return _COMPILED.setdefault(model, CompiledBlocks())


def with_compiled_blocks(model: Model) -> Model:
    """Return a copy of `model` for `Model.run`, which shares its weights, and whose blocks are compiled and change states in place.

    It has no head, which may refer to `model` and would keep it alive.
    """
    step = torch.compile(_in_place, backend=few_rows, fullgraph=True, dynamic=False, recompile_limit=FORMS, isolate_recompiles=True)  # type: ignore[call-overload]
    twin = with_blocks(model, lambda block: _CompiledBlock(block, step))
    del twin._modules["head"]
    return twin


class _CompiledBlock(nn.Module):
    def __init__(self, block: nn.Module, step: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block, self.mixer, self.step = block, block.mixer, step
        self.rehearsed = False

    def forward(self, x: Tensor, fast: Any, window: Any, positions: SlotPositions, *, mlp: bool = True) -> tuple[Tensor, Any, Any]:
        if not self.rehearsed:
            self._mark_sizes(x, fast, window, positions)
        with in_place():
            return self.step(self.block, x, fast, window, positions, mlp), fast, window

    @staticmethod
    def _mark_sizes(x: Tensor, fast: Any, window: Any, positions: SlotPositions) -> None:
        """Tell torch.compile that the number of streams, unless it is one, and the slots that are filled may change."""
        from torch._dynamo import mark_dynamic

        if len(x) > 1:
            states = [fast] * (fast is not None) + [tensor for part in parts(window) for tensor in part]
            for tensor in (x, *states, positions.start, positions.rows, *positions.tables):
                mark_dynamic(tensor, 0)
        for part in parts(window):
            if isinstance(part, RingPart) and part.key.shape[2] > 1:
                for tensor, slots in zip(part, (2, 2, 3), strict=True):
                    mark_dynamic(tensor, slots)


def _in_place(block: Block, x: Tensor, fast: Any, window: Any, positions: SlotPositions, mlp: bool) -> Tensor:
    x, new_fast, new_window = block(x, fast, window, positions, mlp=mlp)
    write_back(fast, new_fast)
    write_back(window, new_window)
    return x


def write_back(old: Any, new: Any) -> None:
    """Copy a block's new fast weights or window cache into the old ones, where they are not the same tensors."""
    if isinstance(old, Tensor):
        if new is not old:
            old.copy_(new)
    else:
        for before, after in zip(parts(old), parts(new), strict=True):
            for one, other in zip(before, after, strict=True):
                write_back(one, other)
