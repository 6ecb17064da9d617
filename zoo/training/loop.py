"""Training: one loop that can be interrupted at any time, metrics as JSON lines, the model at the end."""

from __future__ import annotations

import math
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.costs import training_flops
from zoo.errors import ZooError
from zoo.factory import create
from zoo.loss import Recompute
from zoo.model import Model
from zoo.tasks import Batch, Task, new_task
from zoo.training.config import Report, TrainConfig
from zoo.training.evaluate import by_level, check_fit, evaluate
from zoo.training.optimizers import Weights, freeze, make_optimizers, restore, state_of
from zoo.training.parallel import Answer, Team, forget_gathered, join, whole
from zoo.training.reporting import peak_flops
from zoo.training.run_folder import NotFiniteError, RunFolder


def train(config: TrainConfig, out: str | Path, *, report: Report = lambda metrics: None) -> dict[str, Any]:
    """Run `config` in the folder `out`, from its newest checkpoint if there is one; `zoo.training.run_folder` says what it holds.

    Weights and losses are the same, bit for bit, whether a run was interrupted or not (on one kind of CPU and number of threads).

    Args:
        report: called with each line of metrics.
    Returns:
        What `evaluate` finds on the test split.
    Raises:
        ZooError: a config that does not fit, or something else in `out`: before any work. Also a loss that is not finite or
            has diverged; names the newest checkpoint.
        StoppedError: after SIGTERM; a checkpoint has been written.
    """
    with join(config.device) as team:
        if config.batch_size < team.size * config.accumulate:
            raise ZooError(f"batch_size: {config.batch_size} sequences, fewer than {team.size} processes x accumulate {config.accumulate}")
        return _train(config, RunFolder(Path(out), config.model_dump(mode="json"), team), team, report)


def _train(config: TrainConfig, run: RunFolder, team: Team, report: Report) -> dict[str, Any]:
    start = config if run.newest() is None else config.model_copy(update={"weights": None})  # a checkpoint has its own
    task, model, answer, weights, optimizers = prepare(start, team.device, team)
    with run.held(), sigterm() as asked_to_stop:
        progress: dict[str, Any] = {"step": 0, "first_loss": None}
        if newest := run.newest():
            checkpoint, progress = newest
            restore(optimizers, weights, run.load(checkpoint, model), progress["numbers"])
        model.train()
        peak = peak_flops(team.device) if config.dtype == "bfloat16" else None
        tokens, since = 0, time.perf_counter()
        with run.metrics(after=progress["step"]) if team.first else nullcontext(report) as write_line:
            for step in range(progress["step"], config.steps):
                torch.manual_seed(config.seed * config.steps + step)  # for blocks that drop out
                rate = schedule(step, config)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["initial_lr"] * rate
                batch = task.batch(config.seed, step, config.batch_size)
                score = backward(
                    answer,
                    weights,
                    batch,
                    team=team,
                    accumulate=config.accumulate,
                    recompute=config.recompute,
                    backward_chunks=config.backward_chunks,
                )
                norm = whole(nn.utils.clip_grad_norm_(weights.wide.values(), config.clip))
                progress["first_loss"] = progress["first_loss"] or score.loss
                if not (math.isfinite(score.loss) and norm.isfinite() and score.loss <= config.diverged * progress["first_loss"]):
                    raise ZooError(f"{run.path}: loss {score.loss} with gradient norm {norm.item()} at step {step}; {_advice(run)}")
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                weights.hand_back()
                if team.size > 1:
                    forget_gathered(model)
                progress["step"] = step + 1
                tokens += batch.ids.size
                last = step + 1 == config.steps
                if team.first and ((step + 1) % config.log_every == 0 or last):
                    now = time.perf_counter()
                    metrics: dict[str, Any] = {
                        "step": step + 1,
                        "tokens": (step + 1) * batch.ids.size,
                        "loss": score.loss,
                        "accuracy": round(score.right.float().mean().item(), 5),
                        "by_level": by_level(score.right, score.level),
                        "grad_norm": round(norm.item(), 4),
                        "lr": rate * config.lr,
                        "tokens_per_second": round(tokens / (now - since)),
                        "memory": most_memory(team.device),
                    }
                    if peak is not None:
                        flops = training_flops(model, torch.from_numpy(batch.loss_mask))
                        metrics["mfu"] = round(metrics["tokens_per_second"] * flops / batch.ids.size / (peak * team.size), 4)
                    tokens, since = 0, now
                    write_line(metrics)
                    report(metrics)
                due, stop = (step + 1) % config.checkpoint_every == 0, team.any(asked_to_stop()) and not last
                if (due or stop) and not last:
                    tensors, numbers = state_of(optimizers, weights)
                    held_out = evaluate(model, task, config.eval_sequences, seed=config.seed, team=team)["loss"] if due else None
                    try:
                        saved = run.save(model, tensors, {**progress, "held_out_loss": held_out, "numbers": numbers}, keep=config.keep)
                    except NotFiniteError as error:
                        raise ZooError(f"{run.path}: {error}; {_advice(run)}") from None
                    if stop:
                        raise StoppedError(f"stopped after step {step + 1} of {config.steps}: {saved}; the same command goes on from there")
        results = evaluate(model, task, config.eval_sequences, seed=config.seed, team=team)
        run.finish(model, results)
    return results


