"""The plan of an ablation: its arms, and the runs that match them by training tokens or by FLOPs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from zoo.config import nested, read_shipped, shipped, validate
from zoo.costs import describe, training_flops
from zoo.errors import ZooError, counted
from zoo.registry import nearest
from zoo.training.config import TrainConfig, absolute_paths, merge_runs, named_run, read_config
from zoo.training.loop import loops_at
from zoo.training.prepare import prepare

T = TypeVar("T")


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{list(values)} contains a duplicate")
    return values


Distinct = Annotated[tuple[T, ...], AfterValidator(_distinct)]
Match = Literal["tokens", "flops"]
Seeds = Distinct[Annotated[int, Field(ge=0)]]


class Budget(BaseModel):
    """Training length of arms."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    times: int = Field(default=1, ge=1, description="multiple of the tokens or FLOPs of `reference`")
    arms: Distinct[str] | None = Field(default=None, min_length=1, description="arms that get it; default: all")
    seeds: Seeds | None = Field(default=None, min_length=1, description="default: those of the plan")


class Matching(NamedTuple):
    """Budget at which a table of an ablation compares arms."""

    match: Match
    times: int = 1

    def __str__(self) -> str:
        return self.match if self.times == 1 else f"{self.match}-{self.times}x"


class Plan(BaseModel):
    """One ablation. Each file in `configs/ablations/` holds one, where `run` may name a run that `base` modifies."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    base: dict[str, Any] = Field(description="fields of the run that the arms modify")
    grid: dict[str, list[Any] | dict[str, Any]] = Field(
        {}, description="dotted paths of fields, each with a list of values, or with values by name: an arm for every combination"
    )
    arms: dict[str, dict[str, Any]] = Field({}, description="further arms by name: dotted paths of fields with their values")
    seeds: Seeds = Field((0, 1, 2), min_length=1)
    match: Distinct[Match] = Field(("tokens", "flops"), min_length=1, description="budgets in which to match the arms to `reference`")
    budgets: tuple[Budget, ...] = Field((Budget(),), min_length=1, description="how many tokens or FLOPs, as in `match`, the arms get")
    test_loops: Distinct[Annotated[int, Field(ge=1)]] = Field(
        (), description="further numbers of passes per sleep at which to evaluate finished runs"
    )
    reference: str | None = Field(None, description="the arm that trains for the steps of `base`; default: the first")

    @model_validator(mode="after")
    def _fits(self) -> Plan:
        if not self.grid and not self.arms:
            raise ValueError("grid: neither grid nor arms says what to compare")
        for path, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{path}: no values")
            if len(_by_name(values)) < len(values):
                raise ValueError(f"grid.{path}: {values} contains a duplicate")
        for path in (*self.grid, *itertools.chain(*self.arms.values())):
            if path in ("steps", "seed"):
                raise ValueError(f"{path}: belongs in {'base; match decides the steps of each arm' if path == 'steps' else 'seeds'}")
        if len({budget.times for budget in self.budgets}) < len(self.budgets):
            raise ValueError(f"budgets: {[budget.times for budget in self.budgets]} contains a duplicate")
        return self


def read_plan(source: str | Path, overrides: dict[str, Any] | None = None) -> Plan:
    """Read the ablation in a YAML file, or a shipped one ("cycle-small"), and apply overrides such as {"base": {"steps": 100}}.

    Paths in a file are relative to its folder; in overrides, to the current folder.

    Raises:
        ZooError: there is no such ablation, or a field is invalid.
    """
    overrides = overrides or {}
    if unknown := set(overrides) & set(TrainConfig.model_fields) - set(Plan.model_fields):
        raise ZooError(f"{source}: {min(unknown)}: a field of the run that every arm trains; write base.{min(unknown)}")
    fields, folder = read_shipped("ablations", "ablation", source), Path(source).parent
    run, shipped_plan = fields.pop("run", None), str(source) in shipped("ablations")
    if "run" in overrides:
        run = overrides["run"]
    elif run is not None and not shipped_plan:
        run = named_run(run, folder)
    base = {} if run is None else read_config(run).model_dump(mode="json", exclude_unset=True)
    if not shipped_plan:
        fields = _with_absolute_paths(fields, folder, base)
    fields = merge_runs(merge_runs({"base": base} if base else {}, fields), overrides)
    fields.pop("run", None)
    return validate(Plan, fields, str(source))


def _with_absolute_paths(fields: Mapping[str, Any], folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a plan based on `run` with their paths resolved from `folder`; malformed ones are left to `validate`."""
    found = dict(fields)
    if isinstance(base := fields.get("base"), Mapping):
        found["base"] = absolute_paths(base, folder, run.get("task"))
        run = merge_runs(run, base)
    task = run.get("task")
    if isinstance(arms := fields.get("arms"), Mapping):
        found["arms"] = {name: absolute_paths(arm, folder, task) if isinstance(arm, Mapping) else arm for name, arm in arms.items()}
    grid = fields.get("grid")
    for path, values in grid.items() if isinstance(grid, Mapping) else ():
        if isinstance(values, list | Mapping):
            written = _by_name(values)
            there = {name: absolute_paths({path: value}, folder, task)[path] for name, value in written.items()}
            if there != written:  # the names of arms do not depend on the folder
                found["grid"] = {**found["grid"], path: there}
    return found


