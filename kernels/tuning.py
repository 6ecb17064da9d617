"""Block sizes and launch options of the Triton kernels: a verified row of tuned.json, else the defaults in the code.

A row of tuned.json is one configuration of one kernel for an architecture, a dtype and head sizes.
It is used only where it is known to be correct: on the GPU and Triton version named by its stamp `hardware`, or where
`zoo doctor` has checked it. Nothing is tuned at run time.

    {"kernel": "ssd.states", "arch": 90, "dtype": "bfloat16", "shape": {"N": 128, "P": 64},
     "config": {"BP": 64, "num_warps": 4, "num_stages": 2},
     "compiled": {"triton": "3.7.1", "registers": 167, "spills": 0, "shared": 32768},
     "hardware": null or {"device": "NVIDIA H200", "triton": "3.7.1", "error": 0.004, "ms": 0.08}}
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("tuned.json")
ARCHITECTURES = (80, 90, 100)  # compute capability of A100, H100 and H200, B200

Row = dict[str, Any]

_forced: Row | None = None


def configuration(kernel: str, x: Tensor, plain: dict[str, int], **shape: int) -> dict[str, int]:
    """Return the launch configuration of `kernel` ("<operator>.<function>") for tensors like x.

    Args:
        plain: a configuration that is correct on every GPU, used where no row is verified. It has the same keys as the rows.
        shape: the sizes by which rows are selected.
    """
    if _forced is not None and forces(kernel):
        return dict(_forced["config"])
    if not x.is_cuda:
        return plain
    return _best(kernel, x.device, dtype_name(x), tuple(sorted(shape.items()))) or plain


@contextmanager
def forced(row: Row) -> Iterator[None]:
    """Launch the row's kernel with the row's configuration, verified or not, for any tensors."""
    global _forced
    before, _forced = _forced, row
    try:
        yield
    finally:
        _forced = before


def forces(kernel: str) -> bool:
    """Return whether a row of this kernel is being tried, so that it must be launched."""
    return _forced is not None and _forced["kernel"] == kernel


def target(x: Tensor) -> int:
    """Return the architecture whose rows apply to x; 0 if x is not on a GPU."""
    if _forced is not None:
        return _forced["arch"]
    return architecture(x.device) if x.is_cuda else 0


@functools.cache
def architecture(device: torch.device) -> int:
    """Return the newest of ARCHITECTURES whose rows the GPU may use; 0 if it is older than all of them."""
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in ARCHITECTURES if known <= 10 * major + minor), default=0)


def proven(row: Row, device: str) -> bool:
    """Return whether the row is known to be correct on this GPU (by name) with the installed Triton version."""
    stamp = row["hardware"]
    if stamp is not None and (stamp["device"], stamp["triton"]) == (device, version("triton")):
        return True
    return verdicts(device).get(row_name(row)) is True


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def row_name(row: Row) -> str:
    """Return a unique name for a row: "ssd.states-90-bfloat16-N128-P64-BP64-num_stages2-num_warps4"."""
    sizes = [f"{name}{size}" for part in ("shape", "config") for name, size in sorted(row[part].items())]
    return "-".join([row["kernel"], str(row["arch"]), row["dtype"], *sizes])


@functools.cache
def table() -> list[Row]:
    """Return every row; among rows for one kernel, architecture, dtype and shape, the best comes first."""
    return json.loads(TABLE.read_text())


@functools.cache
def verdicts(device: str) -> dict[str, bool]:
    """Return the verdicts of `zoo doctor` by row, for this GPU and these versions; empty before it has run."""
    path = verdicts_path(device)
    return json.loads(path.read_text()) if path.exists() else {}


def verdicts_path(device: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sleep-zoo" / f"{device.replace(' ', '-')}-triton{version('triton')}-zoo{version('sleep-zoo')}.json"


@functools.cache  # a launch must not read files
def _best(kernel: str, device: torch.device, dtype: str, shape: tuple[tuple[str, int], ...]) -> dict[str, int] | None:
    wanted, name = (kernel, architecture(device), dtype, dict(shape)), torch.cuda.get_device_name(device)
    for row in table():
        if (row["kernel"], row["arch"], row["dtype"], row["shape"]) == wanted and proven(row, name):
            return dict(row["config"])
    return None
