"""The gateway of the service: receives requests, counts how they end, and completes accepted ones before it closes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from types import FrameType
from typing import Protocol

import uvicorn
from opentelemetry.trace import StatusCode, Tracer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from tasks.serve.limits import Animation, Refusal
from tasks.serve.messages import Clip, Message, Progress, Status
from tasks.serve.tracing import NO_TRACES
from trip_model.request_limits import BOUNDS

MAX_STEPS = int(BOUNDS["steps"].maximum)
_IDLE_CHECK_SECONDS = 0.1


class Backend(Protocol):
    """Computes clips: an `Engine` in this process, or `Replicas` of it."""

    retries: int  # requests sent again because their replica was lost

    def stream(self, animation: Animation, seconds: float) -> AsyncGenerator[Message, None]: ...

    async def status(self) -> Status: ...


class Gateway:
    """Passes all requests, of the API and of the web UI, to a backend.

    Args:
        seconds: the time limit of a request.
        max_steps: the largest number of steps that a request may have.
        tracer: of the spans of requests, of videos and of what the model does.
    """

    def __init__(
        self, backend: Backend, seconds: float, max_steps: int = MAX_STEPS, tracer: Tracer = NO_TRACES
    ) -> None:
        self.tracer = tracer
        self.backend = backend
        self.seconds = seconds
        self.max_steps = max_steps
        self.leaving = False  # /readyz says so; requests are still accepted
        self.closing = False
        self.in_flight = 0
        self.metrics = CollectorRegistry()
        ProcessCollector(registry=self.metrics)
        self.metrics.register(_Retries(backend))
        self._requests = Counter("trip_requests", "Requests by HTTP status", ["status"], registry=self.metrics)
        in_flight = Gauge("trip_requests_in_flight", "Accepted requests without a response", registry=self.metrics)
        in_flight.set_function(lambda: self.in_flight)
        self._clip_seconds = Histogram(
            "trip_clip_seconds",
            "Seconds from a request to its clip",
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.metrics,
        )
        labels = ["method", "route", "status"]
        self._http_ends = Counter("trip_http_requests", "HTTP requests by their end", labels, registry=self.metrics)
        self._http_seconds = Histogram(
            "trip_http_seconds",
            "Seconds from the head of an HTTP request to its end",
            ["route"],
            buckets=(0.01, 0.1, 1, 10, 100, 1000),
            registry=self.metrics,
        )
        self._clips = Counter("trip_clips", "Clips by model and version", ["model", "version"], registry=self.metrics)

    def count_refusal(self, refusal: Refusal) -> Refusal:
        self._requests.labels(refusal.status).inc()
        return refusal

    def count_http(self, method: str, route: str, status: int, seconds: float) -> None:
        self._http_ends.labels(method, route, status).inc()
        self._http_seconds.labels(route).observe(seconds)

    async def stream(self, animation: Animation) -> AsyncGenerator[Progress | Clip, None]:
        """Yields progress, then one clip. Raises `Refusal`, before any progress if the request is not accepted."""
        if self.closing:
            raise self.count_refusal(Refusal(503, "the service is stopping; send the request again later", 5))
        start = time.monotonic()
        self.in_flight += 1
        answered = False
        # Not the current span: a generator's blocks run in the contexts of those who read it.
        span = self.tracer.start_span("animate", attributes={"trip.seed": animation.seed})
        try:
            async with aclosing(self.backend.stream(animation, self.seconds)) as messages:
                async for message in messages:
                    answered = not isinstance(message, Progress)
                    if isinstance(message, Progress) and message.step == 1:
                        span.add_event("first step")  # before it, the request waits
                    if isinstance(message, Refusal):
                        span.set_status(StatusCode.ERROR, f"status {message.status}")
                        raise self.count_refusal(message)
                    if isinstance(message, Clip):
                        self._requests.labels(200).inc()
                        self._clips.labels(message.model, message.version).inc()
                        self._clip_seconds.observe(time.monotonic() - start)
                        span.set_attributes(
                            {
                                "trip.model": message.model,
                                "trip.version": message.version,
                                "trip.frames": message.num_frames,
                                "trip.steps": message.steps,
                            }
                        )
                    yield message
        finally:
            self.in_flight -= 1
            if not answered:  # the client has disconnected
                self._requests.labels(499).inc()
                span.add_event("abandoned")
            span.end()


class _Retries(Collector):
    """`trip_request_retries_total`, read from the backend, which counts them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        about = "Requests sent again because their replica was lost"
        yield CounterMetricFamily("trip_request_retries", about, self._backend.retries)


class Server(uvicorn.Server):
    """Ends in three steps: not ready but still accepting, then completing accepted requests only, then stopped.

    The first signal begins the first step, which lasts `pause_seconds`, so that a load balancer sees /readyz before a
    request is refused. A second signal ends the server at once.
    """

    def __init__(self, config: uvicorn.Config, gateway: Gateway, pause_seconds: float = 0) -> None:
        super().__init__(config)
        self._gateway, self._pause_seconds = gateway, pause_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gateway.leaving:
            super().handle_exit(sig, frame)
            return
        self._gateway.leaving = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        await asyncio.sleep(self._pause_seconds)
        self._gateway.closing = True
        while self._gateway.in_flight:
            await asyncio.sleep(_IDLE_CHECK_SECONDS)
        self.should_exit = True
