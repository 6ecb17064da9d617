"""Labels against brute force, splits apart, baselines against enumeration and simulation."""

import json
import math
import os
from collections import Counter, defaultdict
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

import zoo
from zoo.config import validate
from zoo.tasks import new_task, tasks
from zoo.tasks.rule110 import share_of_ones
from zoo.tasks.task import fingerprint
from zoo.text.corpus import tokenize
from zoo.training.config import TrainConfig, read_config
from zoo.training.loop import train


@pytest.mark.parametrize(
    ("fields", "length", "count"),
    [({"nodes": 10}, 3, 3), ({"nodes": 9, "questions": 6}, 3, 6), ({"nodes": 10, "joint": True, "questions": 20}, 2, 20)],
)
def test_cycle_labels(fields, length, count):
    task = new_task({"name": "cycle", "hops": 6, **fields})
    m = task.nodes
    ids, mask, level = task.batch(0, 0, 500)
    assert ids.shape == (500, m + length * count)
    for row, supervised, hops in zip(ids, mask, level, strict=True):
        follows = dict(enumerate(row[:m]))
        walked, node = [0], follows[0]
        while node != 0:
            walked.append(node)
            node = follows[node]
        assert sorted(walked) == list(range(m))
        questions = row[m:].reshape(-1, length)
        assert len({tuple(q[:-1]) for q in questions}) == len(questions)
        for t, (*asked, answer) in enumerate(questions):
            k, node = divmod(asked[0], m) if task.joint else (asked[0] - m + 1, asked[1])
            assert 1 <= k <= 6
            for _ in range(k):
                node = follows[node]
            assert answer == node
            at = slice(m + length * t, m + length * (t + 1))
            assert supervised[at].tolist() == [False] * (length - 1) + [True]
            assert hops[at].tolist() == [0] * (length - 1) + [k]
            assert at.start // m == (at.stop - 1) // m  # asked and answered in one window
        assert not supervised[:m].any()


@pytest.mark.parametrize("fields", [{"questions": 1}, {"questions": 2}, {"joint": True, "questions": 12}, {"hops": 2, "joint": True}])
def test_cycle_chance_by_enumeration(fields):
    """A reader who never saw the window keeps every cycle that agrees with the answers so far, and guesses evenly among theirs."""
    task = new_task({"name": "cycle", "nodes": 6, "hops": 5, **fields})
    orders = [(0, *rest) for rest in permutations(range(1, 6))]
    cycles = np.array([[order[(order.index(x) + 1) % 6] for x in range(6)] for order in orders])
    power = [np.tile(np.arange(6), (len(cycles), 1))]
    for _ in range(task.hops):
        power.append(np.take_along_axis(cycles, power[-1], axis=1))
    right = []
    for row in task.batch(7, 0, 1500, "test").ids:
        agrees = np.ones(len(cycles), dtype=bool)
        for *asked, answer in row[6:].reshape(-1, task.length):
            hops, node = divmod(asked[0], 6) if task.joint else (asked[0] - 5, asked[1])
            right.append(1 / len(set(power[hops][agrees, node])))
            agrees &= power[hops][:, node] == answer
    assert np.mean(right) == pytest.approx(task.chance(), abs=0.015)
    if fields == {"questions": 1}:
        assert task.chance() == pytest.approx(1 / 5)


def test_cycle_answers_are_even():
    """A single question is answered evenly by the other nodes."""
    ids = new_task({"name": "cycle", "nodes": 9, "hops": 8}).batch(1, 0, 20_000).ids
    start, answer = ids[:, 10::3], ids[:, 11::3]
    assert (start != answer).all()
    counts = np.bincount(((answer - start) % 9).ravel(), minlength=9)[1:] / answer.size
    assert np.abs(counts - 1 / 8).max() < 0.01


