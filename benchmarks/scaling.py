"""Growth of cost and memory with tokens, streams, windows, width, depth and passes: exponents, and docs/scaling.png.

    python -m benchmarks.scaling

The exponent is the slope of a line fitted to the upper half of the points on logarithmic axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils._pytree import tree_leaves

import zoo
from benchmarks.measure import PLOTS, quartiles, record, seconds

LENGTHS, BATCHES, WIDTHS, LOOPS = (64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8, 16, 32, 64), (128, 256, 512, 1024), (1, 2, 4, 8, 16)
WINDOWS, DEPTHS = (256, 512, 1024, 2048, 4096, 8192), (2, 4, 8, 16, 32)
ROUNDS = 3
BLOCKS: dict[str, dict[str, Any]] = {"attn": {"heads": 4}, "gdn": {"heads": 4}, "mamba": {}, "mamba2": {}}
Point = tuple[int, Callable[[], object]]


class Curve(NamedTuple):
    """A curve; its points are times in ms, or in MiB what calls return."""

    name: str
    against: str
    points: list[Point]
    unit: str = "ms"


def model(kind: str, width: int = 256, depth: int = 4) -> zoo.Model:
    return zoo.create(
        "gdn4", layers=f"{kind}*{depth}", d_model=width, blocks={kind: BLOCKS[kind]}, vocab_size=256, evict="none", window=None
    )


def after(plain: zoo.Model, tokens: int) -> zoo.Session:
    """Return a session that has read `tokens`."""
    session = zoo.Session(plain)
    session.feed(_ids(1, tokens))
    return session


def held(plain: zoo.Model, streams: int, tokens: int) -> float:
    """Return the size of the state of streams after some tokens, in MiB."""
    leaves = tree_leaves(plain(_ids(streams, tokens), logits_to_keep=1).state)
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)) / 2**20


def curves() -> Iterator[Curve]:
    """Yield every curve."""
    for kind in BLOCKS:
        plain = model(kind)
        yield Curve(f"{kind}: reading a prompt", "tokens", [(T, partial(plain, _ids(1, T))) for T in LENGTHS])
    for kind in BLOCKS:
        plain = model(kind)
        yield Curve(f"{kind}: a token", "streams", [(B, partial(plain, _ids(B, 1), plain(_ids(B, 64)).state)) for B in BATCHES])
    for kind in ("attn", "gdn"):
        yield Curve(f"{kind}: a token", "tokens in the window", [(W, partial(after(model(kind), W).feed, _ids(1, 1))) for W in WINDOWS])
    for kind in BLOCKS:
        yield Curve(f"{kind}: reading 256 tokens", "width", [(D, partial(model(kind, D), _ids(1, 256))) for D in WIDTHS])
    for kind in BLOCKS:
        yield Curve(f"{kind}: reading 256 tokens", "blocks", [(n, partial(model(kind, depth=n), _ids(1, 256))) for n in DEPTHS])
    for window in (64, 512):
        sleeper = zoo.create(f"gdn4-hard{window}")
        points: list[Point] = [(n, partial(sleeper.consolidate, _ids(1, window), loops=n)) for n in LOOPS]
        yield Curve(f"gdn4: a sleep on {window} tokens", "passes", points)
    sleepers = {W: zoo.create(f"gdn4-sleep1-hard{W}") for W in WINDOWS}
    yield Curve("gdn4: a sleep", "tokens in the window", [(W, partial(one.consolidate, _ids(1, W))) for W, one in sleepers.items()])
    for kind in BLOCKS:
        yield Curve(f"{kind}: state", "streams", [(B, partial(held, model(kind), B, 64)) for B in BATCHES], "MiB")
    for kind in ("attn", "gdn"):
        yield Curve(f"{kind}: state", "tokens in the window", [(W, partial(held, model(kind), 1, W)) for W in WINDOWS], "MiB")


def exponent(points: dict[int, float]) -> float:
    xs, ys = (np.log(np.array(list(values)[len(points) // 2 :])) for values in (points, points.values()))
    return float(np.polyfit(xs, ys, 1)[0])


@torch.no_grad()
def main() -> None:
    rows, panels = [], {}
    for name, against, points, unit in track(list(curves()), description="scaling"):
        measured: dict[int, list[float]] = {x: [] for x, _ in points}
        for turn in range(ROUNDS + 1 if unit == "ms" else 1):
            for x, work in points:
                value = 1000 * seconds(work) if unit == "ms" else work()
                if turn or unit != "ms":
                    measured[x].append(value)
        median = {x: quartiles(values)[1] for x, values in measured.items()}
        last, slope = points[-1][0], exponent(median)
        row = {"case": f"{name}, {last:,} {against}, grows by {against} ^ {slope:.2f}", "unit": unit, "ratios": {}, "exponent": slope}
        rows.append(row | {"times": {"ours": quartiles(measured[last])}, "points": median})
        panel = (name.split(": ")[1].split(" on ")[0], against, unit)
        panels.setdefault(panel, {})[f"{name.split(':')[0]} ({slope:.2f})"] = median
    record("scaling", rows)
    draw(panels)


def draw(panels: dict[tuple[str, str, str], dict[str, dict[int, float]]]) -> None:
    import matplotlib.pyplot as plt

    lines = math.ceil(len(panels) / 3)
    figure, axes = plt.subplots(lines, 3, figsize=(12, 3.4 * lines), layout="constrained", squeeze=False)
    for ax, ((what, against, unit), curves) in zip(axes.flat, panels.items(), strict=False):
        for label, points in curves.items():
            ax.loglog(list(points), list(points.values()), "o-", label=label, base=2)
        ax.set(title=what, xlabel=against, ylabel=unit)
        ax.legend(frameon=False, fontsize=8, title="exponent")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in list(axes.flat)[len(panels) :]:
        ax.remove()
    figure.savefig(PLOTS / "scaling.png", dpi=120)
    plt.close(figure)


def _ids(batch: int, tokens: int) -> Tensor:
    return torch.zeros(batch, tokens, dtype=torch.long)


if __name__ == "__main__":
    main()
