"""The settings of a training run: the fields of `configs/train/*.yaml`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zoo.config import merge, read_shipped, shipped, validate
from zoo.errors import ZooError, counted
from zoo.files import as_path
from zoo.loss import Recompute
from zoo.registry import nearest
from zoo.tasks import tasks
from zoo.training.lora import LoRA
from zoo.training.parallel import Parallel
from zoo.training.run_folder import SETTINGS

Report = Callable[[dict[str, Any]], None]
"""Receives each line of metrics as it is written."""


class TrainConfig(BaseModel):
    """One training run. Each file in `configs/train/` holds one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(description="model name with suffixes, a YAML file, or the folder of a model, whose weights are the initial ones")
    overrides: dict[str, Any] = Field({}, description="config fields of the model to replace")
    weights: str | None = Field(
        None, description="initial weights: the folder of a run or of an upstream checkpoint; hub: download the published ones"
    )
    task: dict[str, Any] = Field(description="name and parameters of the task")
    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1, description="sequences per step")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the weights and of the data")
    accumulate: int = Field(1, ge=1, description="micro-batches per step and process")
    recompute: Recompute = Field("nothing", description="activations to recompute in the backward pass; see `zoo.model.Model.answers`")
    backward_chunks: int | None = Field(None, ge=1, description="truncate gradients to groups of this many chunks, counted from the last")
    compile: bool = Field(False, description="compile the blocks with torch.compile, on a CPU; needs a C++ compiler")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of weights and activations; master weights are float32")
    device: str | None = Field(None, description="default: cuda if available, else cpu")
    parallel: Parallel = Field("ddp", description="how the processes of torchrun share the model; see `zoo.training.parallel`")
    optimizer: str = Field("adamw", description="optimiser of embeddings, head, norms, gates and convolutions")
    lr: float = Field(3e-3, gt=0, description="learning rate of `optimizer`")
    muon_lr: float | None = Field(
        None, gt=0, description="learning rate of Muon for the matrices of the blocks; default: `optimizer` trains them too"
    )
    lr_scale: dict[str, float] = Field({}, description="learning-rate multipliers, by parameter-name pattern")
    frozen: tuple[str, ...] = Field((), description="name patterns of parameters that are not trained")
    lora: LoRA | None = Field(None, description="train low-rank adapters of linear layers, and freeze everything else")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of the matrices of linear layers and embeddings")
    no_decay: tuple[str, ...] = Field((), description="name patterns of further parameters without weight decay")
    lr_schedule: Literal["wsd", "cosine", "linear", "constant"] = Field(
        "wsd", description="after the warm-up: stable, then a linear decay; or a cosine or linear decay from there on; or no decay"
    )
    warmup: float = Field(0.05, ge=0, le=1, description="fraction of the steps over which the learning rate rises")
    decay: float = Field(0.3, ge=0, le=1, description="fraction of the steps over which the learning rate of wsd falls to zero")
    schedule: tuple[int, int] | None = Field(
        None, description="for a learning-rate schedule over several runs: the step at which this run begins, and the total number of steps"
    )
    ramp: float = Field(
        0.0, ge=0, le=1, description="fraction of the steps over which the passes per sleep rise from 1 to those of the model"
    )
    balance: float = Field(0.0, ge=0, description="weight of the load-balancing loss of mixtures of experts, added to the loss")
    clip: float = Field(1.0, gt=0, description="maximum norm of the gradient")
    diverged: float = Field(5.0, gt=1, description="stop when the loss stays above this multiple of its median over the first steps")
    log_every: int = Field(20, ge=1, description="steps between lines of metrics")
    eval_sequences: int = Field(512, ge=1, description="held-out sequences per evaluation")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="latest checkpoints to keep, besides the one with the lowest held-out loss")

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate: {self.accumulate} micro-batches are more than the {counted(self.batch_size, 'sequence')} of batch_size"
            )
        if self.compile and self.recompute != "nothing":
            raise ValueError(f"compile: true; compiled blocks recompute no activations; want recompute: nothing, not {self.recompute}")
        if self.compile and self.dtype != "float32":  # torch compiles nothing inside a dispatch mode, which `Float32Products` is
            raise ValueError(f"compile: true; products in {self.dtype} may run in float32, uncompiled; want dtype: float32")
        if self.lora is not None and self.parallel == "fsdp":
            raise ValueError("lora: parallel: fsdp does not shard adapters; want ddp")
        if self.lora is not None and self.muon_lr is not None and not self.lora.train:
            raise ValueError(f"muon_lr: {self.muon_lr}: adapters are trained by `optimizer`; want lora.train, or no muon_lr")
        if not all(factor > 0 for factor in self.lr_scale.values()):
            raise ValueError(f"lr_scale: {self.lr_scale}: want factors above 0; use frozen for parameters that are not trained")
        if self.lr_schedule != "wsd" and self.decay != (unset := type(self).model_fields["decay"].default):
            raise ValueError(f"decay: {self.decay}: only lr_schedule wsd has one, not {self.lr_schedule}; allowed: the default, {unset}")
        if self.schedule is not None and not 0 <= self.schedule[0] <= self.schedule[1] - self.steps:
            fit = f"{counted(self.steps, 'step')} {'does' if self.steps == 1 else 'do'} not fit"
            raise ValueError(f"schedule: {list(self.schedule)}: {fit} into it from there")
        return self


