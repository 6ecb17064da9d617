"""`rule110`: windows show states of a cellular automaton; the question is the first cell of each after t steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from zoo.tasks.task import Batch, Task, tasks

QUERY = 2


@tasks.register("rule110")
class Rule110(Task):
    """Cellular automaton of arXiv 2605.26099, section 4: independent random states on a ring, one per window,
    then the first cell of each after `steps` steps of rule 110.

    Tokens: the cells 0 and 1, and a query token that starts the prediction chunk. A sequence counts as correct if all of its
    answers are.
    """

    name = "rule110"
    level_name = "steps"
    width: int = Field(24, ge=3, le=63, description="number of cells in a state; also the window in tokens")
    strings: int = Field(4, ge=1, description="number of states per sequence")
    steps: int = Field(32, ge=0, description="t, number of steps of the automaton")

    @property
    def vocab_size(self) -> int:
        return 3

    @property
    def window(self) -> int:
        return self.width

    def contexts(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return the cells of each state: [count, strings, width]."""
        return rng.integers(0, 2, (count, self.strings, self.width))

    def pose(self, rng: np.random.Generator, contexts: NDArray[np.int64]) -> Batch:
        count = len(contexts)
        cells = contexts
        for _ in range(self.steps):
            cells = step(cells)
        answers = cells[:, :, 0]
        ids = np.concatenate([contexts.reshape(count, -1), np.full((count, 1), QUERY), answers], axis=1)
        supervised = np.zeros(ids.shape, dtype=bool)
        supervised[:, -self.strings :] = True
        return Batch(ids, supervised, np.where(supervised, self.steps, 0))

    def chance(self) -> float:
        ones = self.share_of_ones()
        return max(ones, 1 - ones)

    def exact_chance(self) -> float:
        return self.chance() ** self.strings

    def share_of_ones(self) -> float:
        """Probability that a cell is 1 after `steps` steps: over all states up to 24 cells, else over 2^20 random ones.

        All cells are counted: by symmetry of the ring they have the same probability.
        """
        exhaustive = self.width <= 24
        count = 2 ** min(self.width, 24) if exhaustive else 2**20
        rng = np.random.default_rng(0)
        width, one, ones = np.uint64(self.width), np.uint64(1), 0
        everything = np.uint64(2**self.width - 1)
        for start in range(0, count, 2**14):  # batches that fit into the cache
            size = min(2**14, count - start)
            cells = np.arange(start, start + size, dtype=np.uint64) if exhaustive else rng.integers(0, 2**self.width, size, dtype=np.uint64)
            for _ in range(self.steps):
                left, right = (cells >> one) | (cells << (width - one)), (cells << one) | (cells >> (width - one))
                cells = (cells | right) & ~(left & cells & right) & everything
            ones += int(np.bitwise_count(cells).sum())
        return ones / (count * self.width)


def step(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """One step of rule 110 on rings, [..., width]: a cell becomes 1 unless it and its right neighbour are 0 or all three are 1."""
    left, right = np.roll(cells, 1, axis=-1), np.roll(cells, -1, axis=-1)
    return (cells | right) & ~(left & cells & right)
