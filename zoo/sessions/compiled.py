"""Blocks compiled by `torch.compile` for a token of one stream, or of each of several, in the background."""

from __future__ import annotations

import operator
import sys
from collections import Counter
from collections.abc import Callable
from threading import Lock, Thread
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from zoo.blocks.block import Block
from zoo.blocks.mixer import parts
from zoo.errors import ZooError, first_line
from zoo.kernels.cpu.backend import with_kernels
from zoo.kernels.cpu.build import build
from zoo.kernels.dispatch import in_place
from zoo.model import Model
from zoo.sessions.rings import RingPart, SlotPositions
from zoo.stack import with_blocks

FORMS = 64  # maximum number of different blocks of a model that are compiled
MOST_TIMES = 8  # that blocks are compiled for one number of streams

Key = tuple[bool, int, bool]
"""For several streams; size of the caches; in inference mode."""


class CompiledBlocks:
    """Copies of a model with compiled blocks, for one stream and for several. Weights are shared with the model.

    Equal blocks share their code, so compiling takes as long for many layers as for a few. Code for a model that has changed since is
    compiled again: in the background, too.
    """

    def __init__(self) -> None:
        self.ready: dict[Key, Copy] = {}
        self.failed = False
        self._threads: dict[Key, Thread] = {}
        self._times: Counter[Key] = Counter()
        self._lock = Lock()
        """Held while blocks are compiled: one copy at a time."""

    def get(self, model: Model, several: bool, context: int, rehearse: Callable[[Model, bool], object]) -> Model | None:
        """Return `model` with compiled blocks. Returns None while they are being compiled, if that has failed, and under autocast.

        Args:
            several: for two streams or more.
            context: size of the caches, which the code depends on.
            rehearse: reads a token of each stream with a model, on scratch states.
        """
        if self.failed or torch.is_autocast_enabled("cpu"):
            return None
        key = several, context, torch.is_inference_mode_enabled()
        copy = self.ready.get(key)
        if copy is not None and copy.serves(model):
            return copy.model
        if copy is not None:
            self.ready.pop(key, None)  # unless another thread has
            self._threads.pop(key, None)
        if key not in self._threads:
            self._times[key] += 1
            self._threads[key] = Thread(target=self._compile, args=(model, key, rehearse), name="zoo-compile", daemon=True)
            self._threads[key].start()
        return None

    def wait(self) -> None:
        """Wait until everything that has been asked for is compiled, or has failed."""
        for thread in list(self._threads.values()):
            thread.join()

    def _compile(self, model: Model, key: Key, rehearse: Callable[[Model, bool], object]) -> None:
        several, _, inference = key
        with self._lock, in_place(), torch.inference_mode(inference), torch.no_grad():
            try:
                if self._times[key] > MOST_TIMES:
                    raise ZooError(f"the model has changed {MOST_TIMES} times")
                if not self.failed:
                    build()
                    copy = Copy(model)  # here, because it imports torch's compiler
                    rehearse(copy.model, several)
                    copy.step.rehearsing = False
                    self.ready[key] = copy
            except Exception as error:  # no C++ compiler, for example
                self.failed = True
                print(f"compile: failed, so tokens are decoded without it: {first_line(error)}", file=sys.stderr)


_COMPILED: WeakKeyDictionary[Model, CompiledBlocks] = WeakKeyDictionary()


def compiled_blocks(model: Any) -> CompiledBlocks:
    """Return the compiled blocks of a model, which its sessions and pools share. Raises ZooError: it cannot be compiled."""
    if not isinstance(model, Model) or model._compiled_call_impl is not None:
        raise ZooError(f"compile: True; want a zoo.Model that is not wrapped or compiled, not {type(model).__name__}")
    if not model.embed.weight.is_cpu:
        raise ZooError(f"compile: True; only tokens on a CPU are compiled, and the model is on {model.embed.weight.device}")
    return _COMPILED.setdefault(model, CompiledBlocks())


class Copy:
    """A copy of a model for `Model.run` that shares its weights, and whose blocks are compiled and change states in place."""

    def __init__(self, model: Model) -> None:
        self.step = _Step()
        self.model = with_blocks(model, lambda block: _CompiledBlock(block, self.step))
        del self.model._modules["head"]  # it may refer to `model`, and would keep it alive
        self._blocks = list(model.blocks)
        self._modules = [module for block in model.blocks for module in block.modules()]
        self._hooks = self._hooks_now()

    def serves(self, model: Model) -> bool:
        """Return whether the code is still that of `model`, as far as is known without running it."""
        same = len(self._blocks) == len(model.blocks) and all(map(operator.is_, self._blocks, model.blocks))
        return same and not self.step.outdated and self._hooks == self._hooks_now()

    def _hooks_now(self) -> list[tuple[int, ...]]:
        return [(*module._forward_hooks, *module._forward_pre_hooks) for module in self._modules]


class _Step:
    """The compiled function of all blocks of a copy. It compiles only while it is rehearsed."""

    def __init__(self) -> None:
        from torch._dynamo.exc import TorchDynamoException

        self.errors = TorchDynamoException
        self.rehearsing, self.outdated = True, False
        options: Any = {"fullgraph": True, "dynamic": False, "recompile_limit": FORMS, "isolate_recompiles": True}
        self.run = torch.compile(_in_place, backend=self._backend, **options)
        self.turn = Lock()
        """Held while blocks run: where two threads run one function, torch takes it for outdated."""

    def _backend(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        if not self.rehearsing:
            raise ZooError("the model has changed")
        return with_kernels(graph, inputs)


class _CompiledBlock(nn.Module):
    def __init__(self, block: Any, step: _Step) -> None:
        super().__init__()
        self.block, self.mixer, self.step = block, block.mixer, step

    def forward(self, x: Tensor, fast: Any, window: Any, positions: SlotPositions, *, keep: int | None = None) -> tuple[Tensor, Any, Any]:
        arguments: Any = self.block, x, fast, window, positions, keep
        if self.step.rehearsing:
            self._mark_sizes(x, fast, window, positions)
        if not self.step.outdated:
            try:
                with self.step.turn:
                    return self.step.run(*arguments), fast, window
            except self.step.errors:  # before anything was computed
                if self.step.rehearsing:
                    raise
                self.step.outdated = True
        return _in_place(*arguments), fast, window

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


def _in_place(block: Block, x: Tensor, fast: Any, window: Any, positions: SlotPositions, keep: int | None) -> Tensor:
    x, new_fast, new_window = block(x, fast, window, positions, keep=keep)
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
