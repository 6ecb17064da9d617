"""Compiled tokens are those of the plain model, which serves whenever there are none."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event, Lock

import pytest
import torch

import zoo
from zoo.blocks.tied_head import TiedHead
from zoo.errors import ZooError
from zoo.sessions.compiled import compiled_blocks

close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-4)
more = partial(pytest.param, marks=pytest.mark.extended)


def model(**fields):
    torch.manual_seed(0)
    return zoo.create("gdn4-sleep2-hard16", **{"vocab_size": 64, "d_model": 32, "window": 8, "loops": 2, "layers": "attn mamba2"} | fields)


def tokens(*shape):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(1))


def read_by_token(session, ids):
    return torch.cat([session.feed(ids[:, n : n + 1]) for n in range(ids.shape[1])], dim=1)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        more({"layers": "(attn mamba2)*3", "evict": "sliding"}),
        more({"layers": "mamba2*2", "evict": "none", "window": None, "loops": 1}),
        more({"layers": "swa gdn jet mamba"}),
        more({"layers": "kda rglru mla"}),
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values()) or "attn mamba2",
)
def test_compiled_tokens_are_those_of_the_plain_model(fields):
    ours, ids = model(**fields), tokens(2, 30)
    before, plain = graphs(), zoo.Session(ours, 2)
    session = zoo.Session(ours, 2, compile=True)
    logits = [read_by_token(session, ids[:, :5])]
    compiled_blocks(ours).wait()
    compiled, twin = graphs(), session.fork()
    logits.append(read_by_token(session, ids[:, 5:]))
    of_twin = read_by_token(twin, ids[:, 5:])
    assert graphs() == compiled > before  # compiled once, for the fork too
    close(torch.cat(logits, dim=1), read_by_token(plain, ids))
    close(of_twin, logits[1])
    close(session.state.fast, plain.state.fast)


@pytest.mark.extended
def test_more_streams_than_at_first_use_the_same_code():
    ours, ids = model(layers="attn mamba2 gdn", window=200), tokens(40, 300)
    session = zoo.Session(ours, 3, compile=True)
    read_by_token(session, ids[:3, :2])
    compiled_blocks(ours).wait()
    compiled = graphs()
    logits = read_by_token(many := zoo.Session(ours, 40, compile=True), ids)
    assert graphs() == compiled
    plain = zoo.Session(ours, 40)
    close(logits, read_by_token(plain, ids))
    close(many.state.fast, plain.state.fast)


@pytest.mark.extended
@pytest.mark.parametrize("fields", [{}, {"layers": "attn*2", "wake_loops": 2, "evict": "none", "window": None, "loops": 1}])
def test_a_pool_compiles_for_batches_of_every_size(fields):
    ours = model(**fields)
    with zoo.SessionPool(ours, 3, context=1000, compile=True) as pool, ThreadPoolExecutor(3) as threads:
        streams = [pool.open() for _ in range(3)]
        answers = [[] for _ in streams]

        def answer(n, count):
            answers[n] += map(int, streams[n].generate(tokens(1, 3 + n) if not answers[n] else None, count))

        while len(compiled_blocks(ours).ready) < 2:
            for size in (1, 2, 3):
                list(threads.map(partial(answer, count=20), range(size)))
            compiled_blocks(ours).wait()
        compiled = graphs()
        list(threads.map(partial(answer, count=20), range(3)))
        list(threads.map(partial(answer, count=100), range(2)))
        assert graphs() == compiled
    for n, answered in enumerate(answers):
        assert answered == [int(t) for t in zoo.Session(ours).generate(tokens(1, 3 + n), len(answered))]


def test_one_call_of_a_kernel_for_each_layer():
    ours, ids = model(layers="gdn mamba2 attn"), tokens(1, 6)
    session = zoo.Session(ours, compile=True)
    read_by_token(session, ids[:, :5])
    compiled_blocks(ours).wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        session.feed(ids[:, 5:])
    called = Counter(event.name for event in profile.events() if event.name.startswith("zoo::"))
    linear = sum(isinstance(module, torch.nn.Linear) for module in ours.modules())
    assert called == {"zoo::linear": linear + isinstance(ours.head, TiedHead), "zoo::step_": 2, "zoo::attend": 1}


def test_one_thread_at_a_time_runs_the_code(monkeypatch):
    """torch.compile takes a function that two threads run for outdated, now and then."""
    busy = Lock()

    def compiled(step, **how):
        def alone(*arguments):
            assert busy.acquire(blocking=False)
            time.sleep(0.001)
            try:
                return step(*arguments)
            finally:
                busy.release()

        return alone

    monkeypatch.setattr(torch, "compile", compiled)
    ours, ids = model(), tokens(4, 20)
    read_by_token(zoo.Session(ours, compile=True), ids[:1, :1])
    compiled_blocks(ours).wait()
    with ThreadPoolExecutor(4) as threads:
        logits = list(threads.map(lambda row: read_by_token(zoo.Session(ours, compile=True), row[None]), ids))
    close(torch.cat(logits), read_by_token(zoo.Session(ours, 4), ids))


class Branches(torch.nn.Module):
    """Cannot be compiled: what it computes depends on a value."""

    def forward(self, x):
        return x + 1 if x.abs().max() < 1e6 else x


def hook(ours):
    ours.blocks[0].mlp.register_forward_hook(lambda module, inputs, y: y + 5.0)


def another_block(ours):
    ours.blocks[0] = copy.deepcopy(ours.blocks[0])
    with torch.no_grad():
        ours.blocks[0].mixer.o_proj.weight.mul_(3)


def branches(ours):
    ours.blocks[1].mlp = Branches()


@pytest.mark.parametrize("change", [hook, more(another_block), branches])
def test_a_model_that_changes(change, capsys):
    ours, ids = model(window=64), tokens(1, 30)
    session, plain = zoo.Session(ours, compile=True), zoo.Session(ours)
    for piece in ids.split(5, dim=1):
        close(read_by_token(session, piece), read_by_token(plain, piece))
        compiled_blocks(ours).wait()
        if session.stats().tokens == 15:
            change(ours)
    assert session.stats().tokens == 30
    assert compiled_blocks(ours).failed == (change is branches)
    assert capsys.readouterr().err.count("\n") == (change is branches)


@pytest.fixture
def threads():
    """A change that only torch.compile sees."""
    before = torch.get_num_threads()
    yield lambda ours: torch.set_num_threads(before + 1)
    torch.set_num_threads(before)


@pytest.mark.extended
@pytest.mark.parametrize("hooked", [False, True])
def test_code_after_a_change_serves_caches_of_every_size(hooked, threads):
    ours, ids = model(window=400), tokens(1, 300)
    session = zoo.Session(ours, compile=True)
    read_by_token(session, ids[:, :2])
    compiled_blocks(ours).wait()
    (hook if hooked else threads)(ours)
    read_by_token(session, ids[:, 2:4])
    compiled_blocks(ours).wait()
    compiled = graphs()
    read_by_token(session, ids[:, 4:])
    assert graphs() == compiled


@pytest.mark.extended
def test_inference_mode():
    ours, ids = model(window=200), tokens(1, 150)
    plain = read_by_token(zoo.Session(ours), ids)
    session = zoo.Session(ours, compile=True)
    with torch.inference_mode():
        logits = [read_by_token(session, ids[:, :2])]
        compiled_blocks(ours).wait()
        compiled = graphs()
        logits.append(read_by_token(session, ids[:, 2:100]))
        assert graphs() == compiled
    logits.append(read_by_token(session, ids[:, 100:]))  # with code of its own, or plain blocks until then
    close(torch.cat(logits, dim=1), plain)


def test_autocast():
    ours, ids = model(), tokens(1, 20)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = (read_by_token(zoo.Session(ours, compile=compile), ids) for compile in (True, False))
    torch.testing.assert_close(found, plain, atol=0.1, rtol=0.1)
    compiled_blocks(ours).wait()
    assert not compiled_blocks(ours).ready


def test_the_plain_model_serves_meanwhile(monkeypatch):
    wait, steps = Event(), []

    def compile(step, **how):
        def compiled(*arguments):
            wait.wait(60)
            steps.append(arguments)
            return step(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    ours, ids = model(), tokens(1, 20)
    session = zoo.Session(ours, compile=True)
    logits = [read_by_token(session, ids[:, :10])]
    assert not steps
    wait.set()
    compiled_blocks(ours).wait()
    rehearsed = len(steps)
    logits.append(read_by_token(session, ids[:, 10:]))
    assert len(steps) == rehearsed + 10 * len(ours.blocks)
    close(torch.cat(logits, dim=1), read_by_token(zoo.Session(ours), ids))


def test_without_a_compiler_one_line_and_the_plain_model(monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("no working C++ compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", lambda step, **how: fails)
    ours, ids = model(), tokens(1, 20)
    logits = [read_by_token(session := zoo.Session(ours, compile=True), ids[:, :10])]
    compiled_blocks(ours).wait()
    logits += [read_by_token(session, ids[:, 10:])]
    close(torch.cat(logits, dim=1), read_by_token(zoo.Session(ours), ids))
    assert capsys.readouterr().err == "compile: failed, so tokens are decoded without it: RuntimeError: no working C++ compiler\n"


def test_a_model_is_released(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **how: step)
    ours = model(tie_embeddings=True)
    read_by_token(session := zoo.Session(ours, compile=True), tokens(1, 4))
    compiled_blocks(ours).wait()
    read_by_token(session, tokens(1, 4))
    released = weakref.ref(ours)
    del ours, session
    gc.collect()
    assert released() is None


def test_what_cannot_be_compiled_is_refused():
    endless = model(layers="attn gdn", evict="none", window=None, loops=1)
    for refused, why in {
        torch.nn.Linear(1, 1): "model: Linear",
        torch.compile(model()): "want a zoo.Model that is not wrapped or compiled, not OptimizedModule",
        endless: "the cache of gdn4-sleep2-hard16 has no limit",
    }.items():
        with pytest.raises(ZooError, match=why):
            zoo.Session(refused, compile=True)
    with pytest.raises(ZooError, match="compile: 1"):
        zoo.SessionPool(endless, context=16, compile=1)
    zoo.SessionPool(endless, context=16, compile=True).close()
