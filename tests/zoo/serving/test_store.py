"""Sessions outlive the process: kills at random moments, and two processes."""

import errno
import gc
import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import zoo
from tests.zoo.serving.buckets import whole
from tests.zoo.serving.disk import stored
from tests.zoo.serving.local import local, post
from tests.zoo.training.tiny import tiny
from zoo.serving.limits import Limits
from zoo.serving.prefixes import common_length
from zoo.serving.store import Journal, Record, Store, StoreError, TakenOverError
from zoo.sessions.host import Stream
from zoo.text.tokenizers import ByteTokenizer
from zoo.training.loop import train

BYTES = ByteTokenizer(256)


@pytest.fixture(scope="module")
def model():
    """It says lower-case letters, so that the tokens of a text are those that were sampled."""
    made = zoo.create("gdn4-sleep2-hard16", layers="attn gdn", d_model=32, d_ff=16, vocab_size=256)
    with torch.no_grad():
        letters = torch.arange(256).sub(ord("a")).div(26, rounding_mode="floor") == 0
        made.head.weight.mul_(4 * letters[:, None])
    return made


@pytest.fixture(params=["folder", "objects"])
def at(request):
    """What `--store` has for a folder: itself, or an object store that is kept there."""
    return (lambda folder: folder) if request.param == "folder" else "bucket://{}".format


def uninterrupted(model, *prompts, tokens=8):
    """Answers of a plain session to each prompt in turn."""
    session = zoo.Session(model)
    return [BYTES.decode(map(int, session.generate(torch.tensor([list(prompt.encode())]), tokens))) for prompt in prompts]


def answers(server, session, *prompts, **more):
    return [server.complete(prompt, session=session, **more)["choices"][0]["text"] for prompt in prompts]


def test_a_slow_disk_delays_only_the_session_that_is_written(model, tmp_path, monkeypatch):
    """The oldest session makes room for a new one; a third is answered in the meantime, and the first continues when it is written."""
    want, disk, writing = uninterrupted(model, "one", "two"), threading.Event(), threading.Event()
    write = Journal.write_snapshot

    def slowly(journal, session):
        writing.set()
        assert disk.wait(60)
        write(journal, session)

    with local(model, BYTES, store=tmp_path, streams=2, limits=Limits(wait=60)) as server, ThreadPoolExecutor(2) as threads:
        assert answers(server, "first", "one") == answers(server, "second", "one") == want[:1]
        monkeypatch.setattr(Journal, "write_snapshot", slowly)
        new = threads.submit(answers, server, "new", "one")
        assert writing.wait(60)
        first = threads.submit(answers, server, "first", "two")
        try:
            assert answers(server, "second", "two") == want[1:]
            assert [new.done(), first.done()] == [False, False]
        finally:
            disk.set()
        assert (new.result(60), first.result(60)) == (want[:1], want[1:])


@pytest.mark.parametrize("kept", [True, False])
def test_a_slow_disk_delays_only_the_session_that_is_deleted(model, tmp_path, monkeypatch, kept):
    """Other sessions continue, and a request for the deleted one waits and begins a new one; with the session in memory, or not."""
    want, disk, deleting, delete = uninterrupted(model, "one", "two"), threading.Event(), threading.Event(), Journal.delete

    def slowly(journal):
        deleting.set()
        assert disk.wait(60)
        delete(journal)

    with local(model, BYTES, store=tmp_path, streams=4) as server:
        assert answers(server, "gone", "one") == answers(server, "other", "one") == want[:1]
    monkeypatch.setattr(Journal, "delete", slowly)
    with local(model, BYTES, store=tmp_path, streams=4) as server, ThreadPoolExecutor(2) as threads:
        if kept:
            assert server.ask("/v1/sessions/gone")[0] == 200
        gone = threads.submit(server.ask, "/v1/sessions/gone", None, "DELETE")
        assert deleting.wait(60)
        again = threads.submit(answers, server, "gone", "one", "two")
        try:
            assert answers(server, "other", "two") == want[1:]
            assert [gone.done(), again.done()] == [False, False]
        finally:
            disk.set()
        assert gone.result(60) == (200, {"id": "gone", "object": "session", "deleted": True})
        assert again.result(60) == want


