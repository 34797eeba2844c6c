"""OpenTelemetry, if it is installed and switched on by its own variables; else nothing of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from mixfleet_broker.errors import ConfigError
from mixfleet_broker.settings import traces_exporter

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger(__name__)

SCOPE: Final = "mixfleet"
"""Of all spans."""


def traces_if_wanted(service: str) -> TracerProvider | None:
    """Return what makes the spans of a process; None unless OTEL_* variables ask for traces.

    Whoever ends the process shuts it down before, or loses the last spans.

    Args:
        service: Its name, unless OTEL_SERVICE_NAME gives another.

    Raises:
        ConfigError: The exporter that is asked for is not known.
    """
    exporter = traces_exporter()
    if exporter is None:
        return None
    try:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        chosen = _exporter(exporter)
    except ImportError:
        logger.warning("no_traces reason=not installed: pip install 'mixfleet[tracing]'")
        return None
    named = Resource.create().merge(Resource({"service.name": service}))
    provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(chosen))
    return provider


def context_of(traceparent: str | None) -> Context:
    """Return the context of a job's sender; that of nobody where there is none."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {} if traceparent is None else {"traceparent": traceparent}
    return TraceContextTextMapPropagator().extract(carrier, context=Context())


def _exporter(name: str) -> SpanExporter:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if name != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER={name}: must be otlp, console or none")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
