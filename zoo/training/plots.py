"""Curves of training runs, and what they reached. `zoo plot`, `zoo ablate` and `zoo demo` draw with these."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from zoo.config import resolve
from zoo.errors import ZooError
from zoo.files import refuse_existing, replacing
from zoo.tasks import Task, new_task
from zoo.training.config import TrainConfig, read_config
from zoo.training.run_folder import METRICS, RESULTS, SETTINGS

COLORS = ("#9aa5b1", "#e0a458", "#2a6f97", "#b5485d", "#5b8c5a", "#7a5ba6", "#3d3d3d", "#c9a227")
FORMATS = (".pdf", ".png", ".svg")
MOST_LEVELS = 8  # that get a panel each


class Trained(NamedTuple):
    """What a run's folder says."""

    config: TrainConfig
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl; levels are numbers."""
    results: dict[str, Any] | None
    """None: not finished."""

    @property
    def task(self) -> Task:
        return new_task(self.config.task)

    @property
    def loops(self) -> int:
        """N"""
        return self.model()["loops"]

    def model(self) -> dict[str, Any]:
        """Fields of the model."""
        return resolve(self.config.model, {"vocab_size": 1, **self.config.overrides}).model_dump(mode="json")


Groups = Mapping[str, Sequence[Trained]]
"""Names, and the runs of each, which differ in the seed alone."""


def read_run(folder: Path) -> Trained:
    """Raises ZooError: not the folder of a run, or of one that has logged nothing yet."""
    if not (folder / SETTINGS).is_file():
        raise ZooError(f"{folder}: not the folder of a training run: there is no {SETTINGS}")
    config = read_config(folder / SETTINGS)
    written = (folder / METRICS).read_text(encoding="utf-8") if (folder / METRICS).exists() else ""
    metrics = [json.loads(line, object_hook=_numbered) for line in written.splitlines(keepends=True) if line.endswith("\n")]
    if not metrics:
        raise ZooError(f"{folder}: nothing to draw: no step of this run is in {METRICS}")
    results = folder / RESULTS
    return Trained(config, metrics, json.loads(results.read_text(encoding="utf-8"), object_hook=_numbered) if results.exists() else None)


def _numbered(fields: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.isdigit() else key: value for key, value in fields.items()}


def grouped(runs: Iterable[Trained]) -> dict[str, list[Trained]]:
    """Runs that differ in the seed alone, together, under what tells them from the others."""
    found: dict[str, tuple[dict[str, Any], list[Trained]]] = {}
    for run in runs:
        settings = _settings(run)
        found.setdefault(json.dumps(settings, sort_keys=True), (settings, []))[1].append(run)
    every = [settings for settings, _ in found.values()]
    paths = [path for path in dict.fromkeys(chain(*every)) if any(one.get(path) != every[0].get(path) for one in every)]
    named = {}
    for settings, alike in found.values():
        name = " ".join(f"{'N' if path == 'model.loops' else path}={settings.get(path)}" for path in paths)
        named[name or alike[0].config.model] = alike
    return named


def _settings(run: Trained, *besides: str) -> dict[str, Any]:
    """Dotted paths and values of everything that makes a run, but for its seed, names, and what `besides` names."""
    fields = {**run.config.model_dump(mode="json", exclude={"model", "overrides"}), "model": run.model()}
    left_out = {"seed", "model.name", "model.about", "model.vocab_size", *besides}
    return {path: value for path, value in _flat(fields) if path not in left_out}


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def figure(groups: Groups) -> Figure:
    """Loss, and accuracy at each level, over training tokens; held-out accuracy against level, and against N where N differs."""
    levels = sorted({level for run in chain(*groups.values()) for level in run.metrics[-1]["by_level"]})
    name = next(iter(groups.values()))[0].task.level_name
    panels: list[Callable[[Axes, Groups], None]] = [loss_curves]
    if 1 < len(levels) <= MOST_LEVELS:
        panels += [partial(accuracy_curves, level=level, title=f"{name}: {level}") for level in levels]
    else:
        panels.append(accuracy_curves)
    finished = {name: done for name, runs in groups.items() if (done := [run for run in runs if run.results])}
    if len(levels) > 1 and finished:
        panels.append(against_level)
    families = [family for family in _families(finished) if len(family) > 1]
    panels += [partial(against_loops, loops=family) for family in families[:1]]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    drawn = Figure(figsize=(3.6 * columns, 3.1 * rows), layout="constrained")
    grid = drawn.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes, groups)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    drawn.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(groups), 5), frameon=False)
    return drawn


def save(drawn: Figure, out: Path) -> None:
    """Write the file `out`, whole or not at all, over whatever is there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        drawn.savefig(file, format=out.suffix[1:], dpi=150)