@pytest.mark.parametrize("stored", [True, False])
def test_a_session_that_is_deleted_meanwhile_is_not_made_again(model, tmp_path, monkeypatch, stored):
    """A GET and a fork that saw the session before another client's DELETE find none after it."""
    with local(model, BYTES, store=tmp_path if stored else None) as server:
        sessions = server.state.sessions
        exists = sessions.exists
        for path, body in (("/v1/sessions/s", None), ("/v1/sessions/s/fork", {"id": "t"})):
            answers(server, "s", "one")

            def and_then_delete(owner, name):
                monkeypatch.setattr(sessions, "exists", exists)
                assert exists(owner, name)
                sessions.delete(owner, name)
                return True

            monkeypatch.setattr(sessions, "exists", and_then_delete)
            status = server.ask(path)[0] if body is None else post(server, path, body)[0]
            assert status == 404
            assert server.ask("/v1/sessions")[1]["data"] == []


def test_a_restart(model, tmp_path, at):
    """A server that has ended, one that has not, and one whose snapshots are gone: the next answer is that of an uninterrupted stream."""
    want = uninterrupted(model, "one", "two", "three", "four", "five")
    with local(model, BYTES, store=at(tmp_path)) as server:
        assert answers(server, "s", "one", "two") == want[:2]
    assert list(tmp_path.glob("*/*.safetensors"))  # written at the end
    with local(model, BYTES, store=at(tmp_path)) as server:
        assert answers(server, "s", "three") == want[2:3]
        shutil.copytree(tmp_path, tmp_path / "killed")
    with local(model, BYTES, store=at(tmp_path / "killed")) as server:
        assert answers(server, "s", "four") == want[3:4]
    for file in (tmp_path / "killed").glob("*/*.safetensors"):
        file.write_bytes(b"damaged")
    with local(model, BYTES, store=at(tmp_path / "killed")) as server:
        assert answers(server, "s", "five") == want[4:]
        assert server.ask("/v1/sessions/s", method="DELETE")[0] == 200
        assert server.ask("/v1/sessions/s", method="DELETE")[0] == 404
        assert answers(server, "s", "one") == want[:1]


@pytest.mark.parametrize("snapshots", [0, 1, 2])
def test_a_session_is_read_back_as_it_was(model, tmp_path, at, snapshots):
    """Its last token is still pending, so the next sleep is on the same tokens. Nothing is saved, or an older state, or the last one."""
    with local(model, BYTES, store=at(tmp_path)) as server:
        for turn in range(2):
            answers(server, "s", "hello")
            if turn < snapshots:
                (kept,) = server.state.sessions._kept.values()
                kept.store_state()
        if snapshots:
            post(server, "/v1/sessions/s/sleep")  # a state has not slept yet
            answers(server, "s", "you")
        shutil.copytree(tmp_path, tmp_path / "killed")
        want = [server.ask("/v1/sessions/s")[1], post(server, "/v1/sessions/s/sleep")[1], answers(server, "s", "more")]
    with local(model, BYTES, store=at(tmp_path / "killed")) as server:
        found = [server.ask("/v1/sessions/s")[1], post(server, "/v1/sessions/s/sleep")[1], answers(server, "s", "more")]
    for one, other in zip(found[:2], want[:2], strict=True):
        assert one.pop("norms")[1] == pytest.approx(other.pop("norms")[1], rel=1e-4)
    assert found == want


def test_a_conversation_after_a_restart(model, tmp_path, at):
    """The messages are stored too, so that `append` continues them; an edit after the restart reads again what it must."""
    hi, more = {"role": "user", "content": "hi"}, {"role": "user", "content": "more"}
    with local(model, BYTES) as server:
        first = server.chat([hi])["choices"][0]["message"]
        second = server.chat([hi, first, more])["choices"][0]["message"]["content"]
        edited = server.chat([hi, first, hi])["choices"][0]["message"]["content"]
    with local(model, BYTES, store=at(tmp_path)) as server:
        server.chat([hi], session="s")
    with local(model, BYTES, store=at(tmp_path)) as server:
        answer = server.chat([more], session="s", append=True)
        assert answer["choices"][0]["message"]["content"] == second
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 20
        assert server.chat([hi, first, hi], session="s")["choices"][0]["message"]["content"] == edited


