"""Labels against brute force, splits apart, baselines against enumeration and simulation."""

import numpy as np
import pytest

import zoo
from zoo.tasks import new_task, tasks


def test_cycle_labels():
    task = new_task({"name": "cycle", "nodes": 10, "hops": 6})
    ids, mask, level = task.batch(0, 0, 500)
    assert ids.shape == (500, 10 + 3 * 3)
    for row, supervised, hops in zip(ids, mask, level, strict=True):
        follows = dict(enumerate(row[:10]))
        walked, node = [0], follows[0]
        while node != 0:
            walked.append(node)
            node = follows[node]
        assert sorted(walked) == list(range(10))
        questions = row[10:].reshape(-1, 3)
        assert len({tuple(q[:2]) for q in questions}) == len(questions)
        for t, (asked, start, answer) in enumerate(questions):
            k, node = asked - 9, start
            assert 1 <= k <= 6
            for _ in range(k):
                node = follows[node]
            assert answer == node
            assert supervised[10 + 3 * t : 13 + 3 * t].tolist() == [False, False, True]
            assert hops[10 + 3 * t : 13 + 3 * t].tolist() == [0, 0, k]
        assert not supervised[:10].any()


def test_cycle_chance_by_simulation():
    task = new_task({"name": "cycle", "nodes": 9, "hops": 8})
    ids, mask, _ = task.batch(1, 0, 20_000)
    start, answer = ids[:, 10::3], ids[:, 11::3]
    assert mask[:, 11::3].all()
    assert (start != answer).all()  # so a guess among the other nodes is right 1 in m - 1 times
    counts = np.bincount(((answer - start) % 9).ravel(), minlength=9)[1:] / answer.size
    assert np.abs(counts - task.chance()).max() < 0.01


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
        ({"name": "cycle", "nodes": 6, "questions": 3}, "questions: 3"),
        ({"name": "rule110", "width": 2}, "width: 2"),
    ],
)
def test_wrong_task(fields, message):
    with pytest.raises(zoo.ZooError, match=message):
        new_task(fields)
