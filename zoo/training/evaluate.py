"""Evaluation of a model on held-out sequences of a task."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import ZooError
from zoo.model import Model
from zoo.tasks import Task
from zoo.text.tokenizers import ByteTokenizer
from zoo.training.parallel import Team

LARGEST = 2**28  # maximum number of logits that are held at once


@torch.no_grad()
def evaluate(
    model: Model,
    task: Task,
    sequences: int,
    *,
    seed: int = 0,
    loops: int | None = None,
    batch_size: int = 256,
    control: bool = False,
    tokenizer: ByteTokenizer | None = None,
    team: Team | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Evaluate a model on `sequences` held-out sequences, or on all if there are fewer.

    Args:
        loops: passes per sleep; default: as configured.
        control: also measure the accuracy when the windows before the questions show another sequence.
        tokenizer: measure bits per byte of the text that it decodes supervised tokens to.
        advance: called after each batch with the number of sequences done.
    Returns:
        The passes per sleep, loss, perplexity, bits_per_byte (with `tokenizer`, or if every token is a byte), accuracy (fraction of
        supervised tokens that are right), exact (fraction of the sequences with answers that have every answer right), accuracy and
        loss by level and by window (counted from 1), loss_by_eighth (by eighth of a window, where every chunk carries loss); first
        and first_by_level (accuracy of the first answer of each sequence, which no earlier answer gives away), whole_by_level
        (fraction of the answers with every token right), majority_by_level (share of the most frequent answer), wrong_window (with
        `control`), and the chance levels of the task.
    Raises:
        ZooError: the model does not fit the task.
    """
    check_fit(model, task)
    sequences = min(sequences, task.held_out() or sequences)
    team = team or Team(model.embed.weight.device)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    given: Counter[tuple[int, tuple[int, ...]]] = Counter()
    text_bytes = 0
    for start in range(0, sequences, batch_size):
        batch = task.batch(seed, start, min(batch_size, sequences - start), "test")
        ids, mask, level = (torch.from_numpy(x) for x in batch)
        marks, loss = _scored(model, ids, mask, loops, team)
        answered = marks > 0
        parts["right"].append(marks[answered] == 2)
        parts["loss"].append(loss[answered])
        parts["level"].append(level[answered])
        places = answered.nonzero()[:, 1]
        parts["window"].append(1 + places // task.window)
        parts["eighth"].append(1 + places % task.window * 8 // task.window)
        parts["exact"].append((marks != 1).all(1)[answered.any(1)])
        first = answered & (answered.cumsum(1) == 1)
        parts["first"].append(marks[first] == 2)
        parts["level of first"].append(level[first])
        begin = _beginnings(answered.numpy(), long=task.long_answers)
        parts["whole"].append(torch.from_numpy(np.minimum.reduceat(marks[answered].numpy(), begin) == 2))
        parts["level of whole"].append(level[answered][torch.from_numpy(begin)])
        tokens = ids[answered].tolist()
        texts = [tuple(tokens[a:b]) for a, b in pairwise([*begin.tolist(), len(tokens)])]
        given.update(zip(parts["level of whole"][-1].tolist(), texts, strict=True))
        if task.of_bytes:
            text_bytes += int(answered.sum())
        elif tokenizer is not None:
            text_bytes += sum(_text_bytes(tokenizer, row, scored) for row, scored in zip(ids, answered, strict=True))
        shown = int(mask.any(0).nonzero()[0]) // task.window * task.window
        if control and shown and len(ids) > 1:
            other = torch.cat([ids[:, :shown].roll(1, 0), ids[:, shown:]], dim=1)
            marks, _ = _scored(model, other, mask, loops, team)
            parts["wrong window"].append(marks[marks > 0] == 2)
        advance(start + len(ids))
    found = {name: torch.cat(tensors) for name, tensors in parts.items()}
    mean = found["loss"].mean().item()
    return {
        "model": model.config.name,
        "task": str(task),
        "level_name": task.level_name,
        "loops": loops or model.config.loops,
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": found["loss"].double().sum().item() / math.log(2) / text_bytes if text_bytes else None,
        "accuracy": found["right"].float().mean().item(),
        "exact": found["exact"].float().mean().item(),
        "first": found["first"].float().mean().item(),
        "wrong_window": found["wrong window"].float().mean().item() if "wrong window" in found else None,
        "by_level": by_level(found["right"], found["level"]),
        "loss_by_level": by_level(found["loss"], found["level"]),
        "by_window": by_level(found["right"], found["window"]),
        "loss_by_window": by_level(found["loss"], found["window"]),
        "loss_by_eighth": by_level(found["loss"], found["eighth"]) if task.loss_everywhere else {},
        "first_by_level": by_level(found["first"], found["level of first"]),
        "whole_by_level": by_level(found["whole"], found["level of whole"]),
        "majority_by_level": _majority(given),
        "chance": task.chance(),
        "exact_chance": task.exact_chance(),
        "answers": len(found["right"]),
    }


def _scored(model: Model, ids: Tensor, mask: Tensor, loops: int | None, team: Team) -> tuple[Tensor, Tensor]:
    """Return a mark for each token, uint8 [B, T] (0: not predicted, 1: wrong, 2: right), and its loss, [B, T]."""
    marks, loss = torch.zeros(ids.numel(), dtype=torch.uint8), torch.zeros(ids.numel())
    logits = int(mask.sum()) * model.config.vocab_size // team.size
    parts = min(-(-logits // LARGEST), max(1, len(ids) // team.size))  # as many in every process, for FSDP2
    for rows in team.rows(len(ids)).tensor_split(parts):
        answers = model.answers(ids[rows].to(team.device), mask[rows].to(team.device), loops=loops)
        place = torch.arange(ids.numel()).view_as(ids)[rows].flatten()[answers.place.cpu()]
        marks[place] = 1 + answers.right().cpu().byte()
        loss[place] = answers.losses().cpu().float()
    return team.max(marks).view_as(ids), team.max(loss).view_as(ids)


def _text_bytes(tokenizer: ByteTokenizer, ids: Tensor, scored: Tensor) -> int:
    """Return the bytes of the text of the scored tokens of a sequence, [T]."""
    first = int(scored.byte().argmax())
    return tokenizer.count_bytes(ids[scored].tolist(), ids[:first].tolist())


def _beginnings(answered: NDArray[np.bool_], *, long: bool) -> NDArray[np.int64]:
    """Return which of the answered tokens, counted row by row, begin an answer; `long`: consecutive ones are one answer."""
    continues = answered & np.roll(answered, 1, axis=1) if long else np.zeros_like(answered)
    continues[:, 0] = False
    return np.flatnonzero(~continues[answered])


def _majority(given: Counter[tuple[int, tuple[int, ...]]]) -> dict[int, float]:
    """Return the share of the most frequent answer at each level."""
    times: dict[int, list[int]] = defaultdict(list)
    for (level, _), count in given.items():
        times[level].append(count)
    return {level: round(max(times[level]) / sum(times[level]), 5) for level in sorted(times)}


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
