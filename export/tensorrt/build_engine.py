"""One TensorRT engine from one ONNX file. Runs in a process of its own, because TensorRT crashes on some graphs it does not like.

    python -P build_engine.py '{"package": "tensorrt_rtx", "graph": "prediction.onnx", ...}'    the arguments of `build`

The last line it prints is a JSON object: what `build` returns, or {"error": one line}. Imports nothing but TensorRT.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class RefusedError(Exception):
    """TensorRT does not build this graph; says why in one line."""


def build(
    package: str, graph: str, engine: str, batch: Sequence[int], workspace: int, compute_capability: Sequence[str], timing_cache: str | None
) -> dict[str, Any]:
    """Write the engine of the ONNX file `graph` to the file `engine`.

    Args:
        package: tensorrt or tensorrt_rtx.
        batch: smallest, preferred and largest size of every dimension that varies.
        workspace: bytes.
        compute_capability: for tensorrt_rtx; none: those it chooses.
        timing_cache: for tensorrt; read if it is there, and written.
    Raises:
        RefusedError: a node, or the whole, does not build.
        OSError: a file cannot be read or written.
    """
    trt = importlib.import_module(package)
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(graph):
        error = parser.get_error(0)
        raise RefusedError(f"refuses {f'{error.node_operator()} {error.node_name()}'.strip() or 'it'}: {_line(error.desc())}")
    inputs, layers = [network.get_input(i) for i in range(network.num_inputs)], network.num_layers
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.add_optimization_profile(profile(builder, inputs, batch))
    if compute_capability:
        known = capabilities(trt)
        config.num_compute_capabilities = len(compute_capability)
        for i, number in enumerate(compute_capability):
            config.set_compute_capability(known[number], i)
    if timing_cache is not None:
        measured = Path(timing_cache).read_bytes() if os.path.isfile(timing_cache) else b""
        config.set_timing_cache(config.create_timing_cache(measured), ignore_mismatch=False)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise RefusedError(f"cannot build it: {_line('; '.join(log.errors) or 'it does not say why')}")
    Path(engine).write_bytes(serialized)
    if timing_cache is not None:
        Path(f"{timing_cache}.new").write_bytes(config.get_timing_cache().serialize())
        os.replace(f"{timing_cache}.new", timing_cache)
    return {"layers": layers, "warnings": grouped(log.warnings, [tensor.name for tensor in inputs])}


def capabilities(trt: Any) -> dict[str, Any]:
    """The compute capabilities that tensorrt_rtx builds for: "8.0" and so on."""
    found = {name.removeprefix("SM"): member for name, member in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    return {f"{digits[:-1]}.{digits[-1]}": member for digits, member in found.items()}


def profile(builder: Any, inputs: Sequence[Any], batch: Sequence[int]) -> Any:
    """Any batch from the smallest to the largest, everything else as in the graph."""
    made = builder.create_optimization_profile()
    for tensor in inputs:
        shape = tuple(tensor.shape)
        if -1 in shape:
            made.set_shape(tensor.name, *[tuple(streams if size == -1 else size for size in shape) for streams in batch])
    return made


def grouped(warnings: Sequence[str], names: Sequence[str]) -> list[str]:
    """Each warning once, with the number of inputs it was said of."""
    name = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    counted = Counter(name.sub("...", _line(warning)) for warning in warnings)
    return [warning if times == 1 else f"{warning} ({times} times)" for warning, times in counted.items()]


def _log(trt: Any) -> Any:
    """A TensorRT logger that keeps errors and warnings."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= self.ERROR:
                self.errors.append(message)
            elif severity == self.WARNING:
                self.warnings.append(message)

    return Log()


def _line(message: str) -> str:
    return " ".join(message.split())


if __name__ == "__main__":
    try:
        print(json.dumps(build(**json.loads(sys.argv[1]))))
    except RefusedError as refused:
        print(json.dumps({"error": str(refused)}))
    except OSError as problem:
        print(json.dumps({"error": f"cannot write its engine: {problem.strerror}"}))
