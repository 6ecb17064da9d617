"""The state of streams at one moment, and the two operations that advance it: a wake pass and a sleep. Nothing is changed in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from zoo.config import ModelConfig
from zoo.eviction import evictions
from zoo.sessions.sleeping_model import SleepingModel
from zoo.state import State


class Counts(NamedTuple):
    """Statistics of a stream."""

    tokens: int = 0
    cached: int = 0
    """Tokens that attention can still see."""
    sleeps: int = 0
    awake: float = 0.0
    """Seconds spent reading."""
    asleep: float = 0.0
    """Seconds spent asleep."""


class Snapshot(NamedTuple):
    """B streams at one moment. Immutable: keeping a snapshot costs nothing, and committing one is an assignment."""

    waking: State | None
    """The state after every token read; None while the session's host keeps it in slots."""
    start: State
    """The state at the window's start: with `ids`, everything a sleep needs."""
    ids: Tensor
    """Tokens of the window, [B, n] int64; empty for a model that never sleeps."""
    logits: Tensor | None
    """Logits of the next token, [B, V]; None before the first, and where a call was interrupted between two pieces of a prompt."""
    pending: Tensor
    """Pending tokens, generated but not read yet, [B, 0 or 1] int64."""
    hidden: tuple[Tensor, ...] | None = None
    """Hidden states of the window after the last block, pieces of [B, n, D], if a sleep can continue from them; else None."""
    counts: Counts = Counts()
    sleeps: tuple[tuple[int, int], ...] = ()
    """Tokens read before, and loops of, each sleep that did not start at a full window: with the tokens, they determine every state."""

    @property
    def state(self) -> State:
        """The waking state, which must not be in slots."""
        assert self.waking is not None, "the state is in slots: reclaim it first"
        return self.waking

    @property
    def awake(self) -> tuple[Tensor, State] | None:
        """Hidden states [B, n, D] and state after the wake pass over the window, from which a sleep can continue; else None."""
        return (torch.cat(self.hidden, dim=1), self.state) if self.hidden else None


def opening(model: SleepingModel, batch_size: int) -> Snapshot:
    """Return the snapshot of `batch_size` streams before their first token."""
    state = model.init_state(batch_size)
    device = next(leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)).device
    nothing = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)
    return Snapshot(state, state, nothing, None, nothing, hidden=_no_hidden(model))


def _no_hidden(model: SleepingModel) -> tuple[Tensor, ...] | None:
    """Hidden states of an empty window."""
    return () if model.keeps_hidden else None


def wake(model: SleepingModel, snapshot: Snapshot, ids: Tensor, keep: int) -> tuple[Tensor, Snapshot]:
    """Run one wake pass over ids: [B, T], which fit into the window.

    Returns the logits of the last `keep` tokens, [B, keep, V], and the snapshot afterwards.
    """
    logits, state, h = model.wake_pass(ids, snapshot.state, keep)
    after = after_reading(model, snapshot, ids, logits, state)
    if h is not None and snapshot.hidden is not None:
        after = after._replace(hidden=(*snapshot.hidden, h))
    return logits, after


async def wake_in_slices(model: SleepingModel, snapshot: Snapshot, ids: Tensor, keep: int) -> tuple[Tensor, Snapshot]:
    """Run `wake` in slices, without hidden states."""
    logits, state = await model.wake_in_slices(ids, snapshot.state, keep)
    return logits, after_reading(model, snapshot, ids, logits, state)


def after_reading(model: SleepingModel, snapshot: Snapshot, ids: Tensor, logits: Tensor, state: State | None) -> Snapshot:
    """Return the snapshot after a wake pass over ids that returned `logits` and `state` (None: in slots)."""
    window = snapshot.ids if model.config.window is None else torch.cat([snapshot.ids, ids], dim=1)
    counts = snapshot.counts._replace(tokens=snapshot.counts.tokens + ids.shape[1], cached=snapshot.counts.cached + ids.shape[1])
    last = logits[:, -1].clone() if logits.shape[1] else None  # a clone: a slice would keep the logits of all tokens
    return snapshot._replace(waking=state, ids=window, logits=last, hidden=None, counts=counts)


def after_sleeping(model: SleepingModel, snapshot: Snapshot, state: State) -> Snapshot:
    """Return the snapshot after a sleep on its window that returned `state`."""
    nothing = snapshot.ids.new_empty(len(snapshot.ids), 0)
    counts = snapshot.counts._replace(sleeps=snapshot.counts.sleeps + 1, cached=kept(model.config, snapshot.counts.cached))
    return snapshot._replace(waking=state, start=state, ids=nothing, hidden=_no_hidden(model), counts=counts)


def kept(config: ModelConfig, tokens: int) -> int:
    """Number of cached tokens, of `tokens`, that remain after an eviction."""
    return evictions.get(config.evict)(config.window).kept(tokens)


def one_of(state: State, n: int) -> State:
    """Return stream n of several, sharing no memory with the others."""
    return tree_map_only(Tensor, lambda tensor: tensor[n : n + 1].clone(), state)


def together(states: Sequence[State]) -> State:
    """Combine streams at the same position into one batch."""
    if len(states) == 1:
        return states[0]
    return tree_map(lambda *rows: torch.cat(rows) if isinstance(rows[0], Tensor) else rows[0], *states)


def size(tree: Any) -> int:
    """Bytes of all tensors in a state, or in a part of one."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