def brute_force_rule110(cells, steps):
    table = {(1, 1, 1): 0, (1, 1, 0): 1, (1, 0, 1): 1, (1, 0, 0): 0, (0, 1, 1): 1, (0, 1, 0): 1, (0, 0, 1): 1, (0, 0, 0): 0}
    for _ in range(steps):
        cells = [table[seen] for seen in zip(cells[-1:] + cells[:-1], cells, cells[1:] + cells[:1], strict=True)]
    return cells


@pytest.mark.parametrize(("steps", "count"), [(0, 50), (1, 50), (5, 50), (32, 2500)])
def test_rule110_labels(steps, count):
    """At the paper's size, 10,000 labels."""
    task = new_task({"name": "rule110", "width": 24, "strings": 4, "steps": steps})
    ids, mask, level = task.batch(0, 0, count)
    assert ids.shape == (count, 101)
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


def test_rule110_baseline_by_simulation():
    """On 16,384 sequences the standard error is .0023."""
    answers = new_task({"name": "rule110"}).batch(5, 0, 16_384).ids[:, -4:]
    assert answers.all(axis=1).mean() == pytest.approx(0.0995, abs=0.005)


@pytest.mark.parametrize(("width", "steps"), [(5, 3), (9, 8), (30, 4)])
def test_rule110_share_of_ones(width, steps):
    task = new_task({"name": "rule110", "width": width, "steps": steps})
    if width < 10:
        cells = [brute_force_rule110([(n >> i) & 1 for i in range(width)], steps)[0] for n in range(2**width)]
        assert share_of_ones(width, steps) == pytest.approx(np.mean(cells), abs=1e-12)
    else:
        ids = task.batch(0, 0, 20_000).ids
        assert share_of_ones(width, steps) == pytest.approx(ids[:, -4:].mean(), abs=0.01)


def rings(ids, width):
    """The states that sequences show."""
    return set(map(tuple, ids[:, : 2 * width].reshape(-1, width).tolist()))


@pytest.mark.parametrize("fields", [{}, {"all_cells": True, "every_step": True}])
def test_rule110_splits_are_by_string(fields):
    """Nearly all strings of the training split are drawn, and none of the held-out ones."""
    task = new_task({"name": "rule110", "width": 10, "strings": 2, "steps": 3, **fields})
    train = set().union(*(rings(task.batch(0, step, 512).ids, 10) for step in range(20)))
    test = set().union(*(rings(task.batch(0, step, 512, "test").ids, 10) for step in range(5)))
    assert not train & test
    assert len(train | test) > 0.99 * 2**10
    assert 20 < len(test) < 120


def test_rule110_all_cells_and_every_step():
    task = new_task({"name": "rule110", "width": 9, "strings": 2, "steps": 4, "all_cells": True, "every_step": True})
    ids, mask, level = task.batch(0, 0, 400)
    assert task.vocab_size == 6
    assert ids.shape == (400, 2 * 9 + 1 + 2 * 9)
    for row, supervised, steps in zip(ids, mask, level, strict=True):
        asked = int(row[18]) - 1
        assert supervised.tolist() == [False] * 19 + [True] * 18
        assert set(steps[supervised]) == {asked}
        assert row[19:].tolist() == [cell for state in row[:18].reshape(2, 9).tolist() for cell in brute_force_rule110(state, asked)]
    assert np.abs(np.bincount(ids[:, 18])[2:] / 400 - 1 / 4).max() < 0.08
    first = new_task({"name": "rule110", "width": 9, "strings": 2, "steps": 4, "every_step": True}).batch(0, 0, 100)
    for row in first.ids:
        assert row[19:].tolist() == [brute_force_rule110(state, int(row[18]) - 1)[0] for state in row[:18].reshape(2, 9).tolist()]


