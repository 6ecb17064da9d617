"""Labels against brute force, splits apart, baselines against enumeration and simulation."""

import numpy as np
import pytest

import zoo
from zoo.tasks import new_task, tasks


def test_cycle_labels():
    task = new_task({"name": "cycle", "nodes": 7, "hops": 6})
    ids, mask, level = task.batch(0, 0, 500)
    assert ids.shape == (500, 14 + 3 * 4)
    for row, supervised, hops in zip(ids, mask, level, strict=True):
        edges = dict(zip(row[0:14:2], row[1:14:2] - 7, strict=True))
        walked, node = [0], edges[0]
        while node != 0:
            walked.append(node)
            node = edges[node]
        assert sorted(walked) == list(range(7))
        questions = row[14:].reshape(-1, 3)
        assert len({tuple(q[:2]) for q in questions}) == len(questions)
        for t, (k, start, answer) in enumerate(questions):
            node = start
            for _ in range(k - 14 + 1):
                node = edges[node]
            assert answer - 7 == node
            assert supervised[14 + 3 * t : 17 + 3 * t].tolist() == [False, False, True]
            assert hops[14 + 3 * t : 17 + 3 * t].tolist() == [0, 0, k - 14 + 1]
        assert not supervised[:14].any()


def test_cycle_chance_by_simulation():
    task = new_task({"name": "cycle", "nodes": 6, "hops": 5})
    ids, mask, _ = task.batch(1, 0, 20_000)
    start, answer = ids[:, 13::3] - 0, ids[:, 14::3] - 6
    assert mask[:, 14::3].all()
    assert (start != answer).all()  # so a guess among the other nodes is right 1 in m - 1 times
    shift = (answer - start) % 6
    counts = np.bincount(shift.ravel(), minlength=6)[1:] / shift.size
    assert np.abs(counts - task.chance()).max() < 0.005


def brute_force_rule110(cells, steps):
    table = {(1, 1, 1): 0, (1, 1, 0): 1, (1, 0, 1): 1, (1, 0, 0): 0, (0, 1, 1): 1, (0, 1, 0): 1, (0, 0, 1): 1, (0, 0, 0): 0}
    for _ in range(steps):
        cells = [table[cells[i - 1], cells[i], cells[(i + 1) % len(cells)]] for i in range(len(cells))]
    return cells


@pytest.mark.parametrize("steps", [0, 1, 5, 32])
def test_rule110_labels(steps):
    task = new_task({"name": "rule110", "width": 24, "strings": 4, "steps": steps})
    ids, mask, level = task.batch(0, 0, 50)
    assert ids.shape == (50, 101)
    for row, supervised in zip(ids, mask, strict=True):
        states = row[:96].reshape(4, 24).tolist()
        assert row[96] == 2
        assert row[97:].tolist() == [brute_force_rule110(state, steps)[0] for state in states]
        assert np.flatnonzero(supervised).tolist() == [97, 98, 99, 100]
    assert set(level[mask]) == {steps}


def test_rule110_baseline():
    """The paper's width: .5617 of all cells are 1 after 32 steps, so always guessing 1 is right on .0995 of the sequences."""
    task = new_task({"name": "rule110"})
    assert task.chance() == pytest.approx(0.5617, abs=5e-5)
    assert task.exact_chance() == pytest.approx(0.0995, abs=5e-5)


@pytest.mark.parametrize(("width", "steps"), [(5, 3), (9, 8), (30, 4)])
def test_rule110_share_of_ones(width, steps):
    task = new_task({"name": "rule110", "width": width, "steps": steps})
    if width < 10:
        cells = [brute_force_rule110([(n >> i) & 1 for i in range(width)], steps)[0] for n in range(2**width)]
        assert task.share_of_ones() == pytest.approx(np.mean(cells), abs=1e-12)
    else:
        ids = task.batch(0, 0, 20_000).ids
        assert task.share_of_ones() == pytest.approx(ids[:, -4:].mean(), abs=0.01)


@pytest.mark.parametrize("name", tasks.names())
def test_batches_are_reproducible_and_held_out(name):
    task = new_task({"name": name, **({"nodes": 5, "hops": 2} if name == "cycle" else {"width": 6, "strings": 1, "steps": 2})})
    first, again, other = task.batch(3, 7, 64), task.batch(3, 7, 64), task.batch(3, 8, 64)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(first.ids, other.ids)
    contexts = {}
    for split in ("train", "test"):
        ids = np.concatenate([task.batch(0, step, 256, split).ids[:, : task.window] for step in range(20)])
        if name == "cycle":  # the same cycle may be shown in any order
            ids = np.array([sorted(zip(row[::2], row[1::2], strict=True)) for row in ids])
        contexts[split] = {row.tobytes() for row in ids}
    assert contexts["train"]
    assert contexts["test"]
    assert not contexts["train"] & contexts["test"]


@pytest.mark.parametrize("name", tasks.names())
def test_tokens_fit_the_vocabulary_and_the_window(name):
    task = new_task({"name": name})
    ids, mask, level = task.batch(0, 0, 300)
    assert ids.min() == 0
    assert ids.max() == task.vocab_size - 1
    supervised_chunks = {t // task.window for t in np.flatnonzero(mask.any(0))}
    assert supervised_chunks == {(ids.shape[1] - 1) // task.window}  # one prediction chunk, at the end
    assert ((level > 0) == mask).all()


def test_too_few_contexts_to_hold_any_out():
    with pytest.raises(zoo.ZooError, match="too few contexts"):
        new_task({"name": "cycle", "nodes": 3, "hops": 1}).batch(0, 0, 4, "test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "task.name: None: want one of cycle, rule110"),
        ({"name": "cicle"}, "unknown task 'cicle'; did you mean 'cycle'"),
        ({"name": "cycle", "node": 3}, "node: unknown field; did you mean 'nodes'"),
        ({"name": "cycle", "nodes": 4, "hops": 4}, "hops: 4 must be less than nodes: 4"),
        ({"name": "cycle", "nodes": 6, "questions": 5}, "questions: 5"),
        ({"name": "rule110", "width": 2}, "width: 2"),
    ],
)
def test_wrong_task(fields, message):
    with pytest.raises(zoo.ZooError, match=message):
        new_task(fields)
