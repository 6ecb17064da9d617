"""Detection of a diverged loss."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

PATIENCE = 10


class Divergence:
    """Detector of divergence: a run has diverged once PATIENCE losses in a row exceed `factor` times the median of the first PATIENCE.

    A single easy or hard batch has no effect, neither at the start nor later.
    """

    def __init__(self, factor: float, first: Sequence[float] = (), above: int = 0) -> None:
        self.factor, self.first, self.above = factor, list(first), above

    def add(self, loss: float) -> bool:
        """Take the loss of a step; returns True if the run has diverged."""
        if len(self.first) < PATIENCE:
            self.first.append(loss)
        self.above = self.above + 1 if loss > self.factor * median(self.first) else 0
        return self.above >= PATIENCE
