"""Training: a loop that can be interrupted at any time, metrics as JSON lines, and the final model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.checkpoints.companions import read_companions
from zoo.costs import peak_flops, training_flops
from zoo.errors import ZooError, counted
from zoo.files import as_path
from zoo.model import Model
from zoo.products import announced, bfloat16_products, matmul_precision, set_products
from zoo.signals import StoppedError, deferred
from zoo.system import peak_resident
from zoo.tasks import Batch
from zoo.training.backward import Score, backward
from zoo.training.compiled import compile_errors
from zoo.training.config import Report, TrainConfig, absolute_paths
from zoo.training.divergence import Divergence
from zoo.training.evaluate import by_level, evaluate
from zoo.training.optimizers import exempt_from_decay, restore, state_of
from zoo.training.parallel import Team, clip_gradients, join, reshard
from zoo.training.prepare import prepare
from zoo.training.run_folder import NotFiniteError, RunFolder
from zoo.training.run_inputs import check_config, check_inputs, record_inputs


def train(config: TrainConfig, out: str | Path, *, report: Report = lambda metrics: None, measure_products: bool = False) -> dict[str, Any]:
    """Run `config` in the folder `out`, from its newest checkpoint if there is one; see `zoo.training.run_folder` for its files.

    A finished run continues if `config` has more steps than it was trained for and is otherwise the same.

    Weights and losses of an interrupted run are bit-identical to those of an uninterrupted one (on the same kind of CPU with
    the same number of threads).

    Args:
        report: called with each line of metrics.
        measure_products: begin a run on a CPU under the precision that `zoo.matmul_precision` finds, and multiply bfloat16 in float32
            where that is faster, as `zoo train` does; default: the current settings. A run resumes under those that it began with.
    Returns:
        The result of `evaluate` on the test split.
    Raises:
        ZooError: an invalid config, or `out` holds something else: before any work. Also if the loss is not finite or has
            diverged; the message names the newest checkpoint.
        StoppedError: after one of the signals of `zoo.signals`; a checkpoint has been written.
    """
    with join(config.device) as team:
        if config.batch_size < team.size * config.accumulate:
            shares = f"{counted(team.size, 'process')} x accumulate {config.accumulate}"
            raise ZooError(f"batch_size: {counted(config.batch_size, 'sequence')}, fewer than {shares}")
        config = TrainConfig(**absolute_paths(config.model_dump(), Path()))
        newer = ("no_decay", "schedule", "ramp", "lora", "balance", "compile")
        lacking = {name for name in newer if not getattr(config, name)}  # as in older runs
        lacking |= {"lr_schedule"} if config.lr_schedule == "wsd" else set()
        settings = config.model_dump(mode="json", exclude=lacking)
        try:
            run = RunFolder(as_path(out, "out"), settings, team)
        except ZooError:
            prepare(config, torch.device("meta"))  # a field that is wrong in itself is named first
            raise
        trainer = Trainer(config, run, team)
        trainer.check()
        for split in ("train", "test"):
            trainer.task.batch(config.seed, 0, 1, split)  # data that does not fit is refused before there is a folder
        with deferred() as stop_requested, trainer.run.locked():
            trainer.resume(measure_products)
            with set_products(trainer.precision, trainer.bfloat16_products), compile_errors():
                return trainer.train(stop_requested, report)


class Trainer:
    """A run in progress: its parts, its folder, and the number of steps done."""

    def __init__(self, config: TrainConfig, run: RunFolder, team: Team) -> None:
        self.config, self.run, self.team = config, run, team
        initial = run.newest() is None or config.lora is not None  # a checkpoint has its own weights
        self.task, self.model, self.answer, self.weights, self.optimizers, frozen = prepare(config, team.device, team, initial=initial)
        self.inputs = self.task.fingerprints() | ({} if frozen is None else {"weights": frozen})
        self.done, self.tokens = 0, 0
        self.divergence = Divergence(config.diverged)
        self.precision = torch.get_float32_matmul_precision()
        self.bfloat16_products = "bfloat16"

    def check(self) -> None:
        """Raise ZooError if a run in the folder began with other data or another model, or its adapters are for other weights."""
        check_inputs(self.run.path, self.inputs)
        check_config(self.run, self.model.config)

    def resume(self, measure_products: bool) -> None:
        """Load the newest checkpoint, if there is one.

        Raises:
            ZooError: the run began under different weight-decay rules.
        """
        if self.team.is_main:
            record_inputs(self.run.path, self.inputs)
        on_cpu = self.team.device.type == "cpu"
        if self.config.weight_decay:
            self.run.record_exempt(exempt_from_decay(self.model, self.config.no_decay))
        if checkpoint := self.run.newest_whole():
            progress = self.run.progress(checkpoint)
            self.model.companions = read_companions(checkpoint)
            restore(self.optimizers, self.weights, self.run.load(checkpoint, self.model), progress["numbers"])
            self.done, self.tokens = progress["step"], progress["tokens"]
            self.divergence = Divergence(self.config.diverged, progress.get("first_losses", ()), progress.get("steps_above", 0))
            if on_cpu:
                self.precision = progress.get("matmul_precision", self.precision)
                self.bfloat16_products = progress.get("bfloat16_products", self.bfloat16_products)
        elif measure_products and on_cpu:
            self.precision = self.team.broadcast(announced(self.measured_precision()) if self.team.is_main else None)
            if self.config.dtype == "bfloat16":
                self.bfloat16_products = self.team.broadcast(bfloat16_products())

    def measured_precision(self) -> str:
        """Return what `matmul_precision` finds for the tokens that a process multiplies at once: a window of a micro-batch."""
        sequences = max(1, self.config.batch_size // (self.config.accumulate * self.team.size))
        return matmul_precision(self.model.config.d_model, sequences * (self.model.config.window or self.task.window))

    def train(self, stop_requested: Callable[[], int], report: Report) -> dict[str, Any]:
        """Take the remaining steps, evaluate, and write the final model. Raises StoppedError.

        Args:
            stop_requested: returns the number of the signal that has arrived, or 0.
        """
        config, main = self.config, self.team.is_main
        self.model.train()
        with self.run.metrics(after=self.done) if main else nullcontext(report) as write_line:
            meter = Meter(config, self.model, self.team, self.tokens)
            while self.done < config.steps:
                latest = self.step()
                last = self.done == config.steps
                if main and (self.done % config.log_every == 0 or last):
                    metrics = meter.read(self.done, self.tokens, latest)
                    write_line(metrics)
                    report(metrics)
                stopping = self._requested(stop_requested)
                due = self.done % config.checkpoint_every == 0 and not last
                if due or last or stopping:
                    self.save(self.evaluate()["loss"] if due else None)
                self._stop(stopping)
        results = self.evaluate(control=True)
        self._stop(self._requested(stop_requested))
        self.run.finish(self.model, results, config.lora)
        return results

    def _requested(self, stop_requested: Callable[[], int]) -> int:
        """Return the number of a signal that has arrived in any process, or 0."""
        return int(self.team.max(torch.tensor(stop_requested())))

    def _stop(self, number: int) -> None:
        """Raise StoppedError if a signal has arrived. All steps that were taken are in a checkpoint."""
        if number:
            where = f"after step {self.done} of {self.config.steps}: {self.run.checkpoint(self.done)}"
            raise StoppedError(f"stopped {where}; the same command resumes", number)

    def step(self) -> Step:
        """Take one step: gradients of a batch, then new weights. Raises ZooError if the loss is not finite or has diverged."""
        config, step = self.config, self.done
        torch.manual_seed((config.seed * config.steps + step) % 2**63)  # for dropout
        batch = self.task.batch(config.seed, step, config.batch_size)
        loops = loops_at(step, config, self.model.config.loops)
        score = backward(
            self.answer,
            self.weights,
            batch,
            self.model.config,
            team=self.team,
            accumulate=config.accumulate,
            loops=loops,
            recompute=config.recompute,
            backward_chunks=config.backward_chunks,
            balance=config.balance,
        )
        norm = clip_gradients(self.weights.wide.values(), config.clip)
        if not (math.isfinite(score.loss) and norm.isfinite()) or self.divergence.add(score.loss):
            raise ZooError(f"{self.run.path}: loss {score.loss} with gradient norm {norm.item()} at step {step}; {self._advice()}")
        factor = learning_rate_factor(step, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        self.weights.write_back()
        if self.team.size > 1:
            reshard(self.model)
        self.done, self.tokens = self.done + 1, self.tokens + batch.tokens
        return Step(batch, score, norm.item(), factor * config.lr, loops)

    def evaluate(self, *, control: bool = False) -> dict[str, Any]:
        return evaluate(self.model, self.task, self.config.eval_sequences, seed=self.config.seed, control=control, team=self.team)

    def save(self, held_out_loss: float | None) -> Path:
        """Write a checkpoint and return its folder. Raises ZooError if a weight is not finite, or if the data has changed."""
        check_inputs(self.run.path, self.task.fingerprints())
        tensors, numbers = state_of(self.optimizers, self.weights, complete=self.config.lora is not None)
        progress = {
            "step": self.done,
            "tokens": self.tokens,
            "first_losses": self.divergence.first,
            "steps_above": self.divergence.above,
            "held_out_loss": held_out_loss,
            "matmul_precision": self.precision,
            "bfloat16_products": self.bfloat16_products,
            "numbers": numbers,
        }
        try:
            return self.run.save(self.model, tensors, progress, keep=self.config.keep)
        except NotFiniteError as error:
            raise ZooError(f"{self.run.path}: {error}; {self._advice()}") from None

    def _advice(self) -> str:
        newest = self.run.newest()
        return f"try a lower lr; the last good checkpoint is {newest}" if newest else "try a lower lr; there is no checkpoint yet"


class Step(NamedTuple):
    """One step that was taken."""

    batch: Batch
    score: Score
    norm: float
    """Norm of the gradient before clipping."""
    lr: float
    loops: int
    """Passes per sleep."""


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Return the fraction of the full learning rate at a step: a linear warm-up, then the shape of `lr_schedule`, which ends at zero."""
    first, steps = config.schedule or (0, config.steps)
    warmup, left = config.warmup * steps, steps - first - step
    rise = (first + step + 1) / max(1.0, warmup)
    match config.lr_schedule:
        case "wsd":
            fall = left / max(1.0, config.decay * steps)
        case "linear":
            fall = left / max(1.0, steps - warmup)
        case "cosine":
            fall = (1 - math.cos(math.pi * min(1.0, left / max(1.0, steps - warmup)))) / 2
        case "constant":
            fall = 1.0
    return min(1.0, rise, fall)