class Costs(NamedTuple):
    """Costs of one training step and of an answer, and the size of the model."""

    tokens: int
    flops: dict[int, int]
    """See `zoo.costs.training_flops`; by passes per sleep."""
    parameters: int
    awake: int
    """FLOPs of one token while awake."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One variant of the run."""

    name: str
    fields: dict[str, Any]
    """Dotted paths and values that differ from the base."""
    config: TrainConfig
    """The run, with the steps and the seed of the base."""

    @cached_property
    def costs(self) -> Costs:
        """Costs, counted on the first batch."""
        task, model, *_ = prepare(self.config, torch.device("meta"))
        batch, most = task.batch(0, 0, self.config.batch_size), model.config.loops
        mask = torch.from_numpy(batch.loss_mask)
        flops = {loops: training_flops(model, mask, loops=loops) for loops in (range(1, most + 1) if self.config.ramp else [most])}
        return Costs(batch.tokens, flops, sum(p.numel() for p in model.parameters()), describe(model).flops_per_token)

    def flops(self, steps: int) -> int:
        """Return the FLOPs of a run of this many steps; steps of a ramp have fewer passes."""
        config, flops = self.config.model_copy(update={"steps": steps}), self.costs.flops
        return sum(flops[loops_at(step, config, max(flops))] for step in range(steps))

    def steps(self, match: Match, amount: int) -> int:
        """Return the number of steps that takes this amount of tokens or FLOPs."""
        if match == "tokens":
            return max(1, round(amount / self.costs.tokens))
        steps = max(1, round(amount / max(self.costs.flops.values())))
        for _ in range(3 if self.config.ramp else 0):  # the mean over a ramp hardly depends on its length
            steps = max(1, round(amount * steps / self.flops(steps)))
        return steps


@dataclass(frozen=True)
class Run:
    """An arm trained with one seed."""

    arm: Arm
    steps: int
    seed: int

    @cached_property
    def config(self) -> TrainConfig:
        """Raises a ZooError that names the run if the steps do not fit the other fields."""
        return validate(TrainConfig, {**self.arm.config.model_dump(), "steps": self.steps, "seed": self.seed}, f"run '{self}'")

    @cached_property
    def flops(self) -> int:
        return self.arm.flops(self.steps)

    @property
    def folder(self) -> str:
        return f"{_slug(self.arm.name)}-{self.steps}steps-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.arm.name}, {counted(self.steps, 'step')}, seed {self.seed}"


def arms_of(plan: Plan) -> list[Arm]:
    """Return every arm of the plan, checked.

    Raises:
        ZooError: an invalid field or value, or fields that do not fit together; names the arm.
    """
    named: dict[str, dict[str, Any]] = {}
    axes = [[(path, name, value) for name, value in _by_name(values).items()] for path, values in plan.grid.items()]
    for chosen in itertools.product(*axes) if axes else ():
        named[" ".join(f"{_short(path)}={name}" for path, name, _ in chosen)] = {path: value for path, _, value in chosen}
    for name, fields in plan.arms.items():
        if name in named:
            raise ZooError(f"arms.{name}: the grid has an arm of this name")
        named[name] = fields
    arms = []
    for name, fields in named.items():
        label, merged = f"arm '{name}'", plan.base
        for path, value in fields.items():
            merged = merge_runs(merged, nested(path, value))
        arms.append(Arm(name, fields, validate(TrainConfig, merged, label)))
        try:
            prepare(arms[-1].config, torch.device("meta"))
        except ZooError as error:
            raise ZooError(f"{label}: {error}") from None
    if len({_slug(name) for name in named}) < len(named):
        raise ZooError(f"arms: {', '.join(named)}: two would share a folder; rename one")
    used = [("budgets", name) for budget in plan.budgets for name in budget.arms or ()]
    for field, arm in [*used, *([("reference", plan.reference)] if plan.reference is not None else [])]:
        if arm not in named:
            raise ZooError(f"{field}: there is no arm '{arm}'; {nearest(arm, named)}")
    return arms


def runs_of(plan: Plan, arms: list[Arm]) -> dict[Matching, list[Run]]:
    """Return the runs for each matching; a run that serves several is in all of them.

    Each arm gets the number of steps that matches the tokens, or the FLOPs, of the reference, times those of the budget.
    """
    reference = next(arm for arm in arms if plan.reference in (None, arm.name))
    once = {"tokens": reference.config.steps * reference.costs.tokens, "flops": reference.flops(reference.config.steps)}
    return {
        Matching(match, budget.times): [
            Run(arm, arm.steps(match, budget.times * once[match]), seed)
            for arm in arms
            if arm.name in (budget.arms or (arm.name,))
            for seed in budget.seeds or plan.seeds
        ]
        for match in plan.match
        for budget in plan.budgets
    }


def _by_name(values: list[Any] | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values of one path of a grid by the name that they have in the names of arms."""
    return values if isinstance(values, Mapping) else {format_value(value): value for value in values}


def _short(path: str) -> str:
    return "N" if path == "overrides.loops" else path.removeprefix("overrides.")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name)


def format_value(value: Any) -> str:
    """Format the value of a config field."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
