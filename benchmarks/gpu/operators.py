"""Operators beside fla, mamba_ssm and torch, beside what the hardware allows, and beside our targets.

Forward passes are replayed as CUDA graphs, so that launches do not count; backward passes are not. Targets are milliseconds on an H200
where a case has them, and otherwise ratios or shares of the copy bandwidth.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.denominators import limit
from benchmarks.gpu.graphs import captured
from benchmarks.gpu.models import DEVICE, DTYPE
from benchmarks.gpu.sheet import Case, Row, beside_limit, ours_first, timed
from benchmarks.kernels import (
    TOLERANCE,
    delta_rule,
    fla_delta_rule,
    fla_kimi,
    kimi,
    mamba_ssm_selective_scan,
    mamba_ssm_ssd,
    selective_scan,
    ssd,
)
from zoo.doctor import call
from zoo.kernels import tuning
from zoo.kernels.common.examples import Inputs, example

TOOLS = ("fla", "mamba_ssm", "causal_conv1d")
Peers = dict[str, Callable[[Inputs], Any]]

OPERATIONS = {"gated_delta_rule": 11.4, "kda": 11.4, "ssd": 7.1, "selective_scan": 9.0}
"""FLOPs of a forward pass per token and entry of the state; a backward pass takes 2.5 to 2.9 times as many."""
BACKWARD = {"gated_delta_rule": 2.5, "kda": 2.5, "ssd": 2.9, "selective_scan": 2.5}
MUST_AIM = {
    "gated_delta_rule 1 x 2048 x 16 x 128, forward": ("0.080 ms", "0.055 ms"),
    "gated_delta_rule 8 x 2048 x 16 x 128, forward": ("0.25 ms", "0.16 ms"),
    "gated_delta_rule 1 x 8192 x 16 x 128, forward": ("0.28 ms", "0.18 ms"),
    "gated_delta_rule 4 x 8192 x 16 x 128, forward": ("0.50 ms", "0.39 ms"),
    "gated_delta_rule 1 x 8192 x 16 x 128, backward": ("0.55 ms", "0.42 ms"),
    "gated_delta_rule 8 x 1024 x 16 x 128, backward": ("0.40 ms", "0.30 ms"),
    "gdn_step 1 x 16 x 128, forward": ("0.008 ms, 2.5 x fla", "0.005 ms"),
    "ssd, forward": ("1.4 x mamba_ssm", "2 x"),
    "ssd, backward": ("1.15 x mamba_ssm", "1.5 x"),
    "selective_scan, forward": ("0.9 x mamba_ssm", "1.1 x"),
    "selective_scan, backward": ("0.8 x mamba_ssm", "1.0 x"),
    "causal_conv1d, forward": ("65 % of copy", "85 %"),
    "rmsnorm, forward": ("80 % of copy", "90 %"),
    "gated_rmsnorm, forward": ("80 % of copy", "90 %"),
    "l2norm, forward": ("80 % of copy", "90 %"),
}
"""By case, or by operator and part."""


def fla_convolution(x: Inputs) -> Any:
    run = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d
    return run(x["x"], x["weight"], x["bias"], activation="silu")


def fla_rmsnorm(x: Inputs) -> Any:
    return importlib.import_module("fla.modules.norm.layernorm").rms_norm(x["x"], x["weight"], None, eps=1e-6)


def fla_gated_rmsnorm(x: Inputs) -> Any:
    return importlib.import_module("fla.modules.norm.fused_norm_gate").rms_norm_gated(x["x"], x["gate"], x["weight"], None, eps=1e-5)


def fla_l2norm(x: Inputs) -> Any:
    return importlib.import_module("fla.modules.norm.l2norm").l2norm(x["x"])


def torch_norm(x: Inputs) -> Any:
    return F.rms_norm(x["x"], x["weight"].shape, x["weight"], 1e-6)


SCANS: dict[str, tuple[Callable[..., dict[str, int]], Peers, list[tuple[int, ...]]]] = {
    "gated_delta_rule": (
        delta_rule,
        {"fla": fla_delta_rule},
        [(1, 2048, 16, 128), (8, 2048, 16, 128), (1, 8192, 16, 128), (4, 8192, 16, 128), (8, 1024, 16, 128)],
    ),
    "kda": (kimi, {"fla": fla_kimi}, [(1, 2048, 16, 128), (8, 2048, 16, 128)]),
    "ssd": (ssd, {"mamba_ssm": mamba_ssm_ssd}, [(1, 2048, 32, 64, 128), (8, 2048, 32, 64, 128), (1, 8192, 32, 64, 128)]),
    "selective_scan": (selective_scan, {"mamba_ssm": mamba_ssm_selective_scan}, [(1, 2048, 4096, 16), (8, 2048, 4096, 16)]),
}
SMALL = {"gated_delta_rule": (1, 64, 2, 32), "kda": (1, 64, 2, 32), "ssd": (1, 64, 2, 32, 32), "selective_scan": (1, 64, 32, 16)}
ROWWISE: dict[str, Peers] = {
    "causal_conv1d": {"fla": fla_convolution},
    "rmsnorm": {"torch": torch_norm, "fla": fla_rmsnorm},
    "gated_rmsnorm": {"fla": fla_gated_rmsnorm},
    "l2norm": {"fla": fla_l2norm},
}


def cases(dry: bool, folder: Path) -> list[Case]:
    found, alone = [], []
    for operator, (sizes, peers, shapes) in SCANS.items():
        for shape in [SMALL[operator]] if dry else shapes:
            name = f"{operator} {' x '.join(map(str, shape))}"
            for part in ("forward", "backward"):
                found.append((f"{name}, {part}", partial(measure, operator, sizes(*shape), peers, part, f"{name}, {part}", folder)))
    step = {"batch": 1, "T": 1, "H": 16, "HV": 16, "K": 128, "V": 128}
    name = "gdn_step 1 x 16 x 128, forward"
    alone.append((name, partial(measure, "gdn_step", step, {}, "forward", name, folder)))
    for operator, peers in ROWWISE.items():
        width = {"D": 4096} if operator == "causal_conv1d" else {"N": 2048}
        shape = {"batch": 1, "T": 64, **width} if dry else {"batch": 8, "T": 4096, **width}
        name = f"{operator} {' x '.join(map(str, shape.values()))}, forward"
        found.append((name, partial(measure, operator, shape, peers, "forward", name, folder)))
    for row in tuning.table():
        if row["arch"] == 90 and row["dtype"] == "bfloat16" and row["kernel"] in ("gated_delta_rule.forward_scan", "ssd.scan") and not dry:
            operator = row["kernel"].split(".")[0]
            if row["shape"] in ({"K": 128, "V": 128}, {"N": 128, "P": 64}):
                shape = SCANS[operator][0](*SCANS[operator][2][0])
                name = f"{operator}, forward, {', '.join(f'{key} {value}' for key, value in row['config'].items())}"
                alone.append((name, partial(forced, row, operator, shape, name, folder)))
    return ours_first(sorted(found, key=lambda case: case[0].startswith("kda")), alone)  # fla tries the most configurations for KDA


def forced(row: tuning.Row, operator: str, shape: dict[str, int], name: str, folder: Path) -> Row:
    with tuning.forced(row):
        return measure(operator, shape, {}, "forward", name, folder)


def measure(operator: str, shape: dict[str, int], others: Peers, part: str, name: str, folder: Path, *, peers: bool = False) -> Row:
    inputs = example(operator, dtype=DTYPE, device=str(DEVICE), **shape)
    if "initial_state" in inputs:
        inputs["initial_state"] = torch.zeros_like(inputs["initial_state"], requires_grad=True)  # mamba_ssm has no other
    contenders: Peers = {"ours": lambda x: call(operator, x, None), **(others if peers else {})}
    contenders = {who: once(partial(forward if part == "forward" else backward, run, inputs)) for who, run in contenders.items()}
    with torch.set_grad_enabled(part == "backward"):
        row = timed({who: partial(run, inputs) for who, run in contenders.items()}, tolerance=TOLERANCE if part == "forward" else None)
        moved = sum(x.nbytes for x in inputs.values())
        results = call(operator, inputs, None)
    moved = moved * (1 if part == "forward" else 2) + sum(y.nbytes for y in results)
    floor = limit(folder, moved, operations(operator, shape, part))
    must, aim = MUST_AIM.get(name) or MUST_AIM.get(f"{operator}, {part}") or ("", "")
    row = beside_limit(row, "ours ms", floor) | {"GB/s": moved / row["ours ms"] / 1e6 if isinstance(row["ours ms"], float) else None}
    return row | {"must": must, "aim": aim}


def once(prepare: Callable[[], Callable[[], Any]]) -> Callable[[Inputs], Any]:
    """Return a function whose first call prepares what it then calls, so that a failure belongs to the contender."""
    ready: list[Callable[[], Any]] = []

    def call(_: Inputs) -> Any:
        if not ready:
            ready.append(prepare())
        return ready[0]()

    return call


def forward(run: Callable[[Inputs], Any], inputs: Inputs) -> Callable[[], Any]:
    leaves = {name: x.detach() for name, x in inputs.items()}

    def first_result() -> Any:
        results = run(leaves)
        return results[0] if isinstance(results, tuple) else results

    return captured(first_result)


def backward(run: Callable[[Inputs], Any], inputs: Inputs) -> Callable[[], Any]:
    """Return a function that computes the gradients of all inputs, from results computed once."""
    results = run(inputs)
    results = results if isinstance(results, tuple) else (results,)
    weights = [torch.randn_like(y) for y in results]
    return partial(torch.autograd.grad, results, list(inputs.values()), weights, retain_graph=True, allow_unused=True)


def operations(operator: str, shape: dict[str, int], part: str) -> float:
    """Return the FLOPs of matrix products; 0 for operators that have none."""
    if operator not in OPERATIONS:
        return 0
    state = {"gated_delta_rule": ("HV", "K", "V"), "kda": ("H", "K", "V"), "ssd": ("H", "P", "N"), "selective_scan": ("D", "N")}[operator]
    entries = shape["batch"] * shape["T"]
    for name in state:
        entries *= shape[name]
    return entries * OPERATIONS[operator] * (1 if part == "forward" else BACKWARD[operator])
