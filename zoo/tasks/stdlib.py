"""`stdlib`: next-byte prediction on the Python files of the standard library, a corpus that every machine has."""

from __future__ import annotations

import functools
import hashlib
import keyword
import platform
import re
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from zoo.errors import ZooError
from zoo.tasks.task import HELD_OUT, Batch, Split, Task, tasks

NAME = re.compile(rb"[A-Za-z_]\w*")
KEYWORDS = frozenset(word.encode() for word in keyword.kwlist)
OTHER, SAME_WINDOW, EARLIER_WINDOW = 1, 2, 3  # levels


@tasks.register("stdlib")
class Stdlib(Task):
    """Sequences of `length` bytes from random offsets of the files, which are joined by zero bytes; one file in 16 is held out.

    Every byte but the first is supervised, so the model needs `sleep_on: every`. Levels: 2 for the bytes of a name whose nearest
    earlier occurrence in the sequence is in the same window, 3 if it is in an earlier window, which may be evicted by then; 1 for all
    other bytes. A name is an identifier that is not a keyword, and belongs to the window in which it begins.
    """

    name = "stdlib"
    level_name = "recall"
    loss_everywhere = True
    of_bytes = True
    is_text = True
    length: int = Field(2048, ge=2, description="number of bytes in a sequence")
    width: int = Field(256, ge=1, description="window in bytes")

    def __str__(self) -> str:
        found = corpus()
        return f"{super().__str__()} (Python {platform.python_version()}, {found.files} files, sha256 {found.sha256[:12]})"

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def window(self) -> int:
        return self.width

    def fingerprints(self) -> dict[str, str]:
        """See `Task.fingerprints`."""
        return {"the standard library": corpus().sha256}

    def batch(self, seed: int, step: int, size: int, split: Split = "train") -> Batch:
        """See `Task.batch`."""
        text = getattr(corpus(), split)
        if len(text) < self.length:
            raise ZooError(f"task {self}: length: {self.length} is more than the {len(text)} bytes of the {split} split")
        starts = np.random.default_rng([seed, step, split == "test"]).integers(0, len(text) - self.length + 1, size)
        rows = [text[start : start + self.length] for start in starts]
        level = np.stack([levels(row.tobytes(), self.width) for row in rows])
        level[:, 0] = 0
        return Batch(np.stack(rows).astype(np.int64), level > 0, level)

    def chance(self) -> float:
        return float(np.bincount(corpus().test).max() / len(corpus().test))


class Corpus(NamedTuple):
    """The files of the standard library, in bytes."""

    train: NDArray[np.uint8]
    test: NDArray[np.uint8]
    files: int
    sha256: str
    """Hash of the names and contents of all files."""


@functools.cache
def corpus() -> Corpus:
    """Read the `.py` files of `sysconfig`'s stdlib, without installed packages and tests. Raises ZooError if there are none."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    files = [path for path in files if not any(_omitted(folder) for folder in path.parts[:-1])]
    if not files:
        raise ZooError(f"task stdlib: there are no .py files in {root}")
    digest, train, test = hashlib.sha256(), list[bytes](), list[bytes]()
    for path in files:
        content = (root / path).read_bytes()
        digest.update(b"%s\0%d\0" % (path.as_posix().encode(), len(content)) + content)
        (train if zlib.crc32(path.as_posix().encode()) % HELD_OUT else test).append(content)
    return Corpus(_joined(train), _joined(test), len(files), digest.hexdigest())


def _joined(contents: list[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"\0".join(contents), np.uint8)


def _omitted(folder: str) -> bool:
    return folder in ("site-packages", "dist-packages", "test", "tests") or folder.endswith("_test")


def levels(text: bytes, width: int) -> NDArray[np.int64]:
    """Return the level of each byte, [len(text)]."""
    found = np.full(len(text), OTHER)
    last: dict[bytes, int] = {}
    for match in NAME.finditer(text):
        word, window = match[0], match.start() // width
        if word in KEYWORDS:
            continue
        if word in last:
            found[match.start() : match.end()] = SAME_WINDOW if last[word] == window else EARLIER_WINDOW
        last[word] = window
    return found


def floor(order: int = 4, sample: int = 1 << 20) -> float:
    """Return the bits per byte of an n-gram model with `order` bytes of context, on the first `sample` bytes of the held-out files.

    Contexts are interpolated with shorter ones: p_k = (count + c p_{k-1}) / (total + c), where c is the number of different bytes
    seen after the context (Witten-Bell smoothing), and p_0 = 1/256.
    """
    train, test = corpus().train, corpus().test[:sample]
    chance = np.full(len(test), 1 / 256)
    for k in range(order + 1):
        seen, asked = _contexts(train, k), _contexts(test, k)
        pairs, times = np.unique(seen * 256 + train[k:], return_counts=True)
        contexts, first = np.unique(pairs // 256, return_index=True)
        totals, kinds = np.add.reduceat(times, first), np.diff(first, append=len(pairs))
        total, kind = (_look_up(contexts, values, asked) for values in (totals, kinds))
        count = _look_up(pairs, times, asked * 256 + test[k:])
        known = total > 0
        chance[k:][known] = (count[known] + kind[known] * chance[k:][known]) / (total[known] + kind[known])
    return float(-np.log2(chance[order:]).mean())


def _contexts(text: NDArray[np.uint8], order: int) -> NDArray[np.int64]:
    """Return the `order` bytes before each byte from text[order] on, as one number."""
    found = np.zeros(len(text) - order, np.int64)
    for i in range(order):
        found = found * 256 + text[i : len(text) - order + i]
    return found


def _look_up(keys: NDArray[np.int64], values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the value of each wanted key, 0 if it is absent. The keys are sorted."""
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
