"""The end of a server: answers in progress are finished, or cut short when their time is up."""

import http.client
import json
import logging
import signal
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

import zoo
from tests.zoo.serving.local import local, until
from tests.zoo.serving.process import process
from zoo.serving.limits import Limits
from zoo.text.tokenizers import ByteTokenizer

FIELDS = {"layers": "gdn", "d_model": 16, "d_ff": 16, "vocab_size": 256}
ENDLESS = {"prompt": "a", "max_tokens": 10**9, "temperature": 0}


@pytest.fixture(scope="module")
def model():
    return zoo.create("gdn4-sleep2-hard16", **FIELDS)


def test_answers_that_are_cut_short(model, caplog):
    """A whole answer gets status 503 with Retry-After, an answer in a stream an error event; neither is a failure to be logged."""
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)
    with local(model, ByteTokenizer(256), limits=Limits(tokens=10**9)) as server, ThreadPoolExecutor() as threads:
        whole = threads.submit(server.open, "/v1/completions", ENDLESS)
        stream = server.open("/v1/completions", {**ENDLESS, "stream": True})
        stream.readline()
        reading = threads.submit(events, stream)
        until(lambda: server.state.metrics.tokens.labels("completion")._value.get() > 300)
        server.state.cut_short()
        with pytest.raises(urllib.error.HTTPError) as refused:
            whole.result()
        assert refused.value.code == 503
        assert refused.value.headers["retry-after"] == "1"
        assert json.load(refused.value)["error"]["message"] == "the server is shutting down"
        *_, last, done = reading.result()
        assert json.loads(last)["error"]["message"] == "the server is shutting down"
        assert done == b"[DONE]"
        numbers = server.open("/metrics").read().decode()
        assert 'zoo_requests_total{route="/v1/completions",status="503"} 1.0' in numbers
    assert not caplog.records


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    made = tmp_path_factory.mktemp("server")
    zoo.save(model, made / "model")
    return made


def begin(url, body, missing=0):
    """Send a request, or all but the last bytes of it. Returns the connection."""
    text = json.dumps({"model": "model", "temperature": 0, **body}).encode()
    client = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    headers = {"content-type": "application/json", "content-length": len(text)}
    client.request("POST", "/v1/completions", text[: len(text) - missing], headers)
    return client


def refused(client):
    response = client.getresponse()
    assert json.loads(response.read())["error"]["message"] == "the server is shutting down"
    return response.status == 503 and response.headers["retry-after"] == "1"


def refuses_connections(url):
    try:
        http.client.HTTPConnection(url.removeprefix("http://")).connect()
    except OSError:
        return True
    return False


def events(response):
    return [line[6:].strip() for line in response if line.startswith(b"data: ")]


def test_answers_are_finished(folder):
    """After Ctrl-C: a whole answer, a stream, a long prompt, and a request that waits for a stream."""
    options = ["--sessions", "3", "--wait", "60", "--grace", "600"]
    with process(folder, *options) as server, ThreadPoolExecutor() as threads:
        some = {"prompt": "a", "max_tokens": 500}
        asked = [begin(server.url, body) for body in (some, {"prompt": "a" * 5000, "max_tokens": 1})]
        stream = begin(server.url, {**some, "stream": True, "stream_options": {"include_usage": True}}).getresponse()
        stream.readline()
        reading = threads.submit(events, stream)
        waiting, half = begin(server.url, {"prompt": "a", "max_tokens": 1}), begin(server.url, some, missing=1)
        until(lambda: server.metric("zoo_queue") == 1)
        server.child.send_signal(signal.SIGINT)
        assert refused(half)
        answers = [json.load(client.getresponse()) for client in (*asked, waiting)]
        *_, last, usage, done = reading.result()
        answers.append(json.loads(usage))
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [500, 1, 1, 500]
        assert json.loads(last)["choices"][0]["finish_reason"] == "length"
        assert done == b"[DONE]"
        assert server.child.wait(60) == 130
        assert "Traceback" not in server.log


@pytest.mark.parametrize(("grace", "signals", "status"), [("1", [signal.SIGTERM], 143), ("1000", [signal.SIGINT] * 2, 130)])
def test_requests_end_when_the_grace_is_over(folder, grace, signals, status):
    """Or with the second signal."""
    options = ["--sessions", "3", "--wait", "60", "--max-tokens", "1000000000", "--max-prompt", "1000000", "--grace", grace]
    with process(folder, *options) as server, ThreadPoolExecutor() as threads:
        cut = [begin(server.url, body) for body in (ENDLESS, {"prompt": "a" * 900_000, "max_tokens": 1})]
        stream = begin(server.url, {**ENDLESS, "stream": True}).getresponse()
        stream.readline()
        reading = threads.submit(events, stream)
        cut += [begin(server.url, ENDLESS), begin(server.url, ENDLESS, missing=1)]
        until(lambda: server.metric("zoo_queue") == 1)
        for number in signals:
            server.child.send_signal(number)
            until(lambda: refuses_connections(server.url))  # a signal that comes before the last one is handled is lost
        *_, error, done = reading.result()
        assert json.loads(error)["error"]["message"] == "the server is shutting down"
        assert done == b"[DONE]"
        assert all(map(refused, cut))
        assert server.child.wait(60) == status
        assert not {"Traceback", "Exception", "Cancel"} & set(server.log.split())
