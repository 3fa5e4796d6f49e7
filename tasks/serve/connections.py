"""A connection of the HTTP server with limits that uvicorn does not have: number, size and time of a request's head."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tasks.serve.server_limits import ServerLimits

LINGER_SECONDS = 2.0  # in which a body is discarded after its refusal, so that the client reads the response
FLUSH_SECONDS = 30.0  # for a client to read the rest of a response


class Connections:
    """Makes the connections of one server and counts those that it closes."""

    def __init__(self, limits: ServerLimits, metrics: CollectorRegistry) -> None:
        self.limits = limits
        self.open: dict[Connection, None] = {}  # oldest first
        about = "Connections that the service closed, by reason"
        self.closed = Counter("trip_connections_closed", about, ["reason"], registry=metrics)
        Gauge("trip_connections", "Open connections", registry=metrics).set_function(lambda: len(self.open))

    def __call__(self, **arguments: Any) -> Connection:
        """uvicorn calls this as the class of a protocol."""
        return Connection(self, **arguments)


class Connection(HttpToolsProtocol):
    """Closes connections with a head that is too slow or too large, and those over the limit."""

    def __init__(self, group: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._group = group
        self._timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = True  # before the end of a request's headers
        self._whole = True  # the body has arrived
        self._discards = False  # the rest of the request

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self._group.open) >= self._group.limits.connections:
            idle = next((other for other in self._group.open if other.is_idle), None)
            if idle is None:
                self._close("number")
                return
            idle._close("number")
        self._group.open[self] = None
        self._set_timer(self._group.limits.head_seconds, "head")

    def connection_lost(self, exc: Exception | None) -> None:
        self._group.open.pop(self, None)
        self._set_timer(None, "")
        super().connection_lost(exc)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self._group.limits.head_bytes and not self.transport.is_closing():
            self._close("head_bytes", b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._whole, self._discards = True, False, False
        self._set_timer(self._group.limits.head_seconds, "head")

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._set_timer(None, "")
        if len(self.url) + sum(len(n) + len(v) + 4 for n, v in self.headers) > self._group.limits.head_bytes:
            self._discards = True
            self._close("head_bytes", b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n")
            return
        self._discards = any(name == b"transfer-encoding" for name, _ in self.headers)  # `Guard` refuses it
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._discards:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._whole, self._in_head, self._head_bytes = True, True, 0
        if self.cycle is not None:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._whole:
            self._set_timer(LINGER_SECONDS, "rest")
        elif self.transport.is_closing():
            self._set_timer(FLUSH_SECONDS, "flush")  # a client that reads nothing keeps a closing connection open

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._set_timer(FLUSH_SECONDS, "flush")

    def _set_timer(self, seconds: float | None, reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._close, reason)

    def _close(self, reason: str, response: bytes = b"") -> None:
        self._group.closed.labels(reason).inc()
        self._group.open.pop(self, None)
        if response:
            self.transport.write(response)
            self.transport.close()
        else:
            self.transport.abort()
