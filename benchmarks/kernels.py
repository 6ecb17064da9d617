"""Time operators beside their peers, forward and with backward, and measure their error against the float64 recurrence.

    python -m benchmarks.kernels --device cpu      our chunked PyTorch forms, transformers' PyTorch paths
    python -m benchmarks.kernels --device cuda     our Triton kernels, fla, mamba_ssm (whichever is installed)

The cell of a peer that is not installed, or of a row that was not measured, gives the reason. A result that fails its check is not timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from benchmarks.measure import OURS, compare, console, difference, record
from zoo.kernels.common.examples import Inputs, example
from zoo.kernels.dispatch import operators

Run = Callable[[Inputs], tuple[Tensor, Tensor]]
"""Takes the inputs of our operator and returns its results."""

TARGET = 1.5
TOLERANCE = 2e-2  # error of a bfloat16 result relative to its largest entry; float32 stays far below


def delta_rule(B: int, T: int, H: int, D: int) -> dict[str, int]:
    return {"batch": B, "T": T, "H": H, "HV": H, "K": D, "V": D}


def kimi(B: int, T: int, H: int, D: int) -> dict[str, int]:
    return {"batch": B, "T": T, "H": H, "K": D, "V": D}


def selective_scan(B: int, T: int, D: int, N: int) -> dict[str, int]:
    return {"batch": B, "T": T, "D": D, "N": N}


def ssd(B: int, T: int, H: int, P: int, N: int) -> dict[str, int]:
    return {"batch": B, "T": T, "H": H, "P": P, "N": N}


def transformers_delta_rule(x: Inputs) -> tuple[Tensor, Tensor]:
    rule = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next").torch_chunk_gated_delta_rule
    return rule(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=x["initial_state"], output_final_state=True)


def transformers_selective_scan(x: Inputs) -> tuple[Tensor, Tensor]:
    scan = importlib.import_module("transformers.models.mamba.modeling_mamba").mamba_selective_scan
    y, state = scan(*(x[name].mT for name in ("u", "dt")), x["A"], *(x[name].mT for name in ("B", "C")), return_last_state=True)
    return y.mT, state


def transformers_ssd(x: Inputs) -> tuple[Tensor, Tensor]:
    scan = importlib.import_module("transformers.models.mamba2.modeling_mamba2").mamba2_chunk_scan
    # 256 is what transformers' Mamba2Config uses; a sequence is padded to a multiple of it
    y, state = scan(x["x"], x["dt"], x["A"], x["B"], x["C"], 256, initial_states=x["initial_state"].mT, return_final_states=True)
    return y, state.mT


def fla_delta_rule(x: Inputs) -> tuple[Tensor, Tensor]:
    rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    return rule(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=x["initial_state"], output_final_state=True)


def fla_kimi(x: Inputs) -> tuple[Tensor, Tensor]:
    rule = importlib.import_module("fla.ops.kda").chunk_kda
    return rule(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=x["initial_state"], output_final_state=True)


def mamba_ssm_selective_scan(x: Inputs) -> tuple[Tensor, Tensor]:
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    u, dt, B, C = (x[name].to(x["u"].dtype).mT.contiguous() for name in ("u", "dt", "B", "C"))
    y, state = scan(u, dt, x["A"], B, C, return_last_state=True)
    return y.mT, state


def mamba_ssm_ssd(x: Inputs) -> tuple[Tensor, Tensor]:
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    y, state = scan(x["x"], x["dt"], x["A"], x["B"], x["C"], 256, initial_states=x["initial_state"].mT, return_final_states=True)
    return y, state.mT


def ours(operator: str, form: str | None) -> Run:
    run = operators.get(operator)
    return lambda x: run(**x, output_final_state=True, form=form)


CPU = {
    "gated_delta_rule": (delta_rule, {"transformers": transformers_delta_rule}, [(1, 512, 4, 64), (4, 1024, 4, 64), (1, 2048, 8, 128)]),
    "selective_scan": (
        selective_scan,
        {"transformers": transformers_selective_scan},
        [(1, 256, 256, 16), (2, 512, 512, 16), (1, 1024, 1536, 16)],
    ),
    "ssd": (ssd, {"transformers": transformers_ssd}, [(1, 512, 4, 64, 64), (2, 1024, 8, 64, 64), (1, 2048, 24, 64, 128)]),
}
CUDA = {
    "gated_delta_rule": (
        delta_rule,
        {"fla": fla_delta_rule},
        [(1, 2048, 16, 128), (8, 2048, 16, 128), (1, 8192, 16, 128), (4, 8192, 16, 128)],
    ),
    "kda": (kimi, {"fla": fla_kimi}, [(1, 2048, 16, 128), (8, 2048, 16, 128), (1, 8192, 16, 128)]),
    "selective_scan": (
        selective_scan,
        {"mamba_ssm": mamba_ssm_selective_scan},
        [(1, 2048, 4096, 16), (8, 2048, 4096, 16), (1, 8192, 4096, 16)],
    ),
    "ssd": (ssd, {"mamba_ssm": mamba_ssm_ssd}, [(1, 2048, 64, 64, 128), (8, 2048, 64, 64, 128), (1, 8192, 64, 64, 128)]),
}


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--rounds", default=15, help="Turns each implementation takes per row.")
def main(device: str, rounds: int) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        console.print("[bold]not measured[/]: there is no GPU; these rows would be:")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    table = CPU if device == "cpu" else CUDA
    cases = [(operator, sizes, peers, shape) for operator, (sizes, peers, shapes) in table.items() for shape in shapes]
    rows: list[dict[str, Any]] = []
    for operator, sizes, peers, shape in track(cases, description=f"operators on {device}"):
        case = f"{operator} {' x '.join(map(str, shape))}"
        if device == "cuda" and not torch.cuda.is_available():
            console.print(f"{case}, beside {', '.join(peers)}")
        else:
            inputs = example(operator, dtype=dtype, device=device, **sizes(*shape))
            inputs["initial_state"] = torch.zeros_like(inputs["initial_state"])  # mamba_ssm has no other
            rows += measure(case, inputs, operator, peers, rounds)
    if rows:
        record("kernels", rows)


def measure(case: str, inputs: Inputs, operator: str, peers: dict[str, Run], rounds: int) -> list[dict[str, Any]]:
    """Return the rows for forward, and for forward and backward. Errors compare all results and gradients with the float64 recurrence."""
    runs = {OURS: ours(operator, None)} | peers
    want = gradients(ours(operator, "reference"), {name: x.double() for name, x in inputs.items()})
    errors, problems = {}, {}
    for name in list(runs):
        try:
            got = gradients(runs[name], inputs)
        except ImportError:
            problems[name] = "not installed"
        else:
            errors[name] = float(np.max([difference(a, b) for a, b in zip(got, want, strict=True)]))  # NaN if one is
            if not errors[name] <= TOLERANCE:
                problems[name] = f"wrong by {errors[name]:.0e}"
        if name in problems:
            del runs[name]
    rows = []
    for part, step in (("forward", forward), ("forward + backward", gradients)):
        contenders = {name: partial(step, run, inputs) for name, run in runs.items()}
        rows.append(compare(f"{case}, {part}", contenders, rounds=rounds, target=TARGET) | {"errors": errors, "problems": problems})
    return rows


@torch.no_grad()
def forward(run: Run, inputs: Inputs) -> tuple[Tensor, ...]:
    return run(inputs)


def gradients(run: Run, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the results and the gradients of their sum with respect to every input except the state."""
    leaves = {name: x.detach().requires_grad_(name != "initial_state") for name, x in inputs.items()}
    y, state = run(leaves)
    wanted = [x for x in leaves.values() if x.requires_grad]
    return y.detach(), state.detach(), *torch.autograd.grad(y.float().sum() + state.float().sum(), wanted)


if __name__ == "__main__":
    main()
