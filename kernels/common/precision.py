"""The float32 matmul precision around operators that are slow under the one of the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zoo.kernels.common.recording import untraced

_lock = threading.Lock()
_inside: list[str] = []
"""The precision of the process, once for each thread in `highest_precision`."""


@untraced
def is_highest() -> bool:
    """Return whether MKL multiplies float32 matrices on a CPU, and not oneDNN."""
    return torch.get_float32_matmul_precision() == "highest"


@contextmanager
def highest_precision() -> Iterator[None]:
    """Set the precision "highest" until the context ends: of the whole process, since torch has no other."""
    with _lock:
        _inside.append(_inside[0] if _inside else torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        with _lock:
            before = _inside.pop()
            if not _inside:
                torch.set_float32_matmul_precision(before)
