"""Watching a run: where its metrics go besides the JSON lines and the progress bar, and what a GPU could do at most."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.training.config import Report, TrainConfig


@contextmanager
def tensorboard(folder: Path) -> Iterator[Report]:
    """Event files in `folder`/tensorboard, where TensorBoard is installed; a run that goes on takes back what it had not saved."""
    writer: Any = None

    def write(metrics: dict[str, Any]) -> None:
        nonlocal writer
        if writer is None:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=metrics["step"])
        for name, value in _flat(metrics).items():
            writer.add_scalar(name, value, metrics["step"])

    yield write if find_spec("tensorboard") else lambda metrics: None
    if writer is not None:
        writer.close()


@contextmanager
def weights_and_biases(project: str | None, folder: Path, plan: TrainConfig) -> Iterator[Report]:
    """A run of the Weights & Biases project, named like the folder; the same one when the run goes on. Raises ZooError."""
    if project is None:
        yield lambda metrics: None
        return
    try:
        import wandb
    except ImportError:
        raise ZooError(f"--wandb: {project}: needs pip install 'sleep-zoo[wandb]'") from None
    run: Any = None

    def write(metrics: dict[str, Any]) -> None:
        nonlocal run
        if run is None:
            run = wandb.init(
                project=project,
                name=folder.name,
                id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                dir=str(folder),
                config=plan.model_dump(mode="json"),
            )
        run.log(_flat(metrics), step=metrics["step"])

    yield write
    if run is not None:
        run.finish()


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics by name, those by level as `by_level/3`."""
    flat = {f"by_level/{level}": share for level, share in metrics["by_level"].items()}
    return {**{name: value for name, value in metrics.items() if name not in ("step", "by_level")}, **flat}


PEAKS = {
    "A100": 312e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165.2e12,
}
"""bfloat16 products without sparsity, per second, as NVIDIA's data sheets give them, by
words of torch's name for the GPU; the first that fits counts."""


def peak_flops(device: torch.device) -> float | None:
    """What the GPU computes per second at most, if it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
