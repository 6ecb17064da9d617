"""Training: it learns, repeats itself, splits parameters as it says, and treats files with care."""

import json

import pytest
import torch

import zoo
from zoo.config import validate
from zoo.tasks import new_task
from zoo.train import TrainConfig, evaluate, make_optimizers, read_config, schedule, train

SMALL = {
    "model": "gdn4-sleep2",
    "overrides": {
        "layers": "attn gdn",
        "learned_positions": True,
        "d_model": 32,
        "d_ff": 48,
        "window": 6,
        "blocks": {"attn": {"heads": 2}, "gdn": {"heads": 2}},
    },
    "task": {"name": "cycle", "nodes": 6, "hops": 1},
    "steps": 6,
    "batch_size": 16,
    "log_every": 2,
    "eval_sequences": 40,
}


def plan(**changes):
    return validate(TrainConfig, {**SMALL, **changes}, "test")


def test_it_learns(tmp_path):
    results = train(plan(steps=250, batch_size=64, lr=1e-2), tmp_path / "run")
    assert results["accuracy"] > 0.9 > 2 * results["chance"]
    assert results["accuracy"] == pytest.approx(results["by_level"][1], abs=1e-4)


@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_a_run_repeats_itself_and_loads(tmp_path, muon_lr):
    for name in ("first", "second"):
        results = train(plan(muon_lr=muon_lr), tmp_path / name)
    first, second = (zoo.load(tmp_path / name) for name in ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("first", "second")]
    assert [line["step"] for line in lines[0]] == [2, 4, 6]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert (
        evaluate(first, new_task(SMALL["task"]), 40)
        == results
        == json.loads(
            (tmp_path / "second" / "results.json").read_text(),
            object_hook=lambda d: {int(k) if k.isdigit() else k: v for k, v in d.items()},
        )
    )
    assert read_config(tmp_path / "first" / "train.yaml") == plan(muon_lr=muon_lr)


def test_evaluate_counts_like_a_loop_over_answers():
    task = new_task({"name": "cycle", "nodes": 9, "hops": 2})
    model = zoo.create("gdn4-sleep2-hard9", layers="attn gdn", d_model=16, vocab_size=task.vocab_size)
    results = evaluate(model, task, 30, batch_size=30)
    ids, mask, level = (torch.from_numpy(x) for x in task.batch(0, 0, 30, "test"))
    right = {1: [], 2: []}
    exact = []
    for row, supervised, hops in zip(ids, mask, level, strict=True):
        state = model.consolidate(row[None, :9])
        predicted = model(row[None, 9:], state).logits[0].argmax(-1)
        hits = [(int(hops[t]), bool(predicted[t - 10] == row[t])) for t in range(9, len(row)) if supervised[t]]
        exact.append(all(hit for _, hit in hits))
        for k, hit in hits:
            right[k].append(hit)
    assert results["by_level"] == {k: pytest.approx(sum(hits) / len(hits), abs=1e-5) for k, hits in right.items()}
    assert results["exact"] == pytest.approx(sum(exact) / 30)
    assert results["answers"] == 30 * 3
    assert evaluate(model, task, 30, loops=1) != evaluate(model, task, 30, loops=3)


def test_muon_takes_the_matrices_of_the_blocks():
    model = zoo.create("gdn4", d_model=16)
    adam, muon = make_optimizers(model, plan(muon_lr=0.02))
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon, in_adam = ({names[id(p)] for group in o.param_groups for p in group["params"]} for o in (muon, adam))
    assert in_muon | in_adam == set(names.values())
    assert not in_muon & in_adam
    assert in_muon == {n for n in names.values() if n.startswith("blocks.") and n.endswith("_proj.weight")}


def test_schedule():
    rates = [schedule(step, plan(steps=100, warmup=0.1, decay=0.3)) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:71] == [1.0] * 62
    assert rates[85] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.04


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(zoo.ZooError, match="try a lower lr"):
        train(plan(lr=1e30, steps=20, clip=1e30), tmp_path / "run")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(zoo.ZooError, match="already exists"):
        train(plan(), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: 0"),
        ({"stepz": 5}, "stepz: unknown field; did you mean 'steps'"),
        ({"model": "gdn4-sleep2-hard9", "overrides": {}}, "window: 9, but the task lays its sequences out for windows of 6"),
        ({"overrides": {"vocab_size": 3, "window": 6}}, "vocab_size: 3 is less than the 7 tokens of the task"),
        ({"task": {"name": "cycle", "nodes": 1}}, "nodes: 1"),
        ({"model": "gdn9"}, "unknown model 'gdn9'"),
    ],
)
def test_wrong_config_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(zoo.ZooError, match=message):
        train(plan(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
