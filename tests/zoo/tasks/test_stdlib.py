"""The text of the standard library: its files, the names that recur, and the floor that counts give."""

import math
import os
import sysconfig
from collections import Counter, defaultdict

import numpy as np
import pytest

from zoo.tasks import new_task, stdlib


def test_the_files_are_those_of_the_standard_library():
    root, found = sysconfig.get_paths()["stdlib"], {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages", "test", "tests") and name[-5:] != "_test"]
        found |= {os.path.join(folder, name): os.path.getsize(os.path.join(folder, name)) for name in files if name.endswith(".py")}
    corpus = stdlib.corpus()
    assert corpus.files == len(found) > 300
    assert len(corpus.train) + len(corpus.test) == sum(found.values()) + len(found) - 2  # joined by a byte each
    assert 0.02 < len(corpus.test) / len(corpus.train) < 0.15
    docstring = b"Random variable generators"
    assert (docstring in corpus.train.tobytes()) != (docstring in corpus.test.tobytes())  # a file is on one side
    assert f"{corpus.files} files, sha256 {corpus.sha256[:12]}" in str(new_task({"name": "stdlib"}))


def test_levels_of_names():
    text = b"for alpha in beta: x_1 = alpha; alpha(beta, x_1) if xx else x"
    levels = stdlib.levels(text, 20)  # windows begin at `: x_1` minus two, and at `pha(`
    named = {
        (at, word): levels[at : at + len(word)].tolist() for word in (b"alpha", b"beta", b"x_1", b"if", b"xx") for at in places(text, word)
    }
    want = {
        (4, b"alpha"): 1, (25, b"alpha"): 3, (32, b"alpha"): 2,  # the third begins in the window of the second
        (13, b"beta"): 1, (38, b"beta"): 3, (19, b"x_1"): 1, (44, b"x_1"): 3, (49, b"if"): 1, (52, b"xx"): 1,
    }  # fmt: skip
    assert named == {place: [level] * len(place[1]) for place, level in want.items()}
    inside = {at + i for at, word in want for i in range(len(word))}
    assert all(levels[i] == 1 for i in range(len(text)) if i not in inside)


def places(text, word):
    return [i for i in range(len(text)) if text.startswith(word, i)]


def test_batches():
    task = new_task({"name": "stdlib", "length": 300, "width": 64})
    ids, mask, level = task.batch(3, 5, 4)
    assert (ids == task.batch(3, 5, 4).ids).all()
    assert not (ids == task.batch(3, 6, 4).ids).all()
    assert mask[:, 1:].all()
    assert not mask[:, 0].any()
    assert set(np.unique(level[:, 1:])) == {1, 2, 3}
    for split in ("train", "test"):
        assert all(row.astype(np.uint8).tobytes() in getattr(stdlib.corpus(), split).tobytes() for row in task.batch(3, 5, 4, split).ids)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_the_floor_is_that_of_counts(monkeypatch, order):
    train, test = b"abracadabra, abracadabra!" * 3 + b"\0\xff", b"abracabra \xff\0ba"
    small = stdlib.Corpus(np.frombuffer(train, np.uint8), np.frombuffer(test, np.uint8), 1, "")
    monkeypatch.setattr(stdlib, "corpus", lambda: small)
    following = defaultdict(Counter)
    for k in range(order + 1):
        for i in range(k, len(train)):
            following[train[i - k : i]][train[i]] += 1

    def chance(context, byte):
        shorter = chance(context[1:], byte) if context else 1 / 256
        seen = following.get(context)
        return shorter if seen is None else (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen))

    bits = [-math.log2(chance(test[i - order : i], test[i])) for i in range(order, len(test))]
    assert stdlib.floor(order) == pytest.approx(sum(bits) / len(bits))