def test_rule110_guess_from_earlier_cells_by_counting():
    """Over all states: the likelier value after each prefix of the cells that have been answered."""
    task = new_task({"name": "rule110", "width": 7, "strings": 1, "steps": 2, "all_cells": True})
    ends = [brute_force_rule110([(n >> i) & 1 for i in range(7)], 2) for n in range(2**7)]
    right = []
    for i in range(7):
        after = defaultdict(Counter)
        for end in ends:
            after[tuple(end[:i])][end[i]] += 1
        right.append(sum(max(counts.values()) for counts in after.values()) / len(ends))
    assert task.chance() == pytest.approx(np.mean(right), abs=1e-12)
    assert task.exact_chance() is None
    wide, ring = (new_task({"name": "rule110", "width": w, "strings": 1, "steps": 3, "all_cells": True}) for w in (28, 20))
    assert ring.chance() - 0.04 < wide.chance() < ring.chance()  # in a whole ring, the first cells say something about the last ones


SMALL = {
    "cycle": {"nodes": 5, "hops": 2},
    "rule110": {"width": 6, "strings": 1, "steps": 2},
    "depo": {"nodes": 12, "hops": 3, "questions": 2},
    "passkey": {"width": 4, "windows": 2, "pairs": 1, "keys": 2, "values": 3, "noise": 2},
    "gsm-infinite": {"operations": 2, "quantities": 3, "shortest": 170, "longest": 240, "width": 120},
}


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}.npy", rng.integers(0, 10, 5000, dtype=np.uint16) + 10 * (split == "test"))
    return {
        "name": "text",
        "train": str(tmp_path / "train.npy"),
        "test": str(tmp_path / "test.npy"),
        "vocab": 20,
        "length": 50,
        "width": 20,
    }


def test_every_task_is_here():
    assert tasks.names() == sorted([*SMALL, "chat", "qa", "stdlib", "text"])


@pytest.mark.parametrize("name", SMALL)
def test_batches_are_reproducible_and_held_out(name):
    task = new_task({"name": name, **SMALL[name]})
    few = 8 if name == "gsm-infinite" else 64
    first, again, other = (task.batch(3, step, few) for step in (7, 7, 8))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(first.ids, other.ids)
    contexts = {}
    shown = first.ids.shape[1] // task.window * task.window
    for split in ("train", "test"):
        count = {"depo": 64, "gsm-infinite": 8}.get(name, 256)
        ids = np.concatenate([task.batch(0, step, count, split).ids[:, :shown] for step in range(20)])
        contexts[split] = {row.tobytes() for row in ids}
    assert contexts["train"]
    assert contexts["test"]
    assert not contexts["train"] & contexts["test"]


@pytest.mark.parametrize("name", SMALL)
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
        ({}, "task.name: None: want one of chat, cycle, depo, gsm-infinite, passkey, qa, rule110, stdlib, text"),
        ({"name": "cicle"}, "unknown task 'cicle'; did you mean 'cycle'"),
        ({"name": "cycle", "node": 3}, "node: unknown field; did you mean 'nodes'"),
        ({"name": "cycle", "nodes": 4, "hops": 4}, "hops: 4 must be less than nodes: 4"),
        ({"name": "cycle", "nodes": 7, "questions": 3}, "questions: 3 of 3 tokens each do not fit into a window of 7"),
        ({"name": "cycle", "nodes": 6, "questions": 25}, "questions: 25 is more than the 24 that there are"),
        ({"name": "rule110", "width": 2}, "width: 2"),
        ({"name": "depo", "nodes": 12, "questions": 3}, "questions: 3 of up to six tokens each do not fit into a window of 12"),
        ({"name": "passkey", "width": 6, "pairs": 4}, "pairs: 4 of two tokens each"),
        ({"name": "passkey", "keys": 15}, "keys: 15 are too few for 16 pairs"),
        ({"name": "passkey", "questions": 17}, "questions: 17: want at most 16"),
        ({"name": "text", "train": "nowhere.npy", "test": "b.npy", "vocab": 9}, "train: nowhere.npy: No such file or directory"),
        ({"name": "text", "train": "a.npy", "test": "./a.npy", "vocab": 9}, "test: ./a.npy is also the file to train on"),
    ],
)
def test_wrong_task(fields, message):
    with pytest.raises(zoo.ZooError, match=message):
        new_task(fields)


