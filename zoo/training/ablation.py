"""Ablations: compare runs that differ in a few fields, given the same number of training tokens or of FLOPs.

The folder of an ablation:

plan.yaml                            the plan; an ablation resumes only under the same one
runs/<arm>-<steps>steps-seed<seed>/  one run each; see `zoo.training.run_folder`
runs/<run>/test_loops.json           accuracy by passes per sleep at test time, if the plan asks for it
runs.csv                             a row per matching, arm, seed and level
table.md tokens.png flops.png        mean and range over the seeds, computed from the runs
scaling.png                          accuracy against training FLOPs, if the plan has several budgets of them
"""

from __future__ import annotations

import csv
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from zoo.checkpoints.own import load
from zoo.config import read_yaml
from zoo.errors import ZooError, counted
from zoo.files import new_folder, refuse_existing, remove_scratch, replacing
from zoo.signals import deferred
from zoo.system import lock
from zoo.tasks import new_task
from zoo.training import scaling
from zoo.training.config import read_config
from zoo.training.evaluate import evaluate
from zoo.training.plan import Arm, Matching, Plan, Run, arms_of, runs_of
from zoo.training.plots import Groups, figure, read_run, save
from zoo.training.run_folder import RESULTS
from zoo.training.run_inputs import check_inputs
from zoo.training.tables import Results, csv_rows, markdown
from zoo.training.workers import Job, train_all

PLAN = "plan.yaml"
TEST_LOOPS = "test_loops.json"


TrainAll = Callable[[Mapping[Run, Job], int | None], dict[Run, str]]
"""Function that does jobs, some at once; `zoo.training.workers.train_all` and `zoo.integrations.ray.train_all` are two."""


def ablate(plan: Plan, out: Path, *, processes: int | None = None, shard: tuple[int, int] = (1, 1), on: TrainAll | None = None) -> str:
    """Train every arm with every seed in the folder `out`, or resume what is there; then write the table and draw the plots.

    Processes on one or several machines may do this at the same time in the same folder: each trains runs that no other is training.

    Args:
        processes: runs at once, each with one thread or one GPU; default: one per GPU, or else per core.
        on: where the runs are trained; default: in processes of this machine.
        shard: (K, N): train only the K-th of N parts of the runs; tables and plots are those of all runs that are finished.
    Returns:
        The tables as Markdown.
    Raises:
        ZooError: an invalid plan, or `out` holds something else: before any work. At the end, if runs failed.
        StoppedError: after one of the signals of `zoo.signals`; runs in progress have written a checkpoint.
    """
    arms = arms_of(plan)
    lacking = {name for name in ("budgets", "test_loops") if getattr(plan, name) == Plan.model_fields[name].default}  # in older folders
    settings = plan.model_dump(mode="json", exclude=lacking)
    if not (out / PLAN).is_file():
        refuse_existing(out)
    else:
        _check_plan(settings, out)
    matched = runs_of(plan, arms)
    runs = sorted(dict.fromkeys(itertools.chain(*matched.values())), key=lambda run: -run.flops)
    part, parts = shard
    if parts > len(runs):
        raise ZooError(f"shard: {part}/{parts}: the plan has only {counted(len(runs), 'run')}")
    _check_runs(runs, out / "runs")
    with deferred():
        _begin(settings, out)
    failed = (on or train_all)(_jobs(runs[part - 1 :: parts], out / "runs", plan.test_loops), processes)
    with deferred(), _sole_writer(out):
        remove_scratch(out)
        tables = _write_results(plan, arms, matched, out)
    if failed:
        raise ZooError(f"{out}: {counted(len(failed), 'run')} failed: " + "; ".join(f"{run}: {why}" for run, why in failed.items()))
    return tables


def _check_plan(settings: dict[str, Any], out: Path) -> None:
    if read_yaml(out / PLAN) != settings:
        raise ZooError(f"{out}: holds another ablation; resume with the same plan ({out / PLAN}), or choose another folder")


