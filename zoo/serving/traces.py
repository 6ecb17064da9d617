"""OpenTelemetry: a span for every request that reaches the model, sent to a collector."""

from __future__ import annotations

import os
from threading import Thread
from types import TracebackType
from urllib.parse import urlsplit

from fastapi import Request

import zoo
from zoo.errors import ZooError
from zoo.serving.bodies import Choice
from zoo.serving.kept import KeptSession
from zoo.serving.schemas import ChatRequest, CompletionRequest

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.propagate import extract
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import SpanKind, StatusCode
except ImportError:
    raise ZooError("otlp: needs pip install 'sleep-zoo[otel]'") from None

PATIENCE = 5  # seconds that a collector has to take the last spans
SAMPLING = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty")


class Traces:
    """Sends spans over OTLP/HTTP, with the attributes of OpenTelemetry's conventions for generative AI.

    A `traceparent` header makes a span part of the client's trace. OpenTelemetry's environment variables apply, such as
    OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_HEADERS and OTEL_TRACES_SAMPLER. No span holds text.

    Args:
        endpoint: URL of the collector, such as http://localhost:4318/v1/traces.
    Raises:
        ZooError: not such a URL.
    """

    def __init__(self, endpoint: str) -> None:
        if not _is_address(endpoint):
            raise ZooError(f"otlp: {endpoint}; want a URL such as http://localhost:4318/v1/traces")
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "zoo")})
        try:
            self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        except ValueError as error:  # of the environment variables
            raise ZooError(f"otlp: {' '.join(str(error).split())}") from None
        self._tracer = self._provider.get_tracer("zoo", zoo.__version__)

    def close(self) -> None:
        """Send what has not been sent, for a few seconds at most."""
        closing = Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(PATIENCE)

    def record(
        self,
        started: int,
        request: Request,
        body: CompletionRequest | ChatRequest,
        kept: KeptSession,
        choices: list[Choice],
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """Record a request that ends now.

        Args:
            started: when it arrived, in nanoseconds since 1970.
            choices: its answers that have begun.
            error: what ended it early.
        """
        operation = "chat" if isinstance(body, ChatRequest) else "text_completion"
        fields = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "sleep-zoo",
            "gen_ai.request.model": body.model,
            "gen_ai.request.max_tokens": body.max_tokens,
            "gen_ai.request.choice.count": body.n,
            "gen_ai.request.stream": body.stream,
            "gen_ai.conversation.id": kept.name,
            **{f"gen_ai.request.{field}": getattr(body, field) for field in SAMPLING if field in body.model_fields_set},
        }
        if choices:
            first = choices[0].answer
            fields |= {
                "gen_ai.response.time_to_first_chunk": (first.first_token - started) / 1e9,
                "gen_ai.response.finish_reasons": [choice.answer.finish_reason for choice in choices if choice.answer.ended],
                "gen_ai.usage.input_tokens": sum(choice.prompt_tokens for choice in choices),
                "gen_ai.usage.cache_read.input_tokens": sum(choice.answer.cached for choice in choices if choice.prompt_tokens),
                "gen_ai.usage.output_tokens": sum(len(choice.answer.tokens) for choice in choices),
                "zoo.sleeps": kept.sleeps,
                "zoo.sleep_seconds": kept.asleep,
            }
        span = self._tracer.start_span(
            f"{operation} {body.model}",
            extract(request.headers),
            SpanKind.SERVER,
            {name: value for name, value in fields.items() if value is not None},
            start_time=started,
        )
        if kind is not None or not all(choice.answer.ended for choice in choices):
            span.set_status(StatusCode.ERROR, "ended early" if error is None else str(error))
            span.set_attribute("error.type", "cancelled" if kind is None else kind.__name__)
        span.end()


def _is_address(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in endpoint
    except ValueError:  # a bad port
        return False
