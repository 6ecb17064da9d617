"""A TensorRT-RTX engine of a small bundle: import, build, load, run and compare, or the exact words of what refuses."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from benchmarks.gpu.models import DEVICE
from benchmarks.gpu.sheet import Case, Row, timed
from benchmarks.measure import difference
from zoo.export.tensorrt.build_engine import capabilities

TOOLS = ("onnx_ir", "onnxscript", "onnxruntime", "tensorrt_rtx")
WINDOW, TOKENS = 8, 6


def cases(dry: bool, folder: Path) -> Iterator[Case]:
    scratch = Path(tempfile.mkdtemp())
    made = cache(partial(zoo.create, "gdn4-sleep2", layers="gdn attn", d_model=32, window=WINDOW, vocab_size=64, blocks=BLOCKS))
    built = cache(lambda: build(made(), scratch / "bundle"))
    opened = cache(lambda: load(built()))
    yield "import", imported
    yield "build for this GPU, by name", lambda: engines(build(made(), scratch / "named", (here(),)))
    yield "build with the default capability", lambda: engines(built())
    yield "load", lambda: {"note": type(opened()).__name__}
    yield "a window, a sleep and more, beside PyTorch", lambda: compared(made(), opened())
    yield "time of a token", lambda: time_of(made(), opened())


BLOCKS = {"gdn": {"heads": 2, "head_dim": 16}, "attn": {"heads": 2}}


def imported() -> Row:
    package = importlib.import_module("tensorrt_rtx")
    return {"note": f"tensorrt_rtx {package.__version__} builds for {', '.join(capabilities(package))}; this GPU: {here()}"}


def here() -> str:
    """Return the compute capability of this GPU; without one, that of an H100."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}.{minor}"


def build(model: zoo.Model, folder: Path, capability: tuple[str, ...] = ()) -> Path:
    """Export the model and build an engine of each graph."""
    from zoo.export import export
    from zoo.export.plan import Plan

    export(model, folder, plan=Plan(prefill=None), target="tensorrt", compute_capability=capability, batch=(1, 1, 2))
    return folder


def engines(folder: Path) -> Row:
    return {"note": ", ".join(f"{file.name} {file.stat().st_size / 1e6:.2g} MB" for file in sorted(folder.glob("*.engine")))}


def load(folder: Path) -> Any:
    from zoo.export import load as open_bundle

    return open_bundle(folder, provider="tensorrt")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Read a window, sleep, and read some more. Returns the logits on the CPU."""
    ids = torch.arange(1, WINDOW + TOKENS + 1)[None] % 60
    return zoo.Session(model).feed(ids).float().cpu()


def compared(model: zoo.Model, opened: Any) -> Row:
    return {"error": difference(logits(opened), logits(model))}


def time_of(model: zoo.Model, opened: Any) -> Row:
    def stream(one: Any) -> Callable[[], Any]:
        session, first = zoo.Session(one), torch.tensor([[1]], device=DEVICE)
        return lambda: [*session.generate(first, TOKENS)]

    return timed({"engine": stream(opened), "PyTorch": stream(model.to(DEVICE))}, per=TOKENS)
