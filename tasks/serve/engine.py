"""Animates photos one batch after another with the version that an alias names, and follows the alias when it moves."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tasks.serve.limits import Animation, Refusal
from tasks.serve.messages import Clip, EngineSpec, Event, Progress, Status
from tasks.serve.versions import Aliased, AliasedModel, RegistryTrouble
from trip_model.images import load_image, video_bytes
from trip_model.pipeline import TripPipeline

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Live:
    aliased: Aliased
    pipe: TripPipeline

    @property
    def version(self) -> str:
        return self.aliased.number


@dataclass(eq=False)
class _Job:
    animation: Animation
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    over: bool = False  # nobody listens any more: answered, out of time, or gone

    @property
    def shape(self) -> tuple[int | None, int | None, float | None]:
        return self.animation.num_frames, self.animation.steps, self.animation.guidance

    def tell(self, event: Event) -> None:
        """Hands an event to the request's event loop, from any thread."""
        if self.over:
            return
        self.over = not isinstance(event, Progress)
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed
            self.over = True


class _Abandoned(Exception):
    """Nobody waits for the batch under way."""


class Engine:
    """One pipeline, one thread that runs it, a bounded queue in front, and one thread that follows the alias."""

    sent_again = 0  # there is nobody else to send a request to

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        spec.access.apply()
        self._aliased = AliasedModel(spec.name, spec.alias, spec.tracking_uri, Path(spec.cache))
        self._live: _Live | None = None
        self._broken: Aliased | None = None
        self._silence = ""
        self._trouble = "the model is being loaded"
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._seconds = 1.0  # of the last batch, to guess from
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._work, self._follow)]

    def start(self) -> None:
        """Loads the model if the registry gives one now, and starts the threads; without one they keep asking."""
        self.refresh()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends both threads; what still waits is refused."""
        self._stopped.set()
        with self._changed:
            _refuse(self._waiting, 503, "the service is stopping; send the request again")
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    async def status(self) -> Status:
        live = self._live
        return Status(
            self.spec.name,
            live.version if live else "",
            self._trouble,
            len(self._waiting),
            torch.get_num_threads(),
            self.device,
            _defaults(live.pipe) if live else {},
        )

    def refresh(self) -> None:
        """Asks the registry once; loads the alias's version beside the one in use, then puts it in its place.

        A version that does not load is left alone until the alias moves on, and the old one stays.
        """
        live = self._live
        try:
            version = self._version()
            if live is None or version != live.aliased:
                if version == self._broken:
                    return
                folder = self._aliased.fetch(version)
                self._broken = version
                self._live = _Live(version, self._tried(TripPipeline.from_folder(folder, self.device)))
                self._broken = None
                self._aliased.forget_all_but(version, live.aliased if live else version)
            self._trouble = self._silence
        except RegistryTrouble as error:
            self._trouble = str(error)
        except Exception as error:  # whatever is wrong with a version, the one in use stays in use
            number = self._broken.number if self._broken else "?"
            self._trouble = f"version {number} of {self.spec.name} does not load: {error}"

    def _version(self) -> Aliased:
        """Where the alias points. A replica that starts while the registry is down takes what was in use last."""
        try:
            version = self._aliased.current()
            self._silence = ""
            return version
        except RegistryTrouble as error:
            known = self._aliased.last_fetched()
            if self._live is not None or known is None:
                raise
            self._silence = str(error)
            return known

    def _tried(self, pipe: TripPipeline) -> TripPipeline:
        """One step of the smallest clip: finds a broken model before a person does, and warms a device up."""
        pipe(np.zeros((pipe.size, pipe.size, 3), np.uint8), "a test", num_frames=2, steps=1)
        return pipe

    async def animate(self, animation: Animation, seconds: float) -> AsyncGenerator[Event, None]:
        """Progress, then one `Clip` or `Refusal`. What is refused at once comes first, so before any progress."""
        job = _Job(animation, asyncio.get_running_loop())
        deadline = time.monotonic() + seconds
        with self._changed:
            refusal = self._refusal()
            if refusal is None:
                self._waiting.append(job)
                self._changed.notify_all()
        if refusal is not None:
            yield refusal
            return
        try:
            yield Progress(0, animation.steps or 0)
            event: Event = Progress(0, 0)
            while isinstance(event, Progress):
                try:
                    event = await asyncio.wait_for(job.events.get(), deadline - time.monotonic())
                except TimeoutError:
                    event = Refusal(504, f"no clip within {seconds:g} s; ask for fewer steps or frames, or later")
                yield event
        finally:  # also when the caller is gone
            job.over = True
            with self._changed:
                if job in self._waiting:
                    self._waiting.remove(job)

    def _refusal(self) -> Refusal | None:
        if self._live is None:
            return Refusal(503, f"there is no model yet: {self._trouble}", retry_after=5)
        if len(self._waiting) >= self.spec.max_queue:
            wait = max(1, round(self._seconds * len(self._waiting) / self.spec.max_batch))
            return Refusal(429, f"{len(self._waiting)} requests wait already; send it again in {wait} s", wait)
        return None

    def _follow(self) -> None:
        while not self._stopped.wait(self.spec.poll_seconds):
            self.refresh()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped.is_set())
                if self._stopped.is_set():
                    return
                first = self._waiting.popleft()
                mates = [job for job in self._waiting if job.shape == first.shape][: self.spec.max_batch - 1]
                for job in mates:
                    self._waiting.remove(job)
            assert self._live is not None
            try:
                self._run(self._live, [first, *mates])
            except Exception as error:  # this thread outlives whatever a request or a model does
                _log.exception("a batch of %d failed", 1 + len(mates))
                _refuse([first, *mates], 500, f"the model failed with {type(error).__name__}; ask for fewer frames")

    def _run(self, live: _Live, batch: list[_Job]) -> None:
        """Answers a batch with one version, whatever the alias does meanwhile."""
        start = time.monotonic()
        ready: list[_Job] = []
        photos: list[np.ndarray] = []
        for job in batch:
            if job.over:
                continue
            try:
                photos.append(load_image(job.animation.image, live.pipe.size))
                ready.append(job)
            except Exception as error:  # decoders of images raise what they like
                known = isinstance(error, ValueError)  # the rest speaks of the decoder, not of the photo
                reason = str(error) if known else f"its decoder failed with {type(error).__name__}"
                job.tell(Refusal(400, f"image cannot be used: {reason}"))
        if not ready:
            return

        def on_step(step: int, steps: int) -> None:
            for job in ready:
                job.tell(Progress(step, steps))
            if self._stopped.is_set() or all(job.over for job in ready):
                raise _Abandoned

        asked = ready[0].animation
        try:
            videos = live.pipe.generate(
                photos,
                [job.animation.prompt for job in ready],
                [job.animation.seed for job in ready],
                asked.num_frames,
                asked.steps,
                asked.guidance,
                on_step=on_step,
            )
            self._seconds = time.monotonic() - start
            for job, pixels in zip(ready, videos, strict=True):
                job.tell(self._clip(job.animation, live, pixels, len(ready)))
        except _Abandoned:
            _refuse(ready, 503, "the service is stopping; send the request again")
        except ValueError as error:
            _refuse(ready, 422, str(error))

    def _clip(self, animation: Animation, live: _Live, pixels: np.ndarray, batch: int) -> Clip:
        given = animation.model_dump(include={"steps", "guidance", "fps"}, exclude_none=True)
        used = _defaults(live.pipe) | given
        if animation.format == "frames":
            files = tuple(_png(frame) for frame in pixels)
        else:
            files = (video_bytes(pixels, used["fps"], animation.format),)
        return Clip(
            files=files,
            format=animation.format,
            seed=animation.seed,
            num_frames=pixels.shape[0],
            width=pixels.shape[2],
            height=pixels.shape[1],
            fps=used["fps"],
            steps=int(used["steps"]),
            guidance=used["guidance"],
            model=self.spec.name,
            version=live.version,
            batch=batch,
            seconds=self._seconds,
        )


def _defaults(pipe: TripPipeline) -> dict[str, float]:
    config = pipe.model.config
    steps = config.schedule.sampling_steps
    return {"num_frames": config.num_frames, "steps": steps, "guidance": config.guidance, "fps": config.fps}


def _refuse(jobs: Iterable[_Job], status: int, message: str) -> None:
    for job in jobs:
        job.tell(Refusal(status, message))


def _png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()
