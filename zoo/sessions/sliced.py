"""`Model.run` in slices, so that other work can be interleaved: one block over some of the tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import TypeVar

import torch
from torch import Tensor

from zoo.blocks.block import last
from zoo.blocks.positions import Positions
from zoo.model import Model, Pass
from zoo.state import Output, State

T = TypeVar("T")


class Slice:
    """Request to run the next slice. The answer is the maximum number of tokens it may cover; None: no limit."""

    def __await__(self) -> Generator[Slice, int | None, int | None]:
        return (yield self)


def finish(work: Coroutine[object, None, T]) -> T:
    """Run `work` to its end without interruption, slices without a limit. Returns its result."""
    while True:
        try:
            work.send(None)
        except StopIteration as done:
            return done.value


async def wake(model: Model, ids: Tensor, state: State | None = None, *, logits_to_keep: int | None = None) -> Output:
    """Run `model.forward` in slices."""
    h, state = await run(model, *model.start_wake(ids, state, keep=logits_to_keep))
    logits = await _slices(h.shape[1], lambda begin, end: model.logits(h[:, begin:end]))
    return Output(logits, state)


async def consolidate(
    model: Model, ids: Tensor, state: State | None = None, *, loops: int | None = None, awake: tuple[Tensor, State] | None = None
) -> State:
    """Run `model.consolidate` in slices."""
    _, state = await run(model, *model.start_sleep(ids, state, loops), awake)
    return model.evict(state)


async def run(
    model: Model,
    h: Tensor,
    start: State,
    positions: Positions,
    passes: list[Pass],
    awake: tuple[Tensor, State] | None = None,
) -> tuple[Tensor, State]:
    """Do what `model.run` does, in slices; `model.run` defines the result."""
    first, outputs = h, []
    fast, window = list(start.fast), list(start.window)
    if awake is not None:  # the first pass has been run
        h, fast, window = awake[0], list(awake[1].fast), list(awake[1].window)
    parts = {(0, positions.length): positions}
    for n, blocks in enumerate(passes):
        if n == 0 and awake is not None:
            continue
        for i, keep in blocks:
            if i == model.span.start:
                first, h = (h, h) if n == 0 else (first, model.between_passes(h, first))
                entered = h
            if n and not model.config.carry and i in model.span:
                fast[i] = start.fast[i]
            at = n % model.config.wake_loops * len(model.blocks) + i
            window[at] = start.window[at]

            def block(begin: int, end: int, i: int = i, at: int = at, h: Tensor = h, keep: int | None = keep) -> Tensor:
                if (begin, end) not in parts:
                    parts[begin, end] = positions.part(begin, end)
                kept = None if keep is None else max(0, end - max(begin, positions.length - keep))
                y, fast[i], window[at] = model.blocks[i](h[:, begin:end], fast[i], window[at], parts[begin, end], keep=kept)
                return y

            h = await _slices(positions.length, block)
            h = model.gated(h, last(entered, h.shape[1]), n) if i == model.span.stop - 1 else h
        outputs.append(h)
    h = torch.stack([last(output, h.shape[1]) for output in outputs], dim=-2) if model.config.wake_loops > 1 else h
    return h, State(tuple(fast), tuple(window), positions.end)


async def _slices(tokens: int, compute: Callable[[int, int], Tensor]) -> Tensor:
    """Call `compute(begin, end)` until all tokens are covered; concatenates the results, [B, T, ...]."""
    if not tokens:
        return compute(0, 0)
    results, end = [], 0
    while end < tokens:
        most = await Slice()
        begin, end = end, tokens if most is None else min(end + most, tokens)
        results.append(compute(begin, end))
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)
