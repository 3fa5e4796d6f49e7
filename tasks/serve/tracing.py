"""Traces of requests and videos by OpenTelemetry, sent over OTLP; without `--traces` every span is a no-op."""

from __future__ import annotations

import os

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NoOpTracer, Tracer

from tasks.records import UserError

NO_TRACES: Tracer = NoOpTracer()
SERVICE = "trip-serve"  # unless OTEL_SERVICE_NAME gives another name


def context_of(traceparent: str | None) -> Context:
    """The context of the header `traceparent` of W3C Trace Context; an empty one without it."""
    return propagate.extract({} if traceparent is None else {"traceparent": traceparent}, Context())


def traceparent_of(context: Context | None = None) -> str | None:
    """The header `traceparent` of a context, by default the current one; None without a span."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context)
    return carrier.get("traceparent")


def otlp_provider() -> TracerProvider:
    """Returns a provider that sends spans over OTLP and HTTP, as the variables OTEL_* of OpenTelemetry say.

    Raises:
        UserError: the exporter is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # pyright: ignore[reportMissingImports] - optional
    except ImportError as error:
        raise UserError(
            f"--traces needs opentelemetry-exporter-otlp-proto-http ({error}); install the extra `traces`"
        ) from error
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", SERVICE)
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
