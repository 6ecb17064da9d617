"""Where a stream stands, and the two things that move it on: reading tokens awake, and a sleep. Nothing is changed in place."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from zoo.config import ModelConfig
from zoo.errors import ZooError
from zoo.eviction import evictions
from zoo.model import Model
from zoo.sessions import sliced as sweep
from zoo.state import Output, State

T = TypeVar("T")


class Sleeper(Protocol):
    """What a session needs of a model: `zoo.Model`, or the exported graphs of one."""

    config: ModelConfig

    def init_state(self, batch_size: int = 1) -> State: ...

    def __call__(self, ids: Tensor, state: State) -> Output: ...

    def consolidate(self, ids: Tensor, state: State) -> State: ...


class Counts(NamedTuple):
    """What has happened to a stream so far."""

    tokens: int = 0
    cached: int = 0
    """Tokens that attention can still look at."""
    sleeps: int = 0
    awake: float = 0.0
    """Seconds of reading."""
    asleep: float = 0.0


class Moment(NamedTuple):
    """B streams at one moment. A snapshot is a reference, and a commit is an assignment."""

    state: State
    """The waking state, after every token read."""
    start: State
    """The state at the window's start: with `ids`, all that a sleep needs."""
    ids: Tensor
    """The window's tokens, [B, n] int64; none for a model that never sleeps."""
    logits: Tensor | None
    """Of the next token, [B, V]; None before the first."""
    said: Tensor
    """What was generated and not read yet, [B, 0 or 1] int64."""
    hidden: tuple[Tensor, ...] | None = None
    """Of every token of the window after the last block, pieces of [B, n, D]: a sleep goes on from them, where the first pass
    asleep is the wake pass. None: they were not kept, and a sleep runs all its passes."""
    counts: Counts = Counts()

    @property
    def awake(self) -> tuple[Tensor, State] | None:
        """What `Model.consolidate` takes as such."""
        return (torch.cat(self.hidden, dim=1), self.state) if self.hidden else None


def opening(model: Sleeper, batch_size: int) -> Moment:
    """`batch_size` streams before their first token."""
    state = model.init_state(batch_size)
    device = next(leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)).device
    nothing = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
    return Moment(state, state, nothing, None, nothing, hidden=_none_yet(model))


def _none_yet(model: Sleeper) -> tuple[Tensor, ...] | None:
    """The hidden states of an empty window; None: no sleep goes on from them."""
    if not isinstance(model, Model) or model._compiled_call_impl is not None:  # what is compiled in place is its forward
        return None
    return () if model.wakes_as_it_sleeps and model.config.window is not None else None


def read(model: Sleeper, moment: Moment, ids: Tensor) -> tuple[Tensor, Moment]:
    """One wake pass over ids: [B, T], which fit into the window. Returns logits [B, T, V] and the moment after."""
    if moment.hidden is None:
        logits, state = model(ids, moment.state)
        return logits, after_reading(model, moment, ids, logits, state)
    assert isinstance(model, Model)
    h, state = model.wake(ids, moment.state)
    logits = model.logits(h)
    return logits, after_reading(model, moment, ids, logits, state)._replace(hidden=(*moment.hidden, h))


async def reading(model: Sleeper, moment: Moment, ids: Tensor) -> tuple[Tensor, Moment]:
    """`read` bit by bit, if the model can."""
    if not isinstance(model, Model):
        return read(model, moment, ids)
    logits, state = await sweep.waking(model, ids, moment.state)
    return logits, after_reading(model, moment, ids, logits, state)


def after_reading(model: Sleeper, moment: Moment, ids: Tensor, logits: Tensor, state: State) -> Moment:
    """The moment after a wake pass over ids that gave `logits` and `state`, without hidden states."""
    window = moment.ids if model.config.window is None else torch.cat([moment.ids, ids], dim=1)
    counts = moment.counts._replace(tokens=moment.counts.tokens + ids.shape[1], cached=moment.counts.cached + ids.shape[1])
    # a clone: a slice would keep the logits of all T tokens
    return moment._replace(state=state, ids=window, logits=logits[:, -1].clone(), hidden=None, counts=counts)


async def consolidation(model: Sleeper, moment: Moment, loops: int | None = None) -> State:
    """`model.consolidate` on the moment's window bit by bit, if the model can."""
    ids, state = moment.ids, moment.start
    if isinstance(model, Model):
        return await sweep.consolidation(model, ids, state, loops=loops, awake=moment.awake)
    if hasattr(model, "consolidation"):
        return await model.consolidation(ids, state, loops=loops)
    if loops not in (None, model.config.loops):
        raise ZooError(f"loops: {loops}; {model.config.name} is exported with {model.config.loops}")
    return model.consolidate(ids, state)


def slept(model: Sleeper, moment: Moment, state: State) -> Moment:
    """The moment after a sleep on its window that came to `state`."""
    nothing = moment.ids.new_empty(len(moment.ids), 0)
    counts = moment.counts._replace(sleeps=moment.counts.sleeps + 1, cached=kept(model, moment.counts.cached))
    return moment._replace(state=state, start=state, ids=nothing, hidden=_none_yet(model), counts=counts)


class _Cached(NamedTuple):
    """A window cache that is nothing but a number of tokens."""

    tokens: int

    def empty(self) -> _Cached:
        return _Cached(0)

    def keep(self, tokens: int) -> _Cached:
        return _Cached(min(tokens, self.tokens))


def kept(model: Sleeper, tokens: int) -> int:
    """How many of so many cached tokens stay when a window is evicted."""
    cache: Any = evictions.get(model.config.evict)(model.config.window).evict(_Cached(tokens))
    return cache.tokens


def one_of(state: State, n: int) -> State:
    """One stream of several, without the memory of the others."""
    return tree_map_only(Tensor, lambda tensor: tensor[n : n + 1].clone(), state)


def together(states: Sequence[State]) -> State:
    """Streams at one position as a batch."""
    if len(states) == 1:
        return states[0]
    return tree_map(lambda *rows: torch.cat(rows) if isinstance(rows[0], Tensor) else rows[0], *states)


def size(tree: Any) -> int:
    """Bytes of the tensors in a state, or in a part of one."""
    return sum(_bytes(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def finish(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, without a break."""
    while True:
        try:
            work.send(None)
        except StopIteration as done:
            return done.value
