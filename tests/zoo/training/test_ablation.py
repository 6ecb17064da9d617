"""Ablations: the arms of a plan, how they are matched, which plans are refused, and the files that come out."""

import csv
import fcntl
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from importlib.resources import files

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import zoo
from tests.zoo.training.tiny import TINY
from zoo.cli import main
from zoo.costs import training_flops
from zoo.training.ablation import ablate
from zoo.training.loop import train
from zoo.training.plan import arms_of, read_plan, runs_of
from zoo.training.plots import figure, grouped, read_run
from zoo.training.prepare import prepare
from zoo.training.workers import finish

BASE = {**TINY, "model": "gdn4-sleep2-hard5", "task": {"name": "cycle", "nodes": 5, "hops": 2}, "steps": 4, "eval_sequences": 8}
ZOO = [sys.executable, "-c", "from zoo.cli import main; main()"]
PLAN = {"base": BASE, "grid": {"overrides.loops": [1, 4]}, "seeds": [0, 3]}


@pytest.fixture
def planned(tmp_path):
    """Return a function that reads a plan from a file."""

    def read(overrides=None, **fields):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({**PLAN, **fields}, sort_keys=False))
        return read_plan(tmp_path / "plan.yaml", overrides)

    return read


def test_a_grid_is_every_combination_and_arms_come_on_top(planned):
    plan = planned(
        grid={"overrides.loops": [1, 4], "task.hops": [1, 3], "lr": [0.1]},
        arms={"deep": {"overrides.layers": "(attn gdn)*2", "overrides.blocks.gdn.heads": 2}},
    )
    arms = arms_of(plan)
    assert [arm.name for arm in arms] == [*(f"N={n} task.hops={k} lr=0.1" for n in (1, 4) for k in (1, 3)), "deep"]
    assert [(a.config.overrides["loops"], a.config.task["hops"], a.config.lr) for a in arms[:4]] == [
        (1, 1, 0.1), (1, 3, 0.1), (4, 1, 0.1), (4, 3, 0.1),
    ]  # fmt: skip
    deep = arms[-1].config
    assert deep.overrides == {**BASE["overrides"], "layers": "(attn gdn)*2", "blocks": {"gdn": {"heads": 2}}}
    assert (deep.task["nodes"], deep.lr) == (5, 3e-3)


def test_a_plan_may_start_from_a_shipped_run_and_be_changed_on_the_command_line(tmp_path):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"run": "cycle", "base": {"steps": 7}, "grid": {"lr": [0.1, 0.2]}}))
    plan = read_plan(tmp_path / "plan.yaml", {"base": {"task": {"hops": 2}}, "seeds": [5]})
    assert plan.seeds == (5,)
    assert (plan.base["steps"], plan.base["batch_size"], plan.base["task"]) == (7, 192, {"name": "cycle", "nodes": 12, "hops": 2})


def test_paths_in_a_plan_are_relative_to_its_folder(tmp_path, monkeypatch):
    """In `run`, in a base that leaves the task to it, in arms and in grids, which name arms as written; not in overrides."""
    folder = tmp_path / "plans"
    zoo.save(zoo.create(BASE["model"], **BASE["overrides"], vocab_size=20), folder / "parent")
    for name in ("a", "b", "test"):
        np.save(folder / f"{name}.npy", np.arange(20, dtype=np.uint8))
    task = {"name": "text", "train": "a.npy", "test": "a.npy", "vocab": 20, "length": 20, "width": 5}
    (folder / "run.yaml").write_text(yaml.safe_dump({**BASE, "task": task}))
    arms = {"b": {"task.train": {"b.npy": 1}, "weights": "parent"}, "parent": {"model": "parent"}}
    fields = {"run": "run.yaml", "base": {"task": {"test": "test.npy"}}, "grid": {"weights": ["parent", "hub"]}, "arms": arms, "seeds": [0]}
    (folder / "plan.yaml").write_text(yaml.safe_dump(fields))
    there = {name: str(folder / name) for name in ("parent", "a.npy", "b.npy", "test.npy")}
    plan = read_plan(folder / "plan.yaml")
    assert (plan.base["task"]["train"], plan.base["task"]["test"]) == (there["a.npy"], there["test.npy"])
    assert plan.arms == {
        "b": {"task.train": {there["b.npy"]: 1}, "weights": there["parent"]},
        "parent": {"model": there["parent"]},
    }
    configs = {arm.name: arm.config for arm in arms_of(plan)}
    assert [(name, config.weights) for name, config in configs.items()] == [
        ("weights=parent", there["parent"]), ("weights=hub", "hub"), ("b", there["parent"]), ("parent", None),
    ]  # fmt: skip
    (folder / "written.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json")))
    assert read_plan(folder / "written.yaml") == plan
    monkeypatch.chdir(tmp_path)
    given = {"run": "plans/run.yaml", "grid": {"weights": ["first"]}, "arms": {"b": {"weights": "first"}}}
    changed = read_plan("plans/plan.yaml", given)
    assert (changed.base, changed.grid, changed.arms["b"]["weights"]) == (plan.base, {"weights": ["first"]}, "first")


