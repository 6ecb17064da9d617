"""Evaluation of a model on held-out sequences of a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.model import Model
from zoo.tasks import Task
from zoo.training.parallel import Team


@torch.no_grad()
def evaluate(
    model: Model,
    task: Task,
    sequences: int,
    *,
    seed: int = 0,
    loops: int | None = None,
    batch_size: int = 256,
    team: Team | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Evaluate a model on `sequences` held-out sequences.

    Args:
        loops: passes per sleep; default: as configured.
        advance: called after each batch with the number of sequences done.
    Returns:
        Loss, accuracy (fraction of answers that are right), exact (fraction of the sequences with answers that have every answer
        right), accuracy and loss by level, and the chance levels of the task.
    Raises:
        ZooError: the model does not fit the task.
    """
    check_fit(model, task)
    team = team or Team(model.embed.weight.device)
    losses, right, levels, exact = [], [], [], []
    for start in range(0, sequences, batch_size):
        batch = task.batch(seed, start, min(batch_size, sequences - start), "test")
        ids, mask, level = (torch.from_numpy(x) for x in batch)
        rows = team.rows(len(ids))
        answers = model.answers(ids[rows].to(team.device), mask[rows].to(team.device), loops=loops)
        place = torch.arange(ids.numel()).view_as(ids)[rows].flatten()[answers.place.cpu()]
        marks, loss = torch.zeros(ids.numel(), dtype=torch.uint8), torch.zeros(ids.numel())
        marks[place] = 1 + answers.right().cpu().byte()  # 0: not predicted, 1: wrong, 2: right
        loss[place] = answers.losses().cpu().float()
        marks, loss = team.max(marks), team.max(loss)
        answered = marks > 0
        right.append(marks[answered] == 2)
        losses.append(loss[answered])
        levels.append(level.flatten()[answered])
        by_row = marks.view_as(ids)
        exact.append((by_row != 1).all(1)[(by_row > 0).any(1)])
        advance(start + len(ids))
    hits, loss, level = torch.cat(right), torch.cat(losses), torch.cat(levels)
    return {
        "model": model.config.name,
        "task": str(task),
        "level_name": task.level_name,
        "loss": loss.mean().item(),
        "accuracy": hits.float().mean().item(),
        "exact": torch.cat(exact).float().mean().item(),
        "by_level": by_level(hits, level),
        "loss_by_level": by_level(loss, level),
        "chance": task.chance(),
        "exact_chance": task.exact_chance(),
        "answers": len(hits),
    }


def by_level(score: Tensor, level: Tensor) -> dict[int, float]:
    """Return the mean of `score` [n] at each value of `level` [n]."""
    return {int(n): round(score[level == n].float().mean().item(), 5) for n in np.unique(level.numpy())}


def check_fit(model: Model, task: Task) -> None:
    """Raise ZooError if the model cannot read the sequences of the task as they are laid out."""
    if model.config.vocab_size < task.vocab_size:
        raise ZooError(f"vocab_size: {model.config.vocab_size} is less than the {task.vocab_size} tokens of the task")
    if model.config.window not in (None, task.window):
        raise ZooError(f"window: {model.config.window}, but the task lays its sequences out for windows of {task.window}")
    if task.loss_everywhere and model.config.window is not None and model.config.sleep_on != "every":
        raise ZooError(f"sleep_on: '{model.config.sleep_on}', but every window of the task carries loss; want 'every'")