def _begin(settings: dict[str, Any], out: Path) -> None:
    """Write the plan, unless it is there."""
    if not (out / PLAN).is_file():
        try:
            with new_folder(out) as folder:
                (folder / PLAN).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        except ZooError:
            if not (out / PLAN).is_file():  # otherwise another process was faster
                raise
    _check_plan(settings, out)


@contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """Wait until no other process writes tables and plots."""
    with (out / PLAN).open(encoding="utf-8") as file:
        while not lock(file):
            time.sleep(0.1)
        yield


def _check_runs(runs: Iterable[Run], folder: Path) -> None:
    """Raise ZooError if a config is invalid, or the data of a finished run has changed: one table would compare runs on different data."""
    known: dict[str, dict[str, str]] = {}
    for run in runs:
        config = run.config
        if (folder / run.folder / RESULTS).exists():
            if (task := json.dumps(config.task)) not in known:
                known[task] = new_task(config.task).fingerprints()
            check_inputs(folder / run.folder, known[task])


def _jobs(runs: Iterable[Run], folder: Path, test_loops: tuple[int, ...]) -> dict[Run, Job]:
    """Return the jobs of the runs that are not finished, in order."""
    pending = [run for run in runs if not (folder / run.folder / _last_file(test_loops)).exists()]
    after = partial(evaluate_with, loops=test_loops) if test_loops else None
    return {run: Job(run.config, folder / run.folder, after) for run in pending}


def _last_file(test_loops: tuple[int, ...]) -> str:
    """Return the name of the file that is written last for a run."""
    return TEST_LOOPS if test_loops else RESULTS


def evaluate_with(folder: Path, loops: tuple[int, ...]) -> None:
    """Evaluate a finished run with other numbers of passes per sleep, and write the accuracy for each."""
    config, model = read_config(folder), load(folder)
    found = {n: evaluate(model, new_task(config.task), config.eval_sequences, seed=config.seed, loops=n)["accuracy"] for n in loops}
    with replacing(folder / TEST_LOOPS) as file:
        file.write_text(json.dumps(found), encoding="utf-8")


def _by_test_loops(folder: Path) -> dict[str, Any]:
    """Return what `evaluate_with` wrote, if it did."""
    if not (folder / TEST_LOOPS).exists():
        return {}
    return {"test_loops": {int(n): share for n, share in json.loads((folder / TEST_LOOPS).read_text(encoding="utf-8")).items()}}


def _write_results(plan: Plan, arms: list[Arm], matched: dict[Matching, list[Run]], out: Path) -> str:
    """Write runs.csv, table.md and the plots of the runs that are finished, and return the table."""
    rows, tables, grouped, by_budget = [], [], dict[Matching, Groups](), dict[Matching, Results]()
    for match, runs in matched.items():
        folders = {run: out / "runs" / run.folder for run in runs}
        trained = {run: read_run(folder) for run, folder in folders.items() if (folder / _last_file(plan.test_loops)).exists()}
        results = {run: one.results | _by_test_loops(folders[run]) for run, one in trained.items() if one.results}
        if results:
            rows += list(csv_rows(match, results))
            tables.append(markdown(match, results, arms, plan.reference or arms[0].name, list(dict.fromkeys(run.seed for run in runs))))
            by_arm = {arm.name: [one for run, one in trained.items() if run.arm is arm] for arm in arms}
            grouped[match] = {name: runs for name, runs in by_arm.items() if runs}
            if match.match == "flops":
                by_budget[match] = results
    if len(by_budget) > 1:
        tables.append(scaling.markdown(by_budget, arms))
    with replacing(out / "runs.csv") as file, file.open("w", newline="", encoding="utf-8") as lines:
        table = csv.DictWriter(lines, list(dict.fromkeys(itertools.chain(*rows))), restval="")
        table.writeheader()
        table.writerows(rows)
    with replacing(out / "table.md") as file:
        file.write_text("\n".join(tables), encoding="utf-8")
    for match, groups in grouped.items():  # last, since a figure that fails must not take the tables with it
        save(figure(groups), out / f"{match}.png")
    if len(by_budget) > 1:
        save(scaling.figure(by_budget, arms), out / "scaling.png")
    return "\n".join(tables)
