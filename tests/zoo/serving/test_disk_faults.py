"""A store on a disk that is full, that fails, or that cannot be read."""

import json
import urllib.error

import pytest
import torch

import zoo
from tests.zoo.serving.disk import Disk, recovers, stored, wait_until
from tests.zoo.serving.local import local, post
from tests.zoo.serving.test_store import BYTES, uninterrupted
from zoo.serving import sessions as kept_sessions
from zoo.serving.store import Store, StoreError

WORDS = ["one", "two", "three", "four"]


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_sessions, "TICK", 0.02)  # how soon the server notices that a store works again
    monkeypatch.setattr(kept_sessions, "SETTLED", float("inf"))  # states are written by no timer
    return Disk(tmp_path, monkeypatch)


def asked(server, word, **more):
    """Text of an answer, or None after a refusal because the store fails, which must say when to come back."""
    try:
        with server.open("/v1/completions", {"prompt": word, "max_tokens": 8, "temperature": 0, **more}) as response:
            return json.loads(response.read())["choices"][0]["text"]
    except urllib.error.HTTPError as refusal:
        found = refusal.code, json.loads(refusal.read())["error"]["code"], int(refusal.headers["retry-after"])
    assert found == (503, "store_failing", 1)
    return None


def reports(server):
    """Whether /ready and the metric say that the store fails."""
    failing = server.ask("/ready")[0] == 503
    assert f"zoo_store_failing {float(failing)}".encode() in server.open("/metrics").read()
    return failing


def files(server):
    with server.nothing_written():
        return stored(server.state.sessions.store.places.folder)


@pytest.fixture(scope="module")
def model():
    made = zoo.create("gdn4-sleep2-hard16", layers="attn gdn", d_model=32, d_ff=16, vocab_size=256)
    with torch.no_grad():  # it says lower-case letters, so that the tokens of a text are those that were sampled
        made.head.weight.mul_(4 * (torch.arange(256).sub(ord("a")).div(26, rounding_mode="floor") == 0)[:, None])
    return made


@pytest.fixture(scope="module")
def right(model):
    return uninterrupted(model, *WORDS)


@pytest.mark.parametrize(
    ("fault", "numbers"),
    [
        ("fill", range(0, 1000, 125)),
        ("fail_after", [0, 3, 4, 5, 6, 9]),
        pytest.param("fill", range(0, 1000, 20), marks=pytest.mark.extended),
        pytest.param("fail_after", range(12), marks=pytest.mark.extended),
    ],
    ids=["full", "sync", "full-all", "sync-all"],
)
def test_a_disk_that_takes_no_more(model, right, tmp_path, disk, fault, numbers):
    """After n bytes, or n calls of fsync, in a session that begins: answers are finished; refused is what cannot be stored."""
    other = uninterrupted(model, "other")[0]
    seen, tokens = set(), {}
    with local(model, BYTES, store=tmp_path, streams=len(numbers) + 1) as server:
        for number in numbers:
            name, said = f"s{number}", []
            getattr(disk, fault)(number)
            for word in WORDS[:-1]:
                full = said and len(files(server)[name]) < sum(len(word) + 8 for word in WORDS[: len(said)])
                answer = asked(server, word, session=name)
                assert answer is None or not full, "the last answer has not been stored"
                if answer is None:
                    assert full or not said, "there was room"
                    assert reports(server)
                    assert asked(server, "other") == other
                    break
                said.append(answer)
            assert said == right[: len(said)]
            seen.add(len(said))
            now = files(server)
            assert {old: now[old] for old in tokens} == tokens
            assert len(now.get(name, [])) >= sum(len(word) + 8 for word in WORDS[: max(0, len(said) - 1)])
            disk.heal()
            recovers(server)
            assert not reports(server)
            assert [asked(server, word, session=name) for word in WORDS[len(said) :]] == right[len(said) :]
            tokens[name] = files(server)[name]
            assert len(tokens[name]) == sum(map(len, WORDS)) + 8 * len(WORDS)
    assert seen == {0, 1, 2, 3}
    with local(model, BYTES, store=tmp_path) as server:
        assert asked(server, "five", session=name) == uninterrupted(model, *WORDS, "five")[-1]


