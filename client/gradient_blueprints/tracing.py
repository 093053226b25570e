"""Traces by OpenTelemetry, where a process has been told to send them; without that nothing of it is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_tracer: Tracer | None = None

Attributes = Mapping[str, str | int | float]


def start_tracing(service: str, environment: Mapping[str, str]) -> None:
    """Send the spans of this process by OTLP over HTTP, if OTEL_EXPORTER_OTLP_ENDPOINT says where to.

    The other OTEL_… variables mean what OpenTelemetry's specification says: headers, sampling, resource attributes.
    """
    global _tracer
    if not any(environment.get(name) for name in _ENDPOINTS):
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = environment.get("OTEL_SERVICE_NAME") or service
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = provider.get_tracer("gradient_blueprints")


def is_tracing() -> bool:
    return _tracer is not None


@contextmanager
def span(
    name: str,
    kind: Literal["internal", "server", "producer", "consumer"] = "internal",
    *,
    parent: str | None = None,
    attributes: Attributes | None = None,
) -> Iterator[Span | None]:
    """A span around a block, below `parent` (a W3C `traceparent`) or the one that is open; None without tracing."""
    if _tracer is None:
        yield None
        return
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    above = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
    with _tracer.start_as_current_span(name, above, SpanKind[kind.upper()], attributes) as opened:
        yield opened


def current_traceparent() -> str | None:
    """The open span as W3C Trace Context writes it, whoever opened it; None when there is none."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    here = trace.get_current_span().get_span_context()
    return f"00-{here.trace_id:032x}-{here.span_id:016x}-{here.trace_flags:02x}" if here.is_valid else None
