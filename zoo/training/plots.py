"""Plots of training runs: learning curves and held-out accuracy. Used by `zoo plot`, `zoo ablate` and `zoo demo`."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from zoo.checkpoints.own import CONFIG
from zoo.config import resolve
from zoo.errors import ZooError
from zoo.files import refuse_existing, replacing
from zoo.tasks import Task, new_task
from zoo.training.config import TrainConfig, read_config
from zoo.training.prepare import model_config
from zoo.training.run_folder import METRICS, RESULTS, SETTINGS
from zoo.training.tables import level_label

COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#222222", "#8b5a2b")
STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), ((0, (4, 1, 1, 1, 1, 1)), "D"))  # lines and markers: eight groups share one
FORMATS = (".pdf", ".png", ".svg")
MAX_PANELS = 8  # levels that get a panel each
BEST_GUESS = "best guess without the context"


class Trained(NamedTuple):
    """A run as read from its folder."""

    config: TrainConfig
    model: dict[str, Any]
    """Config fields of the model."""
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl, with levels as numbers."""
    results: dict[str, Any] | None
    """Results of the run; None if it is not finished."""

    @property
    def task(self) -> Task:
        return new_task(self.config.task)

    @property
    def loops(self) -> int:
        """N, the passes per sleep."""
        return self.model["loops"]


Groups = Mapping[str, Sequence[Trained]]
"""Runs by the name of their group; those of a group differ only in the seed."""


def read_run(folder: Path) -> Trained:
    """Read a run from its folder.

    Raises:
        ZooError: not the folder of a run, or no step is logged yet.
    """
    if not (folder / SETTINGS).is_file():
        raise ZooError(f"{folder}: not the folder of a training run: there is no {SETTINGS}")
    config = read_config(folder / SETTINGS)
    metrics: list[dict[str, Any]] = []
    for line in (folder / METRICS).read_bytes().splitlines(keepends=True) if (folder / METRICS).exists() else []:
        if not line.endswith(b"\n"):
            break  # being written
        if (logged := _read(line, "step", "tokens", "loss", "accuracy")) is None:
            print(f"{folder / METRICS}: line {len(metrics) + 1} is damaged; it and those after it are not read", file=sys.stderr)
            break
        metrics.append(logged)
    if not metrics:
        raise ZooError(f"{folder}: nothing to draw: no step of this run is in {METRICS}")
    # as the run wrote it, since the folder that it began from may be gone
    written = [*sorted(folder.glob(f"checkpoints/[0-9]*/{CONFIG}")), *folder.glob(CONFIG)]
    model = (resolve(written[-1]) if written else model_config(config, new_task(config.task))).model_dump(mode="json")
    if not (folder / RESULTS).exists():
        return Trained(config, model, metrics, None)
    results = _read((folder / RESULTS).read_bytes(), "chance")
    if results is None:
        raise ZooError(f"{folder / RESULTS}: damaged; want the results of a run")
    return Trained(config, model, metrics, results)


def _read(text: bytes, *numbers: str) -> dict[Any, Any] | None:
    """Read a JSON object that holds these numbers and one for each level; None if it does not."""
    try:
        content = json.loads(text, object_hook=_numbered)
        levels = content["by_level"]
        whole = set(content.get("loss_by_level", levels)) == set(levels) and all(isinstance(level, int) for level in levels)
        return content if whole and all(isinstance(x, float | int) for x in (*map(content.get, numbers), *levels.values())) else None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def _numbered(fields: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.isdigit() else key: value for key, value in fields.items()}


