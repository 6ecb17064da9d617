"""`zoo demo`: the whole method at a size that trains in minutes on two cores."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

import zoo.export
from zoo.checkpoints.own import load
from zoo.console import print_table
from zoo.errors import ZooError
from zoo.files import new_folder, remove_scratch, replacing
from zoo.model import Model
from zoo.sessions.session import Session
from zoo.signals import deferred
from zoo.tasks import Task, new_task
from zoo.training.config import read_config
from zoo.training.plots import accuracy_curves, add_legend, against_level, read_run, save
from zoo.training.tables import level_label
from zoo.training.workers import Job, train_all

SETTINGS, RESULTS = "demo.yaml", "results.json"
LOOPS = (1, 2, 4)
SEQUENCES = 1024
console = Console()


def run(out: Path) -> None:
    """Train the same model at each N on the same tokens, export each, compare, and write everything to the folder `out`.

    An interrupted demo resumes.

    Raises:
        ZooError: before any work, if `out` holds something else or the exporter packages are not installed.
        StoppedError: after one of the signals of `zoo.signals`; the runs have been saved.
    """
    import_module("zoo.export.bundle")
    plan = read_config("cycle")
    task = new_task(plan.task)
    if not (out / SETTINGS).is_file() or (out / RESULTS).exists():
        with deferred(), new_folder(out) as folder:
            (folder / SETTINGS).write_text(yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    remove_scratch(out)
    same = f": the same tokens and seed at N = {', '.join(map(str, LOOPS))} passes of sleep"
    console.print(Text(str(task), style="bold").append(same, style="not bold"))
    started = time.perf_counter()
    plans = {n: plan.model_copy(update={"model": f"gdn4-sleep{n}-hard{task.window}"}) for n in LOOPS}
    pending = [n for n in sorted(LOOPS, reverse=True) if not _bundle(out / f"sleep{n}").exists()]  # longest first
    failed = train_all({f"N = {n}": Job(plans[n], out / f"sleep{n}", after=_export) for n in pending}, processes=2)
    if failed:
        raise ZooError("; ".join(f"{name}: {why}" for name, why in failed.items()))
    console.print(f"trained and exported in {time.perf_counter() - started:.0f} s; comparing PyTorch with onnxruntime")
    models = {n: load(out / f"sleep{n}") for n in LOOPS}
    costs = _costs(models, task)
    rows = {n: {**_answer(model, _bundle(out / f"sleep{n}"), task, plan.seed), **costs[n]} for n, model in models.items()}
    with deferred():
        draw(rows, out)
        with replacing(out / RESULTS) as file:
            file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    _show(rows, task, console)
    console.print(f"plot: {out / 'demo.png'}   models, graphs and metrics: {out}/", markup=False, soft_wrap=True)


def _bundle(run: Path) -> Path:
    """Return the folder for the exported graphs of a run."""
    return run.with_name(f"{run.name}-onnx")


def _export(run: Path) -> None:
    zoo.export.export(load(run), _bundle(run))


@torch.no_grad()
def _answer(model: Model, bundle: Path, task: Task, seed: int) -> dict[str, Any]:
    """Ask PyTorch and the exported graphs the same held-out questions. Returns accuracies and the largest difference of logits."""
    ids, mask, level = (torch.from_numpy(x) for x in task.batch(seed, 0, SEQUENCES, "test"))
    answers = model.answers(ids, mask)
    right, levels = answers.right(), level.flatten()[answers.place]
    logits = zoo.export.load(bundle, batch_size=len(ids)).feed(ids).roll(1, dims=1).flatten(0, 1)[answers.place]
    return {
        "answers": len(right),
        "chance": task.chance(),
        "by_level": {int(n): right[levels == n].float().mean().item() for n in levels.unique()},
        "accuracy": right.float().mean().item(),
        "onnx_accuracy": (logits.argmax(-1) == answers.target).float().mean().item(),
        "onnx_logit_difference": (logits - answers.logits).abs().max().item(),
    }


@torch.no_grad()
def _costs(models: dict[int, Model], task: Task) -> dict[int, dict[str, float]]:
    """Return the median seconds per sleep and per predicted token of one stream; the models take turns."""
    window = torch.from_numpy(task.batch(0, 0, 1, "test").ids[:, : task.window])
    sleeps: dict[int, list[float]] = {n: [] for n in models}
    tokens: dict[int, list[float]] = {n: [] for n in models}
    for _ in range(30):
        for n, model in models.items():
            sleeps[n].append(_seconds(partial(model.consolidate, window)))
            session = Session(model)
            session.feed(window)
            session.sleep()
            tokens[n].append(_seconds(partial(list, session.generate(window[:, :1], task.window - 1))) / (task.window - 1))
    return {n: {"seconds_per_sleep": statistics.median(sleeps[n]), "seconds_per_token": statistics.median(tokens[n])} for n in models}


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _show(rows: dict[int, dict[str, Any]], task: Task, console: Console) -> None:
    some = next(iter(rows.values()))
    labels = [level_label(level, task.level_name) for level in some["by_level"]]
    headers = ["N", *labels, "PyTorch", "ONNX", "logits differ by", "s / sleep", "ms / token"]
    cells = [
        [
            str(n),
            *(f"{share:.1%}" for share in row["by_level"].values()),
            f"{row['accuracy']:.1%}",
            f"{row['onnx_accuracy']:.1%}",
            f"{row['onnx_logit_difference']:.1e}",
            f"{row['seconds_per_sleep']:.4f}",
            f"{1000 * row['seconds_per_token']:.2f}",
        ]
        for n, row in rows.items()
    ]
    title = f"{task}: {some['answers']:,} held-out questions, best guess {task.chance():.1%}"
    print_table(headers, cells, title=title, console=console)


def draw(rows: dict[int, dict[str, Any]], out: Path) -> None:
    """Draw the accuracy against hops and against training tokens, one line for each N, into demo.png."""
    groups = {f"N = {n}": [read_run(out / f"sleep{n}")._replace(results=row)] for n, row in rows.items()}
    drawn = Figure(figsize=(10, 3.8), layout="constrained")
    by_level, by_tokens = drawn.subplots(1, 2, sharey=True)
    against_level(by_level, groups)
    accuracy_curves(by_tokens, groups, title="Training accuracy, all hops")
    by_level.set_title("Held-out questions about an evicted window")
    add_legend(drawn)
    save(drawn, out / "demo.png")
