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
from matplotlib.figure import Figure
from rich.console import Console

import zoo.export
from zoo.checkpoints.own import load
from zoo.console import print_table
from zoo.errors import ZooError
from zoo.files import new_folder
from zoo.model import Model
from zoo.sessions.session import Session
from zoo.tasks import Task, new_task
from zoo.training.config import read_config
from zoo.training.loop import StoppedError
from zoo.training.plots import accuracy_curves, add_legend, against_level, read_run, save
from zoo.training.tables import level_label
from zoo.training.workers import Job, train_all

LOOPS = (1, 2, 4)
SEQUENCES = 1024
console = Console()


def run(out: Path) -> None:
    """Train the same model at each N on the same tokens, export each, compare, and write everything to the new folder `out`.

    Raises:
        ZooError: before any work, if `out` exists already or the exporter's packages are not installed.
    """
    import_module("zoo.export.bundle")
    plan = read_config("cycle")
    task = new_task(plan.task)
    with new_folder(out) as folder:
        console.print(f"[bold]{task}[/]: the same tokens and seed at N = {', '.join(map(str, LOOPS))} passes of sleep")
        started = time.perf_counter()
        plans = {n: plan.model_copy(update={"model": f"gdn4-sleep{n}-hard{task.window}"}) for n in LOOPS}
        jobs = {f"N = {n}": Job(plans[n], folder / f"sleep{n}", after=_export) for n in sorted(LOOPS, reverse=True)}  # longest first
        try:
            failed = train_all(jobs, processes=2)
        except StoppedError:
            raise KeyboardInterrupt from None
        if failed:
            raise ZooError("; ".join(f"{name}: {why}" for name, why in failed.items()))
        console.print(f"trained and exported in {time.perf_counter() - started:.0f} s; comparing PyTorch with onnxruntime")
        models = {n: load(folder / f"sleep{n}") for n in LOOPS}
        costs = _costs(models, task)
        rows = {}
        for n, model in models.items():
            rows[n] = {**_answer(model, folder / f"sleep{n}-onnx", task, plan.seed), **costs[n]}
        (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        draw(rows, folder)
    _show(rows, task, console)
    console.print(f"plot: {out / 'demo.png'}   models, graphs and metrics: {out}/")


def _export(run: Path) -> None:
    zoo.export.export(load(run), run.with_name(f"{run.name}-onnx"))


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