@pytest.mark.parametrize("room", [0, 300, 3000, 12_000, 40_000])
def test_no_room_for_states(model, right, tmp_path, disk, room):
    """Sessions whose tokens are stored make room for other requests, without their states; at the end, too."""
    with local(model, BYTES, store=tmp_path, streams=2) as server:
        for name in "ab":
            assert asked(server, "one", session=name) == right[0]
        disk.fill(room)
        assert asked(server, "other") == uninterrupted(model, "other")[0]
        assert reports(server) == (not list(tmp_path.glob("*/*.safetensors")))
        assert [asked(server, "one"), asked(server, "one")] == right[:1] * 2
    assert {name: len(tokens) for name, tokens in stored(tmp_path).items()} == {"a": 11, "b": 11}
    disk.heal()
    with local(model, BYTES, store=tmp_path, streams=2) as server:
        for name in "ab":
            assert asked(server, "two", session=name) == right[1]
        assert not reports(server)


@pytest.mark.parametrize("name", ["lease", "session.json", "journal.jsonl", "state"])
def test_a_session_that_cannot_be_read_back(model, right, tmp_path, disk, name, monkeypatch):
    """It is refused, others continue; without its state, its tokens are read again."""
    with local(model, BYTES, store=tmp_path) as server:
        for session in "st":
            assert asked(server, "one", session=session) == right[0]
        folder = server.state.sessions._kept["", "s"].journal.place.folder
    (state,) = folder.glob("*.safetensors")
    with local(model, BYTES, store=tmp_path) as server:
        disk.unreadable = state if name == "state" else folder / name
        if name == "state":
            assert asked(server, "two", session="s") == right[1]
            return
        with monkeypatch.context() as patch:
            patch.setattr(Store, "check", fails)  # the real one finds nothing wrong with other files
            for turn in range(2):
                assert asked(server, WORDS[turn + 1], session="s") is None
                assert reports(server)
                assert [asked(server, WORDS[turn + 1], session="t"), asked(server, "one")] == [right[turn + 1], right[0]]
        for refused in (server.ask("/v1/sessions/s"), post(server, "/v1/sessions/s/sleep"), server.ask("/v1/sessions/s", method="DELETE")):
            assert (refused[0], refused[1]["error"]["code"]) == (503, "store_failing")
        assert server.ask("/v1/sessions")[0] == (200 if name == "lease" else 503)
        disk.heal()
        recovers(server)
        assert [asked(server, word, session="s") for word in WORDS[1:]] == right[1:]
        disk.unreadable = folder / name  # while it is in memory, only the lease is read
        assert asked(server, "five", session="s") == (None if name == "lease" else uninterrupted(model, *WORDS, "five")[-1])


def test_a_session_that_was_taken_over_is_no_failure(model, right, tmp_path, disk):
    """The server that has lost it stays ready, and the session leaves its memory for another."""
    with local(model, BYTES, store=tmp_path, streams=1) as first, local(model, BYTES, store=tmp_path) as second:
        assert [asked(server, word, session="s") for server, word in ((first, "one"), (second, "two"))] == right[:2]
        assert asked(first, "one", session="t") == right[0]
        assert not reports(first)


def test_idle_sessions_are_written_and_leave_memory(model, right, tmp_path, disk, monkeypatch):
    """By a timer: no request comes that would do it."""
    monkeypatch.setattr(kept_sessions, "SETTLED", 0.1)
    with local(model, BYTES, store=tmp_path) as server:
        assert asked(server, "one", session="s") == right[0]
        wait_until(lambda: list(tmp_path.glob("*/11.safetensors")))
        assert len(server.state.sessions) == 1
        monkeypatch.setattr(server.state.sessions, "_idle", 0.1)
        wait_until(lambda: len(server.state.sessions) == len(server.pool) == 0)
        assert asked(server, "two", session="s") == right[1]


def fails(store):
    raise StoreError("store: fails")
