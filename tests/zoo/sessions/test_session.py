"""Sessions: any cut of a stream gives the same logits; a background sleep is committed as a whole or leaves no trace."""

import dataclasses
import gc
import itertools
import json
import math
import sys
import threading
import weakref
from contextlib import suppress

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zoo
from zoo.blocks.mixer import mixers
from zoo.checkpoints.checksum import FIELD
from zoo.sessions import sliced
from zoo.sessions.sleeping_model import TorchModel, fingerprint
from zoo.sessions.slots import Slots

POLICIES = ["hard6", "slide6"]
PAUSE = 60.0  # seconds that no test waits for
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::pytest.PytestUnraisableExceptionWarning")


def model(name="gdn4-sleep2-hard6", layers="attn gdn", **fields):
    return zoo.create(name, **{"layers": layers, "d_model": 32, "d_ff": 16, "vocab_size": 11, **fields})


def session(name="gdn4-sleep2-hard6", batch_size=2, **how):
    return zoo.Session(model(name), batch_size, **how)


def tokens(count, batch_size=2, seed=0):
    return torch.randint(0, 11, (batch_size, count), generator=torch.Generator().manual_seed(seed))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def equal(a, b):
    pairs = zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs)


class Gated(TorchModel):
    """A model whose sleeps wait at the first block until `gate` is set, and fail if `error` is set."""

    def __init__(self, inner, error=None):
        super().__init__(inner)
        self.keeps_hidden, self.error = False, error
        self.begun, self.gate = threading.Event(), threading.Event()

    async def consolidate_in_slices(self, ids, state, *, loops=None, awake=None):
        self.begun.set()
        assert self.gate.wait(PAUSE)
        await sliced.Slice()
        if self.error:
            raise self.error
        return await super().consolidate_in_slices(ids, state, loops=loops, awake=awake)


def gated(name="gdn4-sleep2-hard6", error=None, **how):
    return zoo.Session(Gated(model(name), error), 2, **how)


def let_it_end(stream):
    stream.model.gate.set()
    assert stream._stream.sleep.ended.wait(PAUSE)


@pytest.mark.parametrize("evict", POLICIES)
@pytest.mark.parametrize("kind", mixers.names())
def test_any_cut_is_what_the_loss_sees(kind, evict):
    """For every mixer, the logits of a stream cut anywhere equal those of training with `sleep_on: every`."""
    sleeping = model(f"gdn4-sleep2-{evict}", layers=f"{kind} gdn", sleep_on="every")
    ids = tokens(20)
    answers = sleeping.answers(ids, torch.ones_like(ids))
    want = torch.empty(40, 11).index_copy(0, answers.place, answers.logits.detach()).view(2, 20, 11)[:, 1:]
    for cuts in ([], range(1, 20), [5, 6, 13], [6, 12, 18], [11]):
        stream = zoo.Session(sleeping, 2)
        fed = [stream.feed(piece) for piece in ids.tensor_split(list(cuts), dim=1)]
        close(torch.cat(fed, 1)[:, :-1], want)


def test_a_model_without_a_window_may_be_cut_anywhere():
    ids, whole, pieces = tokens(20), session("gdn4"), session("gdn4")
    close(torch.cat([pieces.feed(p) for p in ids.split([5, 8, 7], dim=1)], 1), whole.feed(ids))
    pieces.sleep()
    assert pieces.stats().sleeps == 0


def test_a_full_window_sleeps_when_the_next_token_comes():
    stream = session()
    ids = tokens(6)
    stream.feed(ids)
    assert stream.state.position == 6
    awake = stream.state
    stream.sleep()
    assert stream.state.position == 0
    assert torch.equal(stream.state.fast[1], stream.model.consolidate(ids, stream.model.init_state(2)).fast[1])
    assert not torch.equal(stream.state.fast[1], awake.fast[1])
    asleep = stream.state
    stream.sleep()  # nothing to consolidate
    assert stream.state is asleep


def test_sleeping_early_evicts_what_there_is():
    stream = session()
    stream.feed(tokens(4))
    stream.sleep()
    stream.feed(tokens(6))
    assert stream.state.position == 6