def test_matching_by_tokens_and_by_operations(planned):
    """The number of steps equals one counted independently, from the costs of single passes."""
    plan = planned(
        {"base": {"steps": 100}},
        grid={"overrides.loops": [1, 4]},
        arms={"half": {"batch_size": 2, "overrides.loops": 1}, "deep": {"overrides.layers": "(attn gdn)*2", "overrides.loops": 1}},
        match=["tokens", "flops"],
    )
    arms = arms_of(plan)
    matched = runs_of(plan, arms)
    steps = {str(match): {run.arm.name: run.steps for run in runs} for match, runs in matched.items()}
    assert steps["tokens"] == {"N=1": 100, "N=4": 100, "half": 200, "deep": 100}

    def per_sequence(layers, loops):
        """A window of 5 consolidated, a question of 2 tokens read, one answer scored; forward and twice that backward."""
        fields = {"d_model": 16, "d_ff": 16, "layers": layers, "vocab_size": 7}
        sleep = zoo.describe(f"gdn4-sleep{loops}-hard5", **fields).flops_per_sleep
        wake = zoo.describe("gdn4-sleep1-slide2", **fields).flops_per_sleep  # a sleep under hard eviction skips the last MLP
        return 3 * (sleep + wake + 2 * 7 * 16)

    once = per_sequence("attn gdn", 1)
    assert arms[0].costs.flops == {1: 4 * once}
    assert steps["flops"] == {
        "N=1": 100,
        "N=4": round(100 * once / per_sequence("attn gdn", 4)),
        "half": 200,
        "deep": round(100 * once / per_sequence("(attn gdn)*2", 1)),
    }
    assert steps["flops"]["N=4"] < steps["flops"]["deep"] < 100
    by_other = {run.arm.name: run.steps for run in runs_of(planned({"base": {"steps": 100}}, reference="N=4"), arms[:2])["flops", 1]}
    assert by_other == {"N=1": round(100 * per_sequence("attn gdn", 4) / once), "N=4": 100}


def test_budgets_and_a_ramp(planned):
    """An arm with a ramp gets more steps: its FLOPs are the sum over them, of 1 to 4 passes."""
    plan = planned(
        {"base": {"steps": 40}}, match=["flops"], reference="N=4", arms={"ramp": {"overrides.loops": 4, "ramp": 0.5}},
        budgets=[{}, {"times": 3, "arms": ["ramp", "N=4"], "seeds": [7]}],
    )  # fmt: skip
    arms = arms_of(plan)
    matched = runs_of(plan, arms)
    assert [str(match) for match in matched] == ["flops", "flops-3x"]
    assert {(run.arm.name, run.seed) for run in matched["flops", 3]} == {("ramp", 7), ("N=4", 7)}
    by_name = {arm.name: arm for arm in arms}
    for times in (1, 3):
        budget = times * 40 * by_name["N=4"].costs.flops[4]
        (run,) = {(run.steps, run.flops) for run in matched["flops", times] if run.arm.name == "ramp"}
        config = by_name["ramp"].config.model_copy(update={"steps": run[0]})
        task, model, *_ = prepare(config, torch.device("meta"))
        passes = [max(1, math.ceil(4 * (1 - (1 - min(1, step / (run[0] / 2))) ** 0.5))) for step in range(run[0])]
        assert passes == sorted(passes)
        assert set(passes) == {1, 2, 3, 4}
        mask = torch.from_numpy(task.batch(0, 0, config.batch_size).loss_mask)
        assert run[1] == sum(training_flops(model, mask, loops=n) for n in passes)
        assert run[1] == pytest.approx(budget, rel=0.03)
        assert run[0] > 1.2 * times * 40


