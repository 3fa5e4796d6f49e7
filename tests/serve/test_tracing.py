"""Traces: a request, what the model does for it, and a video in the background are one trace; off by default."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tasks.records import UserError
from tasks.serve.limits import Refusal
from tasks.serve.request_log import ACCESS_LOG
from tasks.serve.tracing import otlp_provider
from tests.serve.test_videos import PHOTO, ended, submit, wait
from tests.support.service import QuickBackend, running_service

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def provider() -> Iterator[tuple[TracerProvider, InMemorySpanExporter]]:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    yield provider, spans
    provider.shutdown()


def animate(url: str, **headers: str) -> httpx.Response:
    return httpx.post(
        f"{url}/v1/animate", data={"prompt": "a cat", "seed": "5"}, files={"image": PHOTO}, headers=headers
    )


def test_a_request_and_the_model_are_spans_of_the_callers_trace(provider, caplog) -> None:
    caplog.set_level(logging.INFO, ACCESS_LOG)
    logging.getLogger(ACCESS_LOG).propagate = True
    traces, spans = provider
    with running_service(QuickBackend(), tracer=traces.get_tracer("trip")) as service:
        assert animate(service.url, **HEADER).status_code == 200
        wait(lambda: len(spans.get_finished_spans()) == 2)
    model, request = spans.get_finished_spans()
    assert request.name == "POST /v1/animate" and f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT and request.attributes["http.response.status_code"] == 200
    assert model.name == "animate" and model.parent.span_id == request.context.span_id
    assert model.attributes["trip.seed"] == 5 and model.attributes["trip.version"] == "1"
    assert [event.name for event in model.events] == ["first step"]
    line = json.loads(caplog.records[-1].getMessage())
    assert line["trace_id"] == TRACE and line["request_id"] == request.attributes["trip.request_id"]
    assert "cat" not in str([dict(span.attributes) for span in (model, request)]), "no prompt leaves the service"


def test_a_video_is_a_span_of_the_request_that_asked_for_it(provider) -> None:
    traces, spans = provider
    with running_service(QuickBackend(), tracer=traces.get_tracer("trip")) as service:
        video = ended(service.url, submit(service.url, headers=HEADER).json()["id"])
        wait(lambda: any(span.name == "video" for span in spans.get_finished_spans()))
    by_name = {span.name: span for span in spans.get_finished_spans()}
    request, work, model = by_name["POST /v1/videos"], by_name["video"], by_name["animate"]
    assert {f"{span.context.trace_id:032x}" for span in (request, work, model)} == {TRACE}
    assert work.parent.span_id == request.context.span_id and model.parent.span_id == work.context.span_id
    assert work.attributes["trip.video"] == video["id"]


def test_a_failed_request_is_a_span_with_an_error(provider) -> None:
    class Failing(QuickBackend):
        async def stream(self, animation, seconds):
            yield Refusal(503, "there is no model yet", 1)

    traces, spans = provider
    with running_service(Failing(), tracer=traces.get_tracer("trip")) as service:
        assert animate(service.url).status_code == 503
        wait(lambda: len(spans.get_finished_spans()) == 2)
    assert {span.status.status_code.name for span in spans.get_finished_spans()} == {"ERROR"}


def test_without_traces_a_request_has_the_trace_id_of_its_header_in_the_log(caplog) -> None:
    caplog.set_level(logging.INFO, ACCESS_LOG)
    logging.getLogger(ACCESS_LOG).propagate = True
    with running_service(QuickBackend()) as service:
        assert animate(service.url, **HEADER).status_code == 200
        assert animate(service.url).status_code == 200
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == ACCESS_LOG]
    assert [line["trace_id"] for line in lines] == [TRACE, ""]


def test_the_exporter_is_asked_for_by_its_name_where_it_is_not_installed(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UserError, match=r"--traces needs opentelemetry-exporter-otlp-proto-http .*; install the extra"):
        otlp_provider()


def test_spans_arrive_over_otlp(monkeypatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `traces` is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        provider = otlp_provider()
        with running_service(QuickBackend(), tracer=provider.get_tracer("trip")) as service:
            assert animate(service.url).status_code == 200
        provider.shutdown()
        server.shutdown()
    (path, request) = received[0]
    (resource,) = request.resource_spans
    assert path == "/v1/traces"
    assert {span.name for scope in resource.scope_spans for span in scope.spans} == {"animate", "POST /v1/animate"}
    assert any(a.key == "service.name" and a.value.string_value == "trip-serve" for a in resource.resource.attributes)
