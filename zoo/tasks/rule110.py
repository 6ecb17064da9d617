"""`rule110`: windows show states of a cellular automaton; the questions ask for cells of each after t steps."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from zoo.tasks.task import Batch, Task, tasks

QUERY = 2
CELLS = 20
"""Rings up to this size are enumerated to guess a cell from those before it; in larger ones, half as many cells are read."""


@tasks.register("rule110")
class Rule110(Task):
    """Cellular automaton of arXiv 2605.26099, section 4: independent random states on a ring, one per window,
    then the first cell of each after `steps` steps of rule 110.

    A state belongs to one split: no state of a held-out sequence occurs in training. An answer depends on at most
    2 `steps` + 1 cells of its state, though: if these take few values, a table of them answers held-out questions too.

    Tokens: the cells 0 and 1, and a query token that starts the prediction chunk; with `every_step`, one query token for each
    number of steps. A sequence counts as correct if all of its answers are.
    """

    name = "rule110"
    level_name = "steps"
    width: int = Field(24, ge=3, le=63, description="number of cells in a state; also the window in tokens")
    strings: int = Field(4, ge=1, description="number of states per sequence")
    steps: int = Field(32, ge=0, description="t, number of steps of the automaton")
    all_cells: bool = Field(False, description="ask for every cell of a state instead of the first")
    every_step: bool = Field(False, description="each sequence asks about a number of steps drawn from 1 .. steps")

    @property
    def vocab_size(self) -> int:
        return QUERY + len(self._asked)

    @property
    def window(self) -> int:
        return self.width

    @property
    def contexts_per_sequence(self) -> int:
        return self.strings

    def contexts(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return the cells of states: [count, width]."""
        return rng.integers(0, 2, (count, self.width))

    def pose(self, rng: np.random.Generator, contexts: NDArray[np.int64]) -> Batch:
        states = contexts.reshape(-1, self.strings, self.width)
        count = len(states)
        steps = rng.integers(self._asked.start, self._asked.stop, count)
        cells = answers = states
        for done in range(1, self.steps + 1):
            cells = step(cells)
            answers = np.where((steps >= done)[:, None, None], cells, answers)
        answers = answers if self.all_cells else answers[:, :, :1]
        query = QUERY + steps - self._asked.start
        ids = np.concatenate([states.reshape(count, -1), query[:, None], answers.reshape(count, -1)], axis=1)
        supervised = np.tile(np.arange(ids.shape[1]) > self.strings * self.width, (count, 1))
        return Batch(ids, supervised, np.where(supervised, steps[:, None], 0))

    def chance(self) -> float:
        """Accuracy of the majority guess; with `all_cells`, of the more likely value of a cell given those before it."""
        if self.all_cells:
            return float(np.mean([_guess_from_earlier_cells(self.width, steps) for steps in self._asked]))
        return float(np.mean([self._majority(steps) for steps in self._asked]))

    def exact_chance(self) -> float | None:
        return None if self.all_cells else float(np.mean([self._majority(steps) ** self.strings for steps in self._asked]))

    def _majority(self, steps: int) -> float:
        ones = share_of_ones(self.width, steps)
        return max(ones, 1 - ones)

    @property
    def _asked(self) -> range:
        """Numbers of steps that are asked about."""
        return range(min(1, self.steps) if self.every_step else self.steps, self.steps + 1)


def step(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """One step of rule 110 on rings, [..., width]: a cell becomes 1 unless it and its right neighbour are 0 or all three are 1."""
    left, right = np.roll(cells, 1, axis=-1), np.roll(cells, -1, axis=-1)
    return (cells | right) & ~(left & cells & right)


@lru_cache
def share_of_ones(width: int, steps: int) -> float:
    """Return the probability that a cell is 1 after `steps` steps: over all states up to 24 cells, else over 2^20 random ones.

    All cells are counted: by symmetry of the ring they have the same probability.
    """
    exhaustive = width <= 24
    count = 2**width if exhaustive else 2**20
    rng, ones = np.random.default_rng(0), 0
    for start in range(0, count, 2**14):  # batches that fit into the cache
        size = min(2**14, count - start)
        states = np.arange(start, start + size, dtype=np.uint64) if exhaustive else rng.integers(0, 2**width, size, dtype=np.uint64)
        ones += int(np.bitwise_count(_evolved(states, width, steps)).sum())
    return ones / (count * width)


@lru_cache
def _guess_from_earlier_cells(width: int, steps: int) -> float:
    """Return the accuracy of the more likely value of each cell after `steps` steps, given the cells before it: over all states up to
    CELLS cells, else over 2^20 random ones, of which the CELLS / 2 cells before each are read."""
    if width <= CELLS:
        states, reach = np.arange(2**width, dtype=np.uint64), width - 1
    else:
        states, reach = np.random.default_rng(0).integers(0, 2**width, 2**20, dtype=np.uint64), CELLS // 2
    runs = _evolved(states, width, steps) >> np.uint64(width - 1 - reach)  # the first reach + 1 cells, the first one on top
    seen = np.bincount(runs.astype(np.int64), minlength=2 ** (reach + 1))
    right = []
    while len(seen) > 1:
        pairs = seen.reshape(-1, 2)
        right.append(pairs.max(axis=1).sum() / len(states))
        seen = pairs.sum(axis=1)
    return float(np.mean(right + right[:1] * (width - len(right))))


def _evolved(states: NDArray[np.uint64], width: int, steps: int) -> NDArray[np.uint64]:
    """Return states after `steps` steps: one bit per cell, the first cell in the most significant bit."""
    last, one, everything = np.uint64(width - 1), np.uint64(1), np.uint64(2**width - 1)
    for _ in range(steps):
        left, right = (states >> one) | (states << last), (states << one) | (states >> last)
        states = (states | right) & ~(left & states & right) & everything
    return states
