"""Growth of the cost with length, batch, width and passes: times, exponents, and docs/scaling.png.

    python -m benchmarks.scaling

The exponent is the slope of a line fitted to the upper half of the points on logarithmic axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

import zoo
from benchmarks.measure import PLOTS, quartiles, record, seconds

LENGTHS, BATCHES, WIDTHS, LOOPS = (64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8, 16, 32, 64), (128, 256, 512, 1024), (1, 2, 4, 8, 16)
ROUNDS = 3
BLOCKS: dict[str, dict[str, Any]] = {"attn": {"heads": 4}, "gdn": {"heads": 4}, "mamba": {}, "mamba2": {}}
Point = tuple[int, Callable[[], object]]


def model(kind: str, width: int = 256, **fields: Any) -> zoo.Model:
    return zoo.create(
        "gdn4", layers=f"{kind}*4", d_model=width, blocks={kind: BLOCKS[kind]}, vocab_size=256, evict="none", window=None, **fields
    )


def curves() -> Iterator[tuple[str, str, list[Point]]]:
    """Yield the title, the independent variable and the points of every curve."""
    for kind in BLOCKS:
        plain = model(kind)
        yield f"{kind}: reading a prompt", "tokens", [(T, partial(plain, _ids(1, T))) for T in LENGTHS]
    for kind in BLOCKS:
        plain = model(kind)
        yield f"{kind}: a token", "streams", [(B, partial(plain, _ids(B, 1), plain(_ids(B, 64)).state)) for B in BATCHES]
    for kind in BLOCKS:
        yield f"{kind}: reading 256 tokens", "width", [(D, partial(model(kind, D), _ids(1, 256))) for D in WIDTHS]
    for window in (64, 512):
        sleeper = zoo.create(f"gdn4-hard{window}")
        yield f"gdn4: a sleep on {window} tokens", "passes", [(n, partial(sleeper.consolidate, _ids(1, window), loops=n)) for n in LOOPS]


def exponent(points: dict[int, float]) -> float:
    xs, ys = (np.log(np.array(list(values)[len(points) // 2 :])) for values in (points, points.values()))
    return float(np.polyfit(xs, ys, 1)[0])


@torch.no_grad()
def main() -> None:
    rows, panels = [], {}
    for name, against, points in track(list(curves()), description="scaling"):
        times: dict[int, list[float]] = {x: [] for x, _ in points}
        for turn in range(ROUNDS + 1):
            for x, work in points:
                taken = seconds(work)
                if turn:
                    times[x].append(1000 * taken)
        median = {x: quartiles(values)[1] for x, values in times.items()}
        last, slope = points[-1][0], exponent(median)
        row = {"case": f"{name}, {last} {against}, grows by {against} ^ {slope:.2f}", "unit": "ms", "ratios": {}, "exponent": slope}
        rows.append(row | {"times": {"ours": quartiles(times[last])}, "points": median})
        panels.setdefault(name.split(": ")[1].split(" on ")[0] + f" / {against}", {})[f"{name.split(':')[0]} ({slope:.2f})"] = median
    record("scaling", rows)
    draw(panels)


def draw(panels: dict[str, dict[str, dict[int, float]]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained")
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, points in lines.items():
            ax.loglog(list(points), list(points.values()), "o-", label=label, base=2)
        what, against = title.split(" / ")
        ax.set(title=what, xlabel=against, ylabel="ms")
        ax.legend(frameon=False, fontsize=8, title="exponent")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(PLOTS / "scaling.png", dpi=120)
    plt.close(figure)


def _ids(batch: int, tokens: int) -> Tensor:
    return torch.zeros(batch, tokens, dtype=torch.long)


if __name__ == "__main__":
    main()
