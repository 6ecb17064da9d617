"""Linear layers of a few rows on a CPU, faster than BLAS multiplies them."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

SOURCE = Path(__file__).with_name("linear.cpp")
INSTRUCTIONS = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}
"""Compiler flags for what `torch.backends.cpu.get_cpu_capability` returns."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b without a gradient: x [..., K], W [N, K], b [N] -> [..., N], float32. `build` must have returned."""
    y = torch.ops.zoo.linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


class FewRows(TorchFunctionMode):
    """Calls `linear` in place of `F.linear`, where it can compute the same."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return (linear if func is F.linear and all(map(_plain, args)) else func)(*args, **(kwargs or {}))


def few_rows(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile a graph with `linear` in place of `F.linear`: a backend of torch.compile."""
    from torch._dynamo import lookup_backend  # slow to import

    for node in graph.graph.find_nodes(op="call_function", target=F.linear):
        if all(_plain(operand and operand.meta["example_value"]) for operand in node.args):
            node.target = linear
    return lookup_backend("inductor")(graph, inputs)


def _plain(operand: Tensor | None) -> bool:
    kinds = Tensor, nn.Parameter, FakeTensor  # no quantised weights
    return operand is None or (type(operand) in kinds and operand.is_cpu and operand.dtype == torch.float32)


@cache
def build() -> None:
    """Compile `linear.cpp`, unless an earlier process has, and load it. Takes seconds.

    The library is in torch's folder of extensions, which TORCH_EXTENSIONS_DIR names. The compiler is `c++`, or what CXX names.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: the folder cannot be written.
    """
    from torch.utils.cpp_extension import get_default_build_root, include_paths, library_paths  # slow to import

    flags = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp"]
    flags += INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    for folder in include_paths():
        flags += ["-isystem", folder]
    for folder in library_paths():
        flags += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    command = [os.environ.get("CXX", "c++"), *flags, str(SOURCE), "-ltorch_cpu", "-lc10"]
    made_from = repr((command, torch.__version__, SOURCE.read_text()))
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    library = root / "sleep_zoo" / f"linear-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=library.parent) as scratch:
            _run([*command, "-o", f"{scratch}/linear.so"])
            os.replace(f"{scratch}/linear.so", library)
    torch.ops.load_library(str(library))
    torch.library.register_fake("zoo::linear", lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stderr.strip() or f'exit code {done.returncode}').splitlines()[0]}")