def test_passes_per_sleep():
    stream = session()
    stream.feed(tokens(4))
    stream.sleep(loops=5)
    assert equal(stream.state, stream.model.consolidate(tokens(4), loops=5))
    stream.feed(tokens(4))
    with pytest.raises(zoo.ZooError, match="loops: 0 must be at least 1"):
        stream.sleep(loops=0)


@pytest.mark.parametrize("evict", POLICIES)
def test_interval(evict):
    stream, manual = session(f"gdn4-sleep2-{evict}", when="interval(4)"), session(f"gdn4-sleep2-{evict}", when="manual")
    ids = tokens(10)
    got, want = stream.feed(ids), []
    for piece in ids.split(4, dim=1):
        want.append(manual.feed(piece))
        if piece.shape[1] == 4:
            manual.sleep()
    close(got, torch.cat(want, 1))
    assert stream.stats().sleeps == 2


def test_manual_refuses_what_does_not_fit_before_it_reads():
    stream = session(when="manual")
    stream.feed(tokens(4))
    before = stream.state
    with pytest.raises(zoo.ZooError, match="3 tokens; the window of 6 has room for 2, and the schedule is manual"):
        stream.feed(tokens(3))
    assert stream.state is before
    stream.sleep()
    stream.feed(tokens(6))


@pytest.mark.parametrize("evict", POLICIES)
def test_a_background_sleep_equals_a_sleep_in_the_foreground(evict):
    stream, plain, awake = gated(f"gdn4-sleep2-{evict}"), session(f"gdn4-sleep2-{evict}"), session(f"gdn4-sleep2-{evict}")
    first, meanwhile, later = tokens(10).split([3, 2, 5], dim=1)
    for each in (stream, plain, awake):
        each.feed(first)
    stream.sleep(wait=False)
    assert stream.model.begun.wait(PAUSE)
    assert torch.equal(stream.feed(meanwhile), awake.feed(meanwhile))  # read from the state that has not slept
    assert stream.stats().sleeps == 0
    let_it_end(stream)
    plain.sleep()
    plain.feed(meanwhile)
    assert stream.stats().sleeps == 1
    close((stream.state.fast, stream.state.window), (plain.state.fast, plain.state.window))
    assert stream.state.position == plain.state.position
    close(stream.feed(later), plain.feed(later))


def test_a_full_window_waits_for_the_background_sleep():
    stream, plain = gated(), session()
    ids = tokens(12)
    stream.feed(ids[:, :2])
    stream.sleep(wait=False)
    assert stream.model.begun.wait(PAUSE)
    stream.feed(ids[:, 2:6])
    threading.Timer(0.05, stream.model.gate.set).start()
    stream.feed(ids[:, 6:])
    plain.feed(ids[:, :2])
    plain.sleep()
    plain.feed(ids[:, 2:])
    close(stream.state.fast, plain.state.fast)
    assert stream.stats().sleeps == plain.stats().sleeps == 2


def test_an_idle_session_sleeps():
    stream, plain = session(when="idle(0)"), session()
    ids = tokens(9)
    for each in (stream, plain):
        each.feed(ids[:, :4])
    assert stream._stream.sleep.ended.wait(PAUSE)
    plain.sleep()
    assert equal(stream.state, plain.state)
    assert stream.stats().sleeps == 1
    assert torch.equal(stream.feed(ids[:, 4:]), plain.feed(ids[:, 4:]))


def test_a_token_cancels_an_idle_sleep():
    stream, plain = gated(when="idle(0)"), session()
    ids = tokens(5)
    stream.feed(ids[:, :3])
    assert stream.model.begun.wait(PAUSE)
    sleep = stream._stream.sleep
    stream.schedule.pause = PAUSE
    got = stream.feed(ids[:, 3:])
    stream.model.gate.set()
    assert sleep.ended.wait(PAUSE)
    assert sleep.after is None
    close(torch.cat([got], 1), plain.feed(ids)[:, 3:])
    assert stream.stats().sleeps == 0
    close(stream.state, plain.state)


def test_idle_waits_for_the_pause():
    stream = gated(when=f"idle({PAUSE})")
    stream.feed(tokens(3))
    assert not stream.model.begun.wait(0.1)
    stream.close()


