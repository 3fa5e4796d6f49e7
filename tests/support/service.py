"""A running service for tests: uvicorn with the limits of `flows serve`, over an engine or a quick backend."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from opentelemetry.trace import Tracer

from tasks.serve.api import AppOptions, create_app
from tasks.serve.callbacks import CallbackOptions, Callbacks
from tasks.serve.connections import Connections
from tasks.serve.gateway import Backend, Gateway
from tasks.serve.limits import Animation
from tasks.serve.messages import Clip, Progress, Status
from tasks.serve.server_limits import VideoLimits
from tasks.serve.tracing import NO_TRACES
from tasks.serve.videos import Videos

DEFAULTS = {"num_frames": 16, "steps": 50, "guidance": 1.0, "fps": 4.0}


def clip_of(animation: Animation) -> Clip:
    """A clip whose file is made of the request."""
    data = f"{animation.prompt} {animation.seed} {len(animation.image)}".encode()
    return Clip((data,), animation.format, animation.seed, 2, 8, 8, 4.0, 1, 1.0, "trip", "1", 1, 0.1)


@dataclass
class QuickBackend:
    """A backend without a model: each clip takes `seconds`, one after the other, in `steps` steps."""

    seconds: float = 0.0
    steps: int = 4
    retries: int = 0
    accepted: list[Animation] = field(default_factory=list)

    async def stream(self, animation: Animation, seconds: float):
        self.accepted.append(animation)
        yield Progress(0, 0)
        for step in range(1, self.steps + 1):
            await asyncio.sleep(self.seconds / self.steps)
            yield Progress(step, self.steps)
        yield clip_of(animation)

    async def status(self) -> Status:
        return Status("trip", "1", "", 0, 1, "cpu", DEFAULTS, 1000, 64)


@dataclass
class Running:
    """A service in a thread of this process."""

    url: str
    gateway: Gateway
    videos: Videos
    server: uvicorn.Server

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.partition("://")[2].split(":")
        return host, int(port)


@contextmanager
def running_service(
    backend: Backend,
    options: AppOptions | None = None,
    videos: str | None = None,
    video_limits: VideoLimits | None = None,
    seconds: float = 60,
    callbacks: CallbackOptions | None = None,
    tracer: Tracer = NO_TRACES,
    **config: Any,
) -> Iterator[Running]:
    options = options or AppOptions()
    gateway = Gateway(backend, seconds, tracer=tracer)
    with (
        tempfile.TemporaryDirectory(prefix="trip-videos-") as folder,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        line = Videos(gateway, videos or folder, video_limits, Callbacks(callbacks) if callbacks else None)
        connections: Any = Connections(options.limits, gateway.metrics)
        settings = uvicorn.Config(
            create_app(gateway, line, options), http=connections, ws="none", lifespan="on", log_level="warning",
            access_log=False, timeout_graceful_shutdown=1, proxy_headers=False, **config,
        )  # fmt: skip
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.02)
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", gateway, line, server)
        finally:
            server.should_exit = True
            thread.join(20)
