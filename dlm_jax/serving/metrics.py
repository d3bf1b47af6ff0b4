"""What Prometheus reads of a server, in a registry of its own: requests, their times, and the engine's counts."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlm_jax.serving.engine import Engine
from dlm_jax.serving.protocol import Usage

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/")
_GAUGES = {"queued": "Rows that wait", "active": "Rows that are sampled now", "slots": "Rows that the batches hold",
           "kinds": "Kinds of rows whose programs are kept"}
_COUNTERS = {"tokens": "Sampled tokens", "passes": "Forward passes of batches",
             "busy_seconds": "Time of forward passes"}


class ServerMetrics:
    """The metrics of one server.

    Attributes:
      first_text: seconds from a request for a stream to its first text.
    """

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._requests = Counter("dlm_http_requests", "Answered requests", ["path", "status"], registry=self._registry)
        self._seconds = Histogram("dlm_http_request_seconds", "From a request's head to its answer's end", ["path"],
                                  buckets=_SECONDS, registry=self._registry)
        self.first_text = Histogram("dlm_time_to_first_text_seconds", "From a request for a stream to its first text",
                                    buckets=_SECONDS, registry=self._registry)
        self._tokens = Counter("dlm_tokens", "Tokens of complete answers", ["kind"], registry=self._registry)
        self._passes = Counter("dlm_forward_passes", "Forward passes of the rows of complete answers",
                               registry=self._registry)
        self._registry.register(_EngineCollector(engine))

    def render(self) -> tuple[bytes, str]:
        """Returns all metrics and their media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def count_usage(self, usage: Usage) -> None:
        """Counts the tokens of a complete answer."""
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)
        self._passes.inc(usage.forward_passes)

    def measure(self, app: ASGIApp) -> ASGIApp:
        """Returns an application that counts the requests of `app`; paths that do not exist are counted as one."""
        async def measured(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            path = scope["path"] if scope["path"] in _PATHS else "other"
            status, began = "none", time.perf_counter()

            async def observed_send(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = str(message["status"])
                await send(message)

            try:
                await app(scope, receive, observed_send)
            finally:
                self._requests.labels(path, status).inc()
                self._seconds.labels(path).observe(time.perf_counter() - began)

        return measured


class _EngineCollector(Collector):
    """Reads the engine's counts when they are asked for."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        metrics = self._engine.metrics()
        for name, meaning in _GAUGES.items():
            yield GaugeMetricFamily(f"dlm_engine_{name}", meaning, value=getattr(metrics, name))
        for name, meaning in _COUNTERS.items():
            yield CounterMetricFamily(f"dlm_engine_{name}", meaning, value=getattr(metrics, name))
        rows = CounterMetricFamily("dlm_engine_rows", "Rows by how they ended", labels=["outcome"])
        for outcome in ("completed", "cancelled", "failed", "refused"):
            rows.add_metric([outcome], getattr(metrics, outcome))
        yield rows
