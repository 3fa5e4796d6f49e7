"""The engine of a replica: animates photos in batches with the version of an alias, and follows the alias."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tasks.serve.limits import Animation, Refusal, out_of_time
from tasks.serve.messages import Clip, EngineSpec, Message, Progress, Status
from tasks.serve.versions import AliasedModel, RegistryTrouble, VersionId
from trip_model.images import generated_metadata, load_image, video_bytes
from trip_model.pipeline import TripPipeline

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _LoadedVersion:
    id: VersionId
    pipe: TripPipeline

    @property
    def version(self) -> str:
        return self.id.number


@dataclass(eq=False)
class _Job:
    animation: Animation
    loop: asyncio.AbstractEventLoop
    messages: asyncio.Queue[Message] = field(default_factory=asyncio.Queue)
    done: bool = False  # answered, timed out, or its client has disconnected

    @property
    def shape(self) -> tuple[int | None, int | None, float | None]:
        return self.animation.num_frames, self.animation.steps, self.animation.guidance

    def send(self, message: Message) -> None:
        """Puts a message into the queue of the request's event loop, from any thread."""
        if self.done:
            return
        self.done = not isinstance(message, Progress)
        try:
            self.loop.call_soon_threadsafe(self.messages.put_nowait, message)
        except RuntimeError:  # the loop is closed
            self.done = True


class _Abandoned(Exception):
    """No client waits for the current batch."""