@pytest.mark.parametrize("how", ["wait", "background", "idle"])
def test_a_failed_sleep_is_raised_and_leaves_the_stream_unchanged(how):
    stream = gated(error=RuntimeError("out of memory"), when="idle(0)" if how == "idle" else "full")
    plain = session()
    ids = tokens(9)
    stream.model.gate.set()
    stream.feed(ids[:, :4])
    plain.feed(ids[:, :4])
    if how == "wait":
        with pytest.raises(RuntimeError, match="out of memory"):
            stream.sleep()
    else:
        if how == "background":
            stream.sleep(wait=False)
        assert stream._stream.sleep.ended.wait(PAUSE)
        with pytest.raises(RuntimeError, match="out of memory"):
            stream.feed(ids[:, 4:])
    assert equal(stream._snapshot[:3], plain._snapshot[:3])
    stream.model.error = None
    close(stream.feed(ids[:, 4:]), plain.feed(ids[:, 4:]))


@pytest.mark.parametrize("evict", POLICIES)
def test_fork(evict):
    stream, alone = session(f"gdn4-sleep2-{evict}"), session(f"gdn4-sleep2-{evict}")
    ids, left, right = tokens(9), tokens(9, seed=1), tokens(9, seed=2)
    stream.feed(ids)
    twin = stream.fork()
    got = [stream.feed(left[:, :4]), twin.feed(right), stream.feed(left[:, 4:])]
    alone.feed(ids)
    assert torch.equal(torch.cat([got[0], got[2]], 1), torch.cat([alone.feed(left[:, :4]), alone.feed(left[:, 4:])], 1))
    alone = session(f"gdn4-sleep2-{evict}")
    alone.feed(ids)
    assert torch.equal(got[1], alone.feed(right))
    assert stream.stats().tokens == twin.stats().tokens == 18


@pytest.mark.parametrize("evict", POLICIES)
@pytest.mark.parametrize("kind", mixers.names())
def test_decode_steps_of_fixed_shapes(kind, evict, tmp_path, monkeypatch):
    """The form that a GPU records: the same logits and states, with any other calls between the tokens."""
    sleeping, ids, file = model(f"gdn4-sleep2-{evict}", layers=f"{kind} gdn"), tokens(40), tmp_path / "stream"

    def live():
        stream, at, logits = zoo.Session(sleeping, 2), iter(range(40)), []

        def feed(count):
            logits.extend(stream.feed(ids[:, n : n + 1]) for n in itertools.islice(at, count))

        feed(4)
        logits.append(stream.feed(ids[:, [next(at) for _ in range(4)]]))
        feed(9)  # over the end of a window
        stream.sleep(loops=3)
        feed(2)
        stream.sleep(wait=False)
        assert stream._stream.sleep.ended.wait(PAUSE)
        feed(3)
        twin = stream.fork()
        feed(3)
        logits.append(twin.feed(ids[:, :1]))
        stream.save(file)
        feed(2)
        logits.append(stream.state.fast)
        stream.load(file)
        logits += stream.generate(ids[:, :1], 8)
        return logits, stream.state, dataclasses.astuple(stream.stats())[:4]

    class Counted(Slots):
        def read(self, names, ids):
            used.append(self)
            return super().read(names, ids)

    want, used = live(), []
    monkeypatch.setattr(TorchModel, "slots", lambda self, streams: Counted(self.model, streams, self.config.window))
    close(live(), want)
    assert len(used) > 25


@pytest.mark.parametrize("evict", [*POLICIES, "full"])
def test_tokens_kept_by_an_eviction(evict):
    """The number equals the length of the caches after an eviction."""
    reading = model("gdn4-sleep2-" + evict if evict != "full" else "gdn4")
    for count in range(1, 7):
        cache = reading.evict(reading(tokens(count)).state).window[0]
        assert reading.eviction.kept(count) == cache.key.shape[2]


@pytest.mark.parametrize("evict", POLICIES)
def test_stats(evict):
    stream = session(f"gdn4-sleep2-{evict}")
    described = zoo.describe(stream.model)
    stream.feed(tokens(12))
    stats = stream.stats()
    assert (stats.tokens, stats.window, stats.sleeps) == (12, 6, 1)
    assert stats.evicted == {"hard6": 6, "slide6": 1}[evict]
    assert stats.state_bytes == 2 * described.state_bytes
    if evict == "hard6":
        assert stats.cache_bytes == 2 * described.window_bytes
    stream.sleep()
    assert stream.stats().evicted == {"hard6": 12, "slide6": 7}[evict]
    assert 0 < stream.stats().seconds_asleep < PAUSE
    assert 0 < stats.seconds_awake < PAUSE


