"""Build one TensorRT engine from one ONNX file, in a separate process because TensorRT crashes on some graphs.

    python -P build_engine.py '{"package": "tensorrt_rtx", "graph": "prediction.onnx", ...}'    the arguments of `build`

Its last line of output is a JSON object: the result of `build`, or {"error": one line}. It imports TensorRT only.
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
    """TensorRT cannot build this graph; the message is one line."""


def build(
    package: str, graph: str, engine: str, batch: Sequence[int], workspace: int, compute_capability: Sequence[str], timing_cache: str | None
) -> dict[str, Any]:
    """Build the engine of the ONNX file `graph` and write it to the file `engine`.

    Args:
        package: tensorrt or tensorrt_rtx.
        batch: minimum, optimal and maximum size of the dynamic dimension.
        workspace: scratch memory per layer in bytes.
        compute_capability: targets of tensorrt_rtx; if empty, its default.
        timing_cache: file of timings, for tensorrt; read if it exists, then updated.
    Raises:
        RefusedError: a node or the whole graph cannot be built.
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
        raise RefusedError(f"cannot build it: {_line('; '.join(log.errors) or 'no reason given')}")
    Path(engine).write_bytes(serialized)
    if timing_cache is not None:
        Path(f"{timing_cache}.new").write_bytes(config.get_timing_cache().serialize())
        os.replace(f"{timing_cache}.new", timing_cache)
    return {"layers": layers, "warnings": grouped(log.warnings, [tensor.name for tensor in inputs])}


def capabilities(trt: Any) -> dict[str, Any]:
    """Return the compute capabilities that tensorrt_rtx can build for, keyed like "8.0"."""
    found = {name.removeprefix("SM"): member for name, member in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    return {f"{digits[:-1]}.{digits[-1]}": member for digits, member in found.items()}


def profile(builder: Any, inputs: Sequence[Any], batch: Sequence[int]) -> Any:
    """Return a profile for every batch size in the range; other dimensions are those of the graph."""
    made = builder.create_optimization_profile()
    for tensor in inputs:
        shape = tuple(tensor.shape)
        if -1 in shape:
            made.set_shape(tensor.name, *[tuple(streams if size == -1 else size for size in shape) for streams in batch])
    return made


def grouped(warnings: Sequence[str], names: Sequence[str]) -> list[str]:
    """Merge warnings that differ only in the name of an input, and count them."""
    name = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    counted = Counter(name.sub("...", _line(warning)) for warning in warnings)
    return [warning if times == 1 else f"{warning} ({times} times)" for warning, times in counted.items()]


def _log(trt: Any) -> Any:
    """Return a TensorRT logger that collects errors and warnings."""

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
