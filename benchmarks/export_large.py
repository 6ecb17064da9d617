"""Export and run a large model on this machine, with random weights in half precision.

    python -m benchmarks.export_large [MODEL] [--dtype bfloat16] [--window 64]

The checkpoint is exported once as it is, and once with a small window, on which one sleep runs. onnxruntime has no bfloat16
kernels on a CPU: such graphs are checked but not run. Fails above 20 GiB (Linux), above 15 minutes, or if the bundle is more
than 2 % larger than its checkpoint.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import torch

import zoo
from benchmarks.measure import RESULTS, machine, peak_memory

GIB = 1 << 30
MEMORY, MINUTES, LARGER = 20, 15, 1.02
WIDEN = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]  # optimisations that make float32 copies of weights
EXPORT = "from zoo.export.cli import main; main()"
seconds: dict[str, float] = {}


@contextmanager
def timed(step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - started, 1)
    print(f"{step:<24} {seconds[step]:7.1f} s", flush=True)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def run(file: Path, **ids: Any) -> float:
    """Run a graph from a fresh state and return its largest output. Weights stay memory-mapped and unconverted."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=WIDEN)
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    zeros = {
        value.name: np.zeros([1 if isinstance(n, str) else n for n in value.shape], types[value.type]) for value in session.get_inputs()
    }
    outputs = session.run(None, zeros | {name: np.asarray(value) for name, value in ids.items() if name in zeros})
    if not all(np.isfinite(output).all() for output in outputs):
        sys.exit(f"{file.name}: not all numbers are finite")
    return float(max(np.abs(output).max() for output in outputs))


@click.command()
@click.argument("name", default="jet2b-sleep6")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True)
@click.option("--window", default=64, show_default=True, help="Window of the bundle that sleeps, in tokens.")
def main(name: str, dtype: str, window: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, bundle, small = (Path(scratch) / part for part in ("checkpoint", "bundle", "small"))
        with timed("create and save"):
            zoo.save(zoo.create(name, dtype=getattr(torch, dtype)), checkpoint)
        asked = [sys.executable, "-c", EXPORT, str(checkpoint), "--target", "onnx", "--no-verify", "--out"]
        with timed("export"):
            subprocess.run([*asked, str(bundle)], check=True)
        with timed("onnx.checker"):
            for file in bundle.glob("*.onnx"):
                onnx.checker.check_model(str(file), full_check=True)
        sizes = {"checkpoint": size(checkpoint), "bundle": size(bundle)}
        token = np.ones((1, 1), np.int64)
        largest = {}
        if dtype == "float16":
            with timed("predict one token"):
                largest["prediction"] = run(bundle / "prediction.onnx", input_ids=token)
            shutil.rmtree(bundle)
            subprocess.run([*asked, str(small), f"window={window}"], check=True)
            ids = np.random.default_rng(0).integers(0, 1000, (1, window))
            with timed(f"sleep on {window} tokens"):
                largest["consolidation"] = run(small / "consolidation.onnx", input_ids=ids, n_valid=window - 1)
    held = {"export": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, "all else": peak_memory()}
    line = {"model": name, "dtype": dtype, "seconds": seconds, "bytes": sizes, "held": held, "largest": largest, **machine()}
    print(json.dumps(line))
    with (RESULTS / "export_large.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")
    if max(held.values()) > MEMORY * GIB:
        sys.exit(f"{name}: more than {MEMORY} GiB")
    if seconds["export"] > 60 * MINUTES:
        sys.exit(f"{name}: more than {MINUTES} minutes")
    if sizes["bundle"] > LARGER * sizes["checkpoint"]:
        sys.exit(f"{name}: the bundle is {sizes['bundle'] / sizes['checkpoint']:.3f} x its checkpoint")


if __name__ == "__main__":
    main()