class Prepared(NamedTuple):
    """What a run starts with."""

    task: Task
    model: Model
    answer: Answer
    """`model.answers`, on all processes of the team."""
    weights: Weights
    optimizers: list[torch.optim.Optimizer]


def prepare(config: TrainConfig, device: torch.device, team: Team | None = None) -> Prepared:
    """Everything that `config` names; on the meta device without weights. Raises ZooError: it does not fit together."""
    task = new_task(config.task)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    fields = {"vocab_size": task.vocab_size, **({"sleep_on": "every"} if task.loss_everywhere else {}), **config.overrides}
    pretrained = device.type != "meta" and config.weights is not None and (config.weights == "hub" or config.weights)
    model = create(config.model, device=device, dtype=dtype, seed=config.seed, pretrained=pretrained, **fields)
    check_fit(model, task)
    freeze(model, config.frozen)
    answer = (team or Team(device)).spread(model, config.parallel)
    weights = Weights(model)
    optimizers = make_optimizers(
        model,
        weights,
        lr=config.lr,
        muon_lr=config.muon_lr,
        weight_decay=config.weight_decay,
        optimizer=config.optimizer,
        lr_scale=config.lr_scale,
    )
    return Prepared(task, model, answer, weights, optimizers)


class StoppedError(Exception):
    """A run was asked to stop, and has saved itself."""


class Score(NamedTuple):
    """How a training batch went."""

    loss: float
    right: Tensor
    """Of each answer, bool [n]."""
    level: Tensor
    """[n]"""


def backward(
    answer: Answer,
    weights: Weights,
    batch: Batch,
    *,
    team: Team,
    accumulate: int = 1,
    recompute: Recompute = "nothing",
    backward_chunks: int | None = None,
) -> Score:
    """Gradients of the mean loss of all answers of the batch, of whose sequences each process takes a share in `accumulate` parts.

    Args:
        answer: `model.answers`, or what `Team.spread` makes of it.
        recompute, backward_chunks: as in `Model.answers`.
    """
    ids, mask, level = (torch.from_numpy(x) for x in batch)
    loss, total, marks = 0.0, int(mask.sum()), torch.zeros(ids.numel(), dtype=torch.uint8)
    place = torch.arange(ids.numel()).view_as(ids)
    for part in team.rows(len(ids)).tensor_split(accumulate):
        answers = answer(ids[part].to(team.device), mask[part].to(team.device), recompute=recompute, backward_chunks=backward_chunks)
        share = answers.losses().sum() / total
        (share * team.size).backward()
        weights.take_gradients()
        loss += share.item()
        marks[place[part].flatten()[answers.place.cpu()]] = 1 + answers.right().cpu().byte()
    marks = team.most(marks)
    return Score(team.total(loss), marks[marks > 0] == 2, level.flatten()[marks > 0])


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM stops nothing; the function given says whether it came. In the main thread only."""
    came = False

    def note(number: int, frame: Any) -> None:
        nonlocal came
        came = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)


def most_memory(device: torch.device) -> int:
    """Bytes that were held at once, at most: by tensors on a GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _advice(run: RunFolder) -> str:
    newest = run.newest()
    return f"try a lower lr; the last good checkpoint is {newest[0]}" if newest else "try a lower lr; there is no checkpoint yet"


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the full rate at a step: a rise, a plateau, a straight fall to zero (warm-up, stable, decay)."""
    rise = (step + 1) / max(1.0, config.warmup * config.steps)
    fall = (config.steps - step) / max(1.0, config.decay * config.steps)
    return min(1.0, rise, fall)
