"""Every shipped run fits together at full size, every small twin trains, and runs start from given weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import zoo
from tests.zoo.training.tiny import tiny
from zoo.config import shipped
from zoo.training.config import read_config
from zoo.training.loop import train
from zoo.training.plan import arms_of, read_plan, runs_of
from zoo.training.prepare import prepare

RUNS = sorted(shipped("train"))
SMALL = [name for name in RUNS if name.endswith("-small")]
QUICK = {"steps": 2, "batch_size": 4, "eval_sequences": 4, "log_every": 1}
ORACLES = "tests/data/oracles"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return a tokenizer.json to replace those that the recipes download."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["The number of"], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return str(path)


def full_size(name, tokenizer):
    config = read_config(name)
    return read_config(name, {"task": {"tokenizer": tokenizer}}) if str(config.task.get("tokenizer")).startswith("hub:") else config


@pytest.mark.parametrize("name", RUNS)
def test_shipped_runs_fit_together(name, tokenizer):
    """At full size on the meta device, with optimisers and name patterns."""
    config = full_size(name, tokenizer)
    task, model, _, weights, optimizers, _ = prepare(config, torch.device("meta"))
    assert task.window == model.config.window
    assert model.config.vocab_size >= task.vocab_size
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in weights.wide.values()}
    assert len(optimizers) == 1 + (config.muon_lr is not None)
    new = {f"blocks.{i}.{n}" for i, block in enumerate(model.blocks) for n, _ in block.named_parameters() if block.inserted}
    assert set(weights.wide) == (new if "warmup" in name else {n for n, _ in model.named_parameters()})


def test_every_recipe_of_the_paper_has_its_twins():
    for name in ("rule110-paper", "rule110-figure2a", "depo-paper", "gsm-jet2b", "gsm-ourojet", "gsm-ourojet-slide512", "gsm-samba421m"):
        assert {name, f"{name}-small", f"{name}-h200"} <= set(RUNS)
        paper, twin = read_config(name), read_config(f"{name}-h200")
        assert (twin.steps, twin.batch_size, twin.lr, twin.muon_lr, twin.task) == (
            paper.steps,
            paper.batch_size,
            paper.lr,
            paper.muon_lr,
            paper.task,
        )


def test_figure_2a_has_the_runs_of_the_paper():
    """One pass, 781 steps of 512 sequences of four strings of 24 cells: 40 M tokens for each t."""
    plan = read_plan("figure2a", {"run": "rule110-figure2a-h200"})
    (runs,) = runs_of(plan, arms_of(plan)).values()
    assert [run.config.task["steps"] for run in runs] == [4, 8, 10, 12, 14, 16]
    for run in runs:
        task, model, *_ = prepare(run.config, torch.device("meta"))
        assert (task.strings, task.width, model.config.loops, run.steps, run.config.batch_size) == (4, 24, 1, 781, 512)
        assert run.steps * run.config.batch_size * 100 == 39_987_200 == run.steps * run.arm.costs.tokens
        assert run.config.device == "cuda"


@pytest.mark.parametrize("name", ["gsm-jet2b", "gsm-ourojet", "gsm-ourojet-slide512", "gsm-ourojet-slide512-warmup"])
def test_fine_tuning_uses_the_settings_of_the_paper(name):
    config = read_config(name)
    assert (config.batch_size, config.lr, config.muon_lr, config.seed) == (256, 5e-5, 1e-3, 0)
    assert config.task["operations"] == 8
    assert config.eval_sequences == 7 * 1600
    assert config.schedule == {"gsm-ourojet-slide512-warmup": (0, 600), "gsm-ourojet-slide512": (200, 600)}.get(name)
    model = prepare(read_config(name, {"task": {"tokenizer": None}}), torch.device("meta")).model
    assert model.config.loops == (6 if "jet2b" in name else 4)
    assert model.config.vocab_size == zoo.create(model.config.name.partition("-")[0], device="meta").config.vocab_size


def quick(name):
    return read_config(name, QUICK)


@pytest.mark.parametrize("name", [name for name in SMALL if "slide512" not in name])
def test_small_twins_train(name, tmp_path):
    results = train(quick(name), tmp_path / "run")
    assert results["answers"] >= 4


def test_a_recipe_of_two_phases(tmp_path, monkeypatch):
    """First the inserted blocks alone under hard eviction, then everything under a sliding window, starting from the first run."""
    monkeypatch.chdir(tmp_path)
    for name in ("gsm-ourojet-slide512-warmup-small", "gsm-ourojet-slide512-small"):
        train(quick(name), tmp_path / "runs" / name)
    before = prepare(quick("gsm-ourojet-slide512-warmup-small"), torch.device("cpu")).model.state_dict()
    warm, done = (zoo.load(tmp_path / "runs" / name).state_dict() for name in ("gsm-ourojet-slide512-warmup-small", name))
    changed = {name for name in before if not torch.equal(before[name], warm[name])}
    assert changed
    assert all(name.startswith(("blocks.2.", "blocks.5.")) for name in changed)
    assert {name for name in warm if not torch.equal(warm[name], done[name])} >= {"embed.weight", "blocks.0.mixer.q_proj.weight"}
    start = prepare(quick("gsm-ourojet-slide512-small"), torch.device("cpu")).model
    assert start.config.evict == "sliding"
    assert all(torch.equal(warm[name], tensor) for name, tensor in start.state_dict().items())


def plan(**changes):
    return tiny(**{"checkpoint_every": 1, **changes})


def test_a_run_starts_from_another_and_resumes_without_it(tmp_path):
    train(plan(lr=0.1), tmp_path / "first")

    def stop(metrics):
        shutil.rmtree(tmp_path / "first")
        raise KeyboardInterrupt

    expected = zoo.load(tmp_path / "first").state_dict()
    second = plan(weights=str(tmp_path / "first"), seed=1, steps=4, model="gdn4-sleep3-slide6")
    assert all(torch.equal(expected[n], t) for n, t in prepare(second, torch.device("cpu")).model.state_dict().items())
    train(second, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(second, tmp_path / "second", report=lambda metrics: stop(metrics) if metrics["step"] == 3 else None)
    train(second, tmp_path / "second")
    ends = [zoo.load(tmp_path / name).state_dict() for name in ("whole", "second")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_starts_from_upstream(tmp_path):
    overrides = {"evict": "hard", "window": 6, "loops": 2}
    config = json.loads(Path(f"{ORACLES}/jet-nemotron-a/config.json").read_text())
    model = zoo.load(f"{ORACLES}/jet-nemotron-a")
    (tmp_path / "model.yaml").write_text(model.config.yaml())
    fields = {**overrides, "vocab_size": config["vocab_size"]}
    run = plan(model=str(tmp_path / "model.yaml"), overrides=fields, weights=f"{ORACLES}/jet-nemotron-a")
    started = prepare(run, torch.device("cpu")).model
    assert all(torch.equal(tensor, started.state_dict()[name]) for name, tensor in model.state_dict().items())
    train(run, tmp_path / "run")
    for name, tensor in zoo.load(f"{ORACLES}/jet-nemotron-a").state_dict().items():  # unchanged
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "nowhere"}, "nowhere"),
        ({"weights": "hub"}, "pretrained: no published weights are known"),
        ({"weights": "first", "overrides": {"layers": "attn gdn gdn", "d_model": 16, "d_ff": 16}}, "pattern: the checkpoint has"),
        ({"weights": "first", "overrides": {"layers": "attn gdn", "d_model": 32, "d_ff": 16}}, "d_model: the checkpoint has 16"),
        (
            {"weights": "first", "overrides": {"layers": "attn gdn", "d_model": 16, "d_ff": 16, "blocks": {"attn": {"heads": 2}}}},
            "blocks.attn.heads",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    train(plan(), "first")
    with pytest.raises(zoo.ZooError, match=message):
        train(plan(**changes), "second")
    assert not (tmp_path / "second").exists()


def test_a_file_lists_only_the_differences_from_its_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("base: cycle\nsteps: 7\ntask: {hops: 2}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nlr: 0.5\n")
    config, cycle = read_config("b.yaml", {"seed": 3}), read_config("cycle")
    assert (config.steps, config.lr, config.seed, config.task) == (7, 0.5, 3, {**cycle.task, "hops": 2})
    assert config.model_dump(exclude={"steps", "lr", "seed", "task"}) == cycle.model_dump(exclude={"steps", "lr", "seed", "task"})
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    with pytest.raises(zoo.ZooError, match=r"base: 'b.yaml' is based on this run itself"):
        read_config("b.yaml")
    (tmp_path / "a.yaml").write_text("base: cicle\n")
    with pytest.raises(zoo.ZooError, match="unknown run 'cicle'; did you mean 'cycle'"):
        read_config("a.yaml")


def test_corpora_with_weights_are_one_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("base: cycle\ntask: {name: text, train: {one.npy: 3, two.npy: 1}, test: test.npy}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\ntask: {train: {two.npy: 1}}\n")
    (tmp_path / "plan.yaml").write_text("run: a.yaml\narms: {other: {task.train: {three.npy: 2}}}\n")
    two = {str(tmp_path / "two.npy"): 1}
    assert read_config("b.yaml").task["train"] == two
    assert read_config("b.yaml").task["test"] == str(tmp_path / "test.npy")
    assert read_config("a.yaml", {"task": {"train": {"three.npy": 2}}}).task["train"] == {"three.npy": 2}
    assert read_plan("plan.yaml", {"base": {"task": {"train": two}}}).base["task"]["train"] == two
