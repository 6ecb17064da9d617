"""A training step in bfloat16, with float32 copies of the weights: time, share of the peak, memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.models import DEVICE, create, tokens
from benchmarks.gpu.sheet import Case, Row, read, timed
from zoo.costs import peak_flops, training_flops
from zoo.loss import Recompute
from zoo.training.optimizers import Weights, make_optimizers

TOOLS: tuple[str, ...] = ()
MODES: tuple[Recompute, ...] = ("nothing", "passes", "chunks")


def cases(dry: bool, folder: Path) -> Iterator[Case]:
    batch, length = (2, 32) if dry else (8, 2048)
    for mode in MODES:
        yield f"{batch} x {length}, recompute {mode}", partial(measure, dry, folder, batch, length, mode)
    window = length // 4
    yield f"{batch} x {length}, windows of {window}, N = 4", partial(measure, dry, folder, batch, length, "passes", window=window)
    yield f"{batch} x {length}, recompute nothing, compiled blocks", partial(measure, dry, folder, batch, length, "nothing", compiled=True)


def measure(dry: bool, folder: Path, batch: int, length: int, mode: Recompute, window: int | None = None, compiled: bool = False) -> Row:
    """Time forward, backward and AdamW. With a window, all but the last one sleep, and the last one carries the loss."""
    gc.collect()  # the model of the case before
    model = create("hybrid", dry, **({} if window is None else {"evict": "hard", "window": window, "loops": 4}))
    ids, mask = tokens(model, batch, length), torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
    if window is not None:
        mask[:, :-window] = False
    weights = Weights(model)
    optimizers = make_optimizers(model, weights, lr=1e-4)
    if compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager" if dry else "inductor")

    def step() -> None:
        model.answers(ids, mask, recompute=mode).losses().mean().backward()
        weights.take_gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        weights.write_back()

    step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    row = timed({"step": step})
    row["tokens/s"] = 1e3 * batch * length / row["step ms"]
    if torch.cuda.is_available():
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    row |= shares_of_peak(training_flops(model, mask.cpu()), row["step ms"] / 1e3, folder)
    return row | ({"note": "aot_eager in place of inductor"} if compiled and dry else {})


def shares_of_peak(flops: int, seconds: float, folder: Path) -> Row:
    """Return MFU: by the data sheet, and by the matrix products that the stage `denominators` measured."""
    rows = {row["case"]: row for row in (read(folder / "denominators.json") or {"rows": []})["rows"]}
    peaks = {"data sheet": peak_flops(DEVICE), "measured": 1e12 * rows.get("product, bfloat16", {}).get("TFLOP/s", 0.0)}
    return {"TFLOP": flops / 1e12} | {f"MFU, {name}": flops / seconds / peak for name, peak in peaks.items() if peak}
