"""The outermost layer of the HTTP application: request ids, one line of log and one count for each request."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from opentelemetry.trace import SpanKind, StatusCode, Tracer, use_span
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks.serve.limits import FIELDS, Refusal
from tasks.serve.tracing import NO_TRACES, context_of

ACCESS_LOG = "tasks.serve.access"  # the logger of the lines, each a JSON object
DISCONNECTED = 499  # the status of a request whose client does not wait for the response
_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_TRACE = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")  # `traceparent` of W3C Trace Context
_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# FastAPI's page has a script and styles inside of it.
_DOCS = _PAGE.replace("script-src 'self'", "script-src 'self' 'unsafe-inline'").replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'"
)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_access = logging.getLogger(ACCESS_LOG)
_log = logging.getLogger(__name__)


def error_body(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """The JSON of a refusal. `param` is the field that the message is about, or None."""
    first = refusal.message.partition(" ")[0]
    param = first if first in FIELDS and refusal.status < 500 else None
    error = {"status": refusal.status, "message": refusal.message, "param": param, "request_id": request_id}
    return {"error": error}


def error_response(refusal: Refusal, request_id: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    more = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    if refusal.status == 401:
        more["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(refusal, request_id), refusal.status, {**more, **(headers or {})})


class RequestLog:
    """Gives every request an id (or keeps a valid `X-Request-Id`), logs and counts its end, and answers HEAD as GET.

    A line of the log has the name of the caller's key, never a key, the path without its query, and the trace of a
    `traceparent` header, which also is the parent of the span of the request. An error of the application is logged
    with the id and answered with 500.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, str, int, float], None], tracer: Tracer = NO_TRACES) -> None:
        self._app, self._count, self._tracer = app, count, tracer  # count: of method, route, status, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        headers = dict(scope["headers"])
        sent = headers.get(b"x-request-id", b"").decode("latin-1")
        trace = _TRACE.fullmatch(headers.get(b"traceparent", b""))
        request_id = sent if _ID.fullmatch(sent) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "caller": "", "received_bytes": 0}
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        status, bytes_sent, complete, disconnected = 0, 0, False, False

        async def listen() -> Message:
            nonlocal disconnected
            message = await receive()
            if message["type"] == "http.disconnect" and not complete:
                disconnected = True
            return message

        async def respond(message: Message) -> None:
            nonlocal status, bytes_sent, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                path = scope["path"].removeprefix(scope.get("root_path", ""))
                headers.setdefault("Content-Security-Policy", _DOCS if path.startswith("/docs") else _PAGE)
                if path.startswith("/v1/"):
                    headers.setdefault("Cache-Control", "no-store")
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            elif message["type"] == "http.response.body":
                bytes_sent += len(message.get("body", b""))
                complete = not message.get("more_body", False)
            await send(message)

        header = headers.get(b"traceparent", b"").decode("latin-1") or None
        span = self._tracer.start_span(scope["method"], context_of(header), SpanKind.SERVER)
        try:
            with use_span(span, record_exception=False, set_status_on_exception=False):
                await self._app(inner, listen, respond)
        except Exception as error:
            _log.error("request %s failed", request_id, exc_info=error)
            if status:  # the response has begun; the server closes the connection
                raise
            refusal = Refusal(500, "the service failed on this request; quote the request id when reporting this")
            await error_response(refusal, request_id)(inner, listen, respond)
        finally:
            end = DISCONNECTED if disconnected or not status else status
            route = getattr(inner.get("route"), "path", "none")
            seconds = time.monotonic() - start
            self._count(scope["method"], route, end, seconds)
            span.update_name(f"{scope['method']} {route}")
            span.set_attributes(
                {
                    "http.request.method": scope["method"],
                    "http.route": route,
                    "http.response.status_code": end,
                    "trip.request_id": request_id,
                    "trip.caller": state["caller"],
                }
            )
            if end >= 500:
                span.set_status(StatusCode.ERROR)
            span.end()
            recorded = span.get_span_context()
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": request_id,
                "trace_id": f"{recorded.trace_id:032x}" if recorded.is_valid else trace[1].decode() if trace else "",
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": end,
                "seconds": round(seconds, 4),
                "bytes_received": state["received_bytes"],
                "bytes_sent": bytes_sent,
                "caller": state["caller"],
                "client": scope["client"][0] if scope.get("client") else "",
            }
            _access.info("%s", json.dumps(line))
