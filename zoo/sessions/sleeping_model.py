"""The contract between a session and its model, and how `zoo.Model` fulfils it."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Coroutine
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zoo.blocks.attention import KV
from zoo.blocks.mixer import parts
from zoo.config import ModelConfig
from zoo.errors import ZooError
from zoo.inputs import check_count
from zoo.model import Model
from zoo.sessions import sliced
from zoo.sessions.compiled import compiled_blocks
from zoo.sessions.sliced import Slice
from zoo.sessions.slots import Places, Slots
from zoo.state import Output, State

SAMPLES = 64  # values of each weight that enter the fingerprint


class SleepingModel(Protocol):
    """A model that can be used in a session. States are never changed in place."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def fingerprint(self) -> str:
        """Hash of the weights: a session file can only be loaded with the weights that it was saved with."""
        ...

    @property
    def keeps_hidden(self) -> bool:
        """True if `wake_pass` returns hidden states, from which a sleep can continue."""
        ...

    def init_state(self, batch_size: int = 1) -> State:
        """The state of `batch_size` streams before their first token."""
        ...

    def wake_pass(self, ids: Tensor, state: State, keep: int) -> tuple[Tensor, State, Tensor | None]:
        """Run one wake pass over ids: [B, T].

        Returns the logits of the last `keep` tokens, [B, keep, V], the state, and with `keeps_hidden` the hidden states [B, T, D]
        after the last block.
        """
        ...

    def wake_in_slices(self, ids: Tensor, state: State, keep: int) -> Coroutine[Slice, int | None, Output]:
        """Run one wake pass over ids: [B, T], interruptible at every `Slice` that it awaits; logits of the last `keep` tokens."""
        ...

    def consolidate_in_slices(
        self, ids: Tensor, state: State, *, loops: int | None = None, awake: tuple[Tensor, State] | None = None
    ) -> Coroutine[Slice, int | None, State]:
        """Sleep on one window, ids: [B, n], from the state at its start; interruptible at every `Slice` that it awaits.

        Args:
            loops: passes of the span, default `config.loops`.
            awake: with `keeps_hidden`, the hidden states [B, n, D] and the state after the wake passes over ids.
        """
        ...

    def check_loops(self, loops: int) -> None:
        """Refuse a number of passes that a sleep cannot run. Raises ZooError."""
        ...

    def slots(self, streams: int) -> Places[Any] | None:
        """Buffers for decoding steps of fixed shapes; None where these are not faster."""
        ...

    def plain(self, state: State) -> State:
        """Convert a state to the caches of `zoo.Model`, which session files contain."""
        ...

    def ringed(self, state: State) -> State:
        """Convert a state back from the caches of `zoo.Model`."""
        ...


def check_model(model: Any) -> None:
    """Refuse anything that is neither a model nor a module that wraps one. Raises ZooError."""
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        raise ZooError(f"model: {type(model).__name__}; want a zoo.Model, or the model of a bundle, zoo.export.load(DIR).model")
    if isinstance(model, nn.Module) and all(parameter.is_meta for parameter in model.parameters()):
        raise ZooError(f"model: {config.name} is on the meta device and has no weights")


def sleeping_model(model: Model | SleepingModel) -> SleepingModel:
    """Return `model` in the form that sessions use."""
    return TorchModel(model) if isinstance(model, nn.Module) else model


def compiled_model(model: Model | SleepingModel) -> TorchModel:
    """Return `model` in the form of sessions whose tokens are compiled. Raises ZooError: it cannot be compiled."""
    compiled_blocks(model)
    assert isinstance(model, Model)
    if model.config.window is None and any(isinstance(part, KV) for cache in model.init_state().window for part in parts(cache)):
        name = model.config.name
        raise ZooError(f"compile: True; the cache of {name} has no limit: set evict=sliding and a window, or use a pool with a context")
    return TorchModel(model, compile=True)


class TorchModel:
    """`zoo.Model` as a `SleepingModel`."""

    def __init__(self, model: Model, *, compile: bool = False) -> None:
        self.model, self.config, self.compile = model, model.config, compile
        # torch.compile and other wrappers replace the call as a whole, so its parts must not be called one by one
        self._whole = not isinstance(model, Model) or model._compiled_call_impl is not None
        self.keeps_hidden = model.wakes_as_it_sleeps and model.config.window is not None and not self._whole
        parameters = inspect.signature(model.forward).parameters.values()  # of a wrapper, which may not take all that a model does
        self._keeps = any(parameter.name == "logits_to_keep" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def init_state(self, batch_size: int = 1) -> State:
        return self.model.init_state(batch_size)

    def wake_pass(self, ids: Tensor, state: State, keep: int) -> tuple[Tensor, State, Tensor | None]:
        unread = ids.shape[1] - keep
        if self.keeps_hidden:
            h, state = self.model.wake(ids, state)
            return self.model.logits(h[:, unread:]), state, h
        if unread and self._keeps:
            return *self.model(ids, state, logits_to_keep=keep), None
        logits, state = self.model(ids, state)
        return logits[:, unread:], state, None

    async def wake_in_slices(self, ids: Tensor, state: State, keep: int) -> Output:
        return await sliced.wake(self.model, ids, state, logits_to_keep=keep)

    async def consolidate_in_slices(
        self, ids: Tensor, state: State, *, loops: int | None = None, awake: tuple[Tensor, State] | None = None
    ) -> State:
        return await sliced.consolidate(self.model, ids, state, loops=loops, awake=awake)

    def check_loops(self, loops: int) -> None:
        check_count("loops", loops)

    def slots(self, streams: int) -> Slots[int] | None:
        if self.compile:
            return Slots(self.model, streams, self.config.window or 1, compile=True)
        # a CPU gains nothing from fixed shapes, since it has no CUDA graphs, and an unbounded cache has none
        window = self.config.window
        return Slots(self.model, streams, window) if window is not None and self.model.embed.weight.is_cuda and not self._whole else None

    def plain(self, state: State) -> State:
        return state

    def ringed(self, state: State) -> State:
        return state


def fingerprint(model: nn.Module) -> str:
    """Hash of a few values of every weight."""
    digest = hashlib.sha256()
    for name, weight in ((name, leaf) for name, entry in sorted(model.state_dict().items()) for leaf in tree_leaves(entry)):
        if not isinstance(weight, Tensor):  # of a quantised layer
            digest.update(f"{name} {weight}".encode())
            continue
        plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_quantized
        values = (weight if plain else weight.dequantize()).detach()
        some = values.take(_places(values.numel()).to(values.device)).float().cpu()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


@functools.cache
def _places(count: int) -> Tensor:
    """Return the places of the sampled ones among `count` values."""
    return torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float64).long()  # float32 counts to 2**24