merge_runs = partial(merge, whole=("train",))  # several corpora with their weights are one value
"""`merge` for the fields of runs."""


def read_config(source: str | Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """Read a training run and apply overrides.

    Args:
        source: a YAML file, the folder of a run, or the name of a shipped run ("cycle"). A file may name another run as its
            `base` and list only the differences. Paths in it are relative to its folder; in overrides, to the current folder.
    Raises:
        ZooError: there is no such run, or a field is invalid.
    """
    if (as_path(source, "run") / SETTINGS).is_file() and str(source) not in shipped("train"):
        source = Path(source) / SETTINGS
    return validate(TrainConfig, merge_runs(_fields(source), overrides or {}), str(source))


def _fields(source: str | Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields of a file merged over those of its base. Paths are relative to the file; in shipped runs they stay as they are."""
    fields, shipped_run = read_shipped("train", "run", source), str(source) in shipped("train")
    base, inherited, here = fields.pop("base", None), dict[str, Any](), Path(source).parent
    if base is not None:
        named = str(base) if shipped_run else named_run(str(base), here)
        if named in (*above, str(source)):
            raise ZooError(f"{source}: base: '{base}' is based on this run itself")
        inherited = _fields(named, (*above, str(source)))
    if not shipped_run:
        fields = absolute_paths(fields, here, inherited.get("task"))
    return merge_runs(inherited, fields)


def named_run(name: str, folder: Path) -> str:
    """Return the run that a file in `folder` names: a shipped one, or the path of another, which is relative to `folder`.

    Raises:
        ZooError: neither a shipped run, nor a path.
    """
    known, path = shipped("train"), folder / as_path(name, "run")
    if name in known:
        return name
    if len(Path(name).parts) == 1 and path.suffix not in (".yaml", ".yml") and not os.path.isdir(path):
        raise ZooError(f"unknown run '{name}'; {nearest(name, known)}, or a YAML file")
    return str(path)


def absolute_paths(fields: Mapping[str, Any], folder: Path, task: object = None) -> dict[str, Any]:
    """Return the fields of a run, nested or by dotted path ("task.train"), with their paths resolved from `folder`.

    Args:
        task: the task that `fields` change, if they do not name one.
    """
    whole = next((t["name"] for t in (fields.get("task"), task) if isinstance(t, Mapping) and "name" in t), None)
    name = fields.get("task.name", whole)
    paths = tasks.get(name, "task.name").paths if name in tasks.names() else ()

    def resolved(path: str, value: Any) -> Any:
        match path.split("."):
            case ["weights"] if isinstance(value, str) and value != "hub":
                return _absolute(value, folder)
            case ["model"] if isinstance(value, str) and (value.endswith((".yaml", ".yml")) or (folder / value).is_dir()):
                return _absolute(value, folder)
            case ["task"] if isinstance(value, Mapping):
                return {field: resolved(f"task.{field}", inner) for field, inner in value.items()}
            case ["task", field] if field in paths:
                return _absolute(value, folder)
        return value

    return {path: resolved(str(path), value) for path, value in fields.items()}


def _absolute(value: Any, folder: Path) -> Any:
    """Resolve a path, or every path in a list or among the keys of a mapping."""
    if isinstance(value, list):
        return [_absolute(entry, folder) for entry in value]
    if isinstance(value, Mapping):
        return {_absolute(entry, folder): weight for entry, weight in value.items()}
    return os.path.abspath(folder / value) if isinstance(value, str) and not value.startswith("hub:") else value
