"""OpenTelemetry spans, where its packages are installed (the extra `tracing`) and an endpoint is set."""

import os
from collections.abc import Iterable
from importlib import metadata
from typing import Any, NamedTuple

from starlette.types import Scope

from unperturb.models.errors import ConfigError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Part(NamedTuple):
    """One part of a request's way; times in nanoseconds since 1970."""

    name: str
    began_at: int
    ended_at: int


class Tracing:
    """One span for each request, under the caller's own where it sends a `traceparent`, and one for each part of it."""

    def __init__(self, exporter: Any) -> None:  # noqa: ANN401
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": "unperturb"}).merge(OTELResourceDetector().detect())
        self.provider = TracerProvider(resource=resource)
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self.provider.get_tracer("unperturb", metadata.version("unperturb"))

    def record(self, scope: Scope, facts: dict[str, Any], parts: Iterable[Part], began_at: int) -> None:
        """Record the request that has just ended; `began_at` in nanoseconds since 1970."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self.tracer.start_span(
            f"{facts['method']} {facts['route']}",
            context=extract(headers),
            kind=SpanKind.SERVER,
            start_time=began_at,
            attributes={
                "http.request.method": facts["method"],
                "http.route": facts["route"],
                "http.response.status_code": facts["status"],
                "unperturb.preset": facts["preset"],
                "unperturb.request_id": facts["request_id"],
            },
        )
        if facts["status"] >= 500:
            span.set_status(Status(StatusCode.ERROR))
        for part in parts:
            child = self.tracer.start_span(part.name, context=set_span_in_context(span), start_time=part.began_at)
            child.end(part.ended_at)
        span.end()

    def close(self) -> None:
        """Send what is left."""
        self.provider.shutdown()


def set_up() -> Tracing | None:
    """Return tracing to the endpoint that the standard variables name; None where none does.

    Raises ConfigError where an endpoint is set but the packages are missing.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"{ENDPOINTS[1]} is set, but OpenTelemetry's packages are missing: pip install 'unperturb[tracing]'"
        ) from error
    return Tracing(OTLPSpanExporter())
