"""`zoo doctor`: the form that each operator uses on this machine, and a check of every form."""

from __future__ import annotations

import inspect
import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.devices import usable_device
from zoo.errors import first_line
from zoo.files import replacing
from zoo.kernels import tuning
from zoo.kernels.common.examples import Inputs, example
from zoo.kernels.dispatch import choose, kernels, operators, triton_problem

LENGTH = 130  # tokens: slightly more than two chunks
BUDGET = 60.0  # seconds for the self-check; rows not reached within the budget stay unverified
# relative error (L2) of results and gradients against float64
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float64: 1e-10}


@dataclass(frozen=True)
class Finding:
    """Result of checking one form or configuration of an operator against the step recurrence in float64."""

    operator: str
    name: str
    error: float
    allowed: float
    problem: str = ""
    row: tuning.Row | None = None

    @property
    def right(self) -> bool:
        """True if it ran and its error is within tolerance."""
        return not self.problem and self.error <= self.allowed


def versions(device: torch.device) -> dict[str, str]:
    """Return a mapping from each dependency, and the GPU, to its version, or to the reason why it is missing."""
    return {
        "sleep-zoo": version("sleep-zoo"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton") or "not installed: pip install 'sleep-zoo[triton]'",
        "GPU": _gpu(device) if torch.cuda.is_available() else "none that torch can use",
    }


def serving(device: torch.device) -> list[tuple[str, str, str]]:
    """Return, for each operator, its name, the form that it uses here, and why."""
    x = torch.empty(1, device=device)
    lines = []
    for operator in operators.names():
        forms = _forms(operator)
        served = choose(operator, x, "chunked" if "chunked" in forms else "reference")
        form = next(name for name, run in forms.items() if run is served)
        lines.append((operator, form, _configurations(operator, device) if form == "triton" else _why_not(operator, x)))
    return lines


def self_check(device: torch.device) -> Iterator[Finding]:
    """Check every form that runs here, then every shipped configuration for this GPU until the budget is spent."""
    start = time.perf_counter()
    for operator in operators.names():
        for form in _forms(operator):
            if form != "triton" or device.type == "cuda":
                for dtype in (torch.float32, torch.bfloat16) if form == "triton" else (torch.float32,):
                    yield check(operator, device, dtype, {}, form)
    if device.type != "cuda":
        return
    for row in tuning.table():
        if row["arch"] == tuning.architecture(device) and time.perf_counter() - start < BUDGET:
            operator, dtype = row["kernel"].split(".")[0], getattr(torch, row["dtype"])
            with tuning.forced(row):
                yield check(operator, device, dtype, row["shape"], "triton", row)


def check(
    operator: str, device: torch.device, dtype: torch.dtype, sizes: dict[str, int], form: str, row: tuning.Row | None = None
) -> Finding:
    """Run one form or configuration and compare it with the step recurrence."""
    inputs = example(operator, dtype=dtype, device=str(device), **{"T": LENGTH, **sizes})
    name = tuning.row_name(row) if row else f"{form}, {dtype}".replace("torch.", "")
    try:
        return Finding(operator, name, deviation(operator, inputs, form), ALLOWED[dtype], row=row)
    except Exception as error:  # a compiler or driver may raise anything, and the user wants to see it
        return Finding(operator, name, float("nan"), ALLOWED[dtype], first_line(error)[:200], row)


def deviation(operator: str, inputs: Inputs, form: str) -> float:
    """Return the largest relative error of results and gradients against the step recurrence in float64 on the same inputs."""
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    found, wanted = call(operator, inputs, form), call(operator, exact, "reference")
    errors = [_relative(y, z) for y, z in zip(found, wanted, strict=True)]
    if found[0].requires_grad:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(y.shape, generator=generator).to(y) for y in found]
        with suppress(NotImplementedError):  # a decode step has no gradients
            gradients = torch.autograd.grad(found, list(inputs.values()), weights, allow_unused=True)
            right = torch.autograd.grad(wanted, list(exact.values()), [w.double() for w in weights], allow_unused=True)
            errors += [_relative(y, z) for y, z in zip(gradients, right, strict=True)]
    return float(np.max(errors))  # NaN if one is


def call(operator: str, inputs: Inputs, form: str | None) -> tuple[Tensor, ...]:
    """Call an operator in one form, or in the one that it chooses itself. Returns its results, with the final state."""
    function = operators.get(operator)
    final = {"output_final_state": True} if "output_final_state" in inspect.signature(function).parameters else {}
    results = function(**inputs, **final, form=form)
    return results if isinstance(results, tuple) else (results,)


def remember(findings: list[Finding], device: torch.device) -> None:
    """Store the verdict on each configuration: from now on those that passed are used on this GPU."""
    rows = {tuning.row_name(finding.row): finding.right for finding in findings if finding.row is not None}
    path = tuning.verdicts_path(torch.cuda.get_device_name(device))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def run(check: bool = True, device: str | None = None) -> bool:
    """Print versions, the form of each operator and the results of the check. Returns True if everything that was checked passed.

    Args:
        device: default: cuda if available, else cpu.
    Raises:
        ZooError: there is no such device.
    """
    from rich.console import Console

    from zoo.console import print_table

    chosen = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"), meta=False)
    console = Console()
    for name, found in versions(chosen).items():
        console.print(f"{name:10} {found}", highlight=False, markup=False)
    print_table(["operator", "served by", "because"], serving(chosen), console=console)
    if not check:
        return True
    findings = []
    for finding in self_check(chosen):
        findings.append(finding)
        verdict = "ok" if finding.right else "WRONG"
        figure = finding.problem or f"relative error {finding.error:.1e}, allowed {finding.allowed:.0e}"
        console.print(f"{verdict:6}{finding.operator}: {finding.name}: {figure}", highlight=False, markup=False, soft_wrap=True)
    if chosen.type == "cuda":
        remember(findings, chosen)
    else:
        console.print("Only the PyTorch forms can be checked on a CPU. Run this command on a GPU to verify the Triton configurations.")
    return all(finding.right for finding in findings)


def _relative(found: Tensor | None, wanted: Tensor | None) -> float:
    """Return the relative error; of gradients, those that do not exist are None."""
    if found is None or wanted is None:
        return 0.0 if found is wanted else math.inf
    difference, size = (found.double() - wanted).norm().item(), wanted.norm().item()
    return difference / size if size > 0 else difference


def _forms(operator: str) -> dict[str, Any]:
    operators.get(operator)  # importing an operator registers its forms
    return {name.split(".")[1]: kernels.get(name) for name in kernels.names() if name.startswith(f"{operator}.")}


def _why_not(operator: str, x: Tensor) -> str:
    if "triton" not in _forms(operator):
        return "there is no Triton form"
    return "the tensors are on a CPU" if not x.is_cuda else str(triton_problem(x))


def _configurations(operator: str, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device)
    rows = [row for row in tuning.table() if row["kernel"].split(".")[0] == operator and row["arch"] == tuning.architecture(device)]
    count = sum(tuning.proven(row, name) for row in rows)
    return f"{count} of {len(rows)} configurations verified on this GPU" + ("" if count else "; default ones are used")


def _gpu(device: torch.device) -> str:
    """Return the name of the device, or of the current GPU if the device is a CPU."""
    gpu = device if device.type == "cuda" else None
    major, minor = torch.cuda.get_device_capability(gpu)
    return f"{torch.cuda.get_device_name(gpu)}, compute capability {major}.{minor}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
