"""Clients that send half a request, read nothing, or come all at once, while others are served."""

import contextlib
import json
import logging
import resource
import socket
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest

import zoo
from tests.zoo.serving.local import local, until
from zoo.serving.connections import BODIES, IMPORTS, Gate, OncePerSecond
from zoo.serving.limits import Limits
from zoo.text.tokenizers import ByteTokenizer

FIELDS = {"layers": "gdn", "d_model": 16, "d_ff": 16, "vocab_size": 256}
SHORT = {"prompt": "a", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def model():
    return zoo.create("gdn4-sleep2-hard16", **FIELDS)


def serving(model, *, streams=8, **limits):
    return local(model, ByteTokenizer(256), streams=streams, limits=Limits(**limits))


@contextlib.contextmanager
def sockets(server, count, sent, *, buffer=None):
    """Connections that have sent this much and wait."""
    host, port = server.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as opened:
        made = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in made:
            if buffer:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            one.connect((host, int(port)))
            with contextlib.suppress(ConnectionError):  # the server has closed it
                one.sendall(sent)
        yield made


def closed(one):
    """True once the server has closed a connection."""
    one.settimeout(0.01)
    try:
        return not one.recv(1)
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def post(body, length=None, path="/v1/completions"):
    text = json.dumps({"model": "model", **body}).encode()
    return head(path, len(text) if length is None else length) + text


def head(path, length, kind="json"):
    lines = f"POST {path} HTTP/1.1", "host: localhost", f"content-type: application/{kind}", f"content-length: {length}"
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.parametrize("sent", [b"", b"GET /v1/models HTTP/1.1\r\nhost: local", post({}, length=10**4)])
def test_half_requests_give_way_to_new_connections(model, sent):
    with serving(model, connections=20, patience=1e6) as server, sockets(server, 60, sent) as half:
        assert server.complete("a", max_tokens=2)["choices"]
        assert len(server.gate.waiting) <= 20
        until(lambda: sum(map(closed, half)) >= 40)
        assert not closed(half[-1])


@pytest.mark.parametrize("sent", [b"", b"GET /v1/models HTTP/1.1\r\nhost: local", post({}, length=10**4)])
def test_half_requests_run_out_of_time(model, sent):
    with serving(model, patience=0.3) as server, sockets(server, 3, sent) as half:
        until(lambda: all(map(closed, half)))
        assert server.complete("a", max_tokens=2)["choices"]
        assert not any(each.held for each in server.gate.waiting)


def test_a_slow_request_that_arrives_in_time_is_answered(model):
    with serving(model, patience=20) as server, sockets(server, 1, b"") as (one,):
        for part in post(SHORT).partition(b"\r\n\r\n"):
            one.sendall(part)
            time.sleep(0.1)
        assert one.recv(12) == b"HTTP/1.1 200"


def test_the_bytes_of_half_bodies_are_bounded(model):
    most = 2**14
    body = post({"prompt": "a" * (most - 200)}, length=most - 1)
    with serving(model, body=most, patience=1e6) as server, sockets(server, 2 * BODIES, body) as half:
        assert server.complete("a", max_tokens=2)["choices"]
        assert sum(each.held for each in server.gate.waiting) <= BODIES * most
        assert 0 < sum(map(closed, half)) < 2 * BODIES


def test_the_bytes_of_half_imports_are_bounded(model):
    with serving(model, body=2**10, patience=1e6) as server:
        most = server.state.largest_session
        assert most > BODIES * 2**10
        sent = head("/v1/sessions/s/import", most, "octet-stream") + bytes(most - 1)
        with sockets(server, 2 * IMPORTS, sent) as half:
            assert server.complete("a", max_tokens=2)["choices"]
            assert sum(each.held for each in server.gate.waiting) <= IMPORTS * len(sent)
            assert 0 < sum(map(closed, half)) < 2 * IMPORTS


@pytest.mark.parametrize("patience", [0.5, 1e6])
def test_clients_that_read_nothing_are_dropped(model, patience):
    """One occupies the only stream, until a part of the answer has waited too long, or another request waits for the stream."""
    long = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4096, "stream": True, "logprobs": True, "top_logprobs": 20}
    sent = post(long, path="/v1/chat/completions")
    with serving(model, streams=1, patience=patience, wait=60.0) as server, sockets(server, 1, sent, buffer=4096) as (silent,):
        until(lambda: len(server.state.pool) >= 1)
        if patience < 1:
            until(lambda: len(server.state.pool) == len(server.gate.open) == 0)
        assert server.complete("a", max_tokens=2)["choices"]
        until(lambda: ended(silent))


def ended(one):
    """True once the server has closed a connection; reads what it has sent."""
    one.settimeout(0.01)
    try:
        return all(one.recv(2**16) for _ in range(10**4)) is False
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_a_burst_waits_for_its_turn(model):
    with serving(model, streams=2) as server, ThreadPoolExecutor(30) as many:
        answers = list(many.map(lambda _: server.ask("/v1/completions", {**SHORT, "max_tokens": 8}), range(30)))
    assert [status for status, _ in answers] == [200] * 30
    assert len({answer["choices"][0]["text"] for _, answer in answers}) == 1


@pytest.mark.parametrize(
    ("limits", "message"), [({"wait": 0.2}, "the only stream is in use"), ({"queue": 2, "wait": 60.0}, "2 other requests already waiting")]
)
def test_a_queue_is_bounded(model, limits, message):
    """One long answer holds the only stream: the others wait too long, or there is no room to wait."""
    with serving(model, streams=1, **limits) as server, ThreadPoolExecutor(8) as many:
        with server.open("/v1/completions", {"prompt": "a", "max_tokens": 4096, "stream": True}) as running:
            running.read(1)
            waiting = [many.submit(server.ask, "/v1/completions", SHORT) for _ in range(6)]
            until(lambda: sum(one.done() for one in waiting) >= 4)
            refused = [one.result() for one in waiting if one.done()]
            assert {status for status, _ in refused} == {429}
            assert message in refused[0][1]["error"]["message"]
            with pytest.raises(urllib.error.HTTPError) as error:
                server.open("/v1/completions", SHORT)
            assert error.value.headers["retry-after"]
        assert {one.result()[0] for one in waiting} <= {200, 429}
        assert server.complete("a", max_tokens=2)["choices"]


def test_an_answer_that_nobody_reads_is_given_up(model):
    """Also when the connection is to close after it, and is not waited for."""
    ask = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    with serving(model, patience=0.5) as server, sockets(server, 3, ask, buffer=4096):
        until(lambda: server.gate.open)
        until(lambda: not server.gate.open)


@pytest.mark.parametrize(("files", "connections"), [(10**6, 1000), (1024, 768), (300, 44), (20, 1)])
def test_connections_leave_files_for_the_rest(monkeypatch, files, connections):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (files, 10**6))
    assert Gate(Limits(), 0).connections == connections


def test_a_message_is_logged_once_per_second(caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    logger = logging.getLogger("test_attacks")
    kept = OncePerSecond()
    logger.addFilter(kept)
    for now[0], text in ((0.0, "a"), (0.5, "a"), (0.6, "b"), (1.1, "a"), (1.5, "b"), (1.7, "b"), (2.2, "a")):
        logger.warning("%s", text)
    assert [record.getMessage() for record in caplog.records] == ["a", "b", "a", "b", "a"]
