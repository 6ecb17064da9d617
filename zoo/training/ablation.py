"""Ablations: runs that differ in a few fields, given the same tokens or the same operations, and one table of what they reached.

A folder of an ablation holds

plan.yaml               what was asked for; the folder goes on only under the same
runs/<arm>-<steps>steps-seed<seed>/     a run each; `zoo.training.run_folder` says what it holds
runs.csv                a line per matching, arm, seed and level
table.md tokens.png flops.png           mean and range over the seeds; redrawn from the runs
"""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.progress import TaskID

from zoo.config import merge, nested, read_shipped, read_yaml, validate
from zoo.costs import training_flops
from zoo.errors import ZooError
from zoo.files import new_folder, refuse_existing, replacing
from zoo.registry import nearest
from zoo.training.config import TrainConfig, read_config
from zoo.training.loop import StoppedError, prepare, sigterm, train
from zoo.training.plots import figure, read_run, save
from zoo.training.reporting import add_run, advance, new_progress
from zoo.training.run_folder import RESULTS
from zoo.training.workers import end_with_parent

Match = Literal["tokens", "flops"]
PLAN = "plan.yaml"


class Plan(BaseModel):
    """One ablation. `configs/ablations/*.yaml` holds one of these per file; there, `run` may name a run that `base` changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: dict[str, Any] = Field(description="fields of the run that the arms change")
    grid: dict[str, list[Any]] = Field({}, description="dotted paths of a run's fields, and values: an arm for every combination")
    arms: dict[str, dict[str, Any]] = Field({}, description="more arms: names, and dotted paths of fields with their values")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    match: tuple[Match, ...] = Field(("tokens", "flops"), min_length=1, description="what each arm is given as much of as `reference` is")
    reference: str | None = Field(None, description="the arm that takes the steps of `base`; default: the first")

    @model_validator(mode="after")
    def _fits(self) -> Plan:
        if not self.grid and not self.arms:
            raise ValueError("grid: neither grid nor arms says what to compare")
        for path, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{path}: no values")
        for path in (*self.grid, *itertools.chain(*self.arms.values())):
            if path in ("steps", "seed"):
                raise ValueError(f"{path}: belongs into {'base; match decides the steps of each arm' if path == 'steps' else 'seeds'}")
        for field in ("seeds", "match"):
            if len(set(getattr(self, field))) < len(getattr(self, field)):
                raise ValueError(f"{field}: {list(getattr(self, field))} names one twice")
        return self


def read_plan(source: str | Path, overrides: dict[str, Any] | None = None) -> Plan:
    """The ablation in a YAML file, or a shipped one ("cycle-small"), with overrides ({"base": {"steps": 100}}). Raises ZooError."""
    fields = merge(read_shipped("ablations", "ablation", source), overrides or {})
    run = fields.pop("run", None)
    if run is not None:
        fields["base"] = merge(read_config(run).model_dump(mode="json", exclude_unset=True), fields.get("base", {}))
    return validate(Plan, fields, str(source))


class Costs(NamedTuple):
    """Of one training step, and of the model."""

    tokens: int
    flops: int
    """See `zoo.costs.training_flops`."""
    parameters: int


@dataclass(frozen=True, eq=False)
class Arm:
    """Something to compare."""

    name: str
    fields: dict[str, Any]
    """Dotted paths and values: what differs from the base."""
    config: TrainConfig
    """With the base's steps and seed."""

    @cached_property
    def costs(self) -> Costs:
        """Those of a step, counted on the first batch."""
        task, model, *_ = prepare(self.config, torch.device("meta"))
        mask = task.batch(0, 0, self.config.batch_size).loss_mask
        return Costs(mask.size, training_flops(model, torch.from_numpy(mask)), sum(p.numel() for p in model.parameters()))


@dataclass(frozen=True)
class Run:
    """One arm, trained once."""

    arm: Arm
    steps: int
    seed: int

    @property
    def config(self) -> TrainConfig:
        return self.arm.config.model_copy(update={"steps": self.steps, "seed": self.seed})

    @property
    def folder(self) -> str:
        return f"{_slug(self.arm.name)}-{self.steps}steps-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.arm.name}, {self.steps} steps, seed {self.seed}"