def grouped(runs: Iterable[Trained]) -> dict[str, list[Trained]]:
    """Group the runs that differ only in the seed; the name of a group lists the fields in which it differs from the others."""
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
    """Return all settings of a run by dotted path, without its seed, names, and the paths in `besides`."""
    fields = {**run.config.model_dump(mode="json", exclude={"model", "overrides"}), "model": run.model}
    if (named := Path(run.config.model)).is_absolute() and named.suffix not in (".yaml", ".yml"):  # a folder of initial weights
        fields["weights"] = fields["weights"] or str(named)
    ignored = {"seed", "model.name", "model.about", "model.vocab_size", *besides}
    return {path: value for path, value in _flat(fields) if path not in ignored}


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def figure(groups: Groups) -> Figure:
    """Draw the panels that apply: training loss, training accuracy by level, held-out accuracy by level, and by N.

    Where every token carries loss, held-out loss by level, by position in the window and by N takes the place of accuracy.
    """
    levels = sorted({level for run in chain(*groups.values()) for level in run.metrics[-1]["by_level"]})
    name, text = _level_name(groups), next(iter(groups.values()))[0].task.loss_everywhere
    panels: list[Callable[[Axes, Groups], None]] = [loss_curves]
    if 1 < len(levels) <= MAX_PANELS and not text:
        panels += [partial(accuracy_curves, level=level, title=f"Training accuracy, {level_label(level, name)}") for level in levels]
    elif not text:
        panels.append(accuracy_curves)
    finished = {name: done for name, runs in groups.items() if (done := [run for run in runs if run.results])}
    if len(levels) > 1 and finished:
        panels.append(partial(against_level, loss=text))
    if text and finished:
        panels.append(against_eighth)
    families = [family for family in _families(finished) if len(family) > 1]
    panels += [partial(loss_against_loops if text else against_loops, loops=family) for family in families[:1]]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    drawn = Figure(figsize=(max(6.0, 3.6 * columns), 3.1 * rows), layout="constrained")
    grid = drawn.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes, groups)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    add_legend(drawn)
    return drawn