def refuse(out: Path) -> None:
    """ZooError if `out` cannot be a new picture."""
    if out.suffix not in FORMATS:
        raise ZooError(f"{out}: want a file name that ends in one of {', '.join(FORMATS)}")
    refuse_existing(out)


def loss_curves(axes: Axes, groups: Groups) -> None:
    _curves(axes, groups, lambda metrics: metrics["loss"])
    axes.set(title="loss while training", ylim=(0, None))


def accuracy_curves(axes: Axes, groups: Groups, *, level: int | None = None, title: str = "while training") -> None:
    """A line for each run: the share of right answers, of all or of one level, over tokens."""
    _curves(axes, groups, lambda metrics: metrics["accuracy"] if level is None else metrics["by_level"].get(level))
    _accuracy(axes, groups)
    axes.set_title(title)


def _curves(axes: Axes, groups: Groups, value: Callable[[dict[str, Any]], float | None]) -> None:
    for (name, runs), color in zip(groups.items(), _colors(groups), strict=True):
        for run in runs:
            points = [(metrics["tokens"] / 1e6, y) for metrics in run.metrics if (y := value(metrics)) is not None]
            reach = len(points) // 40  # a running mean: each point is of one batch
            smooth = [fmean(y for _, y in points[max(0, i - reach) : i + reach + 1]) for i in range(len(points))]
            axes.plot([x for x, _ in points], smooth, color=color, linewidth=1.2, alpha=0.8, label=name if run is runs[0] else None)
    _plain(axes)
    axes.set_xlabel("million training tokens")


def against_level(axes: Axes, groups: Groups) -> None:
    """Held-out accuracy against what makes a question harder: mean of a group's finished runs, and their range."""
    for (name, runs), color in zip(groups.items(), _colors(groups), strict=True):
        done = [run.results["by_level"] for run in runs if run.results]
        if done:
            _range(axes, {level: [one[level] for one in done] for level in done[0]}, color=color, label=name)
    _accuracy(axes, groups)
    _plain(axes)
    axes.set(title="held out", xlabel=next(iter(groups.values()))[0].task.level_name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def against_loops(axes: Axes, groups: Groups, loops: Mapping[int, Sequence[Trained]]) -> None:
    """Held-out accuracy at each level against N."""
    some = next(iter(loops.values()))[0]
    levels = sorted(some.results["by_level"]) if some.results else []
    for i, level in enumerate(levels):
        shade = 0.25 + 0.65 * i / max(1, len(levels) - 1)
        found = {n: [run.results["by_level"][level] for run in runs if run.results] for n, runs in sorted(loops.items())}
        _range(axes, found, color=(0.1, 0.35 * shade, 0.75 * shade + 0.2, shade), label=f"{level}")
    _accuracy(axes, groups)
    _plain(axes)
    axes.set(title="held out", xlabel="N, passes of sleep", xticks=sorted(loops))
    axes.legend(title=some.task.level_name, fontsize=7, title_fontsize=7, frameon=False)


def _families(groups: Groups) -> list[dict[int, Sequence[Trained]]]:
    """Groups that differ in N alone (and in the steps that it is given), each by its N; the largest family first."""
    found: dict[str, dict[int, Sequence[Trained]]] = {}
    for runs in groups.values():
        found.setdefault(json.dumps(_settings(runs[0], "model.loops", "steps"), sort_keys=True), {})[runs[0].loops] = runs
    return sorted(found.values(), key=len, reverse=True)


def _range(axes: Axes, points: Mapping[int, Sequence[float]], **style: Any) -> None:
    means = [fmean(values) for values in points.values()]
    below = [mean - min(values) for mean, values in zip(means, points.values(), strict=True)]
    above = [max(values) - mean for mean, values in zip(means, points.values(), strict=True)]
    axes.errorbar(list(points), means, yerr=[below, above], fmt="o-", markersize=4, linewidth=1.5, capsize=3, **style)


def _accuracy(axes: Axes, groups: Groups) -> None:
    """Percent, and the best guess without the context: for two answers, that of the majority."""
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    for chance in {_chance(runs[0]) for runs in groups.values()}:
        axes.axhline(chance, color="#555555", linestyle=":", linewidth=1)
        axes.annotate("best guess", (0.02, chance), (0, 2), axes.get_yaxis_transform(), "offset points", fontsize=7, color="#555555")


def _chance(run: Trained) -> float:
    return run.results["chance"] if run.results else run.task.chance()


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def _colors(groups: Groups) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(groups))]