def test_generate_streams_greedily():
    stream, manual = session(), session()
    prompt = tokens(5)
    token = manual.feed(prompt)[:, -1].argmax(-1)
    for made in stream.generate(prompt, 9):
        assert torch.equal(made, token)
        token = manual.feed(token[:, None])[:, -1].argmax(-1)
    # generated tokens are part of the stream: the last one is read by the next call
    assert stream.stats().tokens + 1 == manual.stats().tokens
    close(stream.feed(tokens(3)), manual.feed(tokens(3)))
    want = manual.feed(tokens(1))[:, -1].argmax(-1)
    stream.feed(tokens(1))
    assert torch.equal(next(stream.generate(None, 1)), want)


def test_dropped_generation_keeps_the_tokens_it_yielded():
    stream, manual = session(), session()
    made = list(itertools.islice(stream.generate(tokens(5), 9), 3))
    assert all(map(torch.equal, made, manual.generate(tokens(5), 3)))
    close(stream.feed(tokens(2)), manual.feed(tokens(2)))


def test_a_pending_token_survives_a_sleep_that_ends_meanwhile():
    stream, plain = gated(), session()
    for each in (stream, plain):
        each.feed(tokens(3))
    stream.sleep(wait=False)
    made = next(stream.generate(None, 1))
    let_it_end(stream)
    plain.sleep()
    close(stream.feed(tokens(2)), plain.feed(torch.cat([made[:, None], tokens(2)], dim=1))[:, 1:])
    assert stream.stats().tokens == plain.stats().tokens == 6


def test_stop():
    stream = session()
    free = torch.stack(list(session().generate(tokens(5), 30, temperature=1, seed=1)), 1)
    stop = [int(free[0, 3]), int(free[1, 7])]
    ends = [min(i for i in range(30) if row[i] in stop) for row in free]
    made = torch.stack(list(stream.generate(tokens(5), 30, temperature=1, seed=1, stop=stop)), 1)
    assert made.shape[1] == max(ends) + 1
    for row, end in zip(made, ends, strict=True):
        assert row[end] in torch.tensor(stop)
        assert (row[end:] == row[end]).all()


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_logits_processor_in_place_changes_no_snapshot(value):
    stream = session()
    stream.feed(tokens(5))
    snapshot, twin = stream.snapshot(), stream.fork()
    want = torch.stack(list(twin.generate(None, 4)))
    with suppress(zoo.ZooError):
        list(stream.generate(None, 4, logits_processor=lambda logits: logits.fill_(value)))
    assert torch.equal(torch.stack(list(stream.restore(snapshot).generate(None, 4))), want)


