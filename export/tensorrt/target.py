"""The target `tensorrt`: strongly typed engines, in which every tensor keeps the type that it has in the graph.

`tensorrt` builds for the local GPU. `tensorrt_rtx` builds without a GPU, for given compute capabilities.
"""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, field_validator

from zoo.errors import ZooError
from zoo.export.manifest import WEIGHTS, Bundle, EngineSpec, digest
from zoo.export.plan import Plan
from zoo.export.target import Target, targets
from zoo.export.tensorrt import build_engine
from zoo.export.tensorrt.build_engine import capabilities
from zoo.files import replacing

OLDEST = (10, 15)  # first tensorrt whose parser supports TensorScatter
BFLOAT16_SINCE = 8.0
GIB = 1 << 30
HEADROOM = 64 << 20  # bytes of an engine besides the weights


class Toolkit(NamedTuple):
    """The TensorRT package that fits this machine."""

    trt: Any
    ahead: bool
    """True if it builds ahead of time, for GPUs of other machines."""

    @property
    def name(self) -> str:
        return f"{self.trt.__name__} {self.trt.__version__}"


class TensorRT(Target):
    """Write an engine for every graph. Fields are the options of the build."""

    gathers_integers: ClassVar[bool] = False
    shares_integers: ClassVar[bool] = False  # tensorrt_rtx 1.7 crashes

    batch: tuple[int, int, int] = Field((1, 1, 8), description="minimum, optimal and maximum number of streams")
    compute_capability: tuple[str, ...] = Field(
        (), description='GPUs that one engine is built for, such as "8.0"; empty: the local GPU, or the default of tensorrt_rtx'
    )
    workspace: float = Field(4, gt=0, description="scratch memory per layer in GiB")
    timing_cache: Path | None = Field(None, description="file of measurements of `tensorrt`, which speeds up the next build")

    @field_validator("batch")
    @classmethod
    def _ordered(cls, batch: tuple[int, int, int]) -> tuple[int, int, int]:
        if not 1 <= batch[0] <= batch[1] <= batch[2]:
            raise ValueError(f"{batch}; want minimum, optimal and maximum, ascending and at least 1")
        return batch

    def check(self, precision: str, plan: Plan) -> None:
        if plan.dialect != "portable":
            raise ZooError(f"dialect: TensorRT does not support '{plan.dialect}', which is specific to onnxruntime; allowed: portable")
        if plan.self_sleeping:
            raise ZooError("self_sleeping: not supported by TensorRT, whose engines do not sleep by themselves; allowed: onnx")
        self.toolkit(precision)

    def build(self, folder: Path, bundle: Bundle) -> Bundle:
        """Write an engine for every graph.

        Raises:
            ZooError: TensorRT cannot build a graph, or the engines do not fit on the disk.
        """
        toolkit = self.toolkit(bundle.precision)
        check_space(folder, (folder / WEIGHTS).stat().st_size, len(bundle.graphs))
        engines = {}
        for graph in bundle.graphs:
            engine = (folder / graph).with_suffix(".engine")
            engines[engine.name] = self.engine(toolkit, folder / graph, engine)
        hashes = {name: digest(folder / name) for name in engines}
        return bundle.model_copy(update={"engines": engines, "sha256": bundle.sha256 | hashes})

    def toolkit(self, precision: str) -> Toolkit:
        """Choose `tensorrt` if it is installed, there is a GPU and no compute capability is requested; otherwise `tensorrt_rtx`.

        Raises:
            ZooError: neither is usable, or it does not support the compute capability or precision.
        """
        if precision not in ("float32", "float16", "bfloat16"):
            raise ZooError(f"dtype: TensorRT has no kernels for {precision}; allowed: float32, float16, bfloat16")
        trt, why_not = _installed("tensorrt"), "is not installed"
        if trt is not None:
            if tuple(int(part) for part in trt.__version__.split(".")[:2]) < OLDEST:
                raise ZooError(f"tensorrt {trt.__version__}: want {OLDEST[0]}.{OLDEST[1]} or newer")
            if torch.cuda.is_available() and not self.compute_capability:
                return Toolkit(trt, ahead=False)
            why_not = "builds only for the local GPU" if self.compute_capability else "needs a GPU to build, and none is available"
        rtx = _installed("tensorrt_rtx")
        if rtx is None:
            raise ZooError(f"tensorrt {why_not}; pip install 'sleep-zoo[tensorrt-rtx]' builds without a GPU, for any compute capability")
        if self.timing_cache is not None:
            raise ZooError(f"timing-cache: {rtx.__name__} measures nothing during a build; allowed with tensorrt only")
        known = capabilities(rtx)
        for asked in self.compute_capability:
            if asked not in known:
                raise ZooError(
                    f"compute-capability: '{asked}' is not supported by {rtx.__name__} {rtx.__version__}; allowed: {', '.join(known)}"
                )
            if precision == "bfloat16" and float(asked) < BFLOAT16_SINCE:
                raise ZooError(f"dtype: no bfloat16 at compute capability {asked}; allowed: {BFLOAT16_SINCE} and newer, or another dtype")
        return Toolkit(rtx, ahead=True)

    def engine(self, toolkit: Toolkit, graph: Path, engine: Path) -> EngineSpec:
        """Build the engine of the ONNX file `graph` and write it atomically to `engine`.

        Raises:
            ZooError: TensorRT refuses the graph or crashes, or the engine does not fit on the disk.
        """
        started = time.perf_counter()
        with replacing(engine) as scratch:
            result = _run(
                f"{graph.name}: {toolkit.name}",
                package=toolkit.trt.__name__,
                graph=str(graph),
                engine=str(scratch),
                batch=self.batch,
                workspace=int(self.workspace * GIB),
                compute_capability=self.compute_capability,
                timing_cache=None if self.timing_cache is None else str(self.timing_cache.absolute()),
            )
        return EngineSpec(
            built_by=toolkit.name,
            compute_capability=list(self.compute_capability) if toolkit.ahead else [_here()],
            batch=self.batch,
            seconds=round(time.perf_counter() - started, 2),
            **result,
        )


targets.register("tensorrt", TensorRT)


def check_space(folder: Path, weights: int, engines: int) -> None:
    """Raise a ZooError if the disk has no room for `engines` engines with `weights` bytes of weights each."""
    need, free = engines * (weights + HEADROOM), shutil.disk_usage(folder).free
    if free < need:
        raise ZooError(f"{folder}: {engines} engines need about {need / GIB:.1f} GiB, and the disk has {free / GIB:.1f} GiB left")


def _here() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def _installed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except (ImportError, OSError):  # OSError: its libraries are missing
        return None


def _run(label: str, **task: Any) -> dict[str, Any]:
    """Run `zoo.export.tensorrt.build_engine.build` in a separate process."""
    script = [sys.executable, "-P", build_engine.__file__, json.dumps(task)]
    done = subprocess.run(script, capture_output=True, text=True)
    if done.returncode < 0:
        raise ZooError(f"{label} crashes ({signal.Signals(-done.returncode).name})")
    if done.returncode:
        raise ZooError(f"{label} fails: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in result:
        raise ZooError(f"{label} {result['error']}")
    return result
