"""`text`: next-token prediction on memory-mapped files of token ids."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from zoo.checkpoints.companions import read_companions, same_tokenizer
from zoo.config import read_yaml
from zoo.errors import ZooError, counted
from zoo.tasks.mixture import drawn, part, shares
from zoo.tasks.task import Batch, Split, Task, refuse_same_file, tasks
from zoo.text.corpus import SUMMARY

Tokens = NDArray[np.unsignedinteger]


@tasks.register("text")
class Text(Task):
    """Sequences of `length` tokens from random offsets of one-dimensional .npy files of unsigned integers, which are never
    read whole. Every token but the first is supervised, so the model needs `sleep_on: every`.

    The level of a token is the index of its window in the sequence, from 1: from 2 on it shows what sleep has kept.
    """

    name = "text"
    level_name = "window"
    paths = ("train", "test")
    loss_everywhere = True
    is_text = True
    of_ids = True
    train: str | dict[str, float] = Field(description="file of token ids; or several, each with a weight: its share of the sequences")
    test: str = Field(description="held-out file of token ids")
    vocab: int = Field(ge=2, description="size of the vocabulary; every token id is smaller")
    length: int = Field(2048, ge=2, description="number of tokens in a sequence")
    width: int = Field(512, ge=1, description="window in tokens")
    epochs: bool = Field(False, description="read a file as consecutive sequences, each once before any is repeated, in random order")
    documents: bool = Field(False, description="read one document in a sequence, as `epochs` does; one that is longer than `length` is cut")

    @model_validator(mode="after")
    def _fits(self) -> Text:
        for file in self._files:
            refuse_same_file(file, self.test)
        if not self._weights or min(self._weights) <= 0:
            raise ValueError(f"train: {self.train}: want at least one file, and weights above 0")
        shares(self._weights)
        first = Path(self._files[0]).parent
        for file in (*self._files[1:], self.test):
            if (folder := Path(file).parent) != first and not same_tokenizer(read_companions(first), read_companions(folder)):
                raise ValueError(f"{'test' if file == self.test else 'train'}: {file}: not of the tokenizer of {self._files[0]}")
        for split, files in {"train": self._files, "test": (self.test,)}.items():
            for file in files:
                tokens = open_tokens(file, split)
                if len(tokens) < (2 if self.documents else self.length):
                    raise ValueError(f"{split}: {counted(len(tokens), 'token')}; want one sequence at least, length: {self.length}")
        return self

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def window(self) -> int:
        return self.width

    @property
    def _files(self) -> tuple[str, ...]:
        return (self.train,) if isinstance(self.train, str) else tuple(sorted(self.train))

    @property
    def _weights(self) -> list[float]:
        return [1.0] if isinstance(self.train, str) else [self.train[file] for file in self._files]

    def sources(self) -> dict[str, Path]:
        """See `Task.sources`."""
        found = super().sources()
        return found | ({f"{field}, {SUMMARY}": file.parent / SUMMARY for field, file in found.items()} if self.documents else {})

    def companions(self) -> dict[str, bytes]:
        """See `Task.companions`: the tokenizer that `zoo tokenize` has copied next to the first file."""
        return read_companions(Path(self._files[0]).parent)

    def batch(self, seed: int, step: int, size: int, split: Split = "train") -> Batch:
        """See `Task.batch`; held-out sequences that are read in order begin with number `step`. Raises ZooError: a token is outside
        the vocabulary."""
        tokens = [open_tokens(file, split) for file in (self._files if split == "train" else (self.test,))]
        if self.epochs or self.documents:
            rows = self._in_order(seed, step if split == "test" else step * size, size, split, tokens)
        else:
            rng = np.random.default_rng([seed, step, split == "test"])
            if len(tokens) == 1:
                corpus, starts = np.zeros(size, np.int64), rng.integers(0, len(tokens[0]) - self.length + 1, size)
            else:
                corpus, _ = drawn(seed, step * size, size, shares(self._weights))
                starts = rng.integers(0, np.array([len(one) for one in tokens])[corpus] - self.length + 1)
            rows = [tokens[n][start : start + self.length] for n, start in zip(corpus, starts, strict=True)]
        longest = max(map(len, rows))
        ids = np.zeros((size, longest), np.uint64)
        for row, piece in zip(ids, rows, strict=True):
            row[: len(piece)] = piece
        if ids.max() >= self.vocab:
            raise ZooError(f"task {self}: token {ids.max()} in the {split} file; vocab says that ids are less than {self.vocab}")
        return by_window(ids.astype(np.int64), self.width, np.array([len(piece) for piece in rows]))

    def held_out(self) -> int | None:
        """See `Task.held_out`."""
        return len(self._parts["test"][0]) if self.epochs or self.documents else None

    def chance(self) -> float:
        return majority(open_tokens(self.test, "test"))

    def _in_order(self, seed: int, first: int, size: int, split: Split, tokens: list[Tokens]) -> list[Tokens]:
        """Return sequences `first` to `first + size - 1` of a run, each a part of a file."""
        corpus, before = drawn(seed, first, size, shares(self._weights if split == "train" else [1.0]))
        rows = []
        for n, count in zip(corpus.tolist(), before.tolist(), strict=True):
            parts = self._parts[split][n]
            start, stop = parts[part(seed, n, count, len(parts))]
            rows.append(tokens[n][start:stop])
        return rows

    @cached_property
    def _parts(self) -> dict[str, list[NDArray[np.int64]]]:
        """The first token of each part of each file, and that after its last, [n, 2]."""
        found = document_parts if self.documents else equal_parts
        files = {"train": self._files, "test": (self.test,)}
        return {split: [found(file, split, self.length) for file in files[split]] for split in files}


def equal_parts(file: str, label: str, length: int) -> NDArray[np.int64]:
    """Return where each run of `length` tokens begins and ends in a file, [n, 2]."""
    begins = np.arange(len(open_tokens(file, label)) // length) * length
    return np.stack([begins, begins + length], axis=1)


def document_parts(file: str, label: str, length: int) -> NDArray[np.int64]:
    """Return where each document begins and ends in a file that `zoo tokenize` wrote, [n, 2]. Raises ZooError.

    A longer document is cut every `length` tokens. A last part of a single token, which has nothing to predict, stays with the part
    before it; a document of a single token is omitted.
    """
    summary = Path(file).parent / SUMMARY
    if not summary.is_file() or type(end := read_yaml(summary).get("end")) is not int:
        raise ZooError(f"task text: {label}: {file}: documents need {SUMMARY} next to it, which `zoo tokenize` writes")
    tokens = open_tokens(file, label)
    stops = np.union1d(np.flatnonzero(tokens == end) + 1, [len(tokens)])
    sizes = np.diff(stops, prepend=0)
    pieces = -(-(sizes - 1) // length)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begins = np.repeat(stops - sizes, pieces) + length * number
    last = number == np.repeat(pieces, pieces) - 1
    return np.stack([begins, np.where(last, np.repeat(stops, pieces), begins + length)], axis=1)


def majority(tokens: NDArray[np.integer[Any]]) -> float:
    """Return the share of the most frequent token among the first million."""
    some = np.asarray(tokens[:1_000_000])
    return float(np.bincount(some).max() / len(some))


def by_window(ids: NDArray[np.int64], width: int, lengths: NDArray[np.int64] | None = None) -> Batch:
    """Return ids [B, T] with every token but the first of a sequence supervised. The level is the window of `width` tokens, from 1.

    Args:
        lengths: number of tokens in each sequence, [B]; the others are padding.
    """
    level = np.tile(np.arange(ids.shape[1]) // width + 1, (len(ids), 1))
    level[:, 0] = 0
    if lengths is not None:
        level[np.arange(ids.shape[1]) >= lengths[:, None]] = 0
    return Batch(ids, level > 0, level)


def open_tokens(path: str | Path, label: str) -> Tokens:
    """Map a file of token ids into memory. Raises ValueError, starting with `label`."""
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise ValueError(f"{label}: {path}: {error.strerror or error}") from None
    except Exception:  # damaged headers make numpy raise anything
        raise ValueError(f"{label}: {path}: not a .npy file of numbers, which `zoo tokenize` writes for a text") from None
    if tokens.ndim != 1 or tokens.dtype.kind != "u":
        raise ValueError(f"{label}: {path}: {tokens.dtype} {list(tokens.shape)}; want one dimension of unsigned integers")
    return tokens
