"""The figure of a probe: how S changes from pass to pass, what can be read from it, and norms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from zoo.training.plots import BEST_GUESS, COLORS, tidy


def figure(results: dict[str, Any]) -> Figure:
    """Draw the results of `zoo.training.probe.probe`."""
    drawn = Figure(figsize=(12, 7.4), layout="constrained")
    halves: Any = drawn.subfigures(2, 1, height_ratios=[1, 1.1])
    above, below = halves
    _changes(above, results["change"])
    read, norms, gradients = below.subplots(1, 3, width_ratios=[1.6, 1, 1])
    _read_outs(read, results)
    _by_pass(norms, results["norms"], "h", "S", "change of S")
    norms.set_title("Norm")
    _by_pass(gradients, results["norms"], "gradient of h", "gradient of S")
    gradients.set_title("Gradient norm")
    return drawn


def _changes(above: Any, change: list[Any]) -> None:
    """Draw the change of S in each pass as an image; one scale for all."""
    above.suptitle("Change of S in each pass: the last layer that has fast weights, one cycle", fontsize=11)
    reach = max(float(np.abs(step).max()) for step in map(np.array, change))
    grid = np.atleast_1d(above.subplots(1, len(change)))
    for n, (axes, step) in enumerate(zip(grid, change, strict=True), 1):
        image = axes.imshow(step, cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest", aspect="equal")
        axes.set(title=f"pass {n}", xticks=[], yticks=[])
    above.colorbar(image, ax=list(grid), shrink=0.8)


def _read_outs(axes: Axes, results: dict[str, Any]) -> None:
    """Draw the accuracy of the read-outs against hops: a line per pass, darker is later, and the controls."""
    accuracy, loops = results["accuracy"], results["loops"]
    hops = range(1, len(accuracy["window"][0]) + 1)
    blue = to_rgb(COLORS[0])
    for n, right in enumerate(accuracy["S"], 1):
        shade = 0.3 + 0.7 * n / loops
        axes.plot(hops, right, color=(*blue, shade), marker="o", markersize=4, label=f"S after pass {n}")
    controls = {
        f"untrained model, S after pass {loops}": (accuracy["untrained"][-1], COLORS[1], "--"),
        f"shuffled labels, S after pass {loops}": (accuracy["shuffled"][-1], COLORS[3], "-."),
        "tokens of the window": (accuracy["window"][0], COLORS[2], "--"),
    }
    answered = [math.nan if right is None else right for right in accuracy["answers"][-1]]
    axes.plot(hops, answered, color="#222222", linestyle=":", marker="x", label=f"answers of the model after pass {loops}")
    for label, (right, color, line) in controls.items():
        axes.plot(hops, right, color=color, linestyle=line, linewidth=1.3, label=label)
    axes.axhline(results["chance"], color="#777777", linestyle=":", linewidth=1.2, zorder=0, label=BEST_GUESS)
    axes.set(title="Linear read-out on unseen cycles", xlabel="hops", ylabel="accuracy", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    tidy(axes)


def _by_pass(axes: Axes, norms: dict[str, list[float]], *names: str) -> None:
    for name, color in zip(names, COLORS, strict=False):
        axes.plot(range(1, len(norms[name]) + 1), norms[name], color=color, marker="o", markersize=4, label=name)
    axes.set(xlabel="pass", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, frameon=False)
    tidy(axes)
