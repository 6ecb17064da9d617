"""Operators beside their peers: time forward, time forward and backward, and error against the float64 recurrence.

    python -m benchmarks.kernels --device cpu      our chunked PyTorch forms, transformers' PyTorch paths
    python -m benchmarks.kernels --device cuda     our Triton kernels, fla, mamba_ssm (whichever is installed)

Ours and the peer take turns within one run, so that what else the machine does falls on both alike. A peer that is not
installed or a row that was not measured says so in its cell; a result that fails its check is not timed.
"""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

Inputs = dict[str, Tensor]
Run = Callable[[Inputs], tuple[Tensor, Tensor]]
"""Takes the inputs of our operator, returns what our operator returns."""

ROUNDS = 15
TOLERANCE = 2e-2  # of a result in bfloat16, relative to the largest entry; float32 stays far below


def delta_rule(B: int, T: int, H: int, D: int, *, dtype: torch.dtype, device: str) -> Inputs:
    r = _random(device, dtype)
    q, k = (torch.nn.functional.normalize(r(B, T, H, D), dim=-1) for _ in range(2))
    g, beta = -0.1 * r(B, T, H).abs().float(), r(B, T, H).float().sigmoid()
    return {"q": q, "k": k, "v": r(B, T, H, D), "g": g, "beta": beta, "initial_state": torch.zeros(B, H, D, D, device=device)}


def selective_scan(B: int, T: int, D: int, N: int, *, dtype: torch.dtype, device: str) -> Inputs:
    r = _random(device, dtype)
    A = -torch.arange(1, N + 1, device=device, dtype=torch.float32).repeat(D, 1)
    dt = torch.nn.functional.softplus(r(B, T, D) - 3)
    return {"u": r(B, T, D), "dt": dt, "A": A, "B": r(B, T, N), "C": r(B, T, N), "initial_state": torch.zeros(B, D, N, device=device)}


def ssd(B: int, T: int, H: int, P: int, N: int, *, dtype: torch.dtype, device: str) -> Inputs:
    r = _random(device, dtype)
    dt = torch.nn.functional.softplus(r(B, T, H).float() - 3)
    A = -torch.linspace(1, 16, H, device=device)
    state = torch.zeros(B, H, N, P, device=device)
    return {"x": r(B, T, H, P), "dt": dt, "A": A, "B": r(B, T, 1, N), "C": r(B, T, 1, N), "initial_state": state}


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


def mamba_ssm_selective_scan(x: Inputs) -> tuple[Tensor, Tensor]:
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    u, dt, B, C = (x[name].mT.contiguous() for name in ("u", "dt", "B", "C"))
    y, state = scan(u, dt, x["A"], B, C, return_last_state=True)
    return y.mT, state


def mamba_ssm_ssd(x: Inputs) -> tuple[Tensor, Tensor]:
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    y, state = scan(x["x"], x["dt"], x["A"], x["B"], x["C"], 256, initial_states=x["initial_state"].mT, return_final_states=True)
    return y, state.mT


