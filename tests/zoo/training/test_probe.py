"""Probes: planted states, norms of a plain loop in float64, and the files that `zoo probe` writes."""

import csv
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import zoo
from tests.zoo.training.tiny import tiny
from zoo.cli import main
from zoo.tasks import new_task
from zoo.training import probe as probing
from zoo.training.loop import train
from zoo.training.probe import after_each_pass, hops_of, probe, read_out

TASK = new_task({"name": "cycle", "nodes": 10, "hops": 4, "joint": True})


def small(layers="attn gdn", **fields):
    return zoo.create("gdn4-hard10", layers=layers, d_model=16, d_ff=16, vocab_size=TASK.vocab_size, loops=3, **fields)


def test_hops_are_followed_one_by_one():
    windows = TASK.contexts(np.random.default_rng(0), 5)
    reached = hops_of(windows, 4)
    for cycle, found in zip(windows, reached, strict=True):
        for x in range(10):
            node = x
            for k in range(4):
                node = cycle[node]
                assert found[k, x] == node


def test_a_read_out_finds_what_is_planted_and_nothing_else():
    """Features that a rotation of f^3 gives read f^3 on unseen cycles; noise and a constant read nothing, at the rate 1 / (M - 1)."""
    windows = np.unique(TASK.contexts(np.random.default_rng(0), 3000), axis=0)
    labels = hops_of(np.random.default_rng(1).permutation(windows), 4)
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(100, 100, generator=generator, dtype=torch.float64))[0]
    planted = F.one_hot(labels[:, 2], 10).flatten(1).double() @ rotation
    noise = torch.randn(len(labels), 100, generator=generator, dtype=torch.float64)
    right = read_out(planted, labels, 1800, 400)
    assert right[2] == 1
    assert max(right[0], right[1], right[3]) < 0.2  # f^3 excludes a few nodes
    assert read_out(torch.cat([planted, 0.1 * noise], 1), labels, 1800, 400)[2] == 1
    for nothing in (noise, torch.zeros_like(noise)):
        assert read_out(nothing, labels, 1800, 400) == pytest.approx([1 / 9] * 4, abs=0.02)
    assert read_out(planted, labels.roll(1, 0), 1800, 400) == pytest.approx([1 / 9] * 4, abs=0.02)


@pytest.mark.parametrize("largest", [1024, 120], ids=["all entries", "sums"])
def test_planted_fast_weights_are_read_pass_by_pass(monkeypatch, largest):
    """Pass p leaves f^p in S, and nothing else; then p hops can be read after pass p, and no others."""
    monkeypatch.setattr(probing, "LARGEST", largest)
    model, read = small(), []
    assert [s if s is None else s.shape for s in model.init_state().fast] == [None, (1, 4, 4, 8)]
    consolidate = model.consolidate

    def remember(ids, **rest):
        read.clear()
        read.append(ids.numpy())
        return consolidate(ids, **rest)

    def plant(block, inputs, outputs):
        h, fast, window = outputs
        read.append(None)
        hop = F.one_hot(hops_of(read[0], 4)[:, len(read) - 2], 10).flatten(1).float()
        return h, F.pad(hop, (0, 28)).view_as(fast) + 0 * fast, window

    monkeypatch.setattr(model, "consolidate", remember)
    model.blocks[1].register_forward_hook(plant)
    monkeypatch.setattr(probing, "evaluate", lambda *args, **rest: {"first_by_level": {1: 1.0}})
    found = probe(model, TASK, cycles=600)
    assert 560 < found["fitted"] <= 600  # without duplicates
    assert found["fitted"] / 4 == pytest.approx(found["scored"], abs=1)
    assert found["fitted"] / 4 == pytest.approx(found["chosen_on"], abs=2)
    assert found["features"] == min(128, largest)
    for n, right in enumerate(found["accuracy"]["S"]):
        assert right[n] >= (1 if largest > 128 else 0.8)
        assert max(right[:n] + right[n + 1 :]) < 0.25
    assert np.ravel(found["accuracy"]["shuffled"]) == pytest.approx(found["chance"], abs=0.06)
    assert found["accuracy"]["window"][0][0] == 1
    assert found["norms"]["S"] == pytest.approx([math.sqrt(10)] * 3)  # ten ones
    assert found["norms"]["change of S"][0] == pytest.approx(math.sqrt(10))