def read_names(tokens):
    """Names of a stretch of Depo tokens, read from left to right: a token above 50 ends a name."""
    names, name = [], ()
    for token in tokens:
        assert 1 <= token <= 100
        name += (int(token),)
        if token > 50:
            names.append(name)
            name = ()
    assert name == ()
    return names


def solve_depo(row):
    """Questions of a sequence of the paper's size, walked hop by hop over the edges: [(k, answer, walked to)], and how many nodes."""
    names = read_names(row[:300][row[:300] != 0])
    assert (row[: np.flatnonzero(row)[0]] == 0).all()
    follows = dict(zip(names[::2], names[1::2], strict=True))
    questions, rest = [], [t for t in row[300:] if t != 0]
    while rest:
        k = rest.pop(0) - 100
        end = rest.index(117)
        ((start,), rest) = read_names(rest[:end]), rest[end + 1 :]
        end = next(i for i, t in enumerate(rest) if t > 50)
        ((answer,), rest) = read_names(rest[: end + 1]), rest[end + 1 :]
        walked = start
        for _ in range(k):
            walked = follows[walked]
        questions.append((k, start, answer, walked))
    return questions, follows


def test_depo_labels():
    """10,000 training sequences of the paper's size; the sizes of the cycles are distributed as the source says."""
    task = new_task({"name": "depo"})
    sizes, hops = [], []
    ids, mask, level = task.batch(0, 0, 10_000)
    assert ids.shape == (10_000, 360)
    for row, supervised, levels in zip(ids, mask, level, strict=True):
        questions, follows = solve_depo(row)
        assert all(answer == walked for _, _, answer, walked in questions)
        assert len({start for _, start, _, _ in questions}) == len(questions) == min(len(follows), 10)
        asked = [t for k, _, answer, _ in questions for t in [k] * (1 + len(answer))]
        assert levels[supervised].tolist() == asked
        marked = [t for _, _, answer, _ in questions for t in (117, *answer)]
        assert row[supervised].tolist() == marked
        sizes.append(len(follows))
        hops += [k for k, *_ in questions]
    n = np.arange(3, 76)
    expected = 1 / (n + 75**0.5)
    assert np.mean(sizes) == pytest.approx((n * expected).sum() / expected.sum(), abs=1)
    assert np.abs(np.bincount(sizes, minlength=76)[3:] / 10_000 - expected / expected.sum()).max() < 0.01
    assert np.abs(np.bincount(hops, minlength=17)[1:] / len(hops) - 1 / 16).max() < 0.005


def test_depo_asks_for_powers_of_two_when_held_out():
    levels = new_task({"name": "depo"}).batch(0, 0, 300, "test").level
    assert set(np.unique(levels)) == {0, 1, 2, 4, 8, 16}
    assert set(np.unique(new_task({"name": "depo", "hops": 11, "largest": True}).batch(0, 0, 100, "test").level)) == {0, 1, 2, 4, 8}


def test_depo_cycles_are_whole_and_the_largest_when_held_out():
    for row in new_task({"name": "depo"}).batch(0, 0, 10, "test").ids:
        _, follows = solve_depo(row)
        node, seen = next(iter(follows)), set()
        while node not in seen:
            seen.add(node)
            node = follows[node]
        assert len(seen) == len(follows) == 75


def test_depo_chance_by_simulation():
    task = new_task({"name": "depo"})
    ids, mask, _ = task.batch(0, 0, 500, "test")
    after, before = ids[mask], ids[:, :-1][mask[:, 1:]]
    right = sum(np.bincount(after[before == token]).max() for token in np.unique(before))
    assert right / mask.sum() == pytest.approx(task.chance(), abs=0.01)


