"""Sessions in an object store: takeovers at every moment, operations that fail, objects that are damaged."""

import itertools
import random
import sys
import uuid
from pathlib import Path
from threading import Thread

import fsspec
import pytest
from click.testing import CliRunner

import zoo
from tests.zoo.serving.buckets import Failing, Faulty, Turns
from tests.zoo.serving.disk import recovers
from tests.zoo.serving.local import local
from tests.zoo.serving.test_disk_faults import asked, reports
from tests.zoo.serving.test_store import BYTES, uninterrupted
from zoo.cli import main
from zoo.errors import ZooError
from zoo.serving import sessions as kept_sessions
from zoo.serving import store as stores
from zoo.serving.store import Record, Store, StoreError, TakenOverError

WORDS = ["one", "two", "three"]


class State:
    """What a session writes."""

    def save(self, path):
        Path(path).write_bytes(b"state")


@pytest.fixture(scope="module")
def model():
    return zoo.create("gdn4-sleep2-hard16", layers="attn gdn", d_model=32, d_ff=16, vocab_size=256)


@pytest.fixture(scope="module")
def right(model):
    return uninterrupted(model, *WORDS)


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(Faulty, "store", {})
    monkeypatch.setattr(Faulty, "pseudo_dirs", [""])


def opened():
    return Store("faulty://live", {}).open("me", "s")


def stored():
    """Tokens that are read back from a copy of the store."""
    copy, files = f"memory://{uuid.uuid4()}", fsspec.filesystem("memory")
    for path, file in list(Faulty.store.items()):
        files.pipe_file(path.replace("/live", copy), file.getvalue())
    return Store(copy, {}).open("me", "s").stored.tokens


def test_a_conversation_continues_on_a_new_server(model, right):
    where = f"memory://{uuid.uuid4()}/sessions"
    for word, answer in zip(WORDS, right, strict=True):
        with local(model, BYTES, store=where) as server:
            assert asked(server, word, session="s") == answer
            assert [each["id"] for each in server.ask("/v1/sessions")[1]["data"]] == ["s"]
    with local(model, BYTES, store=where) as server:
        assert server.ask("/v1/sessions/s", method="DELETE")[0] == 200
    assert fsspec.filesystem("memory").find(where) == []


def test_lines_of_a_former_owner_are_ignored():
    """Whether they arrive before or after the first line of the new one."""
    former = opened()
    former.write(Record([1]))
    owner = opened()
    for tokens in ([1, 2], [1, 3]):  # one that depends on the line before, and one that does not
        with pytest.raises(TakenOverError, match="taken over"):
            former.write(Record(tokens))
    assert owner.check()
    owner.write(Record([1, 4]))
    assert stored() == [1, 4]
    with pytest.raises(TakenOverError):
        former.write(Record([1, 5]))
    with pytest.raises(TakenOverError):
        former.write_snapshot(State())
    owner.write(Record([1, 4, 6]))
    assert stored() == [1, 4, 6]
    owner.write_snapshot(State())
    assert len(Faulty.store) == 6  # session.json, the lease, three lines of the owner, the state


