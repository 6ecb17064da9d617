"""The end of a server: answers in progress are finished, or cut short when their time is up."""

import json
import logging
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest

import zoo
from tests.zoo.serving.local import local, until
from zoo.serving.app import Limits
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
        until(lambda: len(server.pool) == 2)
        server.pool.close()
        with pytest.raises(urllib.error.HTTPError) as refused:
            whole.result()
        assert refused.value.code == 503
        assert refused.value.headers["retry-after"] == "1"
        assert json.load(refused.value)["error"]["message"] == "the server is shutting down"
        *_, last, done = [line[6:] for line in stream if line.startswith(b"data: ")]
        assert json.loads(last)["error"]["message"] == "the server is shutting down"
        assert done == b"[DONE]\n"
        numbers = server.open("/metrics").read().decode()
        assert 'zoo_requests_total{route="/v1/completions",status="503"} 1.0' in numbers
    assert not caplog.records