def loops_at(step: int, config: TrainConfig, loops: int) -> int:
    """Return the passes per sleep at a step of a run whose model has `loops`: ceil(loops (1 - sqrt(1 - t))) at fraction t of the ramp,
    and at least 1. The shape is "1-sqrt" of arXiv 2511.07384."""
    ramp = config.ramp * config.steps
    if step >= ramp:
        return loops
    return max(1, math.ceil(loops * (1 - math.sqrt(1 - step / ramp))))


class Meter:
    """Converts steps into lines of metrics. Speed is measured from one line to the next."""

    def __init__(self, config: TrainConfig, model: Model, team: Team, tokens: int) -> None:
        self.config, self.model, self.team = config, model, team
        self.peak = peak_flops(team.device) if config.dtype == "bfloat16" else None
        self.tokens, self.since = tokens, time.perf_counter()

    def read(self, done: int, tokens: int, latest: Step) -> dict[str, Any]:
        """Return the line of metrics after `done` steps on `tokens` tokens: the latest step, and the speed since the previous line."""
        batch, score, norm, lr, loops = latest
        now = time.perf_counter()
        speed = (tokens - self.tokens) / (now - self.since)
        self.tokens, self.since = tokens, now
        metrics: dict[str, Any] = {
            "step": done,
            "tokens": tokens,
            "loss": score.loss,
            "accuracy": round(score.right.float().mean().item(), 5),
            "by_level": by_level(score.right, score.level),
            "grad_norm": round(norm, 4),
            "lr": lr,
            "tokens_per_second": round(speed),
        }
        if score.balance is not None:
            metrics["balance"] = round(score.balance, 4)
        if score.experts:
            metrics["experts_by_pass"] = {str(number + 1): _uses(load) for number, load in sorted(score.experts.items())}
        if (memory := peak_memory(self.team.device)) is not None:
            metrics["memory"] = memory
        if self.peak is not None:
            flops = training_flops(self.model, torch.from_numpy(batch.loss_mask), loops=loops)
            metrics["mfu"] = round(metrics["tokens_per_second"] * flops / batch.tokens / (self.peak * self.team.size), 4)
        return metrics


def _uses(load: Tensor) -> dict[str, float]:
    """Return the load of the busiest expert in units of the mean, and the share of experts that no token chose: means over the layers.

    Args:
        load: as in `zoo.blocks.moe.expert_loads`.
    """
    return {
        "busiest": round((load.amax(1) / load.double().mean(1)).mean().item(), 3),
        "unused": round((load == 0).double().mean().item(), 4),
    }


def peak_memory(device: torch.device) -> int | None:
    """Return the peak number of bytes in use: allocated to tensors on a GPU, else resident in this process (None: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()