def test_passkey_labels():
    task = new_task({"name": "passkey", "width": 16, "windows": 3, "pairs": 2, "keys": 10, "values": 5, "noise": 3})
    ids, mask, level = task.batch(0, 0, 500)
    assert ids.shape == (500, 3 * 16 + 2 * 6)
    for row, supervised, ago in zip(ids, mask, level, strict=True):
        found = {row[t]: (row[t + 1], 3 - t // 16) for t in range(48) if row[t] < 10}
        assert len(found) == 6
        assert all(10 <= value < 15 for value, _ in found.values())
        assert np.flatnonzero(supervised).tolist() == list(range(49, 60, 2))
        for t in range(48, 60, 2):
            assert (row[t + 1], ago[t + 1]) == found[row[t]]
    assert np.bincount(ids[mask])[10:].min() / mask.sum() == pytest.approx(task.chance(), abs=0.02)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "cycle", "questions": 1},
        {"name": "rule110", "strings": 1, "steps": 3},
        {"name": "depo", "nodes": 12, "hops": 1, "questions": 1, "largest": True},
        {"name": "passkey", "pairs": 1, "windows": 2, "keys": 8, "values": 8, "questions": 1},
        {"name": "gsm-infinite", "operations": 2, "quantities": 3, "shortest": 170, "longest": 240, "width": 120},
    ],
    ids=lambda fields: fields["name"],
)
def test_the_answer_cannot_be_read_from_the_prediction_chunk(fields):
    """A table of what followed the same prediction chunk elsewhere is right no more often than chance."""
    task = new_task(fields)
    few = 10 if task.name == "gsm-infinite" else 1  # slow
    (ids, mask, _), (asked, asked_mask, _) = task.batch(0, 0, 10_000 // few), task.batch(0, 1, 2000 // few)
    shown = (ids.shape[1] - 1) // task.window * task.window
    table, letters = defaultdict(Counter), defaultdict(Counter)
    for row, t in zip(*np.nonzero(mask), strict=True):
        table[ids[row, shown:t].tobytes()][ids[row, t]] += 1
        letters[ids[row, t - 1]][ids[row, t]] += 1
    right = [
        (table.get(asked[row, shown:t].tobytes()) or letters[asked[row, t - 1]]).most_common(1)[0][0] == asked[row, t]
        for row, t in zip(*np.nonzero(asked_mask), strict=True)
    ]
    chance = task.chance()
    assert np.mean(right) == pytest.approx(chance, abs=3 * np.sqrt(chance * (1 - chance) / len(right)) + 0.01)


def test_text(text):
    task = new_task(text)
    tokens = {split: np.load(text[split]) for split in ("train", "test")}
    for split in ("train", "test"):
        ids, mask, level = task.batch(0, 3, 8, split)
        assert np.array_equal(ids, task.batch(0, 3, 8, split).ids)
        windows = np.lib.stride_tricks.sliding_window_view(tokens[split], 50)
        assert all((windows == row).all(axis=1).any() for row in ids)
        assert level.tolist() == [[0] + [1] * 19 + [2] * 20 + [3] * 10] * 8
        assert np.array_equal(mask, level > 0)
    assert task.chance() == np.bincount(tokens["test"]).max() / 5000


@pytest.fixture
def corpora(tmp_path):
    """Two tokenized folders: the tokens of each file to train on."""
    found = {}
    rng = np.random.default_rng(0)
    for name, letters, count in (("few", "abcdefghijklm", 12), ("many", "ABCDEFGHIJKLM", 41)):
        lines = ["".join(rng.choice(list(letters), 32 if n == 3 else 16 * (n % 5) + 8 + n % 4)) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        tokenize([tmp_path / f"{name}.jsonl"], tmp_path / name, held_out=0.2)
        tokens = np.load(tmp_path / name / "train.npy")
        found[str(tmp_path / name / "train.npy")] = tokens
    return {"name": "text", "test": str(tmp_path / "many/test.npy"), "vocab": 256, "length": 16, "width": 8}, found


def sequences(task, count, size):
    """The supervised part of sequences of a run: their tokens and the first one."""
    rows = []
    for step in range(count // size):
        ids, mask, _ = task.batch(0, step, size)
        assert np.array_equal(ids, task.batch(0, step, size).ids)
        rows += [tuple(row[: 1 + marked.sum()].tolist()) for row, marked in zip(ids, mask, strict=True)]
        assert all(marked[1 : 1 + marked.sum()].all() for marked in mask)
    return rows


def test_the_fingerprints_of_data(tmp_path):
    """They follow the contents of files and of tokenizers, not when these were written, nor what else is in a tokenizer's folder."""
    words = tmp_path / "words"
    files = [tmp_path / "train", tmp_path / "test", *(words / name for name in ("tokenizer.json", "chat_template.jinja", "config.json"))]
    words.mkdir()
    question = json.dumps({"context": "a", "question": "b", "answer": "c"}).encode()
    for file in files:
        file.write_bytes(question)
    Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, "a")).save(str(words / "tokenizer.json"))
    task = new_task({"name": "qa", "train": str(tmp_path / "train"), "test": str(tmp_path / "test"), "tokenizer": str(words)})
    before = task.fingerprints()
    assert set(before) == {"task.train", "task.test", "task.tokenizer"}
    for file, changed in zip(files, ["train", "test", "tokenizer", "tokenizer", None], strict=True):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b" ")
        assert [field for field, known in before.items() if task.fingerprints()[field] != known] == [f"task.{changed}"] * bool(changed)
        file.write_bytes(content)
        os.utime(file, (0, 0))
    assert task.fingerprints() == before


