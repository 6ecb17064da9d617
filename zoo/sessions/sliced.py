"""`Model.run` in slices, so that something else may go first: one block over some of the tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from zoo.blocks.positions import Positions
from zoo.model import Model, Passes
from zoo.state import Output, State


class Turn:
    """`await Turn(wants)` hands control to whoever drives this coroutine; the result is what they answer with."""

    def __init__(self, wants: Any = None) -> None:
        self.wants = wants

    def __await__(self) -> Generator[Turn, Any, Any]:
        return (yield self)


async def waking(model: Model, ids: Tensor, state: State | None = None) -> Output:
    """`model.forward` in slices."""
    h, state = await run(model, *model.start_wake(ids, state))
    logits = await _slices(h.shape[1], lambda first, last: model.logits(h[:, first:last]))
    return Output(logits, state)


async def consolidation(
    model: Model, ids: Tensor, state: State | None = None, *, loops: int | None = None, awake: tuple[Tensor, State] | None = None
) -> State:
    """`model.consolidate` in slices."""
    _, state = await run(model, *model.start_sleep(ids, state, loops), awake)
    return model.evict(state)


async def run(
    model: Model,
    h: Tensor,
    start: State,
    positions: Positions,
    passes: Passes,
    awake: tuple[Tensor, State] | None = None,
) -> tuple[Tensor, State]:
    """`model.run` in slices, the definition of what happens here."""
    config, first, after = model.config, h, []
    fast, window = (list(start.fast), list(start.window)) if awake is None else (list(awake[1].fast), list(awake[1].window))
    h = h if awake is None else awake[0]
    parts = {(0, positions.length): positions}
    for n, blocks in enumerate(passes):
        if n == 0 and awake is not None:
            continue
        for i, mlp in blocks:
            if i == model.span.start:
                first, h = (h, h) if n == 0 else (first, model.between_passes(h, first))
            if n and not config.carry and i in model.span:
                fast[i] = start.fast[i]
            at = n % config.wake_loops * len(model.blocks) + i
            window[at] = start.window[at]

            def over(begin: int, end: int, i: int = i, at: int = at, h: Tensor = h, mlp: bool = mlp) -> Tensor:
                if (begin, end) not in parts:
                    parts[begin, end] = positions.part(begin, end)
                y, fast[i], window[at] = model.blocks[i](h[:, begin:end], fast[i], window[at], parts[begin, end], mlp=mlp)
                return y

            h = await _slices(positions.length, over)
        after.append(h)
    h = torch.stack(after, dim=-2) if config.wake_loops > 1 else h
    return h, State(tuple(fast), tuple(window), positions.end)


async def _slices(tokens: int, over: Callable[[int, int], Tensor]) -> Tensor:
    """`over(begin, end)` until all tokens have been taken: its results [B, T, ...] side by side."""
    results, end = [], 0
    while end < tokens:
        most: int | None = await Turn()
        begin, end = end, tokens if most is None else min(end + most, tokens)
        results.append(over(begin, end))
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)
