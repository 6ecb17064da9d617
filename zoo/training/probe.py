"""Probes of a sleep on a cycle: after each pass, which hops can be read linearly from the fast weights S, and norms of h, S and gradients.

The read-out is a ridge regression from the entries of S to f^k(x), for every node x and every number of hops k. It is fitted on held-out
cycles of the task, its penalty is chosen on others, and it is scored on a third set; all cycles are distinct. The controls are the
same read-out of an untrained model, with shuffled labels, and of the tokens of the window.
"""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from zoo.checkpoints.own import load
from zoo.errors import ZooError
from zoo.factory import create
from zoo.files import as_path, new_folder
from zoo.model import Model
from zoo.state import State
from zoo.tasks import Task, new_task
from zoo.tasks.cycle import Cycle
from zoo.training.config import read_config
from zoo.training.evaluate import check_fit, evaluate
from zoo.training.probe_figure import figure
from zoo.training.trained import find

SHIPPED = {"cycle2-sleep1": "cycle6", "cycle2-sleep4": "cycle6"}  # weights in the package, and the run whose task they were trained on
LARGEST = 1024  # maximum number of features of a read-out; more entries of S are projected
STRENGTHS = tuple(10.0**exponent for exponent in range(-5, 0))  # of the ridge, relative to the mean variance of a feature
FEWEST = 96  # minimum number of cycles
BATCH = 512


class Pass(NamedTuple):
    """State after one pass of a sleep."""

    h: Tensor
    """Hidden states [B, T, D], which the next pass starts from; nothing reads those of the last pass."""
    fast: list[Tensor]
    """Fast weights of each layer that has any, [B, ...]."""

    def flat(self) -> Tensor:
        """Return all fast weights, [B, entries]."""
        return torch.cat([s.flatten(1) for s in self.fast], dim=1)


def open_model(named: str) -> tuple[Model, Task]:
    """Return the model of a run, or one that comes with the package, and the task that it was trained on. Raises ZooError."""
    folder = as_path(named, "RUN")
    if named in SHIPPED and not folder.is_dir():
        return create(named, pretrained=True), new_task(read_config(SHIPPED[named]).task)
    trained = find(folder)
    if trained.run is None:
        raise ZooError(f"{named}: want the folder of a training run, or one of {', '.join(SHIPPED)}")
    return load(trained.folder), new_task(trained.run.task)


