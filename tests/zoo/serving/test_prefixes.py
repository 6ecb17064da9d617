"""The prefix tree against a dictionary, and the bound on its bytes."""

import random

import torch

import zoo
from zoo.serving.prefixes import Prefixes
from zoo.sessions.sleeping_model import sleeping_model
from zoo.sessions.snapshot import Snapshot, opening, size

EMPTY = opening(sleeping_model(zoo.create("gdn4-sleep2-hard8", layers="attn gdn", d_model=8, d_ff=8, vocab_size=8)), 1)
BYTES = size((EMPTY.waking, EMPTY.ids))


def state(sleeps=()):
    return EMPTY._replace(sleeps=sleeps)


def found(prefixes, tokens, sleeps=(), owner="me"):
    at, snapshot = prefixes.longest(owner, tokens, sleeps)
    return at, snapshot and snapshot.sleeps


def test_the_longest_prefix():
    """Random sequences of few tokens, so that many share a beginning."""
    chance, prefixes, kept = random.Random(0), Prefixes(2**30), set()
    for _ in range(300):
        tokens = [chance.randrange(2) for _ in range(chance.randrange(12))]
        want = max((len(other) for other in kept if tuple(tokens[: len(other)]) == other), default=0)
        assert found(prefixes, tokens)[0] == want
        assert found(prefixes, tokens, owner="other") == (0, None)
        if chance.random() < 0.3 and tokens:
            prefixes.keep("me", tokens, state())
            kept.add(tuple(tokens))
    assert len(prefixes) == len(kept)
    assert prefixes.bytes == len(kept) * BYTES


def test_sleeps_are_part_of_the_key():
    prefixes, slept = Prefixes(2**30), ((2, 4),)
    prefixes.keep("me", [1, 2], state())
    prefixes.keep("me", [1, 2, 3], state(slept))
    assert found(prefixes, [1, 2, 3, 4]) == (2, ())
    assert found(prefixes, [1, 2, 3, 4], slept) == (3, slept)
    assert found(prefixes, [1, 2, 3, 4], ((2, 2),)) == (2, ())  # that sleep is still to come
    assert found(prefixes, [1, 2, 3, 4], ((1, 2),)) == (0, None)


def test_the_least_recently_used_are_dropped():
    prefixes = Prefixes(3 * BYTES)
    for n in range(3):
        prefixes.keep("me", [n, n], state())
    found(prefixes, [0, 0])
    prefixes.keep("me", [3], state())
    assert [found(prefixes, [n, n])[0] for n in range(3)] == [2, 0, 2]
    assert prefixes.bytes == 3 * BYTES
    nothing = Prefixes(0)
    nothing.keep("me", [1], state())
    assert (len(nothing), nothing.bytes) == (0, 0)


def test_a_session_forgets_only_what_no_other_has_used():
    prefixes = Prefixes(2**30)
    prefixes.keep("me", [1], state(), "a")
    prefixes.keep("me", [1, 2], state(), "a")
    prefixes.longest("me", [1], user="b")
    prefixes.keep("other", [1, 2], state(), "a")
    prefixes.forget("me", "a")
    assert prefixes.longest("me", [1, 2], user="b")[0] == 1
    prefixes.forget("me", "b")
    assert found(prefixes, [1, 2]) == (0, None)
    assert found(prefixes, [1, 2], owner="other") == (2, ())


def test_slices_are_copied():
    """A slice would keep the whole tensor in memory."""
    large = torch.zeros(1, 1000)
    prefixes = Prefixes(2**30)
    prefixes.keep("me", [1], Snapshot(EMPTY.waking, EMPTY.start, EMPTY.ids, large[:, :8], EMPTY.pending))
    snapshot = prefixes.longest("me", [1])[1]
    assert snapshot.logits.untyped_storage().nbytes() == 32