def test_a_run_that_serves_both_matchings_is_one(planned):
    plan = planned()
    matched = runs_of(plan, arms_of(plan))
    tokens, flops = matched["tokens", 1], matched["flops", 1]
    assert {run for run in tokens if run.arm.name == "N=1"} == {run for run in flops if run.arm.name == "N=1"}
    assert len({*tokens, *flops}) == 6
    assert len({run.folder for runs in matched.values() for run in runs}) == 6


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": "attn swa", "evict": "sliding", "window": 4, "loops": 3, "span": (1, 1), "blocks": {"swa": {"window": 3}}},
        {"layers": "attn", "evict": "none"},
        {"layers": "attn*2", "evict": "sliding", "window": 4, "loops": 2, "sleep_on": "every"},
    ],
)
def test_operations_of_a_step_as_torch_counts_them(fields):
    """Attention and MLPs consist of products that torch counts; the backward pass of each takes two more."""
    model = zoo.create("gdn4", d_model=16, **fields)
    ids, mask = torch.randint(3, (2, 11)), torch.zeros(2, 11, dtype=torch.bool)
    mask[:, [6, 9]] = True
    if model.config.sleep_on == "every":
        mask[:] = True
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.answers(ids, mask)
    assert training_flops(model, mask) == 3 * counter.get_total_flops()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": {"overrides.lops": [1]}}, r"arm 'lops=1': .*lops: unknown field; did you mean 'loops'"),
        ({"grid": {"stepz": [1]}}, r"arm 'stepz=1': stepz: unknown field"),
        ({"grid": {"lr": [0.1, -1]}}, r"arm 'lr=-1': lr: -1"),
        ({"grid": {"overrides.layers": ["attn gdn", "attn gdm"]}}, "arm 'layers=attn gdm': .*layers: unknown block 'gdm'"),
        ({"grid": {"task.hops": [1, 9]}}, "arm 'task.hops=9': .*hops: 9 must be less"),
        ({"grid": {"overrides.window": [5, 6]}}, "arm 'window=6': window: 6, but the task"),
        ({"arms": {"odd": {"optimizer": "adamv"}}}, "arm 'odd': optimizer: unknown optimizer 'adamv'"),
        ({"grid": {"steps": [1, 2]}}, "steps: belongs in base"),
        ({"arms": {"other": {"seed": 1}}}, "seed: belongs in seeds"),
        ({"grid": {}}, "neither grid nor arms"),
        ({"grid": {"lr": []}}, "grid.lr: no values"),
        ({"grid": {"lr": [0.1, 0.2, 0.1]}}, r"grid.lr: \[0.1, 0.2, 0.1\] contains a duplicate"),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\] contains a duplicate"),
        ({"seeds": []}, r"seeds: \[\]: want at least 1 entry$"),
        ({"seeds": [0, -1]}, "seeds.1: -1: must be greater than or equal to 0$"),
        ({"budgets": [{"seeds": [-1]}]}, "budgets.0.seeds.0: -1: must be greater than or equal to 0$"),
        ({"test_loops": [2, 0]}, "test_loops.1: 0: must be greater than or equal to 1$"),
        ({"match": ["time"]}, "match.0: 'time'"),
        ({"budgets": [{"arms": ["N=3"]}]}, "budgets: there is no arm 'N=3'; did you mean"),
        ({"test_loops": [2, 2]}, r"test_loops: \[2, 2\] contains a duplicate"),
        ({"budgets": [{"seeds": [1, 1]}]}, r"budgets.0.seeds: \[1, 1\] contains a duplicate"),
        ({"budgets": [{"arms": ["a", "a"]}]}, r"budgets.0.arms: \['a', 'a'\] contains a duplicate"),
        ({"budgets": [{}, {"times": 1}]}, r"budgets: \[1, 1\] contains a duplicate"),
        ({"reference": "N=3"}, "reference: there is no arm 'N=3'; did you mean"),
        ({"arms": {"N=1": {"lr": 1.0}}}, "arms.N=1: the grid has an arm of this name"),
        ({"arms": {"a b": {"lr": 1.0}, "a_b": {"lr": 2.0}}}, "two would share a folder"),
        ({"sedes": [1]}, "sedes: unknown field; did you mean 'seeds'"),
        ({"grid": {"lr": 0.1}}, "grid.lr: 0.1: want a list, or a mapping of fields$"),
        ({"arms": {"x": 1}}, "arms.x: 1: want a mapping of fields$"),
        ({"run": "cycel"}, "unknown run 'cycel'"),
        ({"run": "runs/cycel"}, r"/runs/cycel: no such file or folder; want a YAML file$"),
        ({"run": "cycle", "base": None}, "base: None: want a mapping of fields$"),
    ],
)
def test_invalid_plans_are_refused_before_any_data_is_made(planned, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr("zoo.tasks.cycle.Cycle.contexts", lambda *_: pytest.fail("data was made"))
    with pytest.raises(zoo.ZooError, match=message):
        ablate(planned(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_whose_steps_do_not_fit_is_refused_before_the_first_begins(planned, tmp_path):
    """N = 1 gets more steps than N = 4, which is the reference, and than `schedule` has."""
    plan = planned({"base": {"schedule": [0, 4]}}, reference="N=4", match=["flops"])
    with pytest.raises(zoo.ZooError, match=r"^run 'N=1, 14 steps, seed 0': schedule: \[0, 4\]: 14 steps do not fit into it from there$"):
        ablate(plan, tmp_path / "out", on=lambda jobs, processes: pytest.fail("a run began"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", [file.name for file in files("zoo.configs").joinpath("ablations").iterdir() if file.name.endswith(".yaml")]
)
def test_shipped_plans_fit_together(name):
    plan = read_plan(name.removesuffix(".yaml"))
    arms = arms_of(plan)
    assert len(arms) > 1
    assert plan.reference in (None, *(arm.name for arm in arms))


def in_this_process(jobs, processes):
    """Train every job here. Stands for the pool of workers, which takes seconds to start and has tests of its own."""
    return {name: why for name, job in jobs.items() if (why := finish(job))}


def test_a_folder_becomes_a_table(planned, tmp_path, monkeypatch):
    """The files repeat what the folders of the runs hold, and nothing is trained twice."""
    monkeypatch.setattr("zoo.training.ablation.train_all", in_this_process)
    plan, out = planned(test_loops=[1, 3], arms={"wild": {"lr": 1e30, "clip": 1e30, "overrides.loops": 1}}), tmp_path / "out"
    with pytest.raises(zoo.ZooError, match=r"2 runs failed: wild, 4 steps, seed 0: .*try a lower lr"):
        ablate(plan, out, processes=1)
    folders = {path.name: path for path in (out / "runs").iterdir() if (path / "results.json").exists()}
    assert len(folders) == 6
    rows = list(csv.DictReader((out / "runs.csv").open()))
    assert len(rows) == 2 * 2 * 2 * 3  # matchings, arms, seeds, two levels and all
    for row in rows:
        run = read_run(folders[f"{row['arm']}-{row['steps']}steps-seed{row['seed']}"])
        level = row["level"]
        assert float(row["accuracy"]) == (run.results["accuracy"] if level == "all" else run.results["by_level"][int(level)])
        first = run.results["first"] if level == "all" else run.results["first_by_level"].get(int(level), "")
        assert row["first"] == str(first)
        if level == "all":
            at_test = json.loads((folders[f"{row['arm']}-{row['steps']}steps-seed{row['seed']}"] / "test_loops.json").read_text())
            assert {n: float(row[f"accuracy_at_N={n}"]) for n in "13"} == at_test
            assert run.loops != 1 or at_test["1"] == run.results["accuracy"]
        assert float(row["loss"]) == (run.results["loss"] if level == "all" else run.results["loss_by_level"][int(level)])
        assert (run.config.seed, run.config.steps, run.loops) == (int(row["seed"]), int(row["steps"]), int(row["overrides.loops"]))
        assert int(row["tokens"]) == run.metrics[-1]["tokens"] == run.config.steps * 4 * 7  # the last token predicts nothing
    flops = {(row["arm"], int(row["flops"])) for row in rows if row["match"] == "flops"}
    (_, low), (_, high) = sorted(flops, key=lambda pair: pair[1])
    assert high / low < 1.5  # of 4 steps and of 2

    table = (out / "table.md").read_text()
    tokens = table.partition("## The same training FLOPs")[0]
    (line,) = (line for line in tokens.splitlines() if line.startswith("| N=4 |"))
    found = [float(row["accuracy"]) for row in rows if (row["match"], row["arm"], row["level"]) == ("tokens", "N=4", "all")]
    assert f"{sum(found) / 2:.1%} ({100 * min(found):.1f}-{100 * max(found):.1f})" in line
    assert "wild" not in table
    assert (out / "tokens.png").read_bytes()[:4] == (out / "flops.png").read_bytes()[:4] == b"\x89PNG"

    finished = {path: (path / "results.json").stat().st_mtime_ns for path in folders.values()}
    with pytest.raises(zoo.ZooError, match="holds another ablation"):
        ablate(planned(), out)
    (out / "table.md").unlink()
    with pytest.raises(zoo.ZooError, match="2 runs failed"):
        ablate(plan, out, processes=1)
    assert (out / "table.md").read_text() == table
    assert {path: (path / "results.json").stat().st_mtime_ns for path in folders.values()} == finished


def test_runs_that_began_from_a_folder_are_compared_and_drawn(planned, tmp_path, monkeypatch):
    """Once they have ended, they can be drawn without that folder, and those that began from others are different."""
    monkeypatch.setattr("zoo.training.ablation.train_all", in_this_process)
    parents = [tmp_path / "parent", tmp_path / "other"]
    for parent in parents:
        zoo.save(zoo.create(BASE["model"], **BASE["overrides"], vocab_size=7), parent)
    fields = {key: value for key, value in BASE.items() if key != "overrides"}
    plan = planned(
        base={**fields, "model": str(parents[0])}, arms={"other": {"model": str(parents[1])}}, grid={"overrides.loops": [1, 2]}, seeds=[0],
        match=["tokens"],
    )  # fmt: skip
    out = tmp_path / "out"
    assert "| N=2 " in ablate(plan, out)
    assert (out / "tokens.png").read_bytes()[:4] == b"\x89PNG"
    for parent in parents:
        shutil.rmtree(parent)
    drawn = grouped(map(read_run, sorted((out / "runs").iterdir())))
    assert list(drawn) == [f"weights={parents[0]} N=1", f"weights={parents[0]} N=2", f"weights={parents[1]} N=2"]
    figure(drawn)


def test_a_figure_that_fails_leaves_the_tables(planned, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.training.ablation.train_all", in_this_process)
    monkeypatch.setattr("zoo.training.ablation.figure", lambda groups: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ablate(planned(grid={"lr": [0.1]}, seeds=[0]), tmp_path / "out")
    assert "| lr=0.1 " in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "runs.csv").read_text().count("\n") == 7  # a header, and for each matching two levels and all


def test_other_files_in_the_folder_are_not_touched(planned, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(zoo.ZooError, match="already exists"):
        ablate(planned(), tmp_path / "out")


@pytest.mark.parametrize("blow", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.extended)])
def test_an_interrupted_ablation_resumes(planned, tmp_path, blow):
    """No process survives, the run under way resumes from its checkpoint, and it ends as a run that was not interrupted."""
    plan, out = (
        planned({"base": {"steps": 100, "checkpoint_every": 5}}, grid={"lr": [0.001]}, seeds=[0], match=["tokens"]),
        tmp_path / "out",
    )
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False))
    command = [*ZOO, "ablate", tmp_path / "plan.yaml", "--out", out, "--processes", "1"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    folder = out / "runs" / "lr=0.001-100steps-seed0"
    wait_for(lambda: list(folder.glob("checkpoints/[0-9]*")))
    running.send_signal(blow)
    _, errors = running.communicate(timeout=600)
    assert running.returncode == (128 + blow if blow == signal.SIGTERM else -blow)
    assert ("the same command resumes" in errors) == (blow == signal.SIGTERM)
    wait_for(lambda: not held(folder))  # after SIGKILL the worker stops by itself
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reached = int(max(path.name for path in folder.glob("checkpoints/[0-9]*")))
    assert 5 <= reached == lines[-1]["step"] < 100
    assert "| lr=0.001 |" in ablate(plan, out, processes=1)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == list(range(1, 101))
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][: len(lines)] == lines
    ((run,),) = runs_of(plan, arms_of(plan)).values()
    train(run.config, tmp_path / "whole")
    interrupted, whole = (zoo.load(path).state_dict() for path in (folder, tmp_path / "whole"))
    assert all(torch.equal(interrupted[name], whole[name]) for name in whole)


def test_runs_on_data_that_has_changed_are_not_compared(planned, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.training.ablation.train_all", in_this_process)
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}.npy", np.arange(20, dtype=np.uint8))
    task = {"name": "text", "train": str(tmp_path / "train.npy"), "test": str(tmp_path / "test.npy"), "vocab": 20, "length": 20, "width": 5}
    plan = planned(base={**BASE, "task": task}, grid={"lr": [0.1, 0.2]}, seeds=[0])
    ablate(plan, tmp_path / "out", shard=(1, 2))
    np.save(tmp_path / "train.npy", np.arange(20, dtype=np.uint8)[::-1])
    with pytest.raises(zoo.ZooError, match=r"seed0: task.train: changed since this run began; restore it, or begin a new run"):
        ablate(plan, tmp_path / "out")
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1


def test_shards_in_one_folder_end_with_the_files_of_one_process(planned, tmp_path, monkeypatch):
    """Each trains its part, with runs of every length; the last one to end writes the tables of all."""
    monkeypatch.setattr("zoo.training.ablation.train_all", in_this_process)
    plan = planned(grid={"overrides.loops": [1, 2]}, test_loops=[3])
    ablate(plan, tmp_path / "whole")
    partial = ablate(plan, tmp_path / "shared", shard=(2, 2))
    trained = {run.name for run in (tmp_path / "shared" / "runs").iterdir()}
    assert len(trained) == 3
    assert {name.partition("-")[0] for name in trained} == {"N=1", "N=2"}
    assert "of 2 seeds" in partial
    ablate(plan, tmp_path / "shared", shard=(1, 2))
    for name in ("runs.csv", "table.md", "plan.yaml"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(zoo.ZooError, match="shard: 7/7: the plan has only 6 runs"):
        ablate(plan, tmp_path / "many", shard=(7, 7))
    assert not (tmp_path / "many").exists()


@pytest.mark.extended
@pytest.mark.parametrize("shards", [["--shard=1/2", "--shard=2/2"], [None, None]], ids=["shards", "whole"])
def test_commands_at_once_end_with_the_files_of_one_process(planned, tmp_path, monkeypatch, shards):
    """In one folder, with parts of the plan or without: both succeed, and no run is trained twice."""
    plan, shared = planned({"base": {"steps": 60}}, grid={"overrides.loops": [1, 2]}, match=["tokens"]), tmp_path / "shared"
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False))
    command = [*ZOO, "ablate", tmp_path / "plan.yaml", "--out", shared, "--processes", "1"]
    running = [subprocess.Popen([*command, *filter(None, [shard])], stderr=subprocess.PIPE, text=True) for shard in shards]
    monkeypatch.setattr("zoo.training.ablation.train_all", in_this_process)
    ablate(plan, tmp_path / "whole")
    errors = [process.communicate(timeout=1800)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    for name in ("runs.csv", "table.md", "plan.yaml"):
        assert (shared / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for whole in (tmp_path / "whole" / "runs").iterdir():
        assert (shared / "runs" / whole.name / "metrics.jsonl").read_text().count("\n") == 60


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "-1/2", "a/b"])
def test_a_shard_that_is_none(part, tmp_path):
    result = CliRunner().invoke(main, ["ablate", "cycle-small", "--out", str(tmp_path / "out"), "--shard", part])
    assert result.exit_code == 2
    assert "want K/N with K from 1 to N, such as 2/4" in result.output


def held(folder):
    """Return True if a process trains there."""
    with (folder / "train.yaml").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def wait_for(happened, seconds=600):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
