"""Training: one loop, Muon for matrices and AdamW for the rest, metrics as JSON lines, a checkpoint at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from zoo.config import merge, read_yaml, validate
from zoo.files import refuse_existing, replacing
from zoo.kernels.registry import ZooError, nearest
from zoo.model import Model
from zoo.tasks import Task, new_task
from zoo.weights import create, write

Report = Callable[[dict[str, Any]], None]


class TrainConfig(BaseModel):
    """One training run. `configs/train/*.yaml` holds one of these per file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="a model name with suffixes, or a YAML file")
    overrides: dict[str, Any] = Field({}, description="config fields of the model to replace")
    task: dict[str, Any] = Field(description="a task's name and parameters")
    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1, description="sequences per step")
    seed: int = Field(0, ge=0, description="of the weights and of the data")
    lr: float = Field(3e-3, gt=0, description="of AdamW: embeddings, head, norms, gates, convolutions")
    muon_lr: float | None = Field(None, gt=0, description="of Muon: the matrices of the blocks; default: AdamW trains them too")
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps in which the rate rises")
    decay: float = Field(0.3, ge=0, le=1, description="share of the steps in which the rate falls to zero")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    log_every: int = Field(20, ge=1, description="steps")
    eval_sequences: int = Field(512, ge=1)


def read_config(source: str | Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """The run that a YAML file describes, or one that this package brings ("cycle"), with overrides. Raises ZooError."""
    shipped = {file.name.removesuffix(".yaml"): file for file in files("zoo.configs").joinpath("train").iterdir()}
    if Path(source).suffix not in (".yaml", ".yml") and str(source) not in shipped:
        raise ZooError(f"unknown run '{source}'; a YAML file, or {nearest(str(source), shipped)}")
    return validate(TrainConfig, merge(read_yaml(shipped.get(str(source), Path(source))), overrides or {}), str(source))


def train(config: TrainConfig, out: str | Path, *, report: Report = lambda metrics: None) -> dict[str, Any]:
    """Run `config` and write the new folder `out`: train.yaml, metrics.jsonl, the model, results.json.

    Args:
        report: called with each line of metrics.
    Returns:
        What `evaluate` finds on the test split.
    Raises:
        ZooError: a config that does not fit, or an `out` that exists: before any work. Also a loss that is not finite.
    """
    out = Path(out)
    task = new_task(config.task)
    refuse_existing(out)
    model = create(config.model, seed=config.seed, **{"vocab_size": task.vocab_size, **config.overrides})
    check_fit(model, task)
    optimizers = make_optimizers(model, config)
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    model.train()
    seen, since = 0, time.perf_counter()
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as lines:
        for step in range(config.steps):
            rate = schedule(step, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * rate
            ids, mask, level = (torch.from_numpy(x) for x in task.batch(config.seed, step, config.batch_size))
            answers = model.answers(ids, mask)
            loss = answers.losses().mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            if not torch.isfinite(loss + norm):
                raise ZooError(f"{out}: loss {loss.item()} with gradient norm {norm.item()} at step {step}; try a lower lr")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            seen += ids.numel()
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                now = time.perf_counter()
                right = answers.right()
                metrics = {
                    "step": step + 1,
                    "tokens": (step + 1) * ids.numel(),
                    "loss": round(loss.item(), 5),
                    "accuracy": round(right.float().mean().item(), 5),
                    "by_level": _by_level(right, level.flatten()[answers.place]),
                    "grad_norm": round(norm.item(), 4),
                    "lr": rate * config.lr,
                    "tokens_per_second": round(seen / (now - since)),
                }
                seen, since = 0, now
                lines.write(json.dumps(metrics) + "\n")
                lines.flush()
                report(metrics)
    write(model, out)
    results = evaluate(model, task, config.eval_sequences, seed=config.seed)
    with replacing(out / "results.json") as file:
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def check_fit(model: Model, task: Task) -> None:
    """ZooError if the model cannot read the task's sequences as they are laid out."""
    if model.config.vocab_size < task.vocab_size:
        raise ZooError(f"vocab_size: {model.config.vocab_size} is less than the {task.vocab_size} tokens of the task")
    if model.config.window not in (None, task.window):
        raise ZooError(f"window: {model.config.window}, but the task lays its sequences out for windows of {task.window}")


def make_optimizers(model: Model, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks if `muon_lr` is given; AdamW for everything else."""
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)] if config.muon_lr else []
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)]
    if config.muon_lr:
        made.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the full rate at a step: a rise, a plateau, a straight fall to zero (warm-up, stable, decay)."""
    rise = (step + 1) / max(1.0, config.warmup * config.steps)
    fall = (config.steps - step) / max(1.0, config.decay * config.steps)
    return min(1.0, rise, fall)


@torch.no_grad()
def evaluate(model: Model, task: Task, sequences: int, *, seed: int = 0, loops: int | None = None, batch_size: int = 256) -> dict[str, Any]:
    """How a model does on `sequences` held-out sequences, with `loops` passes per sleep (default: as configured).

    Returns loss, accuracy (share of right answers), exact (share of sequences with every answer right), accuracy by
    level, and the task's chance levels.
    """
    check_fit(model, task)
    losses, right, levels, exact = [], [], [], []
    for start in range(0, sequences, batch_size):
        batch = task.batch(seed, start, min(batch_size, sequences - start), "test")
        ids, mask, level = (torch.from_numpy(x) for x in batch)
        answers = model.answers(ids, mask, loops=loops)
        hit = answers.right()
        losses.append(answers.losses())
        right.append(hit)
        levels.append(level.flatten()[answers.place])
        wrong = torch.zeros(ids.numel(), dtype=torch.bool).index_copy(0, answers.place, ~hit)
        exact.append(~wrong.view_as(ids).any(1))
    hits = torch.cat(right)
    return {
        "model": model.config.name,
        "task": str(task),
        "level_name": task.level_name,
        "loss": torch.cat(losses).mean().item(),
        "accuracy": hits.float().mean().item(),
        "exact": torch.cat(exact).float().mean().item(),
        "by_level": _by_level(hits, torch.cat(levels)),
        "chance": task.chance(),
        "exact_chance": task.exact_chance(),
        "answers": len(hits),
    }


def _by_level(right: Tensor, level: Tensor) -> dict[int, float]:
    return {int(n): round(right[level == n].float().mean().item(), 5) for n in np.unique(level.numpy())}