class Engine:
    """One pipeline, a bounded queue, one thread that runs batches, and one thread that follows the alias."""

    retries = 0  # only `Replicas` retries

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        spec.access.apply()
        self._aliased = AliasedModel(spec.name, spec.alias, spec.tracking_uri, Path(spec.cache))
        self._live: _LoadedVersion | None = None
        self._failed: VersionId | None = None  # the version that did not load
        self._registry_error = ""
        self._trouble = "the model is being loaded"
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._seconds = 1.0  # of the last batch, to estimate waiting times
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._work, self._follow)]

    def start(self) -> None:
        """Loads the model and starts the threads. If no model can be loaded now, the threads try again."""
        self.refresh()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends both threads and refuses waiting requests."""
        self._stopped.set()
        with self._changed:
            _refuse(self._waiting, 503, "the service is stopping; send the request again")
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    async def status(self) -> Status:
        loaded = self._live
        return Status(
            self.spec.name,
            loaded.version if loaded else "",
            self._trouble,
            len(self._waiting),
            torch.get_num_threads(),
            self.device,
            _defaults(loaded.pipe) if loaded else {},
            loaded.pipe.model.config.schedule.num_train_timesteps if loaded else 0,
            loaded.pipe.size if loaded else 0,
        )

    def refresh(self) -> None:
        """Looks up the alias once; loads a new version next to the current one, then replaces that.

        A version that does not load is not tried again until the alias moves, and the current one stays in use.
        """
        current = self._live
        try:
            version = self._version()
            if current is None or version != current.id:
                if version == self._failed:
                    return
                folder = self._aliased.fetch(version)
                self._failed = version
                pipe = TripPipeline.from_pretrained(folder).to(self.device)
                self._live = _LoadedVersion(version, _tested(pipe))
                self._failed = None
                self._aliased.remove_all_except(version, current.id if current else version)
            self._trouble = self._registry_error
        except RegistryTrouble as error:
            self._trouble = str(error)
        except Exception as error:  # a faulty version may raise anything; the current one stays in use
            number = self._failed.number if self._failed else "?"
            self._trouble = f"version {number} of {self.spec.name} does not load: {error}"

    def _version(self) -> VersionId:
        """The version of the alias. A replica that starts while the registry is down takes the last one in use."""
        try:
            version = self._aliased.current()
            self._registry_error = ""
            return version
        except RegistryTrouble as error:
            known = self._aliased.last_fetched()
            if self._live is not None or known is None:
                raise
            self._registry_error = str(error)
            return known

    async def stream(self, animation: Animation, seconds: float) -> AsyncGenerator[Message, None]:
        """Yields progress, then one `Clip` or `Refusal`; only the refusal if the request is not accepted."""
        job = _Job(animation, asyncio.get_running_loop())
        deadline = time.monotonic() + seconds
        with self._changed:
            refusal = self._refusal(animation)
            if refusal is None:
                self._waiting.append(job)
                self._changed.notify_all()
        if refusal is not None:
            yield refusal
            return
        try:
            yield Progress(0, animation.steps or 0)
            message: Message = Progress(0, 0)
            while isinstance(message, Progress):
                try:
                    message = await asyncio.wait_for(job.messages.get(), deadline - time.monotonic())
                except TimeoutError:
                    message = out_of_time(seconds)
                yield message
        finally:  # also when the client has disconnected
            job.done = True
            with self._changed:
                if job in self._waiting:
                    self._waiting.remove(job)

    def _refusal(self, animation: Animation) -> Refusal | None:
        if self._live is None:
            return Refusal(503, f"there is no model yet: {self._trouble}", retry_after=5)
        own = _defaults(self._live.pipe)
        steps, frames = animation.steps or own["steps"], animation.num_frames or own["num_frames"]
        most = max(self.spec.step_frames, own["steps"] * own["num_frames"])
        if steps * frames > most:
            return Refusal(422, f"steps is {steps:g} for {frames:g} frames; use at most {most // frames:g} with them")
        if len(self._waiting) >= self.spec.max_queue:
            wait = max(1, round(self._seconds * len(self._waiting) / self.spec.max_batch))
            return Refusal(429, f"{len(self._waiting)} requests are waiting; send it again in {wait} s", wait)
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
                others = [job for job in self._waiting if job.shape == first.shape][: self.spec.max_batch - 1]
                for job in others:
                    self._waiting.remove(job)
            assert self._live is not None
            try:
                self._run(self._live, [first, *others])
            except Exception as error:  # a model may raise anything; this thread must not end
                _log.exception("a batch of %d failed", 1 + len(others))
                _refuse([first, *others], 500, f"the model failed with {type(error).__name__}; use fewer frames")

    def _run(self, loaded: _LoadedVersion, batch: list[_Job]) -> None:
        """Answers a batch with one version, also if the alias moves meanwhile."""
        start = time.monotonic()
        ready: list[_Job] = []
        photos: list[np.ndarray] = []
        for job in batch:
            if job.done:
                continue
            try:
                photos.append(load_image(job.animation.image, loaded.pipe.size))
                ready.append(job)
            except Exception as error:  # image decoders raise many types
                known = isinstance(error, ValueError)  # other messages describe the decoder, not the photo
                reason = str(error) if known else f"its decoder failed with {type(error).__name__}"
                job.send(Refusal(400, f"image cannot be used: {reason}"))
        if not ready:
            return

        def on_step(step: int, steps: int) -> None:
            for job in ready:
                job.send(Progress(step, steps))
            if self._stopped.is_set() or all(job.done for job in ready):
                raise _Abandoned

        first = ready[0].animation
        try:
            videos = loaded.pipe.generate(
                photos,
                [job.animation.prompt for job in ready],
                [job.animation.seed for job in ready],
                first.num_frames,
                first.steps,
                first.guidance,
                on_step=on_step,
            )
            self._seconds = time.monotonic() - start
            for job, pixels in zip(ready, videos, strict=True):
                job.send(self._clip(job.animation, loaded, pixels, len(ready)))
        except _Abandoned:
            _refuse(ready, 503, "the service is stopping; send the request again")
        except ValueError as error:
            _refuse(ready, 422, str(error))

    def _clip(self, animation: Animation, loaded: _LoadedVersion, pixels: np.ndarray, batch: int) -> Clip:
        given = {"steps": animation.steps, "guidance": animation.guidance, "fps": animation.fps}
        used = _defaults(loaded.pipe) | {name: value for name, value in given.items() if value is not None}
        model = f"{self.spec.name} version {loaded.version}"
        about = generated_metadata(model=model, seed=animation.seed, prompt=animation.prompt)
        if animation.format == "frames":
            files = tuple(_png(frame, about) for frame in pixels)
        else:
            files = (video_bytes(pixels, used["fps"], animation.format, metadata=about),)
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
            version=loaded.version,
            batch=batch,
            seconds=self._seconds,
            prompt_truncated=loaded.pipe.text.truncates(animation.prompt),
        )


def _tested(pipe: TripPipeline) -> TripPipeline:
    """Runs one step of the smallest clip, which finds a broken model before it is used and initialises the device."""
    pipe.generate([np.zeros((pipe.size, pipe.size, 3), np.uint8)], ["a test"], [0], num_frames=2, steps=1)
    return pipe


def _defaults(pipe: TripPipeline) -> dict[str, float]:
    config = pipe.model.config
    steps = config.schedule.sampling_steps
    return {"num_frames": config.num_frames, "steps": steps, "guidance": config.guidance, "fps": config.fps}


def _refuse(jobs: Iterable[_Job], status: int, message: str) -> None:
    for job in jobs:
        job.send(Refusal(status, message))


def _png(frame: np.ndarray, metadata: Mapping[str, Any]) -> bytes:
    buffer, text = io.BytesIO(), PngInfo()
    text.add_text("Comment", json.dumps(dict(metadata), sort_keys=True))
    Image.fromarray(frame).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()
