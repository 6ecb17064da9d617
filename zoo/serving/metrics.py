"""Metrics of the server, in Prometheus' form."""

from __future__ import annotations

from functools import partial

import prometheus_client as prometheus

from zoo.serving.sessions import KeptSessions
from zoo.sessions.pool import SessionPool

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    def __init__(self, sessions: KeptSessions, pool: SessionPool) -> None:
        self.registry = prometheus.CollectorRegistry()
        self.requests = self._counter("zoo_requests", "Requests answered", "route", "status")
        self.tokens = self._counter("zoo_tokens", "Tokens: of prompts, cached (not read again), and of completions", "kind")
        self.first_token = self._histogram("zoo_first_token_seconds", "Time to the first token")
        self.next_token = self._histogram("zoo_token_seconds", "Time between tokens")
        self._gauge("zoo_sessions", "Sessions kept").set_function(lambda: len(sessions))
        self._gauge("zoo_queue", "Requests that wait for a free stream").set_function(lambda: sessions.waiting)
        self._gauge("zoo_streams", "Open streams").set_function(lambda: len(pool))
        self._gauge("zoo_streams_bytes", "Upper bound on the memory of all stream states").set(pool.bytes)
        self._gauge("zoo_prefixes", "States that later prompts may continue from").set_function(lambda: len(sessions.prefixes))
        self._gauge("zoo_prefixes_bytes", "Size of these states").set_function(lambda: sessions.prefixes.bytes)
        self._gauge("zoo_store_failing", "1 while the store cannot be used, or lacks something").set_function(lambda: sessions.failing)
        self._gauge("zoo_sleeps", "Completed sleeps").set_function(lambda: pool.sleeps)
        self._gauge("zoo_sleep_seconds", "Seconds from start to end of all completed sleeps").set_function(lambda: pool.seconds_asleep)
        waiting = prometheus.Gauge("zoo_waiting", "Streams that wait, by what they wait for", ["what"], registry=self.registry)
        for what in pool.waiting:
            waiting.labels(what).set_function(partial(lambda of: pool.waiting[of], what))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> prometheus.Counter:
        return prometheus.Counter(name, about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str) -> prometheus.Histogram:
        return prometheus.Histogram(name, about, registry=self.registry, buckets=SECONDS)

    def _gauge(self, name: str, about: str) -> prometheus.Gauge:
        return prometheus.Gauge(name, about, registry=self.registry)
