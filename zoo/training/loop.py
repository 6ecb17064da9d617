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
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from zoo.config import merge, read_shipped, shipped, validate
from zoo.costs import training_flops
from zoo.errors import ZooError
from zoo.factory import create
from zoo.loss import Recompute
from zoo.model import Model
from zoo.tasks import Batch, Task, new_task
from zoo.training.optimizers import Weights, freeze, make_optimizers, restore, state_of
from zoo.training.parallel import Answer, Parallel, Team, forget_gathered, join, whole
from zoo.training.reporting import peak_flops
from zoo.training.run_folder import SETTINGS, NotFiniteError, RunFolder

Report = Callable[[dict[str, Any]], None]


class TrainConfig(BaseModel):
    """One training run. `configs/train/*.yaml` holds one of these per file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="a model name with suffixes, or a YAML file")
    overrides: dict[str, Any] = Field({}, description="config fields of the model to replace")
    weights: str | None = Field(
        None, description="what to start from: the folder of another run, or of upstream; hub: download what the model names"
    )
    task: dict[str, Any] = Field(description="a task's name and parameters")
    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1, description="sequences per step")
    seed: int = Field(0, ge=0, description="of the weights and of the data")
    accumulate: int = Field(1, ge=1, description="parts of a batch that go through the model one after the other")
    recompute: Recompute = Field("nothing", description="activations made again to save memory; see `zoo.model.Model.answers`")
    backward_chunks: int | None = Field(None, ge=1, description="chunks, counted from the last, that gradients stay within groups of")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of weights and activations; the optimisers' own are float32")
    device: str | None = Field(None, description="default: cuda where there is one, else cpu")
    parallel: Parallel = Field("ddp", description="how the processes that torchrun starts share the model; see `zoo.training.parallel`")
    optimizer: str = Field("adamw", description="of embeddings, head, norms, gates, convolutions")
    lr: float = Field(3e-3, gt=0, description="of that optimiser")
    muon_lr: float | None = Field(
        None, gt=0, description="of Muon: the matrices of the blocks; default: the optimiser above trains them too"
    )
    lr_scale: dict[str, float] = Field({}, description="patterns of parameter names, and what their rate is multiplied by")
    frozen: tuple[str, ...] = Field((), description="patterns of the names of parameters that stay as they are")
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps in which the rate rises")
    decay: float = Field(0.3, ge=0, le=1, description="share of the steps in which the rate falls to zero")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    diverged: float = Field(5.0, gt=1, description="stop when the loss is so many times the first step's")
    log_every: int = Field(20, ge=1, description="steps")
    eval_sequences: int = Field(512, ge=1)
    checkpoint_every: int = Field(1000, ge=1, description="steps")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay, beside the one with the least held-out loss")

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate: {self.accumulate} parts are more than the {self.batch_size} sequences of a batch_size")
        if not all(factor > 0 for factor in self.lr_scale.values()):
            raise ValueError(f"lr_scale: {self.lr_scale}: want factors above 0; frozen holds what is not to be trained")
        return self


def read_config(source: str | Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """The run that a YAML file describes, one that this package brings ("cycle"), or that of a run's folder, with overrides.

    A file may name another run as its `base`, and say only what differs.

    Raises:
        ZooError: there is no such run, or a field that does not fit.
    """
    if (Path(source) / SETTINGS).is_file() and str(source) not in shipped("train"):
        source = Path(source) / SETTINGS
    return validate(TrainConfig, merge(_fields(source), overrides or {}), str(source))


def _fields(source: str | Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the file of a run says, on top of what its base does."""
    fields = read_shipped("train", "run", source)
    base = fields.pop("base", None)
    if base is None:
        return fields
    if base in (*above, str(source)):
        raise ZooError(f"{source}: base: '{base}' is based on this run itself")
    return merge(_fields(base, (*above, str(source))), fields)


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
                        "by_level": _by_level(score.right, score.level),
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


def check_fit(model: Model, task: Task) -> None:
    """ZooError if the model cannot read the task's sequences as they are laid out."""
    if model.config.vocab_size < task.vocab_size:
        raise ZooError(f"vocab_size: {model.config.vocab_size} is less than the {task.vocab_size} tokens of the task")
    if model.config.window not in (None, task.window):
        raise ZooError(f"window: {model.config.window}, but the task lays its sequences out for windows of {task.window}")
    if task.loss_everywhere and model.config.window is not None and model.config.sleep_on != "every":
        raise ZooError(f"sleep_on: '{model.config.sleep_on}', but every window of the task carries loss; want 'every'")


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the full rate at a step: a rise, a plateau, a straight fall to zero (warm-up, stable, decay)."""
    rise = (step + 1) / max(1.0, config.warmup * config.steps)
    fall = (config.steps - step) / max(1.0, config.decay * config.steps)
    return min(1.0, rise, fall)


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
) -> dict[str, Any]:
    """How a model does on `sequences` held-out sequences, with `loops` passes per sleep (default: as configured).

    Returns loss, accuracy (share of right answers), exact (share of sequences with every answer right), accuracy and loss
    by level, and the task's chance levels.
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
        marks[place] = 1 + answers.right().cpu().byte()
        loss[place] = answers.losses().cpu().float()
        marks, loss = team.most(marks), team.most(loss)
        answered = marks > 0
        right.append(marks[answered] == 2)
        losses.append(loss[answered])
        levels.append(level.flatten()[answered])
        exact.append((marks != 1).view_as(ids).all(1))
    hits, loss, level = torch.cat(right), torch.cat(losses), torch.cat(levels)
    return {
        "model": model.config.name,
        "task": str(task),
        "level_name": task.level_name,
        "loss": loss.mean().item(),
        "accuracy": hits.float().mean().item(),
        "exact": torch.cat(exact).float().mean().item(),
        "by_level": _by_level(hits, level),
        "loss_by_level": _by_level(loss, level),
        "chance": task.chance(),
        "exact_chance": task.exact_chance(),
        "answers": len(hits),
    }


def _by_level(score: Tensor, level: Tensor) -> dict[int, float]:
    return {int(n): round(score[level == n].float().mean().item(), 5) for n in np.unique(level.numpy())}