def arms_of(plan: Plan) -> list[Arm]:
    """Every arm, once its run has been found to fit together.

    Raises:
        ZooError: a field, a value, or fields that do not fit together; names the arm.
    """
    named: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*plan.grid.values()) if plan.grid else ():
        fields = dict(zip(plan.grid, values, strict=True))
        named[" ".join(f"{_short(path)}={_text(value)}" for path, value in fields.items())] = fields
    for name, fields in plan.arms.items():
        if name in named:
            raise ZooError(f"arms.{name}: the grid has an arm of this name")
        named[name] = fields
    arms = []
    for name, fields in named.items():
        label, merged = f"arm '{name}'", plan.base
        for path, value in fields.items():
            merged = merge(merged, nested(path, value))
        arms.append(Arm(name, fields, validate(TrainConfig, merged, label)))
        try:
            prepare(arms[-1].config, torch.device("meta"))
        except ZooError as error:
            raise ZooError(f"{label}: {error}") from None
    if len({_slug(name) for name in named}) < len(named):
        raise ZooError(f"arms: {', '.join(named)}: two would share a folder; call one something else")
    if plan.reference is not None and plan.reference not in named:
        raise ZooError(f"reference: there is no arm '{plan.reference}'; {nearest(plan.reference, named)}")
    return arms


def runs_of(plan: Plan, arms: list[Arm]) -> dict[Match, list[Run]]:
    """The runs of each matching; one that serves two is in both.

    An arm takes as many steps as bring it to the tokens, or to the operations, of the reference.
    """
    reference = next(arm for arm in arms if plan.reference in (None, arm.name))
    matched = {}
    for match in plan.match:
        each = {arm: arm.config.steps * getattr(reference.costs, match) / getattr(arm.costs, match) for arm in arms}
        matched[match] = [Run(arm, max(1, round(steps)), seed) for arm, steps in each.items() for seed in plan.seeds]
    return matched


def ablate(plan: Plan, out: Path, *, processes: int | None = None) -> str:
    """Train every arm at every seed in the folder `out`, or go on with what is there; then write the table and draw the plots.

    Args:
        processes: runs at once, each with one thread, or one GPU; default: as many as there are GPUs, else cores.
    Returns:
        The table, as Markdown.
    Raises:
        ZooError: a plan that does not fit, or something else in `out`: before any work. At the end, if runs failed.
        StoppedError: after SIGTERM or Ctrl-C; runs that were under way have written a checkpoint.
    """
    arms = arms_of(plan)
    settings = plan.model_dump(mode="json")
    new = not (out / PLAN).is_file()
    if new:
        refuse_existing(out)
    elif read_yaml(out / PLAN) != settings:
        raise ZooError(f"{out}: holds another ablation; go on with the same ({out / PLAN}), or choose another folder")
    matched = runs_of(plan, arms)
    if new:
        with new_folder(out) as folder:
            (folder / PLAN).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    failed = _train_all(dict.fromkeys(itertools.chain(*matched.values())), out / "runs", processes)
    rows, tables = [], []
    for match, runs in matched.items():
        trained = {run: read_run(out / "runs" / run.folder) for run in runs if run not in failed}
        results = {run: one.results for run, one in trained.items() if one.results}
        if results:
            rows += list(_rows(match, results))
            tables.append(_table(match, results, plan, arms))
            grouped = {arm.name: [one for run, one in trained.items() if run.arm is arm] for arm in arms}
            save(figure({name: runs for name, runs in grouped.items() if runs}), out / f"{match}.png")
    with replacing(out / "runs.csv") as file, file.open("w", newline="", encoding="utf-8") as lines:
        table = csv.DictWriter(lines, list(dict.fromkeys(itertools.chain(*rows))), restval="")
        table.writeheader()
        table.writerows(rows)
    with replacing(out / "table.md") as file:
        file.write_text("\n".join(tables), encoding="utf-8")
    if failed:
        raise ZooError(f"{out}: {len(failed)} runs failed: " + "; ".join(f"{run}: {why}" for run, why in failed.items()))
    return "\n".join(tables)


def _train_all(runs: Iterable[Run], folder: Path, processes: int | None) -> dict[Run, str]:
    """Train those that are not finished, the longest first, in processes of their own; those that failed, and why."""
    runs = list(runs)
    left = [run for run in runs if not (folder / run.folder / RESULTS).exists()]
    left.sort(key=lambda run: run.steps * run.arm.costs.flops)
    slots = min(processes or torch.cuda.device_count() or len(os.sched_getaffinity(0)), len(left))
    workers: dict[Any, _Worker] = {}
    failed: dict[Run, str] = {}
    stopped = False
    with new_progress() as progress, sigterm() as asked_to_stop:
        try:
            while (left or any(worker.run for worker in workers.values())) and not (stopped := asked_to_stop()):
                for slot in set(range(slots)) - {worker.slot for worker in workers.values()}:
                    worker = _Worker(slot)
                    workers[worker.connection] = worker
                for worker in workers.values():
                    if left and worker.run is None:
                        worker.run = left.pop()
                        worker.bar = add_run(progress, str(worker.run), worker.run.steps)
                        with suppress(BrokenPipeError):  # it ended; below we hear so
                            worker.connection.send((worker.run.config, folder / worker.run.folder))
                for connection in wait(list(workers), timeout=1):
                    worker = workers[connection]
                    try:
                        said = worker.connection.recv()
                    except (EOFError, ConnectionResetError):
                        worker.process.join()
                        del workers[connection]
                        said = f"its process ended with status {worker.process.exitcode}"
                    if isinstance(said, dict):
                        advance(progress, worker.bar, said)
                    elif worker.run is not None:
                        if said is not None:
                            failed[worker.run] = said
                        progress.remove_task(worker.bar)
                        progress.console.print(f"{worker.run}: {said or 'done'}")
                        worker.run = None
        except KeyboardInterrupt:
            stopped = True
        finally:
            for worker in workers.values():
                worker.process.terminate()
            for worker in workers.values():
                worker.process.join()
    if stopped:
        raise StoppedError(f"{folder.parent}: stopped; the same command goes on from there")
    return failed


