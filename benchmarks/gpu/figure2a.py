"""Figure 2a of arXiv 2605.26099: exact match on Rule 110 after t steps, N = 1, 40 M tokens, one run for each t.

Runs are kept in build/gpu/figure2a and resume from their checkpoints, as long as that folder is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu.sheet import Case, Row
from benchmarks.measure import HERE
from zoo.config import merge
from zoo.training.config import read_config
from zoo.training.loop import train
from zoo.training.plan import read_plan

TOOLS: tuple[str, ...] = ()
TIMES = read_plan("figure2a").grid["task.steps"]
TINY = {
    "device": "cpu",
    "dtype": "float32",
    "steps": 2,
    "batch_size": 4,
    "eval_sequences": 8,
    "overrides": {"d_model": 32, "d_ff": 64, "blocks": {"gdn": {"heads": 2}, "attn": {"heads": 2}}},
}


def cases(dry: bool, folder: Path) -> Iterator[Case]:
    for t in TIMES[:2] if dry else TIMES:
        yield f"t = {t}", partial(point, t, dry, folder / "figure2a" if dry else HERE.parent / "build" / "gpu" / "figure2a")


def point(t: int, dry: bool, runs: Path) -> Row:
    """Train one run, from its newest checkpoint if there is one."""
    config = read_config("rule110-figure2a-h200", merge({"task": {"steps": t}}, TINY if dry else {}))
    found = train(config, runs / f"t{t}")
    return {name: value for name, value in found.items() if isinstance(value, float | int)}
