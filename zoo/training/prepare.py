"""The objects that a run trains, created from its config."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from zoo.checkpoints.companions import same_tokenizer, tokenizers
from zoo.checkpoints.own import configure, read_config
from zoo.config import ModelConfig, resolve
from zoo.errors import ZooError
from zoo.factory import create
from zoo.model import Model
from zoo.sessions.sleeping_model import fingerprint
from zoo.tasks import Task, new_task
from zoo.training.compiled import with_compiled_blocks
from zoo.training.config import TrainConfig
from zoo.training.evaluate import check_fit
from zoo.training.lora import LoRA, add_adapters
from zoo.training.optimizers import Weights, exempt_from_decay, freeze, make_optimizers
from zoo.training.parallel import Answer, Team


class Prepared(NamedTuple):
    """The objects that a run trains."""

    task: Task
    model: Model
    answer: Answer
    """`model.answers`, over all processes of the team."""
    weights: Weights
    optimizers: list[torch.optim.Optimizer]
    frozen: str | None
    """Fingerprint of the weights that adapters are trained for."""


def prepare(config: TrainConfig, device: torch.device, team: Team | None = None, *, initial: bool = True) -> Prepared:
    """Create everything that `config` names; on the meta device without weights.

    Args:
        initial: read the initial weights, if the config names any.
    Raises:
        ZooError: the parts do not fit together.
    """
    task = new_task(config.task)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    folder = Path(config.model) if Path(config.model).is_dir() else None
    source = (config.weights or folder) if initial and device.type != "meta" else None
    model = create(
        model_config(config, task),
        device=device,
        dtype=dtype,
        seed=config.seed,
        pretrained=source == "hub" or source or False,
    )
    _check_tokenizers(config, model, task)
    model.companions = model.companions or task.companions()
    check_fit(model, task)
    if config.balance and "moe" not in model.config.mlp_pattern:
        raise ZooError(f"balance: {config.balance}: {model.config.name} has no mixture of experts (mlp: moe); want 0")
    frozen = fingerprint(model) if config.lora is not None and device.type != "meta" else None
    if config.lora is not None:
        _check_adapter(config.lora, model, config.weights or folder)
        add_adapters(model, config.lora, seed=config.seed)
    freeze(model, config.frozen)
    team = team or Team(device)
    answer = team.parallelize(model, config.parallel)
    if config.compile and device.type != "meta":
        if team.size > 1:
            raise ZooError(f"compile: true; only training in one process is compiled, not in {team.size}; want false")
        answer = with_compiled_blocks(model, None if _has_fixed_sizes(task, config) else config.batch_size // config.accumulate).answers
    weights = Weights(model)
    optimizers = make_optimizers(
        model,
        weights,
        lr=config.lr,
        muon_lr=config.muon_lr,
        weight_decay=config.weight_decay,
        optimizer=config.optimizer,
        lr_scale=config.lr_scale,
        exempt=exempt_from_decay(model, config.no_decay),
    )
    return Prepared(task, model, answer, weights, optimizers, frozen)


def model_config(config: TrainConfig, task: Task) -> ModelConfig:
    """Return the config of the model that a run trains on its task. Raises ZooError."""
    fields = {**({"sleep_on": "every"} if task.loss_everywhere else {}), **config.overrides}
    if Path(config.model).is_dir():
        return configure(Path(config.model), fields)
    return resolve(config.model, {"vocab_size": task.vocab_size, **fields})


def _check_tokenizers(config: TrainConfig, model: Model, task: Task) -> None:
    """Raise ZooError if the text of a task is not in the tokens of a model that has a tokenizer."""
    if not task.is_text or not tokenizers(model.companions):
        return
    of, field = config.weights or config.model, "task.train" if task.of_ids else "task.tokenizer"
    companions = task.companions()
    if not tokenizers(companions) and not task.of_ids:
        raise ZooError(f"{field}: none, so the task reads bytes, but {of} has a tokenizer")
    if not same_tokenizer(model.companions, companions):
        raise ZooError(f"{field}: the tokenizer is not that of {of}; want the same vocabulary")


def _check_adapter(lora: LoRA, model: Model, base: str | Path | None) -> None:
    """Raise ZooError if a run is to end with adapters alone, for blocks that the checkpoint it starts from lacks."""
    if lora.output != "adapter" or base is None:
        return
    stored = read_config(Path(base)).pattern if Path(base).is_dir() else ()
    blocks = dict(zip(model.config.pattern, model.blocks, strict=True))
    if added := [kind for kind, block in blocks.items() if block.inserted and kind not in stored]:
        raise ZooError(f"lora.output: adapter: an adapter cannot hold the inserted blocks ({', '.join(added)}); want output: merged")


def _has_fixed_sizes(task: Task, config: TrainConfig) -> bool:
    """Return whether all batches seem to have the same length, and loss at the same places: found from the first two."""
    first, second = (task.batch(config.seed, step, config.batch_size).loss_mask for step in range(2))
    return np.array_equal(first, second) and config.batch_size % config.accumulate == 0
