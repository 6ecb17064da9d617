"""Accuracy against training FLOPs, for ablations that train their arms at several budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from zoo.costs import count
from zoo.training.plan import Arm, Matching
from zoo.training.plots import add_legend, error_bars, styles_of, tidy
from zoo.training.tables import Results, accuracy_by_level, aligned, first_answers_tell, level_label, mean_and_range

WANTED = 0.9
"""Accuracy whose cost in FLOPs is compared."""

Curve = Mapping[int, Sequence[float]]
"""Accuracies of the seeds by training FLOPs, ascending."""


def at_hardest_level(found: Mapping[str, Any]) -> float:
    """Return the accuracy at the hardest level."""
    levels = accuracy_by_level(found)
    return levels[max(levels)]


def curves(matched: Mapping[Matching, Results], arms: Sequence[Arm]) -> dict[Arm, Curve]:
    """Return the curve of each arm with a finished run."""
    found: dict[Arm, dict[int, list[float]]] = {arm: {} for arm in arms}
    for results in matched.values():
        for run, one in results.items():
            found[run.arm].setdefault(run.flops, []).append(at_hardest_level(one))
    return {arm: dict(sorted(curve.items())) for arm, curve in found.items() if curve}


def flops_to_reach(curve: Curve, wanted: float = WANTED) -> float:
    """Return the training FLOPs at which the mean accuracy reaches `wanted`: linear in log FLOPs between two budgets.

    0 if the smallest budget is more than enough, infinity if the largest is not enough.
    """
    points = [(flops, fmean(values)) for flops, values in curve.items()]
    if points[0][1] >= wanted:
        return 0
    for (flops, below), (more, above) in pairwise(points):
        if above >= wanted:
            return flops * (more / flops) ** ((wanted - below) / (above - below))
    return math.inf


def markdown(matched: Mapping[Matching, Results], arms: Sequence[Arm]) -> str:
    """Return a Markdown table with a row per arm: costs, accuracy at the hardest level by budget, and FLOPs to reach `WANTED`."""
    rows = [["arm", "parameters", "FLOPs per token awake", *(f"{match.times}x" for match in matched), f"FLOPs to {WANTED:.0%}"]]
    for arm, curve in curves(matched, arms).items():
        row = [arm.name, count(arm.costs.parameters), count(arm.costs.awake)]
        for results in matched.values():
            row.append(mean_and_range([at_hardest_level(one) for run, one in results.items() if run.arm is arm]))
        rows.append([*row, _price(curve)])
    return "\n".join(
        [
            f"## {_title(matched)} against training FLOPs",
            "",
            *aligned(rows),
            "",
            f"Mean (range) over seeds. FLOPs to {WANTED:.0%} are interpolated between budgets, linearly in log FLOPs.",
            "",
        ]
    )


def _price(curve: Curve) -> str:
    flops = flops_to_reach(curve)
    if flops == 0:
        return f"< {count(min(curve))}"
    return f"> {count(max(curve))}" if math.isinf(flops) else count(round(flops))


def figure(matched: Mapping[Matching, Results], arms: Sequence[Arm]) -> Figure:
    """Draw accuracy at the hardest level against training FLOPs: mean and range over the seeds of each arm."""
    drawn = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = drawn.subplots()
    found = curves(matched, arms)
    for (arm, curve), (color, line, marker) in zip(found.items(), styles_of(found), strict=True):
        error_bars(axes, curve, color=color, linestyle=line, marker=marker, label=arm.name)
    axes.axhline(WANTED, color="#777777", linestyle=":", linewidth=1, zorder=0)
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="training FLOPs", ylabel="accuracy", title=_title(matched))
    budgets = {round(fmean(run.flops for run in results)): match.times for match, results in matched.items()}
    axes.set_xticks([*budgets], [f"{times}x: {count(flops)}" for flops, times in budgets.items()])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    tidy(axes)
    add_legend(drawn)
    return drawn


def _title(matched: Mapping[Matching, Results]) -> str:
    some = next(iter(next(iter(matched.values())).values()))
    level = level_label(max(some["by_level"]), some["level_name"])
    return f"{'First answers' if first_answers_tell(some) else 'Answers'}, {level}"