def test_norms_are_those_of_a_plain_loop(monkeypatch):
    """With a prelude, a coda, injection and a norm between passes; gradients from the state after each pass, each on its own."""
    monkeypatch.setattr(probing, "BATCH", 8)
    model = small("gdn attn gdn gdn", span=[1, 3], inject=True, loop_norm=True, dtype="float64")
    torch.nn.init.normal_(model.inject, generator=torch.Generator().manual_seed(0))
    ids = torch.from_numpy(TASK.model_copy(update={"questions": 1}).batch(7, 1, probing.BATCH, "test").ids)
    with torch.no_grad():
        embedded, start, positions, passes = model.start_sleep(ids[:, :10], None, 3)
        first = model.blocks[0](embedded, start.fast[0], start.window[0], positions)[0]  # the prelude

    def sleep(h, fast, begin):
        """Run the passes from `begin` on; yield h and the fast weights after each."""
        for n in range(begin, 3):
            for i, keep in passes[n]:
                if i == 1 and n:
                    h = model.norm(h) + model.inject * first
                h, fast[i], _ = model.blocks[i](h, fast[i], start.window[i], positions, keep=keep)
            yield h, list(fast)

    with torch.no_grad():
        states = list(sleep(embedded, list(start.fast), 0))
    sizes, batch = {name: [] for name in ("h", "S", "change of S", "gradient of h", "gradient of S")}, len(ids)
    kept_by_pass = [[s for s in fast if s is not None] for _, fast in states]
    zeros = before = [torch.zeros_like(s) for s in start.fast if s is not None]

    def norm(tensors):
        return sum(math.sqrt(sum(float((x[b].detach() ** 2).sum()) for x in tensors)) for b in range(batch)) / batch

    for n, (h, fast) in enumerate(states):
        h = h.detach().requires_grad_()
        fast = [s if s is None else s.detach().requires_grad_() for s in fast]
        *_, (_, final) = [(h, fast), *sleep(h, list(fast), n + 1)]
        state = model.evict(zoo.State(tuple(final), start.window, 0))
        logits = model(ids[:, 10:11], state).logits[:, 0]
        F.cross_entropy(logits, ids[:, 11], reduction="sum").backward()
        kept = [s for s in fast if s is not None]
        if n < 2:
            sizes["h"].append(norm([h]))
            sizes["gradient of h"].append(norm([h.grad]))
        sizes["S"].append(norm(kept))
        sizes["change of S"].append(norm([s - old for s, old in zip(kept, before, strict=True)]))
        sizes["gradient of S"].append(norm([torch.zeros_like(s) if s.grad is None else s.grad for s in kept]))
        before = kept
    found, change = probing._sizes(model, TASK.model_copy(update={"questions": 1}), 3, 7)
    assert found.keys() == sizes.keys()
    for name, values in sizes.items():
        assert found[name] == pytest.approx(values, rel=1e-5), name  # the loss is float32
    assert np.array(change) == pytest.approx(
        np.stack([(s[-1][0] - old[-1][0]).reshape(-1, 8) for s, old in zip(kept_by_pass, [zeros, *kept_by_pass], strict=False)]), abs=1e-5
    )


def test_recording_changes_nothing():
    model, ids = small(), torch.from_numpy(TASK.batch(0, 0, 4).ids[:, :10])
    with torch.no_grad():
        passes, state = after_each_pass(model, ids, 3)
        expected = model.consolidate(ids)
        shorter = [model.consolidate(ids, loops=n) for n in (1, 2, 3)]
    assert torch.equal(state.fast[1], expected.fast[1])
    for one, alone in zip(passes, shorter, strict=True):
        assert torch.equal(one.fast[0], alone.fast[1])
    assert not any(block._forward_hooks for block in model.blocks)


def test_the_command_writes_a_picture_and_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tiny(model="gdn4-sleep2-hard8", task={"name": "cycle", "nodes": 8, "hops": 2}), tmp_path / "run")
    done = CliRunner().invoke(main, ["probe", "run", "--cycles", "150", "--loops", "3"])
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in (tmp_path / "probe" / "run").iterdir()) == ["probe.csv", "probe.json", "probe.png"]
    found = json.loads((tmp_path / "probe" / "run" / "probe.json").read_text())
    assert (found["loops"], found["fitted"], found["task"]) == (3, 104, "cycle nodes=8 hops=2")
    rows = list(csv.DictReader((tmp_path / "probe" / "run" / "probe.csv").open()))
    assert len(rows) == 4 * 3 * 2 + 2
    written = {(row["read_out"], row["pass"], row["hops"]): float(row["accuracy"]) for row in rows}
    assert written["S", "3", "2"] == found["accuracy"]["S"][2][1]
    assert f"{found['accuracy']['S'][2][1]:.1%}" in done.output
    again = CliRunner().invoke(main, ["probe", "run", "--cycles", "150", "--loops", "3", "--out", "again"])
    assert again.exit_code == 0
    assert (tmp_path / "again" / "probe.json").read_bytes() == (tmp_path / "probe" / "run" / "probe.json").read_bytes()
    assert "already exists" in CliRunner().invoke(main, ["probe", "run"]).output


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ({"name": "rule110", "width": 10}, {}, "task: rule110; only windows of the task cycle"),
        ({"name": "depo"}, {}, "task: depo; only windows of the task cycle"),
        ({"name": "cycle", "nodes": 5}, {"window": 5}, "task.nodes: 5 give 2 held-out cycles; the probe needs at least 96"),
        ({"name": "cycle", "nodes": 10}, {"evict": "none", "window": None}, "never sleeps into fast weights"),
        ({"name": "cycle", "nodes": 10}, {"evict": "sliding", "layers": "attn"}, "never sleeps into fast weights"),
        ({"name": "cycle", "nodes": 11}, {}, "window: 10, but the task lays its sequences out for windows of 11"),
    ],
)
def test_what_cannot_be_probed_is_refused(task, fields, message):
    with pytest.raises(zoo.ZooError, match=message):
        probe(small(**{"layers": "attn gdn", **fields}), new_task(task))


@pytest.mark.parametrize(
    ("named", "message"), [("cycle2-sleep3", "cycle2-sleep1, cycle2-sleep4"), (".", "want the folder of a training run")]
)
def test_what_is_neither_a_run_nor_comes_with_the_package_is_refused(named, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["probe", named, "--out", "out"])
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert message in done.output
    assert not (tmp_path / "out").exists()
