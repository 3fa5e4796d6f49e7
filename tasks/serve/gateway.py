"""The desk of the service: takes requests in, counts how they end, and finishes what it has taken before it closes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import FrameType
from typing import Protocol

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from tasks.serve.limits import Animation, Refusal
from tasks.serve.messages import Clip, Event, Progress, Status

_IDLE_CHECK_SECONDS = 0.1


class Animators(Protocol):
    """Where requests are answered: an `Engine` of this process, or `Replicas` of it."""

    sent_again: int  # requests that a lost replica had taken

    def animate(self, animation: Animation, seconds: float) -> AsyncGenerator[Event, None]: ...

    async def status(self) -> Status: ...


class Desk:
    """All requests, whether they came over HTTP or from the page, go through `animate`; each has `seconds`."""

    def __init__(self, animators: Animators, seconds: float) -> None:
        self.animators = animators
        self.seconds = seconds
        self.closing = False
        self.under_way = 0
        self.metrics = CollectorRegistry()
        ProcessCollector(registry=self.metrics)
        self._answers = Counter("trip_requests", "Requests by HTTP status", ["status"], registry=self.metrics)
        Gauge("trip_requests_under_way", "Requests not answered yet", registry=self.metrics).set_function(
            lambda: self.under_way
        )
        Gauge("trip_requests_sent_again", "Requests that a lost replica had", registry=self.metrics).set_function(
            lambda: self.animators.sent_again
        )
        self._seconds = Histogram(
            "trip_clip_seconds",
            "From a request to its clip",
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.metrics,
        )
        self._clips = Counter("trip_clips", "Clips by model and version", ["model", "version"], registry=self.metrics)

    def refused(self, refusal: Refusal) -> Refusal:
        """Counts a request that is refused."""
        self._answers.labels(refusal.status).inc()
        return refusal

    async def animate(self, animation: Animation) -> AsyncGenerator[Event, None]:
        """Progress, then one clip or refusal; a refusal at once comes before any progress."""
        if self.closing:
            yield self.refused(Refusal(503, "the service is stopping; send the request to another, or later", 5))
            return
        start = time.monotonic()
        self.under_way += 1
        answered = False
        try:
            async with aclosing(self.animators.animate(animation, self.seconds)) as events:
                async for event in events:
                    answered = not isinstance(event, Progress)
                    if isinstance(event, Refusal):
                        self.refused(event)
                    elif isinstance(event, Clip):
                        self._answers.labels(200).inc()
                        self._clips.labels(event.model, event.version).inc()
                        self._seconds.observe(time.monotonic() - start)
                    yield event
        finally:
            self.under_way -= 1
            if not answered:  # the caller has gone
                self._answers.labels(499).inc()

    async def clip(self, animation: Animation) -> AsyncGenerator[Progress | Clip, None]:
        """As `animate`, but raises the `Refusal`."""
        async with aclosing(self.animate(animation)) as events:
            async for event in events:
                if isinstance(event, Refusal):
                    raise event
                yield event


class Server(uvicorn.Server):
    """At the first signal takes no more requests and finishes those under way; a second one ends it."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk = desk

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._desk.closing:
            super().handle_exit(sig, frame)
            return
        self._desk.closing = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        while self._desk.under_way:
            await asyncio.sleep(_IDLE_CHECK_SECONDS)
        self.should_exit = True