def test_a_token_that_was_yielded_belongs_to_the_caller():
    stream = session()
    want = torch.stack(list(stream.fork().generate(tokens(3), 6)))
    found, snapshots, prompt = [], [], tokens(3)
    for _ in range(6):
        (token,) = stream.generate(prompt, 1)
        found.append(token.clone())
        snapshots.append(stream.snapshot())
        token.zero_()
        prompt = None
    assert torch.equal(torch.stack(found), want)
    assert torch.equal(torch.stack([snapshot.pending[:, 0] for snapshot in snapshots]), want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.restore(None), "snapshot: NoneType; want a Snapshot"),
        (lambda s: s.generate(tokens(1), 0), "generate: tokens: 0: must be greater than or equal to 1"),
        (lambda s: s.generate(tokens(1), 3, temperature=-1), "temperature: -1"),
        (lambda s: s.generate(tokens(1), 3, top_p=0), "top_p: 0"),
        (lambda s: s.generate(None, 3), "prompt: None; nothing has been read yet"),
        (lambda s: s.generate(torch.ones(2, 1).long(), 3, seen=torch.full((2, 1), 99)), "seen: from 99 to 99; the vocabulary is 0 to"),
        (lambda s: s.generate(torch.ones(2, 1).long(), 3, seen=torch.ones(2, 1)), r"seen: \[2, 1\] torch.float32; want \[2, T\]"),
        (lambda s: s.generate(torch.ones(2, 1).long(), 3, seen=torch.ones(1).long()), r"seen: \[1\] torch.int64; want \[2, T\]"),
        (lambda s: s.generate(tokens(0), 3), r"ids: \[2, 0\]"),
        (lambda s: s.feed(tokens(3, batch_size=1)), r"ids: \[1, 3\] torch.int64; want \[2, T\]"),
        (lambda s: s.feed(tokens(3).float()), "torch.float32; want"),
        (lambda s: s.feed(tokens(0)), "T at least 1"),
        (lambda s: s.feed(tokens(3) + 9), "vocabulary is 0 to 10"),
        (lambda s: s.feed(tokens(3) - 9), "vocabulary is 0 to 10"),
        (lambda s: zoo.Session(s.model, 0), "batch_size: 0"),
        (lambda s: zoo.Session(s.model, when="intervall(3)"), r"unknown schedule 'intervall'; did you mean 'interval'"),
        (lambda s: zoo.Session(s.model, when="interval"), r"schedule: 'interval'; interval takes `interval\(n\)`"),
        (lambda s: zoo.Session(s.model, when="interval(two)"), "interval takes"),
        (lambda s: zoo.Session(s.model, when="full(3)"), "schedule: 'full"),
        (lambda s: zoo.Session(s.model, when="interval(7)"), "interval: 7 tokens; the model's window holds 6"),
        (lambda s: zoo.Session(s.model, when="interval(2.5)"), "interval: 2.5"),
        (lambda s: zoo.Session(s.model, when="idle(-1)"), "idle: -1"),
        (lambda s: zoo.Session(s.model, when="interval("), "want a name"),
        (lambda s: zoo.Session(model("gdn4"), when="idle(1)"), "never sleeps"),
    ],
)
def test_bad_calls(call, message):
    stream = session()
    with pytest.raises(zoo.ZooError, match=message):
        call(stream)
    assert stream.stats().tokens == 0


@pytest.mark.parametrize("evict", POLICIES)
@pytest.mark.parametrize("layers", ["attn gdn", "swa jet mamba2", "mamba"])
def test_a_saved_stream_continues_bit_for_bit(tmp_path, layers, evict):
    sleeping = model(f"gdn4-sleep2-{evict}", layers=layers)
    for read in (0, 3, 6, 9):
        stream = zoo.Session(sleeping, 2)
        if read:
            list(stream.generate(tokens(read), 2))
        stream.save(tmp_path / "stream")
        loaded = zoo.Session(sleeping).load(tmp_path / "stream")
        assert loaded._snapshot.counts == stream._snapshot.counts
        ids = tokens(15, seed=1)
        assert torch.equal(loaded.feed(ids), stream.feed(ids))
    assert [path.name for path in tmp_path.iterdir()] == ["stream"]


@torch.no_grad()
@pytest.mark.parametrize("evict", POLICIES)
def test_a_sleep_continues_from_the_wake_pass(tmp_path, evict):
    """A sleep runs one pass less, also after save and load and in a fork; in a pool, which keeps no hidden states, it runs all."""
    sleeping, seen = model(f"gdn4-sleep3-{evict}"), []
    stream = zoo.Session(sleeping, 2, when="manual")
    for block in sleeping.blocks:
        block.register_forward_hook(lambda *_: seen.append(1))

    def asleep(session):
        seen.clear()
        session.sleep()
        return len(seen)

    assert stream.stats().hidden_bytes == 0
    stream.feed(tokens(3))
    stream.feed(tokens(1, seed=1))
    assert stream.stats().hidden_bytes == 2 * 4 * sleeping.config.d_model * 4
    stream.save(tmp_path / "stream")
    twins = [stream.fork(), zoo.Session(sleeping, when="manual").load(tmp_path / "stream")]
    assert [asleep(session) for session in (stream, *twins)] == [2 * 2] * 3
    wanted = sleeping.consolidate(torch.cat([tokens(3), tokens(1, seed=1)], dim=1))
    for session in (stream, *twins):
        assert session.stats().hidden_bytes == 0
        close(session.state, wanted)
    with zoo.SessionPool(sleeping, when="manual") as pool:
        pooled = pool.open().load(one_row(tmp_path, sleeping))
        assert asleep(pooled) == 3 * 2