def ours(operator: str, form: str | None) -> Run:
    run = getattr(importlib.import_module(f"zoo.kernels.{operator}.op"), operator)
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
    "selective_scan": (
        selective_scan,
        {"mamba_ssm": mamba_ssm_selective_scan},
        [(1, 2048, 4096, 16), (8, 2048, 4096, 16), (1, 8192, 4096, 16)],
    ),
    "ssd": (ssd, {"mamba_ssm": mamba_ssm_ssd}, [(1, 2048, 64, 64, 128), (8, 2048, 64, 64, 128), (1, 8192, 64, 64, 128)]),
}


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--rounds", default=ROUNDS, help="Turns each implementation takes per row.")
@click.option("--save/--no-save", default=True, help="Append the rows to benchmarks/results/kernels.jsonl.")
def main(device: str, rounds: int, save: bool) -> None:
    measurable = device == "cpu" or torch.cuda.is_available()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = []
    operators = CPU if device == "cpu" else CUDA
    cases = [(operator, make, peers, shape) for operator, (make, peers, shapes) in operators.items() for shape in shapes]
    for operator, make, peers, shape in track(cases, description=f"operators on {device}", console=Console(stderr=True)):
        row: dict[str, Any] = {"operator": operator, "shape": shape, "device": device}
        if measurable:
            row |= measure(make(*shape, dtype=dtype, device=device), operator, peers, rounds)
        rows.append(row)
    Console(width=160).print(table(rows, device))
    if save and measurable:
        stamp = {
            "torch": torch.__version__,
            "on": _machine(device),
            "threads": torch.get_num_threads(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
        with (Path(__file__).parent / "results" / "kernels.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row | stamp) + "\n" for row in rows)


def measure(inputs: Inputs, operator: str, peers: dict[str, Run], rounds: int) -> dict[str, Any]:
    implementations = {"ours": ours(operator, None)} | peers
    want = gradients(ours(operator, "reference"), {name: x.double() for name, x in inputs.items()})
    row: dict[str, Any] = {"errors": {}, "problems": {}}
    for name in list(implementations):
        try:
            got = gradients(implementations[name], inputs)
        except ImportError:
            row["problems"][name] = "not installed"
        else:
            row["errors"][name] = max(_error(a, b) for a, b in zip(got, want, strict=True))
            if row["errors"][name] > TOLERANCE:
                row["problems"][name] = f"wrong by {row['errors'][name]:.0e}"
        if name in row["problems"]:
            del implementations[name]
    for part, step in (("forward", forward), ("forward and backward", gradients)):
        times: dict[str, list[float]] = {name: [] for name in implementations}
        for _ in range(rounds + 1):
            for name, run in implementations.items():
                times[name].append(_seconds(lambda run=run, step=step: step(run, inputs), inputs))
        row[part] = {name: 1000 * statistics.median(seconds[1:]) for name, seconds in times.items()}
        row[f"{part}, ratios"] = {
            name: sorted(a / b for a, b in zip(times[name][1:], times["ours"][1:], strict=True))
            for name in implementations
            if name != "ours"
        }
    return row


@torch.no_grad()
def forward(run: Run, inputs: Inputs) -> tuple[Tensor, ...]:
    return run(inputs)


def gradients(run: Run, inputs: Inputs) -> tuple[Tensor, ...]:
    """The results and the gradient of their sum with respect to every input but the state."""
    leaves = {name: x.detach().requires_grad_(name != "initial_state") for name, x in inputs.items()}
    y, state = run(leaves)
    wanted = [x for x in leaves.values() if x.requires_grad]
    return y.detach(), state.detach(), *torch.autograd.grad(y.float().sum() + state.float().sum(), wanted)


def table(rows: list[dict[str, Any]], device: str) -> Table:
    columns = ("operator", "shape", "peer", "forward ms", "peer", "ratio", "forward + backward ms", "peer", "ratio", "error", "peer")
    on = f"{_machine(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    made = Table(*columns, title=f"{on}; ratio > 1: ours is faster (median, quartiles)")
    for row in rows:
        peers = (CPU if device == "cpu" else CUDA)[row["operator"]][1]
        for peer in peers:
            cells = [row["operator"], "x".join(map(str, row["shape"])), peer]
            for part in ("forward", "forward and backward"):
                times = row.get(part, {})
                cells += [_number(times.get(name), row, name) for name in ("ours", peer)]
                ratios = row.get(f"{part}, ratios", {}).get(peer)
                cells.append(
                    ""
                    if not ratios
                    else "{:.2f} ({:.2f} to {:.2f})".format(*(ratios[round(at * (len(ratios) - 1))] for at in (0.5, 0.25, 0.75)))
                )
            cells += [f"{row['errors'][name]:.0e}" if name in row.get("errors", {}) else "" for name in ("ours", peer)]
            made.add_row(*cells)
    return made


def _number(value: float | None, row: dict[str, Any], name: str) -> str:
    return row.get("problems", {}).get(name, "not measured") if value is None else f"{value:.2f}"


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def _seconds(step: Callable[[], Any], inputs: Inputs) -> float:
    wait = torch.cuda.synchronize if next(iter(inputs.values())).is_cuda else (lambda: None)
    wait()
    started = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - started


def _random(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