def test_sleeps_are_stored(model, tmp_path, at):
    """A sleep before the window is full is repeated at the same place after a restart without a snapshot."""
    with local(model, BYTES, store=at(tmp_path)) as server:
        answers(server, "s", "one")
        stream = server.state.sessions._kept["", "s"].session
        stream.sleep(3)
        answers(server, "s", "two")
        assert stream.snapshot().sleeps == ((10, 3),)  # 3 + 8 tokens, the last of which is pending
        shutil.copytree(tmp_path, tmp_path / "killed")
        three = answers(server, "s", "three")
    with local(model, BYTES, store=at(tmp_path / "killed")) as server:
        assert answers(server, "s", "three") == three != uninterrupted(model, "one", "two", "three")[2:]
        assert server.state.sessions._kept["", "s"].session.snapshot().sleeps == ((10, 3),)


def test_more_sessions_than_streams(model, tmp_path, at):
    """Sessions leave memory for the store, the least recently used first, and return."""
    want = {n: uninterrupted(model, f"talk {n}", "more") for n in range(9)}
    with local(model, BYTES, store=at(tmp_path), streams=3) as server, ThreadPoolExecutor(3) as threads:
        got = [list(threads.map(lambda n, end=end: answers(server, f"s{n}", end or f"talk {n}")[0], range(9))) for end in ("", "more")]
        assert len(server.state.sessions) <= 3
    assert {n: [first, second] for n, first, second in zip(range(9), *got, strict=True)} == want


def test_two_processes(model, tmp_path, at):
    """A session moves to the server that uses it; the one that has lost it writes nothing."""
    want = uninterrupted(model, "one", "two", "three", "four")
    with local(model, BYTES, store=at(tmp_path)) as first, local(model, BYTES, store=at(tmp_path)) as second:
        turns = zip((first, second, first, second), ("one", "two", "three", "four"), strict=True)
        assert [answers(server, "s", word)[0] for server, word in turns] == want
    store = Store(at(tmp_path / "more"), {})
    lost = store.open("me", "s")
    owned = store.open("me", "s")
    owned.write(Record([1, 2]))
    with pytest.raises(TakenOverError, match="another process"):
        lost.write(Record([3]))
    assert not lost.check()
    assert store.open("me", "s").stored.tokens == [1, 2]


def test_a_session_that_is_created_again_belongs_to_its_creator(tmp_path, at):
    """A process that has held it since before it was deleted writes nothing, even if the number of its lease comes back."""
    store = Store(at(tmp_path), {})
    for _ in range(3):
        before = store.open("me", "s")
    before.write(Record([1]))
    store.open("me", "s").delete()
    assert not store.exists("me", "s")
    assert store.names("me") == []
    for tokens in ([2], [2, 3], [2, 3, 4], [2, 3, 4, 5]):
        owner = store.open("me", "s")
        assert owner.stored.tokens == tokens[:-1]
        owner.write(Record(tokens))
        assert not before.check()
        with pytest.raises(TakenOverError):
            before.write(Record([1, 5]))


def test_other_weights_and_other_keys_are_refused(model, tmp_path, at):
    other = zoo.create(model.config, seed=1)
    with local(model, BYTES, store=at(tmp_path), keys=["one", "two"]) as server:
        assert server.ask("/v1/completions", {"prompt": "a", "session": "s"}, authorization="Bearer one")[0] == 200
        assert server.ask("/v1/sessions/s", method="DELETE", authorization="Bearer two")[0] == 404
        assert not any("one" in file.read_text() for file in tmp_path.glob("*/session.json"))  # keys are not written down
    with local(other, BYTES, store=at(tmp_path), keys=["one"]) as server:
        status, answer = server.ask("/v1/completions", {"prompt": "a", "session": "s"}, authorization="Bearer one")
        assert status == 503
        assert "weights" in answer["error"]["message"]


def test_another_schedule_is_refused(model, tmp_path, at):
    with local(model, BYTES, store=at(tmp_path), when="idle(9)") as server:
        assert server.ask("/v1/completions", {"prompt": "a", "session": "s"})[0] == 200
    with local(model, BYTES, store=at(tmp_path), when="manual") as server:
        status, answer = server.ask("/v1/completions", {"prompt": "a", "session": "s"})
        assert status == 503
        wanted = "session: 's': it was stored with sleeps_after: the default; this server has 'no number of tokens'"
        assert answer["error"]["message"] == wanted
        assert server.ask("/ready")[0] == 200  # other sessions are not affected


