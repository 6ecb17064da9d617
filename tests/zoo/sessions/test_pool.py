"""A pool: every stream answers as a session of its own would; tokens come first; the memory bound holds."""

import copy
import gc
import itertools
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import zoo
from zoo.blocks.mixer import mixers
from zoo.sessions import sliced
from zoo.sessions.scheduler import Scheduler
from zoo.sessions.slots import Slots

PAUSE = 60.0
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::pytest.PytestUnraisableExceptionWarning")


def model(name="gdn4-sleep2-hard6", layers="attn gdn", **fields):
    return zoo.create(name, **{"layers": layers, "d_model": 32, "d_ff": 16, "vocab_size": 11, **fields})


def tokens(count, seed=0):
    return torch.randint(0, 11, (1, count), generator=torch.Generator().manual_seed(seed))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_slots_attend_over_the_tokens_that_are_there(monkeypatch):
    """Not over the whole ring: as many keys as the longest of the streams in the batch has tokens."""
    whole, keys = model("gdn4-full", layers="attn gdn"), []
    slots: Slots[int] = Slots(whole, 3, 100)
    for n in (2, 5, 9):
        slots.put(n, whole(tokens(n)).state)
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, *mask, **how):
        keys.append(k.shape[2])
        return attention(q, k, v, *mask, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for names in ([5, 2], [2], [9, 2, 5]):
        slots.read(names, tokens(len(names)).T)
    assert keys == [6, 4, 10]


@pytest.mark.parametrize("evict", ["hard9", "slide9", "full"])
@pytest.mark.parametrize("kind", [*mixers.names(), "learned positions"])
@torch.no_grad()
def test_slots(kind, evict):
    """Streams at different positions, put in and taken out in any order: each token equals that of the model alone."""
    if kind == "learned positions" and evict != "hard9":
        return
    fields = {"layers": "attn gdn", "learned_positions": True} if kind == "learned positions" else {"layers": f"{kind} gdn"}
    whole = model(f"gdn4-sleep2-{evict}", blocks={"swa": {"window": 4}, "attn": {"kv_heads": 2}}, **fields)
    slots: Slots[str] = Slots(whole, 3, whole.config.window or 40)
    states = {name: whole.init_state() for name in "abcd"}
    if evict != "full":
        for n, name in enumerate("abcd"):
            states[name] = whole.consolidate(tokens(9, seed=n), states[name])
    for n, name in enumerate("abcd"):  # prompts of different lengths
        states[name] = whole(tokens(n + 1, seed=n), states[name]).state
    for turn, names in enumerate(["ab", "abc", "cb", "bd", "dba", "a", "c"]):
        for name in list(slots):
            if name not in names and turn % 2:
                close(slots.take(name), states[name])
        while len({*slots, *names}) > 3:
            slots.take(next(name for name in slots if name not in names))
        for name in names:
            if name not in slots:
                slots.put(name, states[name])
        ids = torch.cat([tokens(1, seed=turn + ord(name)) for name in names])
        got = slots.read(names, ids)
        for row, name in enumerate(names):
            want, states[name] = whole(ids[row : row + 1], states[name])
            close(got[row : row + 1], want)
    for name in list(slots):
        close(slots.take(name), states[name])


@pytest.mark.parametrize("evict", ["hard9", "slide9"])
@torch.no_grad()
def test_slots_compiled(evict):
    """A token of several streams compiles to one graph without a break."""
    whole = model(f"gdn4-sleep2-{evict}", layers="attn jet")
    slots, plain = (Slots(whole, 3, 9) for _ in range(2))
    slots.token = torch.compile(slots.token, fullgraph=True, backend="aot_eager")
    for each in (slots, plain):
        for n, name in enumerate("ab"):
            each.put(name, whole(tokens(3 + n, seed=n)).state)
    for turn in range(4):
        close(slots.read("ab", tokens(2, seed=turn).mT), plain.read("ab", tokens(2, seed=turn).mT))
    close(slots.take("b"), plain.take("b"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("evict", ["hard9", "slide9"])
@torch.no_grad()
def test_slots_recorded(evict):
    """On a GPU: graphs of one, two and three streams, replayed while streams are put in and taken out; and sessions, which use them too."""
    whole = model(f"gdn4-sleep2-{evict}", layers="attn jet swa gdn").cuda()
    slots, states = Slots(whole, 3, 9), {}
    for turn, names in enumerate(["a", "ab", "ab", "abc", "ca", "b", "abc"]):
        for n, name in enumerate(names):
            if name not in states:
                states[name] = whole(tokens(n + 1).cuda()).state
                slots.put(name, states[name])
        ids = tokens(len(names), seed=turn).mT.cuda()
        got = slots.read(names, ids)
        for n, name in enumerate(names):
            want, states[name] = whole(ids[n : n + 1], states[name])
            close(got[n : n + 1], want)
    for name, state in states.items():
        close(slots.take(name), state)
    stream, plain = zoo.Session(whole), zoo.Session(copy.deepcopy(whole).cpu())
    assert [int(t) for t in stream.generate(tokens(5).cuda(), 30)] == [int(t) for t in plain.generate(tokens(5), 30)]


@pytest.mark.parametrize("evict", ["hard6", "slide6"])
@pytest.mark.parametrize("when", ["full", "interval(4)"])
def test_every_stream_as_if_alone(evict, when):
    """More streams than slots, prompts longer than a window, sampling, sleeps in one batch: the tokens of a session of its own.

    Under interval(4) a stream of the pool reads on while it sleeps, so only the number of its tokens is compared.
    """
    sleeping = model(f"gdn4-sleep2-{evict}")

    def alone(n, session):
        how = {"temperature": 1.0, "seed": n}
        made = [int(t) for t in session.generate(tokens(1 + 3 * n, seed=n), 17, **how)]
        made += [int(t) for t in session.generate(tokens(2, seed=n), 9, stop=[3], **how)]
        session.sleep()
        return made, session.state, session.stats()

    want = [alone(n, zoo.Session(sleeping, when=when)) for n in range(6)]
    with zoo.SessionPool(sleeping, slots=4, streams=6, when=when) as pool, ThreadPoolExecutor(6) as threads:
        got = list(threads.map(lambda n: alone(n, pool.open()), range(6)))
    for (made, state, stats), (wanted, wanted_state, wanted_stats) in zip(got, want, strict=True):
        assert (stats.tokens, stats.state_bytes) == (wanted_stats.tokens, wanted_stats.state_bytes) or when != "full"
        if when == "full":
            assert made == wanted
            close(state, wanted_state)
            assert stats.sleeps == wanted_stats.sleeps


def test_a_stream_that_reads_while_it_sleeps():
    """The state after a background sleep equals that after a sleep in the foreground."""
    sleeping = model("gdn4-sleep2-slide6")
    with zoo.SessionPool(sleeping, when="interval(4)") as pool:
        stream, plain = pool.open(), zoo.Session(sleeping, when="manual")
        ids = tokens(6)
        stream.feed(ids)
        plain.feed(ids[:, :4])
        plain.sleep()
        plain.feed(ids[:, 4:])
        stream.sleep()  # waits for the one under way, then consolidates the two remaining tokens
        plain.sleep()
        close(stream.state, plain.state)
        assert stream.stats().sleeps == 2


def test_idle_streams_sleep_in_the_gap_and_together(monkeypatch):
    sleeping, widths, now = model(), [], [0.0]
    consolidate = sliced.consolidate

    def spy(self, ids, state=None, **how):
        widths.append(len(ids))
        return consolidate(self, ids, state, **how)

    monkeypatch.setattr(sliced, "consolidate", spy)
    monkeypatch.setattr("zoo.sessions.scheduler.time.monotonic", lambda: now[0])  # independent of how long feeding takes
    with zoo.SessionPool(sleeping, slots=4, when="idle(0.1)") as pool:
        streams = [pool.open() for _ in range(4)]
        for n, stream in enumerate(streams):
            stream.feed(tokens(5, seed=n))
        assert not widths
        now[0] = 0.2
        for stream in streams:
            assert stream._stream.sleep.ended.wait(PAUSE)
        assert widths == [4]
        for n, stream in enumerate(streams):
            plain = zoo.Session(sleeping)
            plain.feed(tokens(5, seed=n))
            plain.sleep()
            close(stream.state, plain.state)
            close(stream.feed(tokens(3)), plain.feed(tokens(3)))


def test_a_request_waits_for_at_most_one_slice_of_the_sleep_that_it_cancels(monkeypatch):
    sleeping, now, widths, begun, gate = model(), [0.0], [], threading.Event(), threading.Event()
    monkeypatch.setattr("zoo.sessions.scheduler.time.monotonic", lambda: now[0])

    def block_begins(block, inputs):
        widths.append(inputs[0].shape[1])
        if now[0]:
            begun.set()
            assert gate.wait(PAUSE)

    with zoo.SessionPool(sleeping, slots=2, when="idle(0.1)") as pool, ThreadPoolExecutor(1) as client:
        stream, plain = pool.open(), zoo.Session(sleeping)
        stream.feed(tokens(5))
        plain.feed(tokens(5))
        for block in sleeping.blocks:
            block.register_forward_pre_hook(block_begins)
        widths.clear()
        now[0] = 0.2
        assert begun.wait(PAUSE)
        sleep = stream._stream.sleep
        answer = client.submit(stream.feed, tokens(1))
        while not pool._scheduler._arrived:
            time.sleep(0.001)
        gate.set()
        got = answer.result()
        assert widths[:3] == [5, 1, 1]  # the slice in progress, then both blocks on the token
        close(got, plain.feed(tokens(1)))
        assert sleep.cancelled
        assert sleep.after is None


def test_fork_save_load(tmp_path):
    sleeping = model()
    with zoo.SessionPool(sleeping, slots=2, streams=3) as pool:
        stream, plain = pool.open(), zoo.Session(sleeping)
        for each in (stream, plain):
            list(each.generate(tokens(8), 2))
        twin = stream.fork()
        stream.save(tmp_path / "stream")
        loaded = pool.open().load(tmp_path / "stream")
        want = plain.feed(tokens(9, seed=1))
        for each in (stream, twin, loaded, zoo.Session(sleeping).load(tmp_path / "stream")):
            close(each.feed(tokens(9, seed=1)), want)


def test_a_file_of_several_streams_is_refused(tmp_path):
    """Its second row would end up in the next stream of the pool."""
    sleeping = model()
    several = zoo.Session(sleeping, 2)
    several.feed(tokens(10).view(2, 5))
    several.save(tmp_path / "two")
    with zoo.SessionPool(sleeping, slots=2, streams=3) as pool:
        stream, plain = pool.open(), zoo.Session(sleeping)
        for give in (lambda: stream.load(tmp_path / "two"), lambda: stream.restore(several.snapshot())):
            with pytest.raises(zoo.ZooError, match=r"^session: 2 streams; a session of a pool has one$"):
                give()
        close(stream.feed(tokens(8)), plain.feed(tokens(8)))
    assert len(plain.load(tmp_path / "two").snapshot().ids) == 2


def test_the_bound():
    with zoo.SessionPool(model(), slots=2, streams=2) as pool:
        first, _ = pool.open(), pool.open()
        with pytest.raises(zoo.PoolFullError, match="streams: 2 are open"):
            pool.open()
        with pytest.raises(zoo.PoolFullError):
            first.fork()
        first.close()
        with pytest.raises(zoo.ZooError, match="is closed"):
            first.feed(tokens(1))
        last = pool.open()
    with pytest.raises(zoo.ZooError, match="pool: is closed"):
        last.feed(tokens(1))
    last.close()
    with pytest.raises(zoo.ZooError, match="context: None; gdn4 never sleeps"):
        zoo.SessionPool(model("gdn4"))
    with zoo.SessionPool(model("gdn4"), context=7) as pool:
        stream, plain = pool.open(), zoo.Session(model("gdn4"))
        close(stream.feed(tokens(4)), plain.feed(tokens(4)))
        close(stream.feed(tokens(1)), plain.feed(tokens(1)))
        with pytest.raises(zoo.ZooError, match="3 tokens after 5; the pool holds a context of 7"):
            stream.feed(tokens(3))
        close(stream.feed(tokens(2)), plain.feed(tokens(2)))


def live_bytes():
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize(
    ("name", "when"), [("gdn4-sleep2-hard30", "interval(20)"), ("gdn4-sleep2-slide30", "interval(20)"), ("gdn4", "full")]
)
def test_the_bound_in_bytes(name, when, monkeypatch):
    """The streams never exceed the bound, and the bound is not far too high."""
    whole, held, turns = model(name), [], itertools.count()
    how = {"slots": 2, "streams": 4, "when": when, "context": 60}
    turn = Scheduler._turn

    def spy(self):
        turn(self)
        if next(turns) % 16 == 0:  # looking at every object takes long
            held.append(live_bytes())

    gc.collect()
    before = live_bytes()
    with zoo.SessionPool(whole, **how) as pool, ThreadPoolExecutor(4) as threads:
        streams = [pool.open() for _ in range(4)]
        with monkeypatch.context() as watched:  # nothing else runs: no other thread may build a tuple while `gc` holds it
            watched.setattr(Scheduler, "_turn", spy)
            list(threads.map(lambda stream: list(stream.generate(tokens(29), 30)), streams))
        assert pool.sleeps or name == "gdn4"
        assert pool.bytes / 6 < max(held) - before < pool.bytes
        zoo.SessionPool(whole, **how, max_bytes=pool.bytes).close()
        with pytest.raises(zoo.ZooError, match=f"max_bytes: .*; 2 slots and 4 streams of {name} may need {pool.bytes}: allow fewer"):
            zoo.SessionPool(whole, **how, max_bytes=pool.bytes - 1)


def test_one_call_at_a_time_and_generation_that_is_dropped():
    with zoo.SessionPool(model()) as pool:
        stream, plain = pool.open(), zoo.Session(model())
        speech = stream.generate(tokens(3), 10_000)
        next(speech)
        with pytest.raises(zoo.ZooError, match="busy"):
            stream.feed(tokens(1))
        speech.close()
        made = stream.stats().tokens + 1 - 3
        assert made < 9_000
        list(plain.generate(tokens(3), made))
        close(stream.feed(tokens(4)), plain.feed(tokens(4)))


def test_an_error_is_that_of_one_stream(monkeypatch):
    """A failed sleep is raised by the call that waits for it, or by the next one; other streams continue, the stream is unchanged."""
    sleeping = model()
    consolidate = sliced.consolidate

    def fails(self, ids, state=None, **how):
        if (ids == 7).all():
            raise MemoryError("no memory")
        return consolidate(self, ids, state, **how)

    monkeypatch.setattr(sliced, "consolidate", fails)
    with zoo.SessionPool(sleeping) as pool:
        bad, good = pool.open(), pool.open()
        sevens = torch.full((1, 6), 7)
        bad.feed(sevens)
        good.feed(tokens(6))
        with pytest.raises(MemoryError):
            bad.feed(sevens)
        good.feed(tokens(6))
        assert bad.stats().tokens == 6
        bad.sleep(wait=False)
        bad._stream.sleep and bad._stream.sleep.ended.wait(PAUSE)
        with pytest.raises(MemoryError):
            bad.feed(tokens(1))
        monkeypatch.undo()
        plain = zoo.Session(sleeping)
        plain.feed(sevens)
        close(bad.feed(tokens(3)), plain.feed(tokens(3)))


def test_a_scheduler_that_fails_is_reported(monkeypatch):
    with zoo.SessionPool(model()) as pool:
        stream = pool.open()
        monkeypatch.setattr(pool._scheduler, "_turn", lambda: 1 / 0)
        for _ in range(2):
            with pytest.raises((ZeroDivisionError, zoo.ZooError), match="division by zero"):
                stream.feed(tokens(2))
        assert not any(
            thread.name == "zoo-pool" and thread.is_alive() for thread in threading.enumerate() if thread is pool._scheduler.thread
        )


@pytest.mark.parametrize("pause", [0, 0.02])
def test_a_generation_that_is_left_equals_that_of_a_session(pause):
    """The last token that the caller took is pending, and is not slept on, however long the caller takes for a token."""

    def used(stream, taken):
        for number, _ in enumerate(stream.generate(tokens(3), 9, temperature=1.0, seed=0), 1):
            time.sleep(pause)
            if number == taken:
                break
        stream.sleep()
        return stream.stats().tokens, stream.feed(tokens(2, seed=1))

    with zoo.SessionPool(model(), slots=2, streams=9) as pool, ThreadPoolExecutor(9) as threads:
        results = list(threads.map(lambda taken: used(pool.open(), taken), range(1, 10)))
    for taken, (count, logits) in enumerate(results, 1):
        wanted, expected = used(zoo.Session(model()), taken)
        assert count == wanted
        close(logits, expected)


def test_a_caller_interrupted_while_it_waits_leaves_no_unseen_token():
    with zoo.SessionPool(model()) as pool:
        stream, plain = pool.open(), zoo.Session(model())
        speech = stream.generate(tokens(3), 9)
        seen = next(speech)
        (pending,) = pool._scheduler._calls.values()
        results = pending.results

        def interrupted():
            results.get()
            raise KeyboardInterrupt

        pending.results = types.SimpleNamespace(get=interrupted, put=results.put)
        with pytest.raises(KeyboardInterrupt):
            next(speech)
        plain.feed(tokens(3))
        close(stream.feed(tokens(1)), plain.feed(torch.cat([seen[:, None], tokens(1)], 1))[:, -1:])


def test_a_stream_that_is_closed_generates_no_more():
    with zoo.SessionPool(model(), slots=1) as pool:
        stream = pool.open()
        speech = stream.generate(tokens(3), 9)
        next(speech)
        stream.close()
        with pytest.raises(zoo.ZooError, match="stream: is closed"):
            next(speech)
        assert (len(pool), len(pool._scheduler._slots)) == (0, 0)
        twin, plain = pool.open(), zoo.Session(model())
        close(twin.feed(tokens(4)), plain.feed(tokens(4)))


def test_a_generation_is_one_call_alone_and_in_a_pool():
    """Until it ends or is closed, every other call is refused and changes nothing; with its last token the stream is idle."""
    with zoo.SessionPool(model()) as pool:
        for stream in (pool.open(), zoo.Session(model())):
            plain = zoo.Session(model())
            speech, second = stream.generate(tokens(3), 5), stream.generate(tokens(3), 5)
            next(speech)
            for call in (stream.sleep, stream.stats, stream.fork, partial(stream.feed, tokens(1)), partial(next, second)):
                with pytest.raises(zoo.sessions.pool.BusyError, match="a generation that was neither ended nor closed"):
                    call()
            said = [next(speech) for _ in range(4)]
            close(stream.feed(tokens(2)), (list(plain.generate(tokens(3), 5)), plain.feed(tokens(2)))[1])
            assert len(said) == 4
            assert next(speech, None) is None
            other = stream.generate(None, 5)
            next(other)
            other.close()
            stream.sleep()
            assert not stream.stats().window


def test_slots_and_streams():
    assert zoo.SessionPool(model()).streams == 8
    pools = zoo.SessionPool(model(), streams=3), zoo.SessionPool(model(), 3, streams=3)
    assert pools[0].bytes == pools[1].bytes
    with pytest.raises(zoo.ZooError, match="slots: 4 are more than the 3 streams"):
        zoo.SessionPool(model(), 4, streams=3)


def test_a_pool_that_is_closed_opens_no_stream_and_ends_generations_quietly():
    pool = zoo.SessionPool(model())
    stream = pool.open()
    left, speech = pool.open().generate(tokens(3), 9), stream.generate(tokens(3), 9)
    next(left), next(speech)
    pool.close()
    left.close()  # an error here would be printed when the generator is collected
    with pytest.raises(zoo.ZooError, match="pool: is closed"):
        next(speech)
    with pytest.raises(zoo.ZooError, match="pool: is closed"):
        pool.open()


def test_refused_and_interrupted_calls_are_closed(monkeypatch):
    """Busy, closed, failed: no coroutine is left behind unawaited, which Python would report here as an error."""
    with zoo.SessionPool(model(), streams=2) as pool:
        stream, other = pool.open(), pool.open()
        speech = stream.generate(tokens(3), 10_000)
        next(speech)
        with pytest.raises(zoo.sessions.pool.BusyError):
            stream.feed(tokens(1))
        other.close()
        with pytest.raises(zoo.ZooError, match="is closed"):
            other.feed(tokens(1))
    with pytest.raises(zoo.ZooError, match="pool: is closed"):
        list(speech)
    with pytest.raises(zoo.ZooError, match="pool: is closed"):
        stream.sleep()
    gc.collect()


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("cycles", [20, pytest.param(1000, marks=pytest.mark.extended)])
def test_a_closed_stream_is_released(cycles):
    """Opened, used, put to sleep and closed: no object, thread or byte of a tensor remains."""
    with zoo.SessionPool(model(), slots=2, when="interval(4)") as pool:

        def use():
            stream = pool.open()
            list(stream.generate(tokens(3), 4))
            stream.sleep(wait=False)
            stream.close()
            return weakref.ref(stream)

        def left():
            pool.open().close()  # replaces what the scheduler handled last
            gc.collect()
            return len(gc.get_objects()), live_bytes(), threading.active_count()

        used = [use() for _ in range(5)]
        left()
        before = left()
        assert not any(stream() for stream in used)
        for _ in range(cycles):
            use()
        after = left()
        assert after[0] < before[0] + 20
        assert after[1:] == before[1:]
        assert len(pool) == 0