def add_legend(drawn: Figure) -> None:
    """Put one legend below the panels, in as many columns as fit, and make the figure taller by its height."""
    handles = {label: handle for axes in drawn.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if BEST_GUESS in handles:  # last
        handles[BEST_GUESS] = handles.pop(BEST_GUESS)
    labels = [textwrap.fill(label, 50, break_on_hyphens=False) for label in handles]
    for columns in range(min(len(labels), 6), 0, -1):
        legend = drawn.legend(
            handles.values(), labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=3
        )
        size = legend.get_window_extent()
        if size.width <= drawn.bbox.width or columns == 1:
            break
        legend.remove()
    drawn.set_figheight(drawn.get_figheight() + size.height / drawn.dpi)


def save(drawn: Figure, out: Path) -> None:
    """Write the file `out` atomically, replacing one that exists."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        drawn.savefig(file, format=out.suffix[1:], dpi=150)


def refuse(out: Path) -> None:
    """Raise ZooError if `out` cannot be a new image file."""
    if out.suffix not in FORMATS:
        raise ZooError(f"{out}: want a file name that ends in one of {', '.join(FORMATS)}")
    refuse_existing(out)


def loss_curves(axes: Axes, groups: Groups) -> None:
    """Draw the training loss over training tokens."""
    _curves(axes, groups, lambda metrics: metrics["loss"])
    axes.set(title="Training loss", ylabel="loss", ylim=(0, None))


def accuracy_curves(axes: Axes, groups: Groups, *, level: int | None = None, title: str = "Training accuracy") -> None:
    """Draw the training accuracy over training tokens, of all answers or of one level."""
    _curves(axes, groups, lambda metrics: metrics["accuracy"] if level is None else metrics["by_level"].get(level))
    _accuracy_axis(axes, groups)
    axes.set_title(title)


def _curves(axes: Axes, groups: Groups, value: Callable[[dict[str, Any]], float | None]) -> None:
    for (name, runs), (color, line, _) in zip(groups.items(), styles_of(groups), strict=True):
        for run in runs:
            points = [(metrics["tokens"] / 1e6, y) for metrics in run.metrics if (y := value(metrics)) is not None]
            reach = len(points) // 40  # a running mean, since each point is of one batch
            smooth = [fmean(y for _, y in points[max(0, i - reach) : i + reach + 1]) for i in range(len(points))]
            label = name if run is runs[0] else None
            marker = "o" if len(points) == 1 else None  # a line through a single point is invisible
            axes.plot([x for x, _ in points], smooth, color=color, linestyle=line, marker=marker, linewidth=1.2, alpha=0.8, label=label)
    tidy(axes)
    axes.set_xlabel("training tokens (millions)")


def _held_out(axes: Axes, groups: Groups, measure: str) -> None:
    """Draw a held-out measure that has a value for each level: mean and range over the finished runs of a group."""
    for (name, runs), (color, line, marker) in zip(groups.items(), styles_of(groups), strict=True):
        done = [found for run in runs if run.results and (found := run.results.get(measure))]
        if done:
            points = {level: [one[level] for one in done if level in one] for level in sorted(set(chain(*done)))}
            error_bars(axes, points, color=color, linestyle=line, marker=marker, label=name)
    tidy(axes)


def against_level(axes: Axes, groups: Groups, *, loss: bool = False) -> None:
    """Draw the held-out accuracy, or loss, against the level."""
    _held_out(axes, groups, "loss_by_level" if loss else "by_level")
    if not loss:
        _accuracy_axis(axes, groups)
    level, measure = _level_name(groups), "loss" if loss else "accuracy"
    axes.set(title=f"Held-out {measure} by {level}", xlabel=level, ylabel=measure)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def against_eighth(axes: Axes, groups: Groups) -> None:
    """Draw the held-out loss against the position in a window."""
    _held_out(axes, groups, "loss_by_eighth")
    axes.set(title="Held-out loss by position in the window", xlabel="eighth of the window", ylabel="loss")


def loss_against_loops(axes: Axes, groups: Groups, loops: Mapping[int, Sequence[Trained]]) -> None:
    """Draw the held-out loss against N."""
    found = {n: [run.results["loss"] for run in runs if run.results] for n, runs in sorted(loops.items())}
    error_bars(axes, found, color=COLORS[0], marker="o")
    tidy(axes)
    axes.set(title="Held-out loss by N", xlabel="N (passes per sleep)", ylabel="loss", xticks=sorted(loops))


def against_loops(axes: Axes, groups: Groups, loops: Mapping[int, Sequence[Trained]]) -> None:
    """Draw the held-out accuracy at each level against N; darker is harder."""
    measured = {n: [run.results["by_level"] for run in runs if run.results] for n, runs in sorted(loops.items())}
    levels = sorted(set(chain(*chain(*measured.values()))))  # with few held-out sequences, a run may lack some
    lines = []
    for i, level in enumerate(levels):
        shade = 0.25 + 0.65 * i / max(1, len(levels) - 1)
        found = {n: values for n, runs in measured.items() if (values := [one[level] for one in runs if level in one])}
        lines.append(error_bars(axes, found, color=(0.1, 0.35 * shade, 0.75 * shade + 0.2, shade), marker="o"))
    name = next(iter(loops.values()))[0].task.level_name
    labels = [level_label(level, name) for level in levels]
    axes.legend(lines, labels, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    _accuracy_axis(axes, groups)
    tidy(axes)
    axes.set(title="Held-out accuracy by N", xlabel="N (passes per sleep)", xticks=sorted(loops))


def _families(groups: Groups) -> list[dict[int, Sequence[Trained]]]:
    """Return the families of groups that differ only in N (and in steps), each by N; the largest first."""
    found: dict[str, dict[int, Sequence[Trained]]] = {}
    for runs in groups.values():
        found.setdefault(json.dumps(_settings(runs[0], "model.loops", "steps"), sort_keys=True), {})[runs[0].loops] = runs
    return sorted(found.values(), key=len, reverse=True)


def error_bars(axes: Axes, points: Mapping[int, Sequence[float]], **style: Any) -> ErrorbarContainer:
    """Draw the mean and the range of the values at each point."""
    means = [fmean(values) for values in points.values()]
    below = [mean - min(values) for mean, values in zip(means, points.values(), strict=True)]
    above = [max(values) - mean for mean, values in zip(means, points.values(), strict=True)]
    return axes.errorbar(list(points), means, yerr=[below, above], markersize=4, linewidth=1.5, capsize=3, **style)


def _accuracy_axis(axes: Axes, groups: Groups) -> None:
    """Label the axis in percent, and draw the best guess that ignores the context as a reference line."""
    axes.set(ylim=(0, 1.02), ylabel="accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    for chance in {_chance(runs[0]) for runs in groups.values()}:
        axes.axhline(chance, color="#777777", linestyle=":", linewidth=1.2, zorder=0, label=BEST_GUESS)


def _chance(run: Trained) -> float:
    return run.results["chance"] if run.results else run.task.chance()


def _level_name(groups: Groups) -> str:
    return next(iter(groups.values()))[0].task.level_name


def tidy(axes: Axes) -> None:
    """Remove the frame's upper and right sides, and add horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def styles_of(groups: Sized) -> list[tuple[str, Any, str]]:
    """Return a colour, a line style and a marker for each group; distinct for 32 groups."""
    count = len(COLORS)
    return [(COLORS[i % count], *STYLES[i // count % len(STYLES)]) for i in range(len(groups))]
