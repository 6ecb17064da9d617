"""Attacks of many clients on `zoo serve` in a process of its own: another client is answered, and memory is bounded."""

import json
import resource
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

import zoo
from tests.zoo.serving.local import until
from tests.zoo.serving.process import process
from tests.zoo.serving.test_attacks import FIELDS, post, sockets
from zoo.serving.connections import BODIES, FILES
from zoo.serving.limits import Limits

pytestmark = pytest.mark.extended
SECONDS = 2  # until another client is answered
MEMORY = 3 * BODIES * Limits.body  # bytes that half-sent requests may add; a body is copied while it grows
HEAD = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: "


@pytest.fixture(scope="module", autouse=True)
def _files():
    """Room for the connections of the attackers."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    zoo.save(zoo.create("gdn4-sleep2-hard16", **FIELDS), folder / "model")
    with process(folder, "--sessions", "8", files=1024) as running:
        for _ in range(20):
            assert ask(running)[0] == 200
        yield running


def ask(server, **more):
    """Status and headers of the response to a short request."""
    body = {"model": "model", "prompt": "a", "max_tokens": 2, **more}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def check_answered(server):
    started = time.monotonic()
    assert ask(server)[0] == 200
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize(
    ("count", "sent"),
    [(1100, b""), (1100, HEAD), (1000, HEAD + b"x" * 65_000), (600, post({"prompt": "a" * (Limits.body - 100)}, length=Limits.body))],
    ids=["nothing", "half a header", "a long half header", "half a body"],
)
def test_half_requests(server, count, sent):
    before, lines = server.memory, server.log.count("\n")
    with sockets(server, count, sent):
        for _ in range(5):
            check_answered(server)
            assert server.memory - before < MEMORY
        assert server.files < 1024 - FILES // 2
    check_answered(server)
    assert server.log.count("\n") - lines < 100


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_clients_that_read_nothing(server, path):
    """They occupy every stream. While their answers still fit into buffers, they look like others; afterwards they give way."""
    asked = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    sent = post({**asked, "max_tokens": 4096, "stream": True}, path=path)
    with sockets(server, 8, sent):
        until(lambda: server.metric("zoo_streams") == 8)
        until(lambda: pauses(server), 300)
        check_answered(server)


def pauses(server):
    """True if no token is generated for a second."""
    before = server.metric('zoo_tokens_total{kind="completion"}')
    time.sleep(1)
    return server.metric('zoo_tokens_total{kind="completion"}') == before


def test_a_burst(server):
    """Each of 500 requests is answered, or refused until later; another client that comes again is answered."""
    begin = threading.Event()

    def one(_):
        begin.wait()
        status, headers = ask(server, max_tokens=16)
        assert status == 200 or headers["retry-after"]
        return status

    with ThreadPoolExecutor(500) as many:
        burst = [many.submit(one, number) for number in range(500)]
        begin.set()
        started = time.monotonic()
        until(lambda: ask(server)[0] == 200)
        waited = time.monotonic() - started
        statuses = Counter(each.result() for each in burst)
    assert set(statuses) <= {200, 429}
    assert statuses[200] >= 8 + Limits.queue - 1  # the other client may have taken a place
    assert waited < SECONDS
    check_answered(server)
