"""Clients that disconnect before they are answered: their streams are free at once, and hold what was read and generated."""

import http.client
import json
import random

import pytest

import zoo
from tests.zoo.serving.local import local, until
from zoo.serving.limits import Limits
from zoo.text.tokenizers import ByteTokenizer

FIELDS = {"layers": "gdn", "d_model": 16, "d_ff": 16, "vocab_size": 256}
LONG = 10**5


@pytest.fixture(scope="module")
def server():
    limits = Limits(prompt=LONG, tokens=10**9)
    with local(zoo.create("gdn4-sleep2-hard16", **FIELDS), ByteTokenizer(256), streams=1, limits=limits) as running:
        yield running


def tokens(server, kind):
    return server.state.metrics.tokens.labels(kind)._value.get()


def leave(server, body, condition):
    """Ask, and disconnect once the condition holds."""
    client = http.client.HTTPConnection(server.url.removeprefix("http://"))
    body = {"model": "model", "temperature": 0, "session": "s", **body}
    client.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    until(condition)
    client.close()


@pytest.mark.parametrize(
    "more", [{}, {"stream": True, "stop": "x" * 5000}, {"echo": True, "logprobs": 1}], ids=["whole", "held back", "scored"]
)
def test_an_answer_ends(server, more):
    """Also one whose text may all begin a stop string, so that no event has been sent."""
    before = tokens(server, "completion")
    leave(server, {"prompt": "a", "max_tokens": 10**9, **more}, lambda: tokens(server, "completion") > before + 5)
    stream = server.stream("s")
    assert 5 < len(stream) < LONG
    answer = server.complete([stream[-1]], session="s")  # the next request continues from there
    assert answer["usage"]["completion_tokens"] == 8
    assert server.stream("s")[: len(stream)] == stream
    assert server.ask("/v1/sessions/s", method="DELETE")[0] == 200


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"echo": True, "logprobs": 1, "max_tokens": 0}], ids=["whole", "stream", "scored"])
def test_a_prompt_is_read_no_further(server, more):
    prompt = "".join(random.Random(0).choices("ab c", k=LONG))
    leave(server, {"prompt": prompt, **more}, lambda: server.pool.waiting["prompt"] or server.pool.waiting["sleep"])
    stream = server.stream("s")
    assert len(stream) < LONG
    assert bytes(stream).decode() == prompt[: len(stream)]
    assert server.ask("/v1/sessions/s", method="DELETE")[0] == 200
    assert server.complete("a")["usage"]["completion_tokens"] == 8
