"""Spans as a collector receives them."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

import zoo
from tests.zoo.serving.local import local, until
from zoo.serving.traces import Traces
from zoo.text.tokenizers import ByteTokenizer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector():
    """Address of a collector, and the spans that it has received, with their resource."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            received.extend((one.resource, span) for one in request.resource_spans for scope in one.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
        server.shutdown()


def fields(attributes):
    return {one.key: value(one.value) for one in attributes}


def value(one):
    return [value(item) for item in one.array_value.values] if one.HasField("array_value") else getattr(one, one.WhichOneof("value"))


def tiny():
    return zoo.create("gdn4-sleep2-hard16", layers="gdn", d_model=16, d_ff=16, vocab_size=256)


def test_every_answered_request_is_a_span(collector, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    endpoint, received = collector
    started = time.time_ns()
    with local(tiny(), ByteTokenizer(256), traces=Traces(endpoint)) as server:
        server.complete("x" * 40, max_tokens=4)
        server.complete("x" * 40, max_tokens=4, n=2, seed=3, top_p=0.5, temperature=1)
        traced = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        body = {"prompt": "x" * 45, "session": "mine", "stream": True, "max_tokens": 8}
        with server.open("/v1/completions", body, **traced) as response:
            response.read()
        assert server.ask("/v1/completions", {"prompt": "x", "n": 0})[0] == 400
        assert server.ask("/v1/completions", {"prompt": [300]})[0] == 400
    ended = time.time_ns()
    assert {fields(resource.attributes)["service.name"] for resource, _ in received} == {"mine"}
    spans = [span for _, span in received]
    assert [span.name for span in spans] == ["text_completion model"] * 4
    first, second, third, refused = (fields(span.attributes) for span in spans)
    measured = {"gen_ai.response.time_to_first_chunk": None, "zoo.sleep_seconds": None}
    assert first | measured == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "sleep-zoo",
        "gen_ai.request.model": "model",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.stream": False,
        "gen_ai.request.temperature": 0,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 4,
        "zoo.sleeps": 2,
        **measured,
    }
    for span in spans:
        assert started < span.start_time_unix_nano < span.end_time_unix_nano < ended
        assert span.kind == span.SPAN_KIND_SERVER
    for span, told in zip(spans[:3], (first, second, third), strict=True):
        assert 0 < told["gen_ai.response.time_to_first_chunk"] < (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert (second["gen_ai.request.seed"], second["gen_ai.request.top_p"]) == (3, 0.5)
    assert second["gen_ai.response.finish_reasons"] == ["length"] * 2
    assert second["gen_ai.usage.input_tokens"] == 40
    assert second["gen_ai.usage.cache_read.input_tokens"] == 40
    assert second["gen_ai.usage.output_tokens"] == 8
    assert (second["zoo.sleeps"], second["zoo.sleep_seconds"]) == (0, 0)
    assert third["gen_ai.conversation.id"] == "mine"
    assert third["gen_ai.request.stream"] is True
    assert third["zoo.sleeps"] == 1
    for told in (first, third):
        assert 0 < told["zoo.sleep_seconds"] < 10
    assert (spans[2].trace_id.hex(), spans[2].parent_span_id.hex()) == (TRACE, PARENT)
    assert refused["error.type"] == "ApiError"
    assert [span.status.code for span in spans] == [0, 0, 0, spans[3].status.STATUS_CODE_ERROR]
    assert "token 300" in spans[3].status.message


def test_a_server_whose_collector_is_away_answers_and_ends():
    with local(tiny(), ByteTokenizer(256), traces=Traces("http://127.0.0.1:9/v1/traces")) as server:
        server.complete("x", max_tokens=4)


def test_a_stream_whose_client_leaves_is_no_success(collector):
    endpoint, received = collector
    with local(tiny(), ByteTokenizer(256), traces=Traces(endpoint)) as server:
        with server.open("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 4000}) as response:
            response.readline()
        until(lambda: not any(server.state.pool.waiting.values()) and len(server.state.pool) == 0)
    ((_, span),) = received
    told = fields(span.attributes)
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert (told["error.type"], told["gen_ai.response.finish_reasons"]) == ("cancelled", [])
    assert 0 < told["gen_ai.usage.output_tokens"] < 4000


def test_bad_environment_variables_are_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "99999")
    with pytest.raises(zoo.ZooError, match=r"^otlp: max_export_batch_size must be less than or equal to max_queue_size"):
        Traces("http://127.0.0.1:9/v1/traces")


@pytest.mark.parametrize("address", ["localhost:4318", "", "http://", "http://127.0.0.1:abc/", "http://127.0.0.1:99999", "ftp://a/b"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(zoo.ZooError, match=f"otlp: {address}; want a URL such as http://localhost:4318/v1/traces"):
        Traces(address)