def test_a_full_window_ends_an_answer_under_manual(model):
    prompt, window = "abcdefghij", model.config.window
    with local(model, BYTES, when="manual") as server:
        choice = server.complete(prompt, session="s", max_tokens=50)["choices"][0]
        session = zoo.Session(model, when="manual")
        greedy = [int(token) for token in session.generate(torch.tensor([list(prompt.encode())]), window - len(prompt) + 1)]
        assert (choice["text"], choice["finish_reason"]) == (BYTES.decode(greedy), "length")
        status, answer = server.ask("/v1/completions", {"prompt": "k", "session": "s"})
        assert status == 400
        assert "the schedule is manual: sleep first" in answer["error"]["message"]


def test_a_message_that_does_not_fit_leaves_no_trace(model):
    """Under manual, in a conversation whose rendering continues and in one that is read again from its first token."""
    with local(zoo.create(model.config, window=64), BYTES, when="manual") as server:
        server.chat([{"role": "user", "content": "a"}], session="s", max_tokens=2)
        before, tokens = server.ask("/v1/sessions/s")[1], server.stream("s")
        for messages, more in (([{"role": "user", "content": "b" * 30}], {"append": True}), ([{"role": "user", "content": "c" * 99}], {})):
            status, answer = server.ask("/v1/chat/completions", {"messages": messages, "session": "s", "max_tokens": 2, **more})
            assert (status, answer["error"]["param"]) == (400, "messages")
            assert ("it never has room" if not more else "sleep first") in answer["error"]["message"]
            assert (server.ask("/v1/sessions/s")[1], server.stream("s")) == (before, tokens)


def test_a_refused_completion_leaves_no_trace(model):
    """Neither a prompt that is scored and does not fit, nor one whose other fields are wrong."""
    with local(zoo.create(model.config, window=64), BYTES, when="manual") as server:
        server.complete("a", session="s", max_tokens=2)
        before, tokens = server.ask("/v1/sessions/s")[1], server.stream("s")
        for fields, param in (({"prompt": "b" * 600, "echo": True, "logprobs": 1}, "prompt"), ({"logit_bias": {"300": 1}}, "logit_bias")):
            status, answer = server.ask("/v1/completions", {"prompt": "b", "session": "s", "max_tokens": 2, **fields})
            assert (status, answer["error"]["param"]) == (400, param)
            assert (server.ask("/v1/sessions/s")[1], server.stream("s")) == (before, tokens)


@pytest.mark.parametrize("prompt", ["", "x" * 100])
def test_a_prompt_is_refused_alike_in_every_place(model, prompt):
    with local(model, BYTES, when="manual") as server:
        for prompts in ([prompt, "a"], ["a", prompt]):
            status, answer = server.ask("/v1/completions", {"prompt": prompts})
            assert (status, answer["error"]["param"], answer["error"]["type"]) == (400, "prompt", "invalid_request_error")


def test_a_model_that_never_sleeps_is_not_put_to_sleep(model):
    with local(zoo.create(model.config, evict="none", window=None), BYTES, context=100) as server:
        server.complete("a", session="s", max_tokens=2)
        status, answer = post(server, "/v1/sessions/s/sleep", {"loops": 7})
        assert status == 400
        assert "never sleeps" in answer["error"]["message"]


def test_a_session_whose_first_request_was_refused_belongs_to_nobody(model, tmp_path, at):
    other = zoo.create(model.config, loops=3)
    with local(model, BYTES, store=at(tmp_path)) as server:
        assert server.ask("/v1/completions", {"prompt": [300], "session": "s"})[0] == 400
    with local(other, BYTES, store=at(tmp_path)) as server:
        assert server.ask("/v1/completions", {"prompt": "a", "session": "s"})[0] == 200


