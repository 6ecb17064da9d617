"""Tokens decoded in place are those of the PyTorch model, and nothing that was taken from the buffers changes."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from threading import Event

import onnx
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import zoo
from zoo.errors import ZooError
from zoo.export.ring import PAST, RingKV, pack, with_caches
from zoo.export.runtime import ExportedModel, OnnxRuntime
from zoo.sessions.sleeping import Sleep
from zoo.signals import interruptible

close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-3)
CASES = ["hard", "sliding", "full", "ort", "ort-full"]


def stream(model, batch, tokens):
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(7))


def alike(ours, wanted):
    for name, tensor in pack(wanted, PAST).items():
        close(pack(ours, PAST)[name], tensor)


def copied(state):
    return tree_map_only(torch.Tensor, torch.clone, state)


def same(state, other):
    return all(map(torch.equal, *([leaf for leaf in tree_leaves(s) if torch.is_tensor(leaf)] for s in (state, other))))


@pytest.mark.parametrize("case", CASES)
def test_any_calls_between_tokens(bundles, case, tmp_path, monkeypatch):
    model, folder, _ = bundles(case)
    run, may_sleep = Sleep.run, Event()
    monkeypatch.setattr(Sleep, "run", lambda sleep: may_sleep.wait(60) and run(sleep))
    exported, sleeps = ExportedModel(folder), model.config.window is not None
    sessions, ids = [zoo.Session(exported, 2), zoo.Session(model, 2)], stream(model, 2, 40)
    kept = []
    for session in sessions:
        may_sleep.set()
        logits, file = [session.feed(ids[:, n : n + 1]) for n in range(3)], tmp_path / "stream"
        snapshot, twin = session.snapshot(), session.fork()
        before = copied(snapshot.state)
        logits.append(session.feed(ids[:, 3:4]))
        session.save(file)
        if sleeps:
            logits += [session.feed(ids[:, n : n + 1]) for n in range(4, 17)]
            may_sleep.clear()
            session.sleep(wait=False)
            logits.append(session.feed(ids[:, 17:18]))
            may_sleep.set()
            assert session._stream.sleep is None or session._stream.sleep.ended.wait(60)
            logits += [session.feed(ids[:, 18:19]), session.feed(ids[:, 19:22])]
        logits.append(session.feed(ids[:, 22:23]))
        assert same(snapshot.state, before)
        logits.append(twin.feed(ids[:, 23:24]))
        logits.append(session.restore(snapshot).feed(ids[:, 24:25]))
        assert same(snapshot.state, before)
        session.load(file)
        logits.append(torch.stack(list(session.generate(ids[:, 25:26], 9 if sleeps else 2)), dim=1).float())
        kept.append((logits, session.state))
    for found, wanted in zip(kept[0][0], kept[1][0], strict=True):
        close(found, wanted)
    alike(exported.plain(kept[0][1]), kept[1][1])


@pytest.mark.parametrize("case", ["ort", "ort-full"])
def test_pieces_end_at_any_slot(bundles, case):
    model, folder, _ = bundles(case)
    exported, ids = ExportedModel(folder), stream(model, 2, slots := model.config.window or 6)
    for first in range(1, slots - 1):  # the padding of the last piece may reach past the last slot
        ours, wanted = zoo.Session(exported, 2), zoo.Session(model, 2)
        for piece in (ids[:, :first], ids[:, first : slots - 1], ids[:, slots - 1 :]):
            close(ours.feed(piece), wanted.feed(piece))
        alike(exported.plain(ours.state), wanted.state)


@pytest.mark.parametrize("case", ["hard", "sliding", "ort-full"])
def test_a_run_that_fails_leaves_every_stream_as_it_was(bundles, case, monkeypatch):
    model, folder, _ = bundles(case)
    exported, ids = ExportedModel(folder), stream(model, 3, 4)
    slots, states = exported.slots(3), [model(row[None, :n]).state for row, n in zip(ids, (1, 2, 3), strict=True)]
    for n, state in enumerate(states):
        slots.put(n, exported.ringed(state))
    run = OnnxRuntime.bind

    def bind(self, tensors):
        def fails():
            run(self, tensors)()
            raise ZooError("no memory")

        return fails

    for failing in ([0, 1, 2], [2, 1]):
        with monkeypatch.context() as patched:
            patched.setattr(OnnxRuntime, "bind", bind)
            with pytest.raises(ZooError, match="no memory"):
                slots.read(failing, ids[failing, 3:])
        slots._bound.clear()
    logits = slots.read([2, 0], ids[[2, 0], 3:])
    for n, found in zip([2, 0], logits, strict=True):
        wanted, states[n] = model(ids[n : n + 1, 3:], states[n])
        close(found, wanted[0])
    for n, state in enumerate(states):
        alike(exported.plain(slots.take(n)), state)


def test_a_full_window_and_another_model_are_refused(bundles):
    exported = ExportedModel(bundles("full").folder)
    slots, token = exported.slots(2), torch.zeros(2, 1, dtype=torch.int64)
    for n, tokens in enumerate((6, 2)):
        slots.put(n, exported(torch.zeros(1, tokens, dtype=torch.int64), exported.init_state()).state)
    with pytest.raises(ZooError, match="1 token does not fit into a window of 6 that holds 6"):
        slots.read([0, 1], token)
    assert slots.read([1], token[:1]).shape == (1, 1, 11)
    assert [slots.take(n).position for n in (0, 1)] == [6, 3]
    with pytest.raises(ZooError, match="state"):
        slots.put(0, ExportedModel(bundles("hard").folder).init_state())


@pytest.mark.parametrize("case", ["sliding", "ort"])
def test_sessions_and_pools_decode_in_place(bundles, case, monkeypatch):
    """No token of a stream makes new states."""
    exported = ExportedModel(bundles(case).folder)
    monkeypatch.setattr(OnnxRuntime, "__call__", lambda self, tensors: pytest.fail("states were copied"))
    with zoo.SessionPool(exported, slots=2) as pool:
        for session in (zoo.Session(exported), pool.open()):
            session.feed(torch.zeros(1, 1, dtype=torch.int64))
            list(session.generate(None, 3))
            assert session.stats().tokens == 3


def test_a_token_has_few_operators(bundles):
    """Attention with its cache is one, and each rotation is one."""
    graph = onnx.load(bundles("ort-full").folder / "prediction.onnx", load_external_data=False).graph
    count = Counter(node.op_type for node in graph.node)
    assert (count["GroupQueryAttention"], count["RotaryEmbedding"], count["Split"], count["Softmax"]) == (2, 4, 0, 0)


@pytest.mark.parametrize("case", ["full", "ort-full"])
def test_slots_without_a_token_are_not_read(bundles, case):
    model, folder, _ = bundles(case)
    exported, ids = ExportedModel(folder), stream(model, 2, 3)
    state = exported(ids[:, :2], exported.init_state(2)).state

    def spoiled(i, cache):
        return RingKV(*(torch.cat([x[:, :, :2], x[:, :, 2:] + 1e6], dim=2) for x in cache)) if isinstance(cache, RingKV) else cache

    wanted, found = exported(ids[:, 2:], state), exported(ids[:, 2:], with_caches(state, spoiled))
    assert torch.equal(found.logits, wanted.logits)
    assert same(exported.plain(found.state), exported.plain(wanted.state))
    assert all(tensor.isfinite().all() for tensor in pack(found.state, PAST).values())


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not list(Path(torch.__file__).parent.glob("lib/libgomp*")), reason="torch uses another OpenMP library")
@pytest.mark.usefixtures("three_threads")
def test_threads_of_torch_end_before_a_graph_runs(bundles):
    """They wait actively, and would compete with those of the graph."""
    session = zoo.Session(ExportedModel(bundles("ort")[1]))
    session.feed(torch.zeros(1, 3, dtype=torch.int64))
    torch.rand(1000, 1000).exp()
    busy, started = len(os.listdir("/proc/self/task")), time.monotonic()
    session.feed(torch.zeros(1, 1, dtype=torch.int64))
    while len(os.listdir("/proc/self/task")) != busy - 2 and time.monotonic() - started < 5:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) == busy - 2


def test_interrupted_between_a_token_and_its_record(bundles, monkeypatch):
    """The stream continues as if Ctrl-C had come a moment later."""
    exported = ExportedModel(bundles("sliding").folder)
    sessions = [zoo.Session(exported) for _ in range(2)]
    prompt, stopped = stream(exported, 1, 3), iter(sessions[0].generate(stream(exported, 1, 3), 9))
    whole = list(sessions[1].generate(prompt, 6))
    tokens = [next(stopped) for _ in range(3)]
    slots = sessions[0]._host._slots
    read = slots.read

    def then_interrupted(*arguments):
        logits = read(*arguments)
        signal.raise_signal(signal.SIGINT)
        return logits

    monkeypatch.setattr(slots, "read", then_interrupted)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        next(stopped)
    monkeypatch.undo()
    assert sessions[0].state.position == sessions[0].stats().tokens == 6
    assert list(map(int, [*tokens, *sessions[0].generate(None, 3)])) == list(map(int, whole))


def test_made_in_inference_mode(bundles):
    exported = ExportedModel(bundles("hard").folder)
    ids = stream(exported, 1, 3)
    want = list(zoo.Session(exported).generate(ids, 4))
    session = zoo.Session(exported)
    with torch.inference_mode():
        tokens = list(session.generate(ids, 2))
    assert list(map(int, [*tokens, *session.generate(None, 2)])) == list(map(int, want))


def test_a_session_that_is_too_long(bundles, tmp_path):
    model, folder, _ = bundles("full")
    session = zoo.Session(model)
    session.read(stream(model, 1, 8))
    session.save(tmp_path / "long")
    with pytest.raises(ZooError, match=r"long: position: 8; this bundle was exported with a max_length of 6"):
        zoo.Session(ExportedModel(folder)).load(tmp_path / "long")
