"""Training: it learns, is reproducible, assigns parameters to optimisers as documented, and overwrites nothing."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

import zoo
from tests.zoo.training.tiny import tiny
from zoo.blocks.moe import balance_loss, recorded_routes
from zoo.config import validate
from zoo.tasks import Batch, new_task, tasks
from zoo.training.backward import backward
from zoo.training.config import TrainConfig, read_config
from zoo.training.divergence import Divergence
from zoo.training.evaluate import evaluate
from zoo.training.loop import learning_rate_factor, train
from zoo.training.optimizers import Weights, freeze, make_optimizers
from zoo.training.parallel import Team

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


ALONE = Team(torch.device("cpu"))


def plan(**changes):
    return validate(TrainConfig, {**SMALL, **changes}, "test")


def test_it_learns(tmp_path):
    results = train(plan(steps=250, batch_size=64, lr=1e-2), tmp_path / "run")
    assert results["accuracy"] > 0.9 > 2 * results["chance"]
    assert results["accuracy"] == pytest.approx(results["by_level"][1], abs=1e-4)


@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_a_run_is_reproducible_and_loads(tmp_path, muon_lr):
    for name in ("first", "second"):
        results = train(plan(muon_lr=muon_lr), tmp_path / name)
    first, second = (zoo.load(tmp_path / name) for name in ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("first", "second")]
    assert [line["step"] for line in lines[0]] == [2, 4, 6]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert (
        evaluate(first, new_task(SMALL["task"]), 40, control=True)
        == results
        == json.loads(
            (tmp_path / "second" / "results.json").read_text(),
            object_hook=lambda d: {int(k) if k.isdigit() else k: v for k, v in d.items()},
        )
    )
    assert read_config(tmp_path / "first" / "train.yaml") == plan(muon_lr=muon_lr)


def test_phases_share_one_schedule_of_the_learning_rate():
    whole = [learning_rate_factor(step, plan(steps=60)) for step in range(60)]
    phases = [(20, (0, 60)), (40, (20, 60))]
    assert [learning_rate_factor(step, plan(steps=n, schedule=s)) for n, s in phases for step in range(n)] == whole
    with pytest.raises(zoo.ZooError, match=r"schedule: \[30, 60\]: 40 steps do not fit"):
        plan(steps=40, schedule=[30, 60])


def test_evaluate_counts_like_a_loop_over_answers():
    task = new_task({"name": "cycle", "nodes": 9, "hops": 2})
    model = zoo.create("gdn4-sleep2-hard9", layers="attn gdn", d_model=16, vocab_size=task.vocab_size)
    results = evaluate(model, task, 30, batch_size=30, control=True)
    ids, mask, level = (torch.from_numpy(x) for x in task.batch(0, 0, 30, "test"))
    right = {1: [], 2: []}
    exact, first, other = [], [], []
    for i, (row, supervised) in enumerate(zip(ids, mask, strict=True)):
        logits = model(row[None, 9:], model.consolidate(ids[i - 1][None, :9])).logits[0]
        other.append(logits.argmax(-1)[supervised[10:].nonzero()[:, 0]])
    for row, supervised, hops in zip(ids, mask, level, strict=True):
        state = model.consolidate(row[None, :9])
        predicted = model(row[None, 9:], state).logits[0].argmax(-1)
        hits = [(int(hops[t]), bool(predicted[t - 10] == row[t])) for t in range(9, len(row)) if supervised[t]]
        exact.append(all(hit for _, hit in hits))
        first.append(hits[0][1])
        for k, hit in hits:
            right[k].append(hit)
    assert results["by_level"] == {k: pytest.approx(sum(hits) / len(hits), abs=1e-5) for k, hits in right.items()}
    assert results["whole_by_level"] == results["by_level"]  # an answer is one token
    assert results["exact"] == pytest.approx(sum(exact) / 30)
    assert results["first"] == pytest.approx(sum(first) / 30)
    asked = ids[mask].view(30, 3)
    assert results["wrong_window"] == pytest.approx((torch.stack(other) == asked).float().mean().item())
    most = {k: Counter(ids[level == k].tolist()).most_common(1)[0][1] / (level == k).sum().item() for k in right}
    assert results["majority_by_level"] == {k: pytest.approx(share, abs=1e-5) for k, share in most.items()}
    assert results["answers"] == 30 * 3
    assert evaluate(model, task, 30, loops=1) != evaluate(model, task, 30, loops=3)


def test_exact_counts_only_sequences_with_answers():
    class Half(tasks.get("cycle")):
        def batch(self, *arguments):
            batch = super().batch(*arguments)
            batch.loss_mask[::2] = False
            batch.loss_mask[:, :-1] = False  # one answer per sequence, so that some are right by chance
            return batch

    task = Half(nodes=6, hops=1)
    model = zoo.create("gdn4-sleep2-hard6", layers="attn gdn", d_model=16, vocab_size=task.vocab_size, sleep_on="every")
    ids, mask, _ = (torch.from_numpy(x[1::2]) for x in task.batch(0, 0, 200, "test"))
    answers = model.answers(ids, mask)
    wrong_rows = set((answers.place[~answers.right()] // ids.shape[1]).tolist())
    assert 0 < len(wrong_rows) < 100
    assert evaluate(model, task, 200)["exact"] == pytest.approx(1 - len(wrong_rows) / 100)


def test_muon_takes_the_matrices_of_the_blocks():
    model = zoo.create("gdn4", d_model=16)
    adam, muon = make_optimizers(model, Weights(model), lr=1e-3, muon_lr=0.02)
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon, in_adam = ({names[id(p)] for group in o.param_groups for p in group["params"]} for o in (muon, adam))
    assert in_muon | in_adam == set(names.values())
    assert not in_muon & in_adam
    assert in_muon == {n for n in names.values() if n.startswith("blocks.") and n.endswith("_proj.weight")}


def rates(optimizers, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}


def test_rates_and_freezing_by_name():
    model = zoo.create("gdn4", d_model=16)
    freeze(model, ["*.mlp.*", "head.*"])
    scale = {"blocks.0.*": 0.5, "*.A_log": 3.0, "blocks.*.mixer_norm.*": 2.0}
    found = rates(make_optimizers(model, Weights(model), lr=0.1, muon_lr=0.01, lr_scale=scale), model)
    assert found.keys() == {name for name, _ in model.named_parameters() if ".mlp." not in name and name != "head.weight"}
    for name, rate in found.items():
        factor = 0.5 if name.startswith("blocks.0.") else 3 if name.endswith("A_log") else 2 if ".mixer_norm." in name else 1
        base = 0.01 if name.startswith("blocks.") and name.endswith("_proj.weight") else 0.1
        assert rate == pytest.approx(base * factor), name


def test_frozen_parameters_do_not_change(tmp_path):
    train(plan(frozen=["blocks.0.*"]), tmp_path / "run")
    trained = zoo.load(tmp_path / "run").state_dict()
    fresh = zoo.create("gdn4-sleep2", **SMALL["overrides"], vocab_size=7).state_dict()
    assert {name for name in fresh if torch.equal(fresh[name], trained[name])} == {name for name in fresh if name.startswith("blocks.0.")}


def test_micro_batches_add_up_to_the_batch():
    config = plan()
    task = new_task(config.task)
    gradients, losses = [], []
    for accumulate in (1, 3):  # 16 sequences do not divide evenly
        model = zoo.create(config.model, **config.overrides, vocab_size=7, dtype=torch.float64)
        weights = Weights(model)
        losses.append(backward(model.answers, weights, task.batch(0, 0, 16), model.config, accumulate=accumulate, team=ALONE).loss)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)
    ids, mask, _ = (torch.from_numpy(x) for x in task.batch(0, 0, 16))
    assert losses[0] == pytest.approx(model.loss(ids, mask).item(), abs=1e-12)


def test_bfloat16_is_trained_through_float32_copies(tmp_path):
    config = plan(dtype="bfloat16", lr=1e-2, steps=80, batch_size=32)
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    for name, p in zoo.load(tmp_path / "run").named_parameters():
        assert p.dtype == (torch.float32 if name.endswith(("norm.weight", "A_log", "dt_bias")) else torch.bfloat16), name
    model = torch.nn.ParameterDict({"w": torch.ones(1, dtype=torch.bfloat16)})
    weights = Weights(model)
    (sgd,) = [torch.optim.SGD(weights.wide.values(), lr=1e-3)]
    for _ in range(8):  # each step is too small to change a bfloat16 1
        (model["w"] * 1).sum().backward()
        weights.take_gradients()
        sgd.step()
        sgd.zero_grad()
        weights.write_back()
    assert weights.wide["w"].item() == pytest.approx(0.992)
    assert model["w"].item() == torch.tensor(0.992, dtype=torch.bfloat16).item()


def test_the_learning_rate_warms_up_stays_and_decays():
    rates = [learning_rate_factor(step, plan(steps=100, warmup=0.1, decay=0.3)) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:71] == [1.0] * 62
    assert rates[85] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.04


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_torch_after_the_warmup(name):
    """Torch's, counted from the last step of the warm-up."""
    rates = [learning_rate_factor(step, plan(steps=100, warmup=0.1, lr_schedule=name)) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 90),
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 90),
    }[name]()
    for rate in rates[10:]:
        assert rate == pytest.approx(torchs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        torchs.step()


def test_decay_belongs_to_wsd():
    with pytest.raises(zoo.ZooError, match=r"decay: 0\.6: only lr_schedule wsd has one, not cosine; allowed: the default, 0\.3"):
        plan(lr_schedule="cosine", decay=0.6)
    with pytest.raises(zoo.ZooError, match="lr_schedule"):
        plan(lr_schedule="step")


def test_weight_decay_shrinks_matrices_and_nothing_else(tmp_path):
    """One step with weight decay and the same step without it; the parameters that differ are those that decay."""
    fields = {"layers": "mamba2 attn gdn", "window": 6, "d_model": 16, "d_ff": 16, "learned_positions": True, "inject": True,
              "blocks": {"mamba2": {"head_dim": 16, "state_dim": 16}}}  # fmt: skip
    trained = {}
    for name, changes in {"none": {}, "some": {"weight_decay": 0.5}, "less": {"weight_decay": 0.5, "no_decay": ["*.mlp.*"]}}.items():
        train(plan(overrides=fields, steps=1, warmup=0.0, decay=0.0, **changes), tmp_path / name)
        trained[name] = zoo.load(tmp_path / name).state_dict()
    decayed = {name for name in trained["none"] if not torch.equal(trained["none"][name], trained["some"][name])}
    expected = {n for n in trained["none"] if n.endswith("_proj.weight")} | {"embed.weight", "head.weight"}
    assert decayed == expected
    assert all(trained["some"][name].norm() < trained["none"][name].norm() for name in decayed)
    less = {name for name in trained["none"] if not torch.equal(trained["none"][name], trained["less"][name])}
    assert less == {name for name in expected if ".mlp." not in name}
    recorded = (tmp_path / "some" / "no_decay.txt").read_text().splitlines()
    assert sorted(recorded) == sorted(trained["none"].keys() - expected)
    assert not (tmp_path / "none" / "no_decay.txt").exists()


def test_a_run_that_began_under_another_rule_of_weight_decay_is_refused(tmp_path):
    def stop(metrics):
        raise KeyboardInterrupt

    config = plan(weight_decay=0.1, steps=6, checkpoint_every=1, log_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", report=stop)
    record = tmp_path / "run" / "no_decay.txt"
    names = record.read_text()
    record.unlink()  # as runs of older versions
    for _ in range(2):
        with pytest.raises(zoo.ZooError, match="began with weight decay on different parameters"):
            train(config, tmp_path / "run")
        record.write_text("norm.weight\n")
    record.write_text(names)
    assert train(config, tmp_path / "run")["answers"] > 0


def batch_of_four(answered):
    """Return four sequences of which only the last `answered` ask anything."""
    ids = torch.randint(7, (4, 9), generator=torch.Generator().manual_seed(0)).numpy()
    mask = np.zeros((4, 9), dtype=bool)
    mask[4 - answered :, 7:] = True
    return Batch(ids, mask, mask * 1)


def test_a_micro_batch_without_answers_adds_nothing():
    batch = batch_of_four(2)
    model = zoo.create("gdn4-sleep2-hard6", layers="attn gdn", d_model=16, d_ff=16, vocab_size=7, dtype=torch.float64)
    score = backward(model.answers, Weights(model), batch, model.config, accumulate=2, team=ALONE)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = model.loss(*(torch.from_numpy(x[2:]) for x in batch[:2]))
    loss.backward()
    assert score.loss == pytest.approx(loss.item(), abs=1e-12)
    assert len(score.right) == 4
    assert all(torch.allclose(found[name], p.grad, rtol=0, atol=1e-12) for name, p in model.named_parameters())
    with pytest.raises(zoo.ZooError, match="a batch without answers"):
        backward(model.answers, Weights(model), batch_of_four(0), model.config, accumulate=2, team=ALONE)


EXPERTS = {"layers": "gdn", "d_model": 16, "d_ff": 16, "mlp": "moe", "mlps": {"moe": {"experts": 4, "top_k": 1, "width": 8}}}


@pytest.mark.parametrize("recompute", ["nothing", "passes", "chunks"])
def test_the_balance_of_experts_is_part_of_the_gradient(recompute):
    """That of every route in a wake pass and in the passes of a sleep."""
    ids, mask, level = batch_of_four(4)
    model = zoo.create("gdn4-sleep3-hard6", **EXPERTS, vocab_size=7, dtype=torch.float64)
    score = backward(
        model.answers, Weights(model), Batch(ids, mask, level), model.config, balance=0.7, recompute=recompute, accumulate=2, team=ALONE
    )
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses, balances, chosen = [], [], []
    for half in (slice(0, 2), slice(2, 4)):
        with recorded_routes() as routes:
            losses.append(model.loss(torch.from_numpy(ids[half]), torch.from_numpy(mask[half])))
        assert len(routes) == 2 + 1  # nothing reads the MLP of the last pass
        balances.append(balance_loss(routes))
        chosen += [(route.number, expert) for route in routes for expert in route.chosen.flatten().tolist()]
    (sum(losses) / 2 + 0.7 * sum(balances) / 2).backward()
    assert score.loss == pytest.approx(sum(losses).item() / 2, abs=1e-12)
    assert score.balance == pytest.approx(sum(balances).item() / 2, abs=1e-12)
    assert {n: load.tolist() for n, load in score.experts.items()} == {n: [[chosen.count((n, e)) for e in range(4)]] for n in range(2)}
    assert all(torch.allclose(found[name], model.get_parameter(name).grad, rtol=0, atol=1e-12) for name in found)


def test_training_balances_experts(tmp_path):
    lines = []
    config = tiny(steps=40, batch_size=8, lr=0.02, overrides=EXPERTS, balance=1.0)
    train(config, tmp_path / "run", report=lines.append)
    assert lines[-1]["balance"] < 1.02 < lines[0]["balance"]  # 1: all experts are chosen equally often
    assert lines[-1]["experts_by_pass"].keys() == {"1"}  # nothing reads the MLP of the second pass
    assert lines[-1]["experts_by_pass"]["1"]["busiest"] < 1.3 < lines[0]["experts_by_pass"]["1"]["busiest"]
    with pytest.raises(zoo.ZooError, match=r"balance: 1.0: gdn4-sleep2-hard6 has no mixture of experts"):
        train(tiny(balance=1.0), tmp_path / "dense")


def test_the_divisor_is_the_number_of_predicted_tokens():
    """The first token after a sleep is marked, but nothing predicts it."""
    ids, mask, level = batch_of_four(4)
    mask[:, 6] = True
    model = zoo.create("gdn4-sleep2-hard6", layers="attn gdn", d_model=16, d_ff=16, vocab_size=7, dtype=torch.float64)
    state = model.consolidate(torch.from_numpy(ids[:, :6]))
    logits = model(torch.from_numpy(ids[:, 6:]), state).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(ids[:, 7:]).flatten())
    for accumulate in (1, 3):
        score = backward(model.answers, Weights(model), Batch(ids, mask, level), model.config, accumulate=accumulate, team=ALONE)
        assert score.loss == pytest.approx(expected.item(), abs=1e-12)


def test_a_single_batch_does_not_decide_that_a_run_has_diverged():
    easy_start = Divergence(5)
    assert not any(easy_start.add(loss) for loss in [0.001, *[0.9] * 100, 50.0, *[0.9] * 9, *[9.0] * 9, 0.5])
    growing = Divergence(5)
    assert [growing.add(loss) for loss in [*[1.0] * 10, *[6.0] * 12]] == [False] * 19 + [True] * 3


def test_the_judgement_on_divergence_survives_a_restart():
    losses = [*[1.0] * 12, *[6.0] * 12]
    without = Divergence(5)
    expected = [without.add(loss) for loss in losses]
    found, state = [], ([], 0)
    for loss in losses:
        divergence = Divergence(5, *state)
        found.append(divergence.add(loss))
        state = json.loads(json.dumps([divergence.first, divergence.above]))
    assert found == expected
    assert sum(expected) == 3


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(zoo.ZooError, match="try a lower lr; there is no checkpoint yet"):
        train(plan(lr=1e30, steps=20, clip=1e30), tmp_path / "run")


def test_a_loss_that_grows_stops_the_run_and_the_last_checkpoint_is_named(tmp_path):
    with pytest.raises(
        zoo.ZooError, match=r"loss .* at step \d+; try a lower lr; the last good checkpoint is .*checkpoints/000000\d\d"
    ) as raised:
        train(plan(lr=3.0, steps=40, clip=1e30, diverged=2, checkpoint_every=1, warmup=0.9), tmp_path / "run")
    model = zoo.load(str(raised.value).rpartition(" is ")[2])
    assert all(p.isfinite().all() for p in model.parameters())


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
        ({"optimizer": "adamv"}, "unknown optimizer 'adamv'; did you mean 'adamw'"),
        ({"frozen": ["blocks.7.*"]}, "frozen: 'blocks.7.*' matches no parameter"),
        ({"frozen": ["*"]}, "frozen: no parameter is left to train"),
        ({"lr_scale": {"embd*": 2.0}}, "lr_scale: 'embd.' matches no parameter"),
    ],
)
def test_wrong_config_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(zoo.ZooError, match=message):
        train(plan(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 17}, "accumulate: 17 micro-batches are more than the 16 sequences"),
        ({"lr_scale": {"*": 0.0}}, "want factors above 0"),
        ({"dtype": "float16"}, "dtype: 'float16'"),
        ({"keep": 0}, "keep: 0"),
    ],
)
def test_wrong_values(changes, message):
    with pytest.raises(zoo.ZooError, match=message):
        plan(**changes)
