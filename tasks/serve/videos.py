"""Videos that are made in the background: a line of jobs whose records and results are files at an fsspec address."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from anyio import to_thread
from opentelemetry.trace import SpanKind

from infra import storage
from infra.storage import StorageError
from tasks.json_records import parse_record
from tasks.serve.callbacks import CallbackFailed, Callbacks
from tasks.serve.gateway import Gateway
from tasks.serve.limits import Animation, Refusal
from tasks.serve.messages import Clip
from tasks.serve.server_limits import VideoLimits
from tasks.serve.tracing import context_of, traceparent_of

PREFIX = "video_"
STATES = ("queued", "in_progress", "completed", "failed", "cancelled")
_RETRY_SECONDS = 2.0  # where a refusal that may end names no time
_SWEEP_SECONDS = 30.0
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Video:
    """The record of one video. It is stored as `<id>.json`, next to `<id>.photo` until it ends, and `<id>.clip`.

    Args:
        owner: the name of the key that asked for it, "" without keys. Other keys do not see it.
        request: the values of the request without the photo, the seed included.
        fingerprint: of the values and the photo, to compare requests with one idempotency key.
        created: when it was accepted, in seconds since 1970.
        ended: when it was completed, failed or cancelled.
        clip: the fields of the `Clip` without its files.
        error: the status and message of the refusal that ended it.
        callback: the address that is called when it has ended.
        called: whether that was done, or given up.
        trace: the `traceparent` of its request.
    """

    id: str
    owner: str
    state: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    request: dict[str, str | int | float | None]
    fingerprint: str
    created: float
    ended: float | None = None
    clip: dict[str, bool | str | int | float] | None = None
    error: tuple[int, str] | None = None
    callback: str | None = None
    called: bool = False
    trace: str | None = None
    schema: Literal[1] = 1

    @property
    def has_ended(self) -> bool:
        return self.ended is not None


class Videos:
    """The queue of videos of one service, and their files at `address`.

    A video is accepted when its photo and its record are stored. A killed service makes the unfinished ones from their
    start when it starts again: the seed is in the record, so the clip is the same. One address is for one service.

    With `callbacks` a caller may give an address, which is called at least once when its video has ended, also by the
    next start of a killed service.
    """

    def __init__(
        self,
        gateway: Gateway,
        address: str,
        limits: VideoLimits | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.limits = limits or VideoLimits()
        self.callbacks = callbacks
        self._calls: set[asyncio.Task[None]] = set()
        self._gateway, self._address = gateway, storage.absolute(address)
        self._videos: dict[str, Video] = {}
        self._line: deque[str] = deque()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._progress: dict[str, tuple[int, int]] = {}
        self._arrived = asyncio.Condition()
        self._idempotent = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Reads the records, then makes videos and removes old ones during an `async with` block."""
        await self._load()
        if self.callbacks is not None:
            self.callbacks.open()
            for video in self._videos.values():
                self._call(video)
        tasks = [asyncio.create_task(self._work()) for _ in range(self.limits.parallel)]
        tasks.append(asyncio.create_task(self._sweep()))
        try:
            yield
        finally:
            for task in (*tasks, *self._running.values()):
                task.cancel()
            await asyncio.gather(*tasks, *self._running.values(), return_exceptions=True)
            for task in self._calls:  # the next start calls again
                task.cancel()
            await asyncio.gather(*self._calls, return_exceptions=True)
            if self.callbacks is not None:
                await self.callbacks.close()

    async def submit(
        self, animation: Animation, owner: str, idempotency_key: str | None = None, callback: str | None = None
    ) -> Video:
        """Stores a video and puts it at the end of the queue. Raises `Refusal`.

        With an idempotency key that the owner has sent before, it returns that video, or refuses other values.
        """
        if callback is not None:
            if self.callbacks is None:
                raise Refusal(422, "this service calls no addresses; send the request without Callback-Url")
            callback = self.callbacks.check(callback)
        if idempotency_key is None:
            return await self._accept(PREFIX + secrets.token_hex(16), animation, owner, callback)
        id = id_of(owner, idempotency_key)
        async with self._idempotent:
            existing = self._videos.get(id)
            if existing is None:
                return await self._accept(id, animation, owner, callback)
        if (existing.fingerprint, existing.callback) != (_fingerprint(animation), callback):
            raise Refusal(409, "the Idempotency-Key was sent with another request; use a new one")
        return existing

    def get(self, id: str, owner: str) -> Video:
        """Returns a video of an owner. Raises `Refusal`."""
        video = self._videos.get(id)
        if video is None or video.owner != owner:
            raise Refusal(404, f"no video has the id {id[:60]!r}; it may have expired")
        return video

    def of(self, owner: str) -> list[Video]:
        """Returns the videos of an owner, the newest first."""
        videos = [video for video in self._videos.values() if video.owner == owner]
        return sorted(videos, key=lambda video: (video.created, video.id), reverse=True)

    def place(self, video: Video) -> int | None:
        """Returns the place of a video in the queue from 1, or None if it does not wait."""
        return self._line.index(video.id) + 1 if video.id in self._line else None

    def progress(self, video: Video) -> tuple[int, int]:
        """Returns how many of how many steps are done; (0, 0) before the first."""
        return self._progress.get(video.id, (0, 0))

    def expires(self, video: Video) -> float:
        """Returns when a video is removed, in seconds since 1970."""
        return (video.ended or video.created) + self.limits.keep_seconds

    async def content(self, video: Video) -> bytes:
        """Returns the file of a completed video. Raises `Refusal`."""
        if video.state != "completed":
            raise Refusal(409, f"the video is {video.state}; its content exists once it is completed")
        return await self._store(lambda: storage.read_bytes(self._file(video.id, "clip")))

    async def cancel(self, video: Video) -> Video:
        """Takes a video out of the queue, or stops it at its next step; one that has ended is returned as it is."""
        if video.id in self._line:
            self._line.remove(video.id)
        task = self._running.get(video.id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        latest = self._videos.get(video.id, video)
        return latest if latest.has_ended else await self._end(latest, state="cancelled")

    async def remove(self, video: Video) -> None:
        """Cancels a video and removes its files."""
        await self.cancel(video)
        await self._delete(video.id)

    def _file(self, id: str, kind: str) -> str:
        return storage.join(self._address, f"{id}.{kind}")

    async def _load(self) -> None:
        """Reads all records, and removes files of requests that were never accepted."""

        def read() -> list[Video]:
            storage.drop_unfinished(self._address)
            names = storage.list_dir(self._address)
            videos = []
            for name in names:
                id, _, kind = name.rpartition(".")
                if not id.startswith(PREFIX):
                    continue
                if kind == "json":
                    try:
                        videos.append(parse_record(Video, storage.read_bytes(self._file(id, "json"))))
                    except ValueError as error:
                        _log.error("videos: the record %s is not readable (%s); it is left as it is", name, error)
                elif f"{id}.json" not in names:
                    storage.delete(self._file(id, kind))
            return videos

        for video in sorted(await to_thread.run_sync(read), key=lambda video: video.created):
            self._videos[video.id] = video
            if not video.has_ended:
                self._line.append(video.id)

    async def _accept(self, id: str, animation: Animation, owner: str, callback: str | None) -> Video:
        if self._gateway.closing:
            raise Refusal(503, "the service is stopping; send the request again later", 5)
        if len(self._line) >= self.limits.waiting:
            raise Refusal(429, f"{len(self._line)} videos are waiting; send it again in 30 s", 30)
        if len(self._videos) >= self.limits.kept:
            raise Refusal(429, f"{len(self._videos)} videos are stored; delete some, or send it again in 60 s", 60)
        values = dataclasses.asdict(animation)
        photo = values.pop("image")
        video = Video(
            id,
            owner,
            "queued",
            values,
            _fingerprint(animation),
            time.time(),
            callback=callback,
            trace=traceparent_of(),
        )
        self._videos[id] = video  # counts before it is stored

        def write() -> None:
            storage.write_bytes(self._file(id, "photo"), photo)
            storage.write_json(self._file(id, "json"), dataclasses.asdict(video))  # the mark of acceptance

        try:
            await self._store(write)
        except BaseException:
            del self._videos[id]
            raise
        self._line.append(id)
        async with self._arrived:
            self._arrived.notify()
        return video

    async def _work(self) -> None:
        while True:
            async with self._arrived:
                await self._arrived.wait_for(lambda: self._line)
            if self._gateway.closing:  # the next start makes the rest
                return
            id = self._line.popleft()
            task = asyncio.create_task(self._make(self._videos[id]))
            self._running[id] = task
            try:
                await asyncio.wait([task])
                if not task.cancelled() and (error := task.exception()) is not None:
                    _log.error("video %s failed", id, exc_info=error)
                    await self._end(self._videos[id], state="failed", error=(500, "the service failed on this video"))
            finally:
                del self._running[id]
                self._progress.pop(id, None)

    async def _make(self, video: Video) -> None:
        video = self._videos[video.id] = replace(video, state="in_progress")
        attributes = {"trip.video": video.id, "trip.waited_seconds": time.time() - video.created}
        span = self._gateway.tracer.start_as_current_span(
            "video", context_of(video.trace), SpanKind.CONSUMER, attributes
        )
        with span:
            await self._make_clip(video)

    async def _make_clip(self, video: Video) -> None:
        try:
            photo = await self._store(lambda: storage.read_bytes(self._file(video.id, "photo")))
            clip = await self._clip(video, Animation(photo, **video.request))  # pyright: ignore[reportArgumentType]
            about = {field.name: getattr(clip, field.name) for field in dataclasses.fields(clip)}
            del about["files"]
            data = await to_thread.run_sync(clip.as_file)
            await self._store(lambda: storage.write_bytes(self._file(video.id, "clip"), data))
            await self._end(video, state="completed", clip=about)
        except Refusal as refusal:
            await self._end(video, state="failed", error=(refusal.status, refusal.message))

    async def _clip(self, video: Video, animation: Animation) -> Clip:
        """Returns the clip; waits while the model is full or away. Raises `Refusal`."""
        while True:
            try:
                async with contextlib.aclosing(self._gateway.stream(animation)) as messages:
                    async for message in messages:
                        if isinstance(message, Clip):
                            return message
                        self._progress[video.id] = (message.step, message.steps)
            except Refusal as refusal:
                if refusal.status not in (429, 503) or time.time() > self.expires(video):
                    raise
                await asyncio.sleep(refusal.retry_after or _RETRY_SECONDS)

    async def _end(self, video: Video, **changes: Any) -> Video:
        ended = replace(video, ended=time.time(), **changes)

        def write() -> None:
            storage.write_json(self._file(video.id, "json"), dataclasses.asdict(ended))
            storage.delete(self._file(video.id, "photo"))

        try:
            await self._store(write)
        except Refusal as refusal:  # the next start makes it again
            _log.error("video %s ended, but %s", video.id, refusal.message)
        self._videos[video.id] = ended
        self._call(ended)
        return ended

    def _call(self, video: Video) -> None:
        """Starts the calls of the address of a video that has ended."""
        if self.callbacks is not None and video.has_ended and video.callback is not None and not video.called:
            task = asyncio.create_task(self._call_until_answered(self.callbacks, video, video.callback))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def _call_until_answered(self, callbacks: Callbacks, video: Video, address: str) -> None:
        error = None if video.error is None else {"status": video.error[0], "message": video.error[1]}
        event = {
            "type": f"video.{video.state}",
            "timestamp": datetime.fromtimestamp(video.ended or video.created, UTC).isoformat(),
            "data": {"id": video.id, "status": video.state, "error": error},
        }
        for attempt, delay in enumerate(callbacks.options.delays, 1):
            await asyncio.sleep(delay)
            if video.id not in self._videos:  # deleted
                return
            try:
                await callbacks.send(address, video.owner, f"{video.id}.{video.state}", event)
                break
            except CallbackFailed as failure:
                _log.warning("video %s: attempt %d to call its address failed: %s", video.id, attempt, failure)
        if video.id not in self._videos:
            return
        called = self._videos[video.id] = replace(self._videos[video.id], called=True)
        with contextlib.suppress(Refusal):  # otherwise the next start calls again
            await self._store(lambda: storage.write_json(self._file(video.id, "json"), dataclasses.asdict(called)))

    async def _sweep(self) -> None:
        while True:
            now = time.time()
            for video in [v for v in self._videos.values() if v.has_ended and self.expires(v) < now]:
                with contextlib.suppress(Refusal):
                    await self._delete(video.id)
            await asyncio.sleep(min(_SWEEP_SECONDS, max(0.1, self.limits.keep_seconds / 4)))

    async def _delete(self, id: str) -> None:
        # The record last: a killed service then removes the rest at its next start.
        await self._store(lambda: [storage.delete(self._file(id, kind)) for kind in ("photo", "clip", "json")])
        self._videos.pop(id, None)

    async def _store(self, call: Callable[[], _Result]) -> _Result:
        """The result of a call that reads or writes files, in a thread. Raises `Refusal`."""
        try:
            return await to_thread.run_sync(call)
        except (OSError, StorageError) as error:
            _log.error("videos: the store failed: %s", error)
            raise Refusal(503, "the store of the videos does not answer; send the request again later", 5) from error


def id_of(owner: str, idempotency_key: str) -> str:
    """Returns the id of the video of an owner and an idempotency key."""
    return PREFIX + hashlib.sha256(f"{owner}\0{idempotency_key}".encode()).hexdigest()[:32]


def _fingerprint(animation: Animation) -> str:
    photo = hashlib.sha256(animation.image).hexdigest()
    return hashlib.sha256(repr(replace(animation, image=photo.encode())).encode()).hexdigest()
