"""`text`: next-token prediction on memory-mapped files of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from zoo.checkpoints.companions import read_companions
from zoo.errors import ZooError
from zoo.tasks.task import Batch, Split, Task, refuse_same_file, tasks


@tasks.register("text")
class Text(Task):
    """Sequences of `length` tokens from random offsets of a one-dimensional .npy file of unsigned integers, which is never
    read whole. Every token but the first is supervised, so the model needs `sleep_on: every`.

    The level of a token is the index of its window in the sequence, from 1: from 2 on it shows what sleep has kept.
    """

    name = "text"
    level_name = "window"
    paths = ("train", "test")
    loss_everywhere = True
    is_text = True
    train: str = Field(description="file of token ids")
    test: str = Field(description="held-out file of token ids")
    vocab: int = Field(ge=2, description="size of the vocabulary; every token id is smaller")
    length: int = Field(2048, ge=2, description="number of tokens in a sequence")
    width: int = Field(512, ge=1, description="window in tokens")

    @model_validator(mode="after")
    def _fits(self) -> Text:
        refuse_same_file(self.train, self.test)
        for field in ("train", "test"):
            tokens = self._tokens("test" if field == "test" else "train")
            if len(tokens) < self.length:
                raise ValueError(f"{field}: {len(tokens)} tokens are less than one sequence, length: {self.length}")
        return self

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def window(self) -> int:
        return self.width

    def companions(self) -> dict[str, bytes]:
        """See `Task.companions`: the tokenizer that `zoo tokenize` has copied next to the file."""
        return read_companions(Path(self.train).parent)

    def batch(self, seed: int, step: int, size: int, split: Split = "train") -> Batch:
        """See `Task.batch`. Raises ZooError: a token is outside the vocabulary."""
        tokens = self._tokens(split)
        starts = np.random.default_rng([seed, step, split == "test"]).integers(0, len(tokens) - self.length + 1, size)
        ids = np.stack([tokens[start : start + self.length] for start in starts])
        if ids.max() >= self.vocab:
            raise ZooError(f"task {self}: token {ids.max()} in the {split} file; vocab says that ids are less than {self.vocab}")
        return by_window(ids.astype(np.int64), self.width)

    def chance(self) -> float:
        return majority(self._tokens("test"))

    def _tokens(self, split: Split) -> NDArray[np.unsignedinteger]:
        return open_tokens(self.test if split == "test" else self.train, split)


def majority(tokens: NDArray[np.integer[Any]]) -> float:
    """Return the share of the most frequent token among the first million."""
    some = np.asarray(tokens[:1_000_000])
    return float(np.bincount(some).max() / len(some))


def by_window(ids: NDArray[np.int64], width: int) -> Batch:
    """Return ids [B, T] with every token but the first of a sequence supervised. The level is the window of `width` tokens, from 1."""
    level = np.tile(np.arange(ids.shape[1]) // width + 1, (len(ids), 1))
    level[:, 0] = 0
    return Batch(ids, level > 0, level)


def open_tokens(path: str | Path, label: str) -> NDArray[np.unsignedinteger]:
    """Map a file of token ids into memory. Raises ValueError, starting with `label`."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # damaged headers make numpy raise anything
        raise ValueError(f"{label}: {path}: not a .npy file of numbers, which `zoo tokenize` writes for a text: {error}") from None
    if tokens.ndim != 1 or tokens.dtype.kind != "u":
        raise ValueError(f"{label}: {path}: {tokens.dtype} {list(tokens.shape)}; want one dimension of unsigned integers")
    return tokens