def test_the_fingerprint_of_a_large_file(tmp_path):
    """Every byte counts up to 16 MiB, and a change of 1/256 of a larger file is seen wherever it is."""
    file = tmp_path / "large"
    for size, changed in ((2**24, 1), (3 * 2**24 + 5, (3 * 2**24 + 5) // 256 + 1)):
        tokens = np.zeros(size, np.uint8)
        tokens.tofile(file)
        found = {fingerprint(file)}
        starts = (0, 2**16 - 1, size // 2, size // 3, size - changed)
        for start in starts:
            tokens[start : start + changed] = 1
            tokens.tofile(file)
            found.add(fingerprint(file))
            tokens[start : start + changed] = 0
        tokens[:-1].tofile(file)
        assert len(found | {fingerprint(file)}) == len(starts) + 2


def test_a_path_with_a_colon_is_relative_to_its_file(tmp_path):
    (tmp_path / "run.yaml").write_text("model: gdn4\nsteps: 1\ntask: {name: text, train: 'a:b.npy', test: c.npy, vocab: 9}\n")
    assert read_config(tmp_path / "run.yaml").task["train"] == str(tmp_path / "a:b.npy")


def test_the_order_of_corpora_does_not_matter(corpora):
    fields, found = corpora
    one, other = (new_task({**fields, "train": dict.fromkeys(files, 1)}) for files in (found, reversed(found)))
    assert np.array_equal(one.batch(0, 0, 8).ids, other.batch(0, 0, 8).ids)
    assert one.fingerprints() == other.fingerprints()


def test_the_end_of_documents_is_part_of_the_data(corpora, tmp_path):
    task = new_task({**corpora[0], "train": str(tmp_path / "many" / "train.npy"), "documents": True})
    before, summary = task.fingerprints(), tmp_path / "many" / "data.yaml"
    summary.write_text(summary.read_text().replace("end: 0", "end: 1"))
    assert task.fingerprints() != before


def test_corpora_of_several_tokenizers_are_refused(corpora, tmp_path):
    """Another form of the same vocabulary is the same tokenizer."""
    fields, found = corpora
    words = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}
    for name in ("few", "many"):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(words, indent=len(name)))
    new_task({**fields, "train": dict.fromkeys(found, 1)})
    words["model"]["vocab"] = {"b": 0, "a": 1}
    (tmp_path / "few" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(zoo.ZooError, match=r"train: .*many.train.npy: not of the tokenizer of .*few.train.npy"):
        new_task({**fields, "train": dict.fromkeys(found, 1)})


def test_every_part_of_a_text_occurs_once_in_an_epoch(corpora):
    fields, found = corpora
    file, tokens = next(iter(found.items()))
    parts = Counter(tuple(tokens[at : at + 16].tolist()) for at in range(0, len(tokens) - 15, 16))
    rows = sequences(new_task({**fields, "train": file, "epochs": True}), 2 * len(parts), 2)
    assert Counter(rows[: len(parts)]) == Counter(rows[len(parts) :]) == parts
    assert rows[: len(parts)] != rows[len(parts) :]


@pytest.mark.parametrize("options", [{}, {"epochs": True}, {"documents": True}], ids=["random", "epochs", "documents"])
def test_every_corpus_has_its_share(corpora, options):
    fields, found = corpora
    first, second = found
    task = new_task({**fields, "train": {first: 3, second: 1}, **options})
    rows = sequences(task, 2000, 250)
    text = {file: tokens.tobytes() for file, tokens in found.items()}
    origin = Counter(next(file for file in found if bytes(row) in text[file]) for row in rows)
    assert origin == {first: 1500, second: 500}
    if options:
        for file in found:
            times = Counter(row for row in rows if bytes(row) in text[file])
            assert max(times.values()) - min(times.values()) <= 1
            assert len(times) == len(task._parts["train"][list(found).index(file)])


@pytest.mark.parametrize("options", [{"epochs": True}, {"documents": True}], ids=["epochs", "documents"])
def test_held_out_sequences_are_read_once_in_batches_of_any_size(corpora, options):
    fields, found = corpora
    task = new_task({**fields, "train": next(iter(found)), **options})
    whole = task.batch(0, 0, task.held_out(), "test")
    again = [task.batch(0, start, min(3, task.held_out() - start), "test") for start in range(0, task.held_out(), 3)]
    read = [[tuple(row[level > 0]) for batch in batches for row, _, level in zip(*batch, strict=True)] for batches in ([whole], again)]
    assert read[0] == read[1]
    assert sorted(read[0]) == sorted(tuple(task.batch(0, n, 1, "test").ids[0][1:]) for n in range(task.held_out()))


def test_corpora_in_a_file_are_relative_to_its_folder(corpora, tmp_path):
    fields, found = corpora
    task = {**fields, "train": {"few/train.npy": 3, "many/train.npy": 1}, "test": "many/test.npy"}
    (tmp_path / "base.yaml").write_text(json.dumps({"model": "gdn4-sleep2-hard8", "task": task, "steps": 1}))
    (tmp_path / "mine.yaml").write_text(json.dumps({"base": "base.yaml", "task": {"length": 32}}))
    for name in ("base", "mine"):
        read = read_config(tmp_path / f"{name}.yaml").task
        assert read["train"] == dict(zip(found, (3, 1), strict=True))
        assert read["test"] == fields["test"]


def test_a_sequence_never_crosses_documents(corpora, tmp_path):
    fields, found = corpora
    file, tokens = next(iter(found.items()))
    stops = [0, *(np.flatnonzero(tokens == 0) + 1).tolist()]
    parts = []
    for begin, stop in pairwise(stops):
        cuts = [*range(begin, stop - 1, 16), stop]
        parts += [tuple(tokens[a:b].tolist()) for a, b in pairwise(cuts)]
    task = new_task({**fields, "train": file, "documents": True})
    assert Counter(sequences(task, len(parts), 1)) == Counter(parts)
    assert {len(part) for part in parts} > {16}
    np.save(tmp_path / "other.npy", tokens)
    with pytest.raises(zoo.ZooError, match=r"train: .*other.npy: documents need data.yaml next to it"):
        new_task({**fields, "train": str(tmp_path / "other.npy"), "documents": True}).batch(0, 0, 1)


def test_documents_of_a_batch_are_trained_as_if_alone(corpora):
    """Loss and gradients, with sleeps after every window: a batch of documents equals them one by one."""
    fields, found = corpora
    batch = new_task({**fields, "train": next(iter(found)), "documents": True, "length": 64}).batch(0, 0, 6)
    size = {"layers": "attn gdn", "d_model": 16, "d_ff": 16, "vocab_size": 256, "sleep_on": "every", "dtype": torch.float64, "seed": 1}
    together, alone = (zoo.create("gdn4-sleep2-hard8", **size) for _ in range(2))
    ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.loss_mask)
    assert len(set(mask.sum(1).tolist())) > 2
    together.loss(ids, mask).backward()
    losses = [
        alone.answers(row[None, : 1 + marked.sum()], marked[None, : 1 + marked.sum()]).losses()
        for row, marked in zip(ids, mask, strict=True)
    ]
    torch.cat(losses).mean().backward()
    for one, other in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-10, rtol=0)