class _Worker:
    """A process that trains one run after the other; on the connection it says how it goes, and at a run's end None or what went wrong."""

    run: Run | None = None
    bar: TaskID

    def __init__(self, slot: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.slot = slot
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, slot), daemon=True)
        self.process.start()
        theirs.close()


def _work(connection: Connection, slot: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent sends SIGTERM, on which a run saves itself
    end_with_parent()
    torch.set_num_threads(1)
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(slot % gpus)

    def report(said: Any) -> None:
        with suppress(BrokenPipeError):  # the parent is gone: SIGTERM is on its way
            connection.send(said)

    while True:
        config, folder = connection.recv()
        try:
            train(config, folder, report=report)
        except ZooError as error:
            report(str(error))
        except StoppedError:
            return
        else:
            report(None)


def _rows(match: Match, results: dict[Run, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of runs.csv: for each run one for all levels together, and one for each."""
    paths = list(dict.fromkeys(path for run in results for path in run.arm.fields))
    for run, found in results.items():
        costs, settings = run.arm.costs, run.config.model_dump()
        row = {
            "match": match,
            "arm": run.arm.name,
            **{path: _text(_at(settings, path)) for path in paths},
            "seed": run.seed,
            "steps": run.steps,
            "tokens": run.steps * costs.tokens,
            "flops": run.steps * costs.flops,
            "parameters": costs.parameters,
            "best_guess": found["chance"],
        }
        yield {**row, "level": "all", "loss": found["loss"], "accuracy": found["accuracy"], "exact": found["exact"]}
        for level, accuracy in found["by_level"].items():
            yield {**row, "level": level, "loss": found["loss_by_level"][level], "accuracy": accuracy}


def _table(match: Match, results: dict[Run, dict[str, Any]], plan: Plan, arms: list[Arm]) -> str:
    """Markdown: an arm a line, mean and range over its seeds."""
    some = next(iter(results.values()))
    levels = list(dict.fromkeys(itertools.chain(*(found["by_level"] for found in results.values()))))
    scores = [("right", "accuracy", None), *((f"{level} {some['level_name']}", "by_level", level) for level in levels if len(levels) > 1)]
    if some["exact_chance"] is not None:
        scores.append(("whole sequences", "exact", None))
    lines = [
        f"## The same {'tokens' if match == 'tokens' else 'training FLOPs'} as {plan.reference or arms[0].name}",
        "",
        f"| arm | parameters | steps | Mtokens | TFLOPs | {' | '.join(title for title, *_ in scores)} | best guess |",
        "|---|" + "---:|" * (len(scores) + 5),
    ]
    for arm in arms:
        done = {run: found for run, found in results.items() if run.arm is arm}
        if not done:
            continue
        steps, found = next(iter(done)).steps, next(iter(done.values()))
        cells = [arm.name if len(done) == len(plan.seeds) else f"{arm.name} ({len(done)} of {len(plan.seeds)} seeds)"]
        cells += [
            f"{arm.costs.parameters:,}",
            f"{steps:,}",
            f"{steps * arm.costs.tokens / 1e6:.3g}",
            f"{steps * arm.costs.flops / 1e12:.3g}",
        ]
        for _, field, level in scores:
            cells.append(_spread([one[field] if level is None else one[field].get(level) for one in done.values()]))
        cells.append(f"{found['chance']:.1%}" + ("" if found["exact_chance"] is None else f", whole {found['exact_chance']:.2%}"))
        lines.append(f"| {' | '.join(cells)} |")
    seeds = ", ".join(map(str, plan.seeds))
    lines += ["", f"{some['answers']:,} held-out answers a run; mean (least-most) of seeds {seeds}; torch {torch.__version__}.", ""]
    return "\n".join(lines)


def _spread(values: list[float | None]) -> str:
    """Mean and range."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{fmean(known):.1%}" + (f" ({100 * min(known):.1f}-{100 * max(known):.1f})" if len(known) > 1 else "")


def _at(settings: Any, path: str) -> Any:
    """What is at a dotted path, or nothing."""
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings


def _short(path: str) -> str:
    return "N" if path == "overrides.loops" else path.removeprefix("overrides.")


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name)