def probe(model: Model, task: Task, *, loops: int | None = None, cycles: int = 6144, seed: int = 0) -> dict[str, Any]:
    """Probe the sleep of a model on the windows of the task `cycle`.

    Args:
        loops: N, passes per sleep; default: as configured.
        cycles: number of held-out cycles to fit on. A quarter as many choose the penalty, and a quarter as many are scored. Cycles
            are drawn at random and used once, so that there are fewer if some are drawn twice.
        seed: seed of the cycles, of the projection, and of the untrained model.
    Returns:
        The numbers of cycles ("fitted", "chosen_on", "scored"), of entries of S and of features of a read-out; "chance"; "accuracy" by
        name of the read-out and [pass][hop], where "answers" are those of the model after that many passes; "norms" by name and [pass],
        means over a batch of the Frobenius norm per cycle; "change" [pass] of the fast weights of the last layer that has any, for one
        cycle, as a matrix.
    Raises:
        ZooError: another task, too few cycles, or a model that does not fit or has no fast weights to sleep into.
    """
    if not isinstance(task, Cycle):
        raise ZooError(f"task: {task.name}; only windows of the task cycle have hops that the probe can read")
    check_fit(model, task)
    entries = sum(fast.numel() for fast in model.init_state().fast if fast is not None)
    if model.config.window is None or not entries:
        raise ZooError(f"{model.config.name}: evict: {model.config.evict}, layers: {model.config.layers}; never sleeps into fast weights")
    loops = len(model.passes(loops or model.config.loops, asleep=True))
    windows = _distinct(task, cycles * 3 // 2, seed)
    fit, scored = len(windows) * 2 // 3, len(windows) // 6
    choose = len(windows) - fit - scored
    labels = hops_of(windows, task.hops)
    held = labels.split([fit, choose, scored])
    shuffled = torch.cat([held[0].roll(1, 0), held[1].roll(1, 0), held[2]])  # the labels of another cycle
    trained = [read_out(x, torch.cat([labels, shuffled], 1), fit, choose) for x in _features(model, windows, loops, seed)]
    fresh = create(model.config, dtype=model.dtype, seed=seed)
    first = task.model_copy(update={"questions": 1})
    answered = [evaluate(model, first, scored, seed=seed, loops=n)["first_by_level"] for n in range(1, loops + 1)]
    shown = F.one_hot(torch.from_numpy(windows), task.nodes).flatten(1).double()
    norms, change = _sizes(model, first, loops, seed)
    return {
        "model": model.config.name,
        "task": str(task),
        "loops": loops,
        "fitted": fit,
        "chosen_on": choose,
        "scored": scored,
        "entries": entries,
        "features": min(entries, LARGEST),
        "chance": 1 / (task.nodes - 1),
        "accuracy": {
            "S": [right[: task.hops] for right in trained],
            "untrained": [read_out(x, labels, fit, choose) for x in _features(fresh, windows, loops, seed)],
            "shuffled": [right[task.hops :] for right in trained],
            "window": [read_out(shown, labels, fit, choose)],
            "answers": [[right.get(hop) for hop in range(1, task.hops + 1)] for right in answered],
        },
        "norms": norms,
        "change": change,
    }


def hops_of(windows: NDArray[np.int64], hops: int) -> Tensor:
    """Return the nodes that 1 .. `hops` hops lead to from each node: f [C, M] -> [C, hops, M]."""
    reached = [windows]
    for _ in range(1, hops):
        reached.append(np.take_along_axis(windows, reached[-1], axis=1))
    return torch.from_numpy(np.stack(reached, axis=1))


def read_out(features: Tensor, labels: Tensor, fit: int, choose: int) -> list[float]:
    """Return the accuracy of linear read-outs, one per set of labels: a ridge regression of one-hot labels for every node.

    Args:
        features: [C, F], float64.
        labels: [C, K, M], values below M.
        fit: number of rows, the first ones, on which weights are fitted.
        choose: number of rows after these on which the ridge penalty is chosen for each of the K. All others are scored.
    """
    x = features - features[:fit].mean(0)
    target = F.one_hot(labels[:fit], labels.shape[2]).flatten(1).to(x.dtype)
    mean = target.mean(0)
    gram, cross = x[:fit].T @ x[:fit], x[:fit].T @ (target - mean)
    unit = torch.eye(len(gram), dtype=x.dtype) * (gram.diagonal().mean() + torch.finfo(x.dtype).tiny)
    right = []
    for strength in STRENGTHS:
        weights = torch.cholesky_solve(cross, torch.linalg.cholesky(gram + strength * unit))
        guess = (x[fit:] @ weights + mean).unflatten(1, (*labels.shape[1:], -1)).argmax(-1)
        right.append((guess == labels[fit:]).double().mean(2))
    chosen, scored = torch.stack(right).split([choose, len(x) - fit - choose], dim=1)
    return scored.mean(1).gather(0, chosen.mean(1).argmax(0, keepdim=True))[0].tolist()


def after_each_pass(model: Model, ids: Tensor, loops: int) -> tuple[list[Pass], State]:
    """Consolidate windows, ids [B, T]; return what each pass leaves, and the state after the sleep."""
    outputs: list[Any] = []
    hooks = [block.register_forward_hook(lambda *call: outputs.append(call[-1])) for block in model.blocks]
    try:
        state = model.consolidate(ids, loops=loops)
    finally:
        for hook in hooks:
            hook.remove()
    fast, passes, in_order = list(model.init_state(len(ids)).fast), [], iter(outputs)
    for blocks in model.passes(loops, asleep=True):
        for i, _ in blocks:
            h, fast[i], _ = next(in_order)
        passes.append(Pass(h, [s for s in fast if s is not None]))
    return passes, state


def _distinct(task: Cycle, count: int, seed: int) -> NDArray[np.int64]:
    """Return at most `count` distinct held-out windows, [C, M], in random order."""
    found = np.unique(task.batch(seed, 0, count, "test").ids[:, : task.window], axis=0)
    if len(found) < FEWEST:
        raise ZooError(f"task.nodes: {task.nodes} give {len(found)} held-out cycles; the probe needs at least {FEWEST}")
    return np.random.default_rng(seed).permutation(found)


@torch.no_grad()
def _features(model: Model, windows: NDArray[np.int64], loops: int, seed: int) -> list[Tensor]:
    """Return the features of the windows after each pass, [C, F] float64: the entries of S, or signed sums of them.

    With more than LARGEST entries, each is multiplied by a random sign and added to a random one of LARGEST sums.
    """
    found: list[list[Tensor]] = [[] for _ in range(loops)]
    for ids in torch.from_numpy(windows).split(BATCH):
        for n, state in enumerate(after_each_pass(model, ids, loops)[0]):
            flat = state.flat().double()
            if (entries := flat.shape[1]) > LARGEST:
                rng = torch.Generator().manual_seed(seed)
                place = torch.randint(LARGEST, (entries,), generator=rng)
                sign = 1 - 2 * torch.randint(2, (entries,), generator=rng)
                flat = flat.new_zeros(len(flat), LARGEST).index_add_(1, place, flat * sign)
            found[n].append(flat)
    return [torch.cat(parts) for parts in found]


def _sizes(model: Model, task: Cycle, loops: int, seed: int) -> tuple[dict[str, list[float]], list[list[list[float]]]]:
    """Return the norms by pass, and the change of one layer for one cycle; gradients are of the loss of the first answer."""
    ids = torch.from_numpy(task.batch(seed, 1, BATCH, "test").ids)
    passes, state = after_each_pass(model, ids[:, : task.window], loops)
    logits = model(ids[:, task.window : -1], state).logits[:, -1]
    loss = F.cross_entropy(logits.float(), ids[:, -1], reduction="sum")
    inner = [one.h for one in passes[:-1]]
    fast = [s for one in passes for s in one.fast]
    gradients = iter(torch.autograd.grad(loss, [*inner, *fast], allow_unused=True, materialize_grads=True))
    of_h = [_norm([next(gradients)]) for _ in inner]
    of_fast = [_norm([next(gradients) for _ in one.fast]) for one in passes]
    by_pass = [[torch.zeros_like(s) for s in passes[0].fast], *(one.fast for one in passes)]
    steps = [[s - before for before, s in zip(*two, strict=True)] for two in pairwise(by_pass)]
    norms = {
        "h": [_norm([h]) for h in inner],
        "S": [_norm(one.fast) for one in passes],
        "change of S": [_norm(step) for step in steps],
        "gradient of h": of_h,
        "gradient of S": of_fast,
    }
    images = [step[-1][0].reshape(-1, step[-1].shape[-1]) for step in steps]
    return norms, [[[round(x, 5) for x in row] for row in image.tolist()] for image in images]


def _norm(tensors: list[Tensor]) -> float:
    """Return the mean over a batch of the Frobenius norm of all tensors of a sequence together."""
    squares = sum(x.detach().double().flatten(1).square().sum(1) for x in tensors)
    return torch.as_tensor(squares).sqrt().mean().item()


def write(results: dict[str, Any], out: Path) -> None:
    """Write probe.json, probe.csv (a row per read-out, pass and hop) and probe.png to the new folder `out`."""
    with new_folder(out) as folder:
        (folder / "probe.json").write_text(json.dumps(results), encoding="utf-8")
        with (folder / "probe.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["read_out", "pass", "hops", "accuracy"])
            for name, by_pass in results["accuracy"].items():
                for n, by_hop in enumerate(by_pass, 1):
                    rows.writerows([name, "" if name == "window" else n, hop, right] for hop, right in enumerate(by_hop, 1))
        figure(results).savefig(folder / "probe.png", dpi=150)
