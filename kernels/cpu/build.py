"""The library of C++ kernels, compiled on the machine that runs it."""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

HERE = Path(__file__).parent
INSTRUCTIONS = {"AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}
"""Compiler flags for what `torch.backends.cpu.get_cpu_capability` returns."""


@cache
def build() -> None:
    """Compile the C++ files of this folder, unless an earlier process has, and load them. Takes seconds.

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
    command = [os.environ.get("CXX", "c++"), *flags, *map(str, sorted(HERE.glob("*.cpp"))), "-ltorch_cpu", "-lc10"]
    made_from = repr((command, torch.__version__, [file.read_text() for file in sorted(HERE.glob("*.[ch]*"))]))
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    library = root / "sleep_zoo" / f"cpu-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=library.parent) as scratch:
            _run([*command, "-o", f"{scratch}/cpu.so"])
            with open(f"{scratch}/cpu.so", "rb") as file:
                os.fsync(file.fileno())
            os.replace(file.name, library)
    torch.ops.load_library(str(library))
    torch.library.register_fake("zoo::linear", lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))
    torch.library.register_fake("zoo::attend", lambda q, k, v, visible, scale: q.new_empty(*q.shape[:2], v.shape[3]))
    torch.library.register_fake("zoo::step_", lambda state, q, k, v, decay, beta, scale: torch.empty_like(v))


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stderr.strip() or f'exit code {done.returncode}').splitlines()[0]}")
