"""Gradients of one batch, in micro-batches and over all processes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.blocks.moe import Routes, balance_loss, expert_loads, recorded_routes
from zoo.config import ModelConfig
from zoo.errors import ZooError
from zoo.loss import Recompute, chunks, predicted
from zoo.tasks import Batch
from zoo.training.optimizers import Weights
from zoo.training.parallel import Answer, Team


class Score(NamedTuple):
    """Loss and correct answers of a training batch, over all processes."""

    loss: float
    right: Tensor
    """Correctness of each answer, [n] bool."""
    level: Tensor
    """Level of each answer, [n] int."""
    experts: dict[int, Tensor]
    """`zoo.blocks.moe.expert_loads` of this process; empty for a model without a mixture of experts."""
    balance: float | None = None
    """Load-balancing loss, if it is added to the loss; see `zoo.blocks.moe.balance_loss`."""


def backward(
    answer: Answer,
    weights: Weights,
    batch: Batch,
    config: ModelConfig,
    *,
    team: Team,
    accumulate: int = 1,
    loops: int | None = None,
    recompute: Recompute = "nothing",
    backward_chunks: int | None = None,
    balance: float = 0.0,
) -> Score:
    """Accumulate the gradients of the mean loss over all answers of the batch.

    Each process handles its shard of the sequences, in `accumulate` micro-batches. One without answers is replaced by a sequence
    that has some, with weight zero, so that all processes take part in the same collectives.

    Args:
        answer: `model.answers`, or the result of `Team.parallelize`.
        config: config of the model.
        loops, recompute, backward_chunks: as in `Model.answers`.
        balance: weight of the load-balancing loss, which counts the wake passes and every pass of a sleep.
    """
    ids, mask, level = (torch.from_numpy(x) for x in batch)
    loads: dict[int, Tensor] = {}
    loss, unbalanced, marks = 0.0, 0.0, torch.zeros(ids.numel(), dtype=torch.uint8)
    place = torch.arange(ids.numel()).view_as(ids)
    parts = team.rows(len(ids)).tensor_split(accumulate)
    counts = [_count(mask[part], config) for part in parts]
    total = team.sum(sum(counts))
    if not total:
        raise ZooError("the task gave a batch without answers: its loss_mask marks no token that can be predicted")
    for part, count in zip(parts, counts, strict=True):
        rows = part if count else next(row for row in torch.arange(len(ids)).split(1) if _count(mask[row], config))
        recording: AbstractContextManager[Routes] = recorded_routes() if "moe" in config.mlp_pattern else nullcontext(Routes())
        with recording as routes:  # in the backward pass too, which may recompute them
            answers = answer(
                ids[rows].to(team.device), mask[rows].to(team.device), loops=loops, recompute=recompute, backward_chunks=backward_chunks
            )
            for number, load in expert_loads(routes).items():
                loads[number] = loads.get(number, 0) + load
            share = objective = answers.losses().sum() / total
            if balance:
                of_experts = balance_loss(routes) * count / total
                objective = share + balance * of_experts
                unbalanced += of_experts.item()
            if not count:
                objective = share = share * 0
            (objective * team.size).backward()  # the processes' gradients are averaged
        weights.take_gradients()
        loss += share.item()
        if count:
            marks[place[rows].flatten()[answers.place.cpu()]] = 1 + answers.right().cpu().byte()  # 0: not predicted, 1: wrong, 2: right
    team.average_replicated()
    marks = team.max(marks)
    right, level = marks[marks > 0] == 2, level.flatten()[marks > 0]
    return Score(team.sum(loss), right, level, loads, team.sum(unbalanced) if balance else None)


def _count(loss_mask: Tensor, config: ModelConfig) -> int:
    """Return the number of tokens that carry loss."""
    return int(predicted(loss_mask, chunks(loss_mask, config)).sum())