def test_a_disk_without_locks_is_refused(model, tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("zoo.system.fcntl.flock", without)
    with local(model, BYTES, store=tmp_path) as server:
        status, answer = server.ask("/v1/completions", {"prompt": "a", "session": "s"})
        assert status == 503
        assert "No locks available" in answer["error"]["message"]
    with pytest.raises(zoo.ZooError, match="cannot be locked: No locks available; want a disk with file locks"):
        train(tiny(), tmp_path / "run")


def test_torn_lines(tmp_path):
    """A journal cut at any byte has the records that were complete, and is continued after them."""
    store, records = (
        Store(tmp_path, {}),
        [Record([1, 2]), Record([1, 3, 4], ((3, 2),)), Record([1, 3, 4, 5], ((3, 2),), [{"role": "user"}])],
    )
    journal, sizes = store.open("me", "s"), [0]
    for record in records:
        journal.write(record)
        sizes.append(journal.place.size)
    file = journal.place.folder / "journal.jsonl"
    content = file.read_bytes()
    for cut in range(len(content) + 1):
        file.write_bytes(content[:cut])
        journal = store.open("me", "s")
        whole = sum(size <= cut for size in sizes) - 1
        assert journal.stored == (records[whole - 1] if whole else Record())
        if cut % 10 == 0:
            journal.write(Record([9]))
            assert store.open("me", "s").stored.tokens == [9]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("journal.jsonl", lambda text: text.replace("[2]", "[7]"), "journal.jsonl: line 2 is damaged"),
        ("journal.jsonl", lambda text: text.replace("[3]", "[7]"), "journal.jsonl: line 3 is damaged"),
        ("lease", lambda text: "x", "lease: damaged: invalid literal"),
        ("session.json", lambda text: text.replace("weights", "heights"), "it was stored with weights: the default; this server has"),
        ("session.json", lambda text: "[" * 100_000, "session.json: cannot be read"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, change, message):
    store = Store(tmp_path, {"weights": "0"})
    journal = store.open("me", "s")
    for end in (2, 3, 4):
        journal.write(Record(list(range(1, end))))
    file = journal.place.folder / name
    file.write_text(change(file.read_text()))
    with pytest.raises(StoreError, match=message):
        store.open("me", "s")


def test_routes(model, tmp_path, at):
    """Sessions are listed, looked at, put to sleep and forked, in memory or in the store."""
    with local(model, BYTES, store=at(tmp_path)) as server:
        answers(server, "s", "x" * 40)
        about = server.ask("/v1/sessions/s")[1]
        assert (about["tokens"], about["window"]) == (48, {"tokens": 15, "limit": 16})
        assert about["sleeps"] == [{"position": 16, "loops": 2}, {"position": 32, "loops": 2}]
        assert about["norms"][0] is None
        assert about["norms"][1] > 0
        assert server.ask("/v1/sessions/s/sleep", {"loops": 3})[0] == 400  # an unknown field: model
    with local(model, BYTES, store=at(tmp_path)) as server:
        about = post(server, "/v1/sessions/s/sleep", {"loops": 3})[1]
        assert about["sleeps"][2:] == [{"position": 47, "loops": 3}]
        assert about["window"]["tokens"] == 0
        assert post(server, "/v1/sessions/s/fork", {"id": "t"})[1]["sleeps"] == about["sleeps"]
        assert post(server, "/v1/sessions/s/fork", {"id": "t"})[0] == 409
        assert post(server, "/v1/sessions/none/fork", {"id": "u"})[0] == post(server, "/v1/sessions/none/sleep", {})[0] == 404
        assert server.ask("/v1/sessions/none")[0] == 404
        assert [each["id"] for each in server.ask("/v1/sessions")[1]["data"]] == ["s", "t"]
        assert answers(server, "s", "more") == answers(server, "t", "more")


def test_copies_at_random_moments(model, tmp_path):
    """Under four clients, the store as it is at some moment continues every session after its last finished request."""
    words, chance = [f"word {n}" for n in range(6)], random.Random(0)
    want = {name: uninterrupted(model, *(f"{name} {word}" for word in words), tokens=5) for name in "abcd"}
    finished = dict.fromkeys("abcd", 0)

    def talk(name):
        for n, word in enumerate(words[:-1]):
            assert answers(server, name, f"{name} {word}", max_tokens=5) == [want[name][n]]
            finished[name] = n + 1

    with local(model, BYTES, store=tmp_path / "live") as server, ThreadPoolExecutor(4) as threads:
        work, copies = threads.map(talk, "abcd"), []
        for n in range(3):
            time.sleep(chance.random() / 4)
            copies.append((dict(finished), shutil.copytree(tmp_path / "live", tmp_path / str(n), ignore=shutil.ignore_patterns(".*"))))
        list(work)
    for before, folder in copies:
        store = Store(folder, {})
        for name in "abcd":
            if not store.exists("", name):
                assert before[name] == 0
        with local(model, BYTES, store=folder) as server:
            for name in "abcd":
                done = len(open_tokens(server, name)) // (len(f"{name} word 0") + 5)
                assert done >= before[name]
                assert answers(server, name, f"{name} {words[done]}", max_tokens=5) == [want[name][done]]


def open_tokens(server, name):
    kept = server.state.sessions.acquire("", name)
    server.state.sessions.release(kept)
    return kept.tokens


def test_sessions_leave_no_states_in_reference_cycles(model, tmp_path):
    """Only the garbage collector would free them, seconds later."""
    with local(model, BYTES, slots=2, streams=3, store=tmp_path, limits=Limits(prefixes=0)) as server:
        gc.collect()
        gc.disable()
        try:
            for n in range(20):
                answers(server, f"s{n % 10}", f"{n}", max_tokens=5)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            assert [thing for thing in gc.garbage if isinstance(thing, torch.Tensor | Stream)] == []
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()


@pytest.mark.extended
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_kills(model, tmp_path, at, how):
    """Under 16 clients `zoo serve` is stopped at random moments: no file is torn, no finished request lost, each answer right."""
    zoo.save(model, tmp_path / "model")
    chance, clients = random.Random(0), [Talker(model, n) for n in range(16)]
    for _ in range(50):
        process, url = serve(tmp_path, at)
        with ThreadPoolExecutor(16) as threads:
            work = [threads.submit(client.talk, url) for client in clients]
            answered, most = sum(len(client.messages) for client in clients), time.monotonic() + 20
            goal = answered + chance.randint(1, 60)
            while sum(len(client.messages) for client in clients) < goal and time.monotonic() < most:
                time.sleep(0.02 * chance.random())
            process.send_signal(how)
            process.wait(60)
        stored(tmp_path / "store") if at(tmp_path) == tmp_path else whole(tmp_path / "store")
        for each in work:
            each.result()
        assert "Traceback" not in (tmp_path / "log").read_text()
    assert sum(len(client.messages) for client in clients) > 16


class Talker:
    """A client with a conversation."""

    def __init__(self, model, n):
        self.model, self.n, self.messages = model, n, []
        self.read, self.held = 0, 0
        """Tokens of its session after the last answer, and how many of them the next prompt begins with."""

    def talk(self, url):
        """Ask until the server is gone."""
        try:
            stored = self._stored(url) if self.read else 0
        except urllib.error.HTTPError as error:
            if error.code != 503:  # it is shutting down
                raise
            return
        except (OSError, http.client.HTTPException, ValueError):
            return
        assert stored >= self.read
        if stored > self.read:  # it was stopped before it sent an answer that it had stored; the state before that is read again
            self.held = 0
        while True:
            messages = [*self.messages, {"role": "user", "content": f"{self.n} {len(self.messages)}"}]
            body = {"model": "gdn4-sleep2-hard16", "temperature": 0, "max_tokens": 4, "session": f"s{self.n}", "messages": messages}
            request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    answer = json.loads(response.read())
            except (OSError, http.client.HTTPException, ValueError):
                return
            prompt = BYTES.chat(messages)
            said = list(map(int, zoo.Session(self.model).generate(torch.tensor([prompt]), 4)))
            text = answer["choices"][0]["message"]["content"]
            assert text == BYTES.decode(said)
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= self.held
            self.messages, self.read = [*messages, {"role": "assistant", "content": text}], len(prompt) + len(said)
            following = BYTES.chat([*self.messages, {"role": "user", "content": ""}])
            self.held = common_length([*prompt, *said], following)

    def _stored(self, url):
        """Number of tokens in its session."""
        with urllib.request.urlopen(f"{url}/v1/sessions/s{self.n}", timeout=60) as response:
            return json.loads(response.read())["tokens"]


def serve(folder, at):
    """`zoo serve` with a store. Returns the process and its address."""
    log = folder / "log"
    run = "import tests.zoo.serving.buckets, zoo.__main__; zoo.__main__.run()"
    command = [sys.executable, "-c", run, "serve", str(folder / "model"), "--port", "0", "--store", str(at(folder / "store"))]
    with log.open("w") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=Path(__file__).parents[3], env=environment)
    while not (match := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    return process, match[0]
