"""The base class of tasks and their registry. To add a task, add a file to this folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from zoo.checkpoints.companions import read_companions
from zoo.config import validate
from zoo.errors import ZooError
from zoo.registry import Registry

Split = Literal["train", "test"]
HELD_OUT = 16  # one context in 16 belongs to the test split
BLOCKS, BLOCK = 256, 2**16  # number of blocks that a fingerprint reads from a large file, and their bytes


class Batch(NamedTuple):
    """B sequences of T tokens."""

    ids: NDArray[np.int64]
    """Token ids [B, T]."""
    loss_mask: NDArray[np.bool_]
    """Mask [B, T], true for supervised tokens."""
    level: NDArray[np.int64]
    """Difficulty of each supervised token (hops, steps), [B, T]; 0 elsewhere."""

    @property
    def tokens(self) -> int:
        """Number of tokens to run, padding included: all but the last of each sequence, which predicts nothing."""
        return len(self.ids) * (self.ids.shape[1] - 1)


class Task(BaseModel):
    """A generator of sequences. Subclasses add their parameters as fields and implement the members below."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: ClassVar[str]
    level_name: ClassVar[str] = "level"
    """Name of the quantity that makes a question harder."""
    paths: ClassVar[tuple[str, ...]] = ()
    """Fields that hold paths; in a file, they are relative to its folder."""
    loss_everywhere: ClassVar[bool] = False
    """True if every chunk carries loss, so that the model must sleep on every chunk."""
    long_answers: ClassVar[bool] = False
    """True if consecutive supervised tokens are one answer; otherwise each is a separate answer."""
    of_bytes: ClassVar[bool] = False
    """True if every token is a byte, so that the loss gives bits per byte."""
    is_text: ClassVar[bool] = False
    """True if tokens are those of the model's tokenizer, or bytes, so that the bytes of their text can be counted."""
    of_ids: ClassVar[bool] = False
    """True if files hold token ids, which any tokenizer may have made."""

    def __str__(self) -> str:
        given = "".join(f" {field}={value}" for field, value in self.model_dump(exclude_defaults=True).items())
        return f"{self.name}{given}"

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are 0 .. vocab_size - 1."""
        raise NotImplementedError

    @property
    def window(self) -> int:
        """L, the window in tokens that the sequences are laid out for."""
        raise NotImplementedError

    @property
    def contexts_per_sequence(self) -> int:
        """Number of contexts in a sequence."""
        return 1

    def companions(self) -> dict[str, bytes]:
        """Return files that travel with a model trained on the task, such as a tokenizer; see `zoo.checkpoints.companions`."""
        return {}

    def sources(self) -> dict[str, Path]:
        """Return the files, and the folders of tokenizers, that the sequences come from, by field."""
        found = {}
        for field in self.paths:
            value = getattr(self, field)
            if isinstance(value, str):
                found[field] = Path(value)
            elif value is not None:
                found |= {f"{field}.{n}": Path(path) for n, path in enumerate(sorted(value), 1)}
        return found

    def fingerprints(self) -> dict[str, str]:
        """Return a fingerprint of each source, by field."""
        return {f"task.{field}": fingerprint(path) for field, path in self.sources().items() if path.exists()}

    def contexts(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return `count` random contexts, [count, ...]: the information that an answer depends on, and the unit by which splits
        are separated."""
        raise NotImplementedError

    def pose(self, rng: np.random.Generator, contexts: NDArray[np.int64]) -> Batch:
        """Return sequences that show the contexts, `contexts_per_sequence` each, and ask about them."""
        raise NotImplementedError

    def chance(self) -> float:
        """Return the accuracy per answer of a good guess that ignores the context. It may use the earlier questions and answers of
        the sequence."""
        raise NotImplementedError

    def exact_chance(self) -> float | None:
        """Return the rate at which that guess gets a whole sequence right; None if that is not informative."""
        return None

    def held_out(self) -> int | None:
        """Return the number of held-out sequences, after which they repeat; None if they are drawn at random."""
        return None

    def batch(self, seed: int, step: int, size: int, split: Split = "train") -> Batch:
        """Return the `step`-th batch of `size` sequences, a function of its arguments alone.

        No context occurs in both splits: its hash decides which one it belongs to.

        Raises:
            ZooError: the task has too few contexts to fill the split.
        """
        rng = np.random.default_rng([seed, step, split == "test"])
        kept: list[NDArray[np.int64]] = []
        missing = size * self.contexts_per_sequence
        for _ in range(100):
            if not missing:
                return self.pose(rng, np.concatenate(kept))
            drawn = self.contexts(rng, missing * (2 * HELD_OUT if split == "test" else 2))
            drawn = drawn[(_hash(drawn) % HELD_OUT == 0) == (split == "test")][:missing]
            kept.append(drawn)
            missing -= len(drawn)
        raise ZooError(f"task {self}: too few contexts to hold one in {HELD_OUT} out for the {split} split; make it larger")


def _hash(contexts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a hash of each context (splitmix64 over its entries)."""
    mixed = np.zeros(len(contexts), dtype=np.uint64)
    for column in contexts.reshape(len(contexts), -1).T.astype(np.uint64):
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
    return mixed


tasks: Registry[type[Task]] = Registry("task", "tasks", "zoo.tasks.*")


def fingerprint(path: Path) -> str:
    """Return a hash of a file's size and content, or of the tokenizer in a folder. Raises ZooError.

    Of a file of more than 16 MiB, 256 evenly spaced blocks of 64 KiB are read.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for name, content in read_companions(path).items():
            digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{size} ".encode())
            for start in range(0, size, max(BLOCK, -(-size // BLOCKS))):
                file.seek(start)
                digest.update(file.read(BLOCK))
    except OSError as error:
        raise ZooError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def refuse_same_file(train: str, test: str) -> None:
    """Raise ValueError if the held-out file is the one to train on."""
    if Path(train).resolve() == Path(test).resolve():
        raise ValueError(f"test: {test} is also the file to train on")


def new_task(fields: Mapping[str, Any]) -> Task:
    """Return the task that `{"name": "cycle", "nodes": 12, ...}` describes. Raises ZooError."""
    fields = dict(fields)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise ZooError(f"task.name: {name!r}: want one of {', '.join(tasks.names())}")
    return validate(tasks.get(name, "task.name"), fields, f"task {name}")