def one_row(folder, sleeping):
    """Save a session of one stream that has read something. Returns the file."""
    stream = zoo.Session(sleeping, when="manual")
    stream.feed(tokens(3, batch_size=1))
    stream.save(folder / "row")
    return folder / "row"


@pytest.mark.parametrize("evict", ["hard", "sliding", "none"])
def test_a_session_under_autocast_is_saved(tmp_path, evict):
    """Its window caches are in the dtype of autocast."""
    made = zoo.create("gdn4", layers="attn gdn", d_model=16, vocab_size=11, evict=evict, window=None if evict == "none" else 6)
    with torch.autocast("cpu", torch.bfloat16):
        stream = zoo.Session(made, 2)
        stream.feed(tokens(9))
        stream.save(tmp_path / "session")
        other = zoo.Session(made, 2).load(tmp_path / "session")
        assert torch.equal(other.feed(tokens(7)), zoo.Session(made, 2).restore(stream.snapshot()).feed(tokens(7)))


def test_the_header_of_a_session(tmp_path):
    session().save(tmp_path / "stream")
    with safe_open(tmp_path / "stream", "pt") as file:
        header = file.metadata()
    assert header["model"] == "gdn4-sleep2-hard6"
    assert len(header["config"]) == 16
    assert json.loads(header["versions"])["torch"] == torch.__version__


def test_another_model_is_refused(tmp_path):
    stream = session()
    stream.feed(tokens(4))
    stream.save(tmp_path / "stream")
    others = {
        "model": model("gdn4-sleep3-hard6"),
        "config": model(norm_eps=1e-5),
        "weights": model(seed=1),
    }
    for field, other in others.items():
        there = zoo.Session(other, 2)
        there.feed(tokens(2))
        before = there.state
        with pytest.raises(zoo.ZooError, match=f"stream: {field}: the session is for"):
            there.load(tmp_path / "stream")
        assert there.state is before


def test_weights_of_any_size_have_a_fingerprint():
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros(1).expand(233_373_696))  # the embedding of jet2b; float32 cannot represent its last index
    assert fingerprint(layer) != fingerprint(torch.nn.Linear(1, 1))


def test_a_damaged_file_is_refused(tmp_path):
    stream = session()
    stream.feed(tokens(8))
    file = tmp_path / "stream"
    with pytest.raises(zoo.ZooError, match="stream: No such file"):
        stream.load(file)
    stream.save(file)
    whole = file.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(zoo.ZooError, match="stream: cannot be read"):
            stream.load(file)
    file.write_bytes(whole)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    unsigned = {field: value for field, value in header.items() if field != FIELD}
    tensors = load_file(file)
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        for wrong in (rest, {**rest, name: tensors[name].repeat(2, *[1] * (tensors[name].ndim - 1))}):
            save_file(wrong, file, unsigned)
            with pytest.raises(zoo.ZooError, match="incomplete session"):
                stream.load(file)
            save_file(wrong, file, header)
            with pytest.raises(zoo.ZooError, match=r"damaged: its tensors do not match its zoo\.sha256"):
                stream.load(file)
    save_file(tensors, file)
    with pytest.raises(zoo.ZooError, match="format: None; want a session file"):
        stream.load(file)


def test_reading_a_file_leaves_nothing_behind(tmp_path):
    """`safe_open` of safetensors 0.8 leaves two objects behind for every tensor."""
    stream = session()
    stream.feed(tokens(8))
    stream.save(tmp_path / "stream")
    counts = []
    for _ in range(3):
        for _ in range(50):
            stream.load(tmp_path / "stream")
        gc.collect()
        counts.append(sys.getallocatedblocks())
    assert counts[2] - counts[1] < 50


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(zoo.ZooError, match="No such file"):
        session().save(tmp_path / "nowhere" / "stream")


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("cycles", [20, pytest.param(1000, marks=pytest.mark.extended)])
@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_a_session_is_released(how, cycles):
    sleeping = model()

    def use():
        stream = zoo.Session(sleeping, when="idle(0)")
        stream.feed(tokens(3, batch_size=1))
        if how == "closed":
            stream.close()
        return weakref.ref(stream)

    assert use()() is None
    gc.collect()
    threads, objects = threading.active_count(), len(gc.get_objects())
    for _ in range(cycles):
        use()
    gc.collect()
    assert threading.active_count() == threads
    assert len(gc.get_objects()) < objects + 20