def test_a_process_that_takes_over_too_slowly_is_refused(monkeypatch):
    """Others have taken the session over since it chose its number."""
    write, others = Faulty.pipe_file, []

    def slowly(files, path, content):
        if path.endswith(".lease") and not others:
            others.append(None)
            others.extend(opened() for _ in range(2))
        write(files, path, content)

    opened().write(Record([1]))
    monkeypatch.setattr(Faulty, "pipe_file", slowly)
    with pytest.raises(TakenOverError):
        opened()
    assert [journal.check() for journal in others[1:]] == [False, True]


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.extended)])
@pytest.mark.parametrize("first", ["writes", "rewrites", "opens"])
def test_takeovers_at_every_moment(monkeypatch, first, count):
    """Two processes take turns in random order: what one of them has written stays, and the last to take over can write."""
    chance, refused = random.Random(0), 0
    for _ in range(count):
        Faulty.store.clear()
        monkeypatch.setattr(stores, "LONG_JOURNAL", 2**20)
        held, written = opened(), {"a": [], "b": []}
        held.write(Record([1]))
        held.write(Record([1, 2]))

        turns = Turns(chance.sample("ab", counts=[16, 16], k=32))

        def act(me, journal, written=written, turns=turns):
            try:
                journal = journal or opened()
                tokens = [*journal.stored.tokens, ord(me)]
                journal.write(Record(tokens))
                written[me] = tokens
                if first == "rewrites":
                    journal.write_snapshot(State())
            except TakenOverError:
                pass
            finally:
                turns.end()

        if first == "rewrites":
            monkeypatch.setattr(stores, "LONG_JOURNAL", 0)
        with monkeypatch.context() as patch:
            patch.setattr(Faulty, "before", staticmethod(turns.before))
            patch.setattr(Faulty, "after", staticmethod(turns.after))
            threads = [Thread(target=act, args=(me, held if me == "a" and first != "opens" else None), name=me) for me in "ab"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        now = stored()
        assert now in written.values(), "the last one could not write"
        for me, tokens in written.items():
            assert now[: len(tokens)] == tokens, f"what {me} has written is lost"
        refused += [] in written.values()
        after = opened()
        after.write(Record([*now, 3]))
        assert stored() == [*now, 3]
    assert 0 < refused < count


@pytest.mark.parametrize("afterwards", [False, True])
def test_operations_that_fail(monkeypatch, afterwards):
    """After each, the session is as before the write or as after it; later it can be written."""
    failing = Failing(monkeypatch, afterwards=afterwards)
    for n in range(40):
        Faulty.store.clear()
        failing.heal()
        journal, possible, failed = opened(), [[]], 0
        failing.fail_at(n)
        for tokens in ([1, 2], [1, 3], [1, 3, 4], [1]):
            try:
                journal.write(Record(tokens))
                possible = [tokens]
                journal.write_snapshot(State())
            except StoreError:
                failed += 1
                possible.append(tokens)
                if failed == 2:
                    failing.heal()
            assert stored() in possible
        assert failed or n > 30
        failing.heal()
        journal.write(Record([1, 2, 5]))
        with monkeypatch.context() as patch:
            patch.setattr(stores, "LONG_JOURNAL", 0)
            journal.write_snapshot(State())
        assert stored() == [1, 2, 5]
        assert len(Faulty.store) == 4  # session.json, the lease, one line, the state
        assert opened().snapshot == 3


@pytest.mark.parametrize("afterwards", [False, True])
def test_a_session_that_is_deleted_in_part(monkeypatch, afterwards):
    """It is as it was, or gone: what a former owner has left never comes back."""
    failing, seen = Failing(monkeypatch, afterwards=afterwards), []
    for n in range(12):
        Faulty.store.clear()
        opened().write(Record([1]))
        journal = opened()
        journal.write(Record([1, 2]))
        journal.write(Record([1, 2, 3]))
        failing.fail_at(n)
        try:
            journal.delete()
            assert not Faulty.store
        except StoreError:
            seen.append(stored())
            failing.heal()
            opened().write(Record([4]))
            assert stored() == [4]
        failing.heal()
    assert [tokens for tokens, _ in itertools.groupby(seen)] == [[1, 2, 3], []]


def test_a_line_that_arrives_after_its_repetition(monkeypatch):
    """The owner has given it up, and has written others since."""
    journal, late = opened(), []
    journal.write(Record([1, 2]))
    write = Faulty.pipe_file
    with monkeypatch.context() as patch:
        patch.setattr(Faulty, "pipe_file", lambda *args: late.append(args) or 1 / 0)
        with pytest.raises(StoreError):
            journal.write(Record([]))
    journal.write(Record([1, 2, 3]))
    for args in late:
        write(*args)
    assert stored() == [1, 2, 3]
    journal.write(Record([1, 2, 3, 4]))
    assert stored() == [1, 2, 3, 4]


@pytest.mark.parametrize("afterwards", [False, True])
def test_a_server_without_a_connection(model, right, monkeypatch, afterwards):
    """Answers are finished; refused is what cannot be stored, until the store works again."""
    monkeypatch.setattr(kept_sessions, "TICK", 0.02)
    monkeypatch.setattr(kept_sessions, "SETTLED", float("inf"))
    failing, seen = Failing(monkeypatch, afterwards=afterwards), set()
    with local(model, BYTES, store="faulty://live", streams=20) as server:
        for n in (*range(0, 12, 2), 13, 17):
            said = []
            failing.fail_at(n)
            for word in WORDS:
                if (answer := asked(server, word, session=f"s{n}")) is None:
                    assert reports(server)
                    assert asked(server, "one") == right[0]
                    break
                said.append(answer)
            seen.add(len(said))
            failing.heal()
            recovers(server)
            said += [asked(server, word, session=f"s{n}") for word in WORDS[len(said) :]]
            assert said == right
    assert seen >= {0, 1, 2}


@pytest.mark.parametrize(
    ("ending", "change", "message"),
    [
        ("2.jsonl", lambda content: content.replace(b"[2]", b"[7]"), "line 2 is damaged"),
        ("2.jsonl", None, "one is missing"),
        ("session.json", lambda content: b"[", "session.json: cannot be read"),
        (
            "session.json",
            lambda content: content.replace(b"weights", b"heights"),
            "it was stored with weights: the default; this server has",
        ),
    ],
)
def test_damaged_objects_are_refused(ending, change, message):
    files, store = fsspec.filesystem("memory"), Store(f"memory://{uuid.uuid4()}", {"weights": "0"})
    journal = store.open("me", "s")
    for end in (2, 3, 4):
        journal.write(Record(list(range(1, end))))
    (path,) = (path for path in files.find(journal.place.name) if path.endswith(ending))
    files.pipe_file(path, change(files.cat_file(path))) if change else files.rm_file(path)
    with pytest.raises(StoreError, match=message):
        store.open("me", "s")


def test_a_store_that_cannot_be_used_is_refused_at_once(model, tmp_path, monkeypatch):
    zoo.save(model, tmp_path)
    fsspec.register_implementation("absent", "absent.Files", errtxt="Install absent to access it")
    for where, message in {
        "nope://bucket/x": "Protocol not known: nope",
        "absent://bucket/x": "Install absent to access it",
        "file:///x": "want the folder without file://, or the URL of an object store",
    }.items():
        result = CliRunner().invoke(main, ["serve", str(tmp_path), "--port", "0", "--store", where])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert result.stderr.startswith(f"Error: store: {where}")
        assert message in result.stderr
    monkeypatch.delitem(sys.modules, "zoo.serving.objects")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ZooError, match=r"store: s3://x: needs pip install 'sleep-zoo\[store\]'"):
        Store("s3://x", {})
