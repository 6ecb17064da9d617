"""Which corpus each sequence of a run comes from, and which part of it: in exact proportions, not just on average."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

PERIOD = 1000
"""Sequences in which every corpus has its exact share."""


def shares(weights: Sequence[float]) -> NDArray[np.int64]:
    """Return the number of sequences of each corpus in a period. Raises ValueError if one has none."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * PERIOD
    counts = exact.astype(np.int64)
    most = np.argsort(counts - exact, kind="stable")  # the largest remainders first
    counts[most[: PERIOD - counts.sum()]] += 1
    if not counts.all():
        raise ValueError(f"train: a weight of {min(weights):g} is less than one sequence in {PERIOD}")
    return counts


def drawn(seed: int, first: int, size: int, counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the corpus of each of the sequences `first` to `first + size - 1` of a run, and how many it has had before, [size] each.

    Args:
        counts: as `shares` returns them.
    """
    periods = range(first // PERIOD, (first + size - 1) // PERIOD + 1)
    corpus, before = (np.concatenate(parts) for parts in zip(*(_period(seed, period, tuple(counts)) for period in periods), strict=True))
    here = slice(first - periods[0] * PERIOD, first - periods[0] * PERIOD + size)
    return corpus[here], before[here]


def _period(seed: int, period: int, counts: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    corpus = np.random.default_rng([seed, period, 1]).permutation(np.repeat(np.arange(len(counts)), counts))
    before = np.empty_like(corpus)
    for n, count in enumerate(counts):
        before[corpus == n] = period * count + np.arange(count)
    return corpus, before


def part(seed: int, corpus: int, before: int, parts: int) -> int:
    """Return which of the `parts` parts of a corpus a sequence reads: each once in every epoch, in another order each time."""
    epoch, place = divmod(before, parts)
    return int(_order(seed, corpus, epoch, parts)[place])


@lru_cache(maxsize=8)
def _order(seed: int, corpus: int, epoch: int, parts: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, corpus, epoch, 2]).permutation(parts)
