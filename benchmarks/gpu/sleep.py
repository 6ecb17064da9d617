"""A sleep of four passes over a window: eager, and captured as one CUDA graph; and where its time goes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import zoo
from benchmarks.gpu.denominators import limit
from benchmarks.gpu.graphs import FORM, captured
from benchmarks.gpu.models import create, peer, tokens
from benchmarks.gpu.sheet import Case, Row, beside_limit, ours_first, timed

TOOLS = ("transformers", "fla", "causal_conv1d")
LOOPS = 4
TRACE = "sleep-trace.json.gz"
KINDS = {  # of kernels, by parts of their names
    "products": ("gemm", "cutlass", "nvjet", "xmma", "mm", "matmul", "linear", "bmm"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "scans": ("scan", "prepare", "delta_rule"),
}


def cases(dry: bool, folder: Path) -> list[Case]:
    found = []
    windows = (16, 32) if dry else (256, 512, 2048)
    theirs = cache(lambda: peer(create("hybrid", dry)))
    for window in windows:
        made = cache(partial(create, "hybrid", dry, evict="hard", window=window, loops=LOOPS))
        found.append((f"hybrid, 1 x {window}", partial(measure, made, theirs, window, folder)))
    return ours_first(found, [(f"shares at 1 x {window}", partial(shares, made, window, folder))])


@torch.no_grad()
def measure(made: Callable[[], zoo.Model], theirs: Callable[[], Any], window: int, folder: Path, *, peers: bool) -> Row:
    model = made()
    ids = tokens(model, 1, window)
    graph: list[Callable[[], Any]] = []

    def eager() -> Any:
        return model.consolidate(ids)

    def replayed() -> Any:
        if not graph:
            graph.append(captured(eager))
        return graph[0]()

    def transformers() -> Tensor:
        """Run as many forward passes, without the head."""
        for _ in range(LOOPS):
            h = theirs().model(ids).last_hidden_state
        return h

    contenders = {"graph": replayed, "eager": eager}
    row = timed(contenders | ({f"transformers, {LOOPS} passes": transformers} if peers else {}))
    costs = zoo.describe(model)
    floor = limit(folder, LOOPS * costs.weight_bytes, costs.flops_per_sleep or 0)
    return beside_limit(row, "graph ms", floor) | {"must": "2.5 x transformers", "aim": "4 x", "note": FORM}


@torch.no_grad()
def shares(made: Callable[[], zoo.Model], window: int, folder: Path) -> Row:
    """Profile one sleep, save the trace, and return the share of each kind of kernel and the number of launches."""
    model = made()
    ids = tokens(model, 1, window)
    model.consolidate(ids)
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        model.consolidate(ids)
        if on_gpu:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(folder / TRACE))
    found = dict.fromkeys((*KINDS, "other"), 0.0)
    count = 0
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent <= 0 or (on_gpu and event.device_type != torch.autograd.DeviceType.CUDA):
            continue
        count += event.count
        found[next((kind for kind, parts in KINDS.items() if any(part in event.key.lower() for part in parts)), "other")] += spent
    total = sum(found.values())
    percent = ", ".join(f"{kind} {100 * spent / total:.0f} %" for kind, spent in found.items())
    return {"note": f"{percent}; {count} {'launches' if on_gpu else 'calls of operators on the CPU'}; {total / 1e3:.3g} ms; trace: {TRACE}"}
