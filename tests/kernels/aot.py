"""Compiles rows of tuned.json for GPUs that are not present, through the operators' own launch code, and reports the resources used.

    python -m tests.kernels.aot --stamp [KERNEL]   compile the rows of KERNEL (a prefix; default: all) and write their stamps
    python -m tests.kernels.aot                    read rows from stdin, one JSON object per line, and write their stamps to stdout

It needs the real compiler, so TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zoo.files import replacing
from zoo.kernels import tuning

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory that a block may have
MMA = re.compile(r"^(#\w+) = #ttg\.(?:nvidia_mma|dot_op)", re.MULTILINE)


class Compiler:
    """A process without the interpreter that compiles one row after another."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "tests.kernels.aot"]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, row: tuning.Row) -> dict[str, Any]:
        """{"triton", "registers", "spills" (bytes of stack), "shared" (bytes)} of the worst variant, and its "faults"."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(row) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the compiler died on {tuning.row_name(row)}"
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()


def stamp(prefix: str) -> None:
    """Compile the rows in two processes and rewrite tuned.json, one row per line."""
    table = [row for row in tuning.table() if row["kernel"].startswith(prefix)]
    compilers = [Compiler(), Compiler()]

    def compile_every_other(first: int) -> None:
        for row in table[first :: len(compilers)]:
            row["compiled"] = compilers[first](row)
            print(tuning.row_name(row), row["compiled"], flush=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_every_other, range(len(compilers))))
    for compiler in compilers:
        compiler.close()
    if faulty := [tuning.row_name(row) for row in table if row["compiled"].pop("faults")]:
        sys.exit(f"not written, for these rows have faults: {', '.join(faulty)}")
    lines = ",\n".join(json.dumps(row) for row in tuning.table())
    with replacing(tuning.TABLE) as new:
        new.write_text(f"[\n{lines}\n]\n")


def serve() -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from zoo.kernels import dispatch
    from zoo.kernels.common.examples import example
    from zoo.kernels.dispatch import kernels

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print to stdout, too

    class Target:
        """The part of a driver that compiling needs. Its devices are numbered by architecture."""

        arch = 0

        def get_current_device(self) -> int:
            return self.arch

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.arch, 32)

        def get_current_stream(self, device: int) -> int:
            return 0

    target = Target()
    driver.set_active(target)
    dispatch.triton_problem = lambda x: None
    wanted = ""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        if self.fn.__name__ == wanted:
            compiled.append(run(self, *arguments, grid=grid, warmup=True, **keywords))

    JITFunction.run = compile_only
    kernels.names()
    for line in sys.stdin:
        row = json.loads(line)
        operator, wanted = row["kernel"].split(".")
        target.arch = row["arch"]
        compiled.clear()
        try:
            inputs = example(operator, dtype=getattr(torch, row["dtype"]), device="meta", **{"T": 2048, **row["shape"]})
            with tuning.forced(row):
                function = dispatch.operators.get(operator)
                final = {"output_final_state": True} if "output_final_state" in inspect.signature(function).parameters else {}
                results = function(**inputs, **final, form="triton")
                results = results if isinstance(results, tuple) else (results,)
                if results[0].requires_grad:
                    with contextlib.suppress(NotImplementedError):  # a decode step has no gradients
                        torch.autograd.backward(results, [torch.empty_like(y) for y in results])
            found = [_resources(kernel, row["arch"]) for kernel in compiled]
            if not found:
                raise LookupError(f"{operator} launches no kernel {wanted}")
            answer = {key: max(one[key] for one in found) for key in ("registers", "spills", "shared")}
            answer = {"triton": triton.__version__, **answer, "faults": [fault for one in found for fault in one["faults"]]}
        except Exception as error:
            answer = {"triton": triton.__version__, "faults": [f"{type(error).__name__}: {error}"[:500]]}
        print(json.dumps(answer), file=answers, flush=True)


def _resources(kernel: Any, arch: int) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {"registers": used["REG"], "spills": used["STACK"], "shared": kernel.metadata.shared, "faults": _faults(kernel, arch)}


def _faults(kernel: Any, arch: int) -> list[str]:
    """Return the faults that a GPU would have at run time although the kernel compiles."""
    faults = []
    if re.search(r"\btrap;", kernel.asm["ptx"]):
        faults.append("the compiler gave up: a trap instruction")
    if kernel.metadata.shared > SHARED_LIMIT[arch]:
        faults.append(f"{kernel.metadata.shared} bytes of shared memory, {SHARED_LIMIT[arch]} allowed")
    # on Hopper such a transpose is stored wrongly with some tiles (flash-linear-attention#640)
    layouts = MMA.findall(kernel.asm["ttgir"])
    for transpose in re.findall(r"tt\.trans [^\n]*: (tensor<[^>]*>) ->", kernel.asm["ttgir"]):
        if any(re.search(rf"{layout}\b", transpose) for layout in layouts):
            faults.append(f"a matrix unit's result is transposed: {transpose}")
    return faults


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ, "the interpreter compiles nothing"
    if sys.argv[1:2] == ["--stamp"]:
        stamp("".join(sys.argv[2:]))
    else:
        serve()
