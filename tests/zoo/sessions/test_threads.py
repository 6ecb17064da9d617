"""Threads do random things with the streams of one pool: every call returns what it returns from a session of its own."""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import zoo

VOCABULARY = 11
MOST = 3  # open streams of a thread
THREADS = 5
CALLS = ["feed", "feed", "feed", "generate", "generate", "generate", "sleep", "nap", "fork", "save", "load", "open", "look", "refused"]


class User:
    """Does random things with up to three streams.

    Args:
        start: opens a stream.
        loops: numbers of passes to choose from for a sleep.
        background: whether sleeps may run in the background, which changes no result.
    """

    def __init__(self, start, seed, folder, *, loops, background):
        self.start, self.random, self.folder, self.loops, self.background = start, random.Random(seed), folder, loops, background
        self.streams, self.files = [start()], []
        folder.mkdir()

    def work(self, calls):
        """Return what each call returned: a name, facts, and tensors."""
        seen = []
        for kind in [*self.random.choices(CALLS, k=calls), *["look"] * MOST]:
            stream = self.streams[self.random.randrange(len(self.streams))]
            try:
                facts, tensors = getattr(self, kind)(stream) or (None, [])
            except zoo.ZooError as error:
                facts, tensors = str(error), []
            seen.append((kind, facts, tensors))
        return seen

    def ids(self, most):
        return torch.tensor([self.random.choices(range(VOCABULARY), k=self.random.choice([1, 1, self.random.randint(1, most)]))])

    def feed(self, stream):
        return None, [stream.feed(self.ids(15))]

    def generate(self, stream):
        """Take all tokens of a generation, or leave it early: closed, or dropped."""
        how = {"temperature": self.random.choice([0, 1.0]), "seed": self.random.randint(0, 9), "stop": self.random.choice([[], [3]])}
        prompt, tokens, taken = self.random.choice([None, self.ids(9)]), self.random.randint(1, 15), self.random.randint(1, 15)
        generation = stream.generate(prompt, tokens, **how)
        said = [int(token) for token in itertools.islice(generation, taken)]
        if taken % 2:
            generation.close()
        return said, []

    def sleep(self, stream):
        stream.sleep(self.random.choice(self.loops))

    def nap(self, stream):
        """Read while asleep; a second sleep waits for the first, and consolidates what came after it."""
        loops, ids = self.random.choice(self.loops), self.ids(15)
        stream.sleep(loops, wait=not self.background)
        stream.read(ids)
        stream.sleep()

    def fork(self, stream):
        self.add(stream.fork())

    def open(self, stream):
        self.add(self.start())

    def add(self, stream):
        self.streams.append(stream)
        if len(self.streams) > MOST:
            self.streams.pop(self.random.randrange(MOST)).close()

    def save(self, stream):
        self.files.append(self.folder / str(len(self.files)))
        stream.save(self.files[-1])

    def load(self, stream):
        if self.files:
            stream.load(self.random.choice(self.files))

    def look(self, stream):
        """What calls may change. Not after every call: it takes the state out of the slots."""
        stats, now = stream.stats(), stream.snapshot()
        facts = stats.tokens, stats.window, stats.evicted, stats.sleeps, now.ids.tolist(), now.pending.tolist(), now.sleeps
        return facts, [fast for fast in now.state.fast if fast is not None]

    def refused(self, stream):
        stream.feed(torch.tensor([[VOCABULARY]]))


def check(pool, model, seed, folder, loops=(None, 1, 3), calls=30):
    """Threads on a pool, and then the same users one after another with sessions of their own on the model."""
    users = [User(pool.open, f"{seed} {n}", folder / f"pool{n}", loops=loops, background=True) for n in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(lambda user: user.work(calls), users))
    for n, got in enumerate(found):
        alone = User(partial(zoo.Session, model, when=pool.schedule), f"{seed} {n}", folder / f"alone{n}", loops=loops, background=False)
        for call, ((kind, facts, tensors), (_, wanted, expected)) in enumerate(zip(got, alone.work(calls), strict=True)):
            where = f"seed {seed}, thread {n}, call {call}, {kind}"
            assert facts == wanted, where
            torch.testing.assert_close(tensors, expected, rtol=1e-4, atol=1e-4, msg=lambda text, where=where: f"{where}: {text}")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.extended) for seed in range(1, 21))])
@pytest.mark.parametrize(("name", "when"), [("hard6", "full"), ("slide6", "full"), ("hard6", "manual"), ("full", "full")])
def test_random_threads(name, when, seed, tmp_path):
    """More streams than slots, which sleep with any number of passes, or never."""
    model = zoo.create(f"gdn4-sleep2-{name}", layers="attn gdn", d_model=32, d_ff=16, vocab_size=VOCABULARY)
    with zoo.SessionPool(model, slots=4, streams=(MOST + 1) * THREADS, when=when, context=1000) as pool:
        check(pool, model, seed, tmp_path)
