"""`zoo demo`: the whole idea at a size that two cores train in minutes."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import zoo.export
from zoo.checkpoints.own import load
from zoo.files import new_folder
from zoo.model import Model
from zoo.sessions.session import Session
from zoo.tasks import Task, new_task
from zoo.training.config import TrainConfig, read_config
from zoo.training.loop import StoppedError, train
from zoo.training.plots import accuracy_curves, against_level, read_run, save
from zoo.training.reporting import add_run, advance, new_progress
from zoo.training.workers import end_with_parent

LOOPS = (1, 2, 4)
SEQUENCES = 1024
console = Console(width=None if Console().is_terminal else 120)  # a log takes lines of any length


def run(out: Path) -> None:
    """Train the same model at each N on the same tokens, export each, compare, and write everything to the new folder `out`.

    Raises:
        ZooError: `out` exists already, or the packages of the exporter are not installed: before any work.
    """
    import_module("zoo.export.bundle")
    plan = read_config("cycle")
    task = new_task(plan.task)
    with new_folder(out) as folder:
        console.print(f"[bold]{task}[/]: the same tokens and seed at N = {', '.join(map(str, LOOPS))} passes of sleep")
        started = time.perf_counter()
        _train_and_export_all({n: plan.model_copy(update={"model": f"gdn4-sleep{n}-hard{task.window}"}) for n in LOOPS}, folder)
        console.print(f"trained and exported in {time.perf_counter() - started:.0f} s; asking PyTorch and onnxruntime the same questions")
        models = {n: load(folder / f"sleep{n}") for n in LOOPS}
        costs = _costs(models, task)
        rows = {}
        for n, model in models.items():
            rows[n] = {**_answer(model, folder / f"sleep{n}-onnx", task, plan.seed), **costs[n]}
        (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        draw(rows, folder)
    console.print(_table(rows, task))
    console.print(f"plot: {out / 'demo.png'}   models, graphs and metrics: {out}/")


def _train_and_export_all(plans: dict[int, TrainConfig], out: Path) -> None:
    """Train and export in two processes of one thread each, the longest run first."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with new_progress() as progress, ProcessPoolExecutor(2, context, initializer=_begin, initargs=(queue,)) as pool:
        bars = {n: add_run(progress, f"N = {n}", plan.steps) for n, plan in plans.items()}
        runs = [pool.submit(_train_and_export, plans[n], out, n) for n in sorted(plans, reverse=True)]
        while not (all(run.done() for run in runs) and queue.empty()):
            while not queue.empty():
                n, metrics = queue.get()
                advance(progress, bars[n], metrics)
            time.sleep(0.2)
        for run in runs:
            run.result()


_said: Any
"""In a process of the pool: the queue on which it says how a run goes."""


def _begin(queue: Any) -> None:
    global _said
    _said = queue
    end_with_parent()
    torch.set_num_threads(1)


def _train_and_export(plan: TrainConfig, out: Path, n: int) -> None:
    try:
        train(plan, out / f"sleep{n}", report=lambda metrics: _said.put((n, metrics)))
    except StoppedError:
        os._exit(1)  # the pool would go on with the next run
    zoo.export.export(load(out / f"sleep{n}"), out / f"sleep{n}-onnx")


@torch.no_grad()
def _answer(model: Model, bundle: Path, task: Task, seed: int) -> dict[str, Any]:
    """The same held-out questions to PyTorch and to the exported graphs: how many are right, and how far the logits are apart."""
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
    """Median seconds per sleep and per predicted token of one stream, the N taking turns."""
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


def _table(rows: dict[int, dict[str, Any]], task: Task) -> Table:
    table = Table(title=f"{task}: {next(iter(rows.values()))['answers']} held-out questions, best guess {task.chance():.1%}")
    levels = list(next(iter(rows.values()))["by_level"])
    for name in (
        "N",
        *(f"{level} {task.level_name}" for level in levels),
        "PyTorch",
        "onnxruntime",
        "logits differ",
        "s / sleep",
        "ms / token",
    ):
        table.add_column(name, justify="right")
    for n, row in rows.items():
        table.add_row(
            str(n),
            *(f"{row['by_level'][level]:.1%}" for level in levels),
            f"{row['accuracy']:.1%}",
            f"{row['onnx_accuracy']:.1%}",
            f"{row['onnx_logit_difference']:.1e}",
            f"{row['seconds_per_sleep']:.4f}",
            f"{1000 * row['seconds_per_token']:.2f}",
        )
    return table


def draw(rows: dict[int, dict[str, Any]], out: Path) -> None:
    """Accuracy against hops and against tokens seen, one line for each N, into demo.png."""
    groups = {f"N = {n}": [read_run(out / f"sleep{n}")._replace(results=row)] for n, row in rows.items()}
    drawn = Figure(figsize=(10, 3.8), layout="constrained")
    by_level, by_tokens = drawn.subplots(1, 2, sharey=True)
    against_level(by_level, groups)
    accuracy_curves(by_tokens, groups, title="while training, all hops")
    by_level.set(title="held-out questions about an evicted window", ylabel="answers right")
    by_level.legend(title="passes of sleep", frameon=False)
    save(drawn, out / "demo.png")