def test_text_refuses(text, tmp_path):
    with pytest.raises(zoo.ZooError, match="a weight of 1 is less than one sequence in 1000"):
        new_task({**text, "train": {text["train"]: 5000, str(tmp_path / "test2.npy"): 1}})
    for weights in ({}, {text["train"]: -1}):
        with pytest.raises(zoo.ZooError, match="want at least one file, and weights above 0"):
            new_task({**text, "train": weights})
    for weight in (math.nan, math.inf):
        with pytest.raises(zoo.ZooError, match=r"test2\.npy: (nan|inf): want a finite number"):
            new_task({**text, "train": {text["train"]: 1, str(tmp_path / "test2.npy"): weight}})
    with pytest.raises(zoo.ZooError, match="length: 6000"):
        new_task({**text, "length": 6000})
    with pytest.raises(zoo.ZooError, match="token 9 in the train file; vocab says that ids are less than 9"):
        new_task({**text, "vocab": 9}).batch(0, 0, 4)
    np.save(tmp_path / "signed.npy", np.zeros(100, dtype=np.int64))
    with pytest.raises(zoo.ZooError, match=r"train: .*signed.npy: int64 .*; want one dimension of unsigned integers"):
        new_task({**text, "train": str(tmp_path / "signed.npy")})
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    with pytest.raises(zoo.ZooError, match=r"train: .*objects.npy: not a .npy file of numbers"):
        new_task({**text, "train": str(tmp_path / "objects.npy")})
    np.savez(tmp_path / "several.npz", np.zeros(100, dtype=np.uint8))
    with pytest.raises(zoo.ZooError, match=r"train: .*several.npz: not a .npy file of numbers"):
        new_task({**text, "train": str(tmp_path / "several.npz")})
    np.save(tmp_path / "large.npy", np.full(100, 2**63, dtype=np.uint64))
    with pytest.raises(zoo.ZooError, match=f"token {2**63} in the train file"):
        new_task({**text, "train": str(tmp_path / "large.npy")}).batch(0, 0, 4)


def test_text_trains_and_sleeps_on_every_window(text, tmp_path):
    plan = {"model": "gdn4-sleep2-hard20", "overrides": {"layers": "attn gdn", "d_model": 16}, "task": text, "steps": 3, "batch_size": 2}
    results = train(validate(TrainConfig, {**plan, "eval_sequences": 2}, "test"), tmp_path / "run")
    assert zoo.load(tmp_path / "run").config.sleep_on == "every"
    assert set(results["loss_by_level"]) == {1, 2, 3}
    plan["overrides"]["sleep_on"] = "unsupervised"
    with pytest.raises(zoo.ZooError, match="sleep_on: 'unsupervised', but every window"):
        train(validate(TrainConfig, plan, "test"), tmp_path / "other")
