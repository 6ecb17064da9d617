"""Sessions move between servers as files."""

import http.client
import urllib.error
import urllib.request

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

import zoo
from tests.zoo.serving.disk import Disk, recovers
from tests.zoo.serving.local import local, until
from tests.zoo.serving.test_store import BYTES, answers, uninterrupted
from zoo.checkpoints.checksum import metadata
from zoo.serving.connections import BODIES
from zoo.serving.limits import Limits

NAME = "gdn4-sleep2-hard16"
FIELDS = {"layers": "attn gdn", "d_model": 32, "d_ff": 16, "vocab_size": 256}
TYPE = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def model():
    made = zoo.create(NAME, **FIELDS)
    with torch.no_grad():  # it says lower-case letters, so that the tokens of a text are those that were sampled
        made.head.weight.mul_(4 * (torch.arange(256).sub(ord("a")).div(26, rounding_mode="floor") == 0)[:, None])
    return made


def exported(server, name, **headers):
    with server.open(f"/v1/sessions/{name}/export", **headers) as response:
        return response.read()


def imported(server, name, content, **headers):
    request = urllib.request.Request(f"{server.url}/v1/sessions/{name}/import", content, {**TYPE, **headers}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def content(model):
    """A session of 20 + 8 tokens that has slept twice, once on its own."""
    with local(model, BYTES) as server:
        answers(server, "s", "x" * 20)
        kept = server.state.sessions._kept["", "s"]
        kept.session.sleep(3)
        return exported(server, "s")


def test_a_session_moves_to_another_server(model, content, tmp_path):
    """It answers there as it would have here, also after a restart, and is described as here."""
    stream = zoo.Session(model)
    list(stream.generate(torch.tensor([list(b"x" * 20)]), 8))
    stream.sleep(3)
    want = BYTES.decode(map(int, stream.generate(torch.tensor([list(b"more")]), 8)))
    for store in (None, tmp_path):
        with local(model, BYTES, store=store) as server:
            assert imported(server, "t", content)[0] == 200
            assert server.ask("/v1/sessions/t")[1]["sleeps"] == [{"position": 16, "loops": 2}, {"position": 27, "loops": 3}]
            assert imported(server, "t", content)[0] == 409
            if store is None:
                assert answers(server, "t", "more") == [want]
                assert exported(server, "t") != content
    for file in tmp_path.glob("*/*.safetensors"):
        file.unlink()
    with local(model, BYTES, store=tmp_path) as server:  # its tokens are read again
        assert answers(server, "t", "more") == [want]


def test_a_session_may_be_larger_than_other_requests(model, content):
    """Even than as many of them as may be half sent at a time."""
    with local(model, BYTES, limits=Limits(body=len(content) // BODIES // 2)) as server:
        client = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
        client.putrequest("POST", "/v1/sessions/t/import")
        for name, value in {**TYPE, "content-length": len(content)}.items():
            client.putheader(name, value)
        client.endheaders(content[:-1])
        until(lambda: sum(each.held for each in server.gate.waiting) >= len(content))
        client.send(content[-1:])
        assert client.getresponse().status == 200


def test_a_conversation_moves_with_its_messages(model):
    hi, more = ({"role": "user", "content": text} for text in ("hi", "more"))
    with local(model, BYTES) as server, local(model, BYTES) as other:
        server.chat([hi], session="s")
        assert imported(other, "s", exported(server, "s"))[0] == 200
        assert other.chat([more], session="s", append=True)["choices"] == server.chat([more], session="s", append=True)["choices"]


def changed(content, tmp_path, change):
    """A file with changed fields and tensors, and a checksum that fits them."""
    (tmp_path / "file").write_bytes(content)
    with safe_open(tmp_path / "file", "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header.pop("zoo.sha256")
    change(header, tensors)
    return save(tensors, metadata(tensors, header))


CHANGES = {
    "weights": (lambda header, tensors: header.update(weights="0"), "weights: the session is for '0'"),
    "no conversation": (lambda header, tensors: header.pop("conversation"), "conversation: tokens: is missing"),
    "no JSON": (lambda header, tensors: header.update(conversation="{"), "conversation: not JSON"),
    "tokens": (lambda header, tensors: header.update(conversation=header["conversation"].replace("120,", "", 1)), "not those of the state"),
    "vocabulary": (lambda header, tensors: header.update(conversation=header["conversation"].replace("[120", "[999", 1)), "0 to 255"),
    "settings": (lambda header, tensors: header.update(conversation=header["conversation"].replace("{}", '{"a": "b"}')), "settings: "),
    "position": (lambda header, tensors: header.update(positions="[1e9, 0]"), "not those of the state"),
    "streams": (lambda header, tensors: tensors.update({name: torch.cat([x, x]) for name, x in tensors.items()}), "not those of the state"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_do_not_fit_are_refused(model, content, tmp_path, server, change):
    edit, message = CHANGES[change]
    status, answer = imported(server, "t", changed(content, tmp_path, edit))
    assert status == 400
    assert message in answer
    assert ("not JSON" in answer) == (change == "no JSON")
    assert str(tmp_path.parent.parent) not in answer  # no path of the server
    assert server.ask("/v1/sessions/t")[0] == 404


@pytest.fixture(scope="module")
def server(model):
    with local(model, BYTES) as running:
        yield running


def test_damaged_and_large_files_other_types_and_other_weights_are_refused(model, content, server):
    for n in range(0, len(content), len(content) // 12):
        assert imported(server, "t", content[:n])[0] == 400
        assert imported(server, "t", content[:n] + bytes([content[n] ^ 1]) + content[n + 1 :])[0] == 400
    assert imported(server, "t", bytes(2**20 + 1))[0] == 400  # larger than other requests may be
    assert imported(server, "t", content, **{"content-type": "text/plain"})[0] == 415
    assert imported(server, "a%20b", content)[0] == 400
    large = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    large.putrequest("POST", "/v1/sessions/t/import")
    large.putheader("content-length", str(server.pool.bytes // server.pool.streams + 2**24 + 1))
    large.endheaders()
    assert large.getresponse().status == 413
    with local(zoo.create(NAME, seed=1, **FIELDS), BYTES) as other:
        assert '"message":"file: weights: the session is for' in imported(other, "t", content)[1]
    with local(model, BYTES, when="interval(8)") as other:
        assert "settings: the session is for {}, this server has {'sleeps_after': '8 tokens'}" in imported(other, "t", content)[1]
    assert server.ask("/v1/sessions")[1]["data"] == []


def test_sessions_are_bound_to_the_key(model):
    key, other = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
    with local(model, BYTES, keys=["one", "two"]) as server:
        server.ask("/v1/completions", {"prompt": "a", "session": "s"}, **key)
        content = exported(server, "s", **key)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            exported(server, "s", **other)
        assert imported(server, "s", content)[0] == 401
        assert imported(server, "s", content, **other)[0] == 200
        assert server.ask("/v1/sessions/s", method="DELETE", **key)[0] == 200
        assert server.ask("/v1/sessions/s", **other)[0] == 200


@pytest.mark.parametrize("room", [0, 100, 350, 2_000])
def test_an_import_onto_a_full_disk_leaves_nothing(model, content, tmp_path, monkeypatch, room):
    disk = Disk(tmp_path, monkeypatch)
    with local(model, BYTES, store=tmp_path) as server:
        disk.fill(room)
        assert imported(server, "t", content)[0] == 503
        assert server.ask("/ready")[0] == 503
        assert server.ask("/v1/sessions/t")[0] == 404
        assert server.ask("/v1/sessions")[1]["data"] == []
        assert len(server.state.sessions) == len(server.pool) == 0
        disk.heal()
        assert imported(server, "t", content)[0] == 200
        recovers(server)


def test_a_deleted_session_is_gone_everywhere(model, tmp_path):
    """From memory, the store and the prefix tree; also where another server has used it in the meantime."""
    with local(model, BYTES, store=tmp_path) as first, local(model, BYTES, store=tmp_path) as second:
        for server in (first, second, first):
            answers(server, "s", "one")
        for server in (second, first):
            assert server.ask("/v1/sessions/s", method="DELETE")[0] == 200
            assert not list(tmp_path.glob("*/journal.jsonl"))
            assert len(server.state.sessions) == len(server.state.sessions.prefixes) == 0
            assert [answers(each, "s", "one")[0] for each in (first, second)] == uninterrupted(model, "one", "one")
