"""flash-linear-attention's chunk_OPERATOR on CPU tensors: python -m tests.kernels.fla_peer OPERATOR IN.safetensors OUT.safetensors

OPERATOR is gated_delta_rule or kda. IN holds q, k, v, g, beta, initial_state and the gradients do, dfinal; OUT receives the results
and the gradients of all inputs. It runs in a separate process, since it changes the interpreter to what fla's kernels expect.
"""

import builtins
import contextlib
import importlib
import os
import sys
import types

os.environ |= {"TRITON_INTERPRET": "1", "FLA_DISABLE_BACKEND_DISPATCH": "1"}

import tests.kernels.interpreter  # noqa: F401, I001  first

import torch
from safetensors.torch import load_file, save_file
from triton.runtime import autotuner
from triton.runtime import interpreter as upstream

from tests.kernels.interpreter import rehearse


def first_configuration_only() -> None:
    """Replace autotuning, which asks a driver."""
    new = autotuner.Autotuner.__init__

    def cut(self, *arguments, **keywords):
        new(self, *arguments, **keywords)
        self.configs = self.configs[:1]

    autotuner.Autotuner.__init__ = cut


def loops_count_in_tensors() -> None:
    """Let loop variables be cast: fla does, and in the interpreter they are Python integers."""

    def counted(*bounds):
        numbers = [int(x.handle.data.item()) if hasattr(x, "handle") else int(getattr(x, "value", x)) for x in bounds]
        yield from map(upstream._implicit_cvt, builtins.range(*numbers))

    execute = upstream.FunctionRewriter._compile_and_exec

    def patched(self, tree):
        self.fn.__globals__["range"] = counted
        return execute(self, tree)

    upstream.FunctionRewriter._compile_and_exec = patched


class NoDevice(contextlib.nullcontext):
    def __init__(self, *_: object) -> None:
        super().__init__()


def main(operator: str, source: str, destination: str) -> None:
    first_configuration_only()
    loops_count_in_tensors()
    torch.cuda.device = NoDevice
    torch.cpu.device = NoDevice
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=132)
    run = getattr(importlib.import_module(f"fla.ops.{operator}"), f"chunk_{operator}")
    given = load_file(source)
    grads = given.pop("do"), given.pop("dfinal")
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    with rehearse(strict=False, tf32=True):
        results = run(**leaves, output_final_state=True)
        torch.autograd.backward(results, grads)
    found = {"o": results[0], "final": results[1], **{f"d{name}": x.grad for name, x in leaves.items()}}
    save_file({name: x.detach().contiguous() for name, x in found.items()}, destination)


if __name__ == "__main__":
    main(*sys.argv[1:])
