"""`passkey`: several windows hold key-value pairs among noise; the questions ask which value belongs to a key: plain recall."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from zoo.errors import counted
from zoo.tasks.task import Batch, Task, tasks


@tasks.register("passkey")
class Passkey(Task):
    """Associative recall. It needs no computation, so it shows whether sleep costs memory.

    Each of `windows` windows holds `pairs` pairs `key value` at random even positions, with noise between them. The prediction
    chunk asks for the value of keys from any window. The keys of a sequence are distinct.

    Tokens: keys are 0 .. keys - 1, followed by the values, then the noise.
    """

    name = "passkey"
    level_name = "windows ago"
    width: int = Field(64, ge=2, description="window in tokens")
    windows: int = Field(4, ge=1)
    pairs: int = Field(4, ge=1, description="number of pairs per window; 1: a passkey")
    questions: int | None = Field(None, ge=1, description="per sequence; default: all pairs, or as many as fit into one window")
    keys: int = Field(64, ge=1)
    values: int = Field(64, ge=2)
    noise: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Passkey:
        if 2 * self.pairs > self.width:
            raise ValueError(f"pairs: {self.pairs} of two tokens each do not fit into a window of {self.width}")
        if self.windows * self.pairs > self.keys:
            raise ValueError(f"keys: {self.keys} are too few for {counted(self.windows * self.pairs, 'pair')} with different keys")
        if self.questions is not None and self.questions > min(self.width // 2, self.windows * self.pairs):
            raise ValueError(f"questions: {self.questions}: want at most {min(self.width // 2, self.windows * self.pairs)}")
        return self

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + self.noise

    @property
    def window(self) -> int:
        return self.width

    def contexts(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return tokens: [count, windows * width]."""
        slots = self.width // 2
        ids = rng.integers(self.keys + self.values, self.vocab_size, (count, self.windows, self.width))
        key = rng.permuted(np.tile(np.arange(self.keys), (count, 1)), axis=1)[:, : self.windows * self.pairs]
        key = key.reshape(count, self.windows, self.pairs)
        place = 2 * rng.permuted(np.tile(np.arange(slots), (count, self.windows, 1)), axis=2)[:, :, : self.pairs]
        np.put_along_axis(ids, place, key, axis=2)
        np.put_along_axis(ids, place + 1, self.keys + rng.integers(0, self.values, key.shape), axis=2)
        return ids.reshape(count, -1)

    def pose(self, rng: np.random.Generator, contexts: NDArray[np.int64]) -> Batch:
        count, total = len(contexts), self.windows * self.pairs
        asked = self.questions or min(total, self.width // 2)
        place = np.nonzero(contexts < self.keys)[1].reshape(count, total)
        place = rng.permuted(place, axis=1)[:, :asked]
        pairs = [np.take_along_axis(contexts, place + i, axis=1) for i in (0, 1)]
        ids = np.concatenate([contexts, np.stack(pairs, axis=2).reshape(count, -1)], axis=1)
        level = np.zeros_like(ids)
        level[:, contexts.shape[1] + 1 :: 2] = self.windows - place // self.width
        return Batch(ids, level > 0, level)

    def chance(self) -> float:
        return 1 / self.values
