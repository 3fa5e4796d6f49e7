"""Decodes videos into clips on a time grid (Section 4.1) or with a stride.

*Pixels* are uint8 [F, H, W, 3] RGB of a square or of the frame size nearest to the video's aspect ratio: the frame is
resized to cover it and its centre cropped, or with `fit="squash"` the entire frame is resized to it.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from tasks.video.colour import UnsupportedColourError, colour_of
from tasks.video.frame import Framing
from tasks.video.frame_sizes import FrameSize
from tasks.video.selective_decode import can_skip_frames, frames_of_spans, selected_frames
from tasks.video.shots import ShotSplitter
from tasks.video.spec import ShotSpec
from tasks.video.streams import alpha_decoder, decoded_frames, deinterlaced, has_display_stamps, main_stream
from trip_model.config import Fit

# Of the pixels and times that a file gives; in the fingerprint of a data set and in the meta of its samples.
# 2: colour, fields, alpha, streams and stamps. 3: exact conversion to RGB at even widths.
# 4: the last frames of a span at the end of a video.
DECODE_VERSION = 4
# Containers that hold their own frames. A playlist would make the decoder open the addresses it lists.
CONTAINERS = "mov,matroska,avi,ogg,flv,mpeg,mpegvideo,mpegts,asf,gif,mxf"
SPAN_TOLERANCE = 0.0005  # seconds; stamps of tables are rounded to milliseconds
SPAN_OVERHANG = 1.0  # seconds that a span may end after its video: durations of tables are rounded


class ClipError(ValueError):
    """A video that cannot become a clip: `reason` is a word to count by, `detail` a sentence for the user."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ClipError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Clip:
    """A decoded window of a video, or all of its frames as a track."""

    pixels: np.ndarray  # uint8 [F, H, W, 3]
    times: np.ndarray  # float32 [F], presentation stamps in seconds since the first displayed frame
    info: dict[str, Any] = field(default_factory=dict)


def read_windows(
    source: bytes | str | Path,
    num_frames: int,
    fps: float,
    size: int,
    windows: int = 1,
    start_seconds: float = 0.0,
    fit: Fit = "crop",
    stride: int | None = None,
    frame_sizes: Sequence[Sequence[int]] = (),
) -> list[Clip]:
    """Decodes up to `windows` non-overlapping clips from one video, each of `num_frames` frames on a time grid.

    The grid uses presentation stamps relative to the first displayed frame: grid point k takes the frame displayed at
    `start + k / fps` (the last one stamped at or before it), also for variable frame rates and late starts. Each frame
    is converted at most once and only if a grid point needs it; frames that no grid point needs may not be decoded, so
    that their damage goes unnoticed. A truncated file gives the windows before the break, and `info["broken"]` names
    the error; `info` also counts the decoded frames that are corrupt and the stamps that run backwards.

    With a stride there is no grid: the clip takes frames 0, stride, 2 * stride .. of the decoder's output and ignores
    their stamps.

    Args:
        source: the bytes of a video file, or its path.
        num_frames: F, frames of each clip.
        fps: grid points per second.
        size: side of the square, in pixels.
        windows: maximum number of clips; clip w starts at `start_seconds + w * num_frames / fps`, or with a stride at
            frame `w * num_frames * stride`.
        start_seconds: of the first clip, from the first displayed frame.
        fit: how a frame fills the square, or its frame size.
        stride: in frames; None uses the grid. Needs `start_seconds` 0.
        frame_sizes: (width, height) each, of which the first frame decides one; none: the square.
    Raises:
        ClipError: `undecodable`, `no_video_stream`, `no_frames`, `no_timestamps`, `unsupported_colour`, `damaged`
            (broken before the end of the first window) or `too_short`. MemoryError: the frames do not fit.
    """
    sizes = _sizes(size, frame_sizes)
    chosen, info = _read_grid(source, num_frames, num_frames * windows, fps, sizes, start_seconds, fit, stride)
    return [
        _clip(chosen[window * num_frames : (window + 1) * num_frames], info | {"window": window}, start_seconds)
        for window in range(len(chosen) // num_frames)
    ]


def read_track(
    source: bytes | str | Path,
    num_frames: int,
    fps: float,
    size: int,
    longest: int,
    fit: Fit = "crop",
    stride: int | None = None,
    frame_sizes: Sequence[Sequence[int]] = (),
) -> list[Clip]:
    """Decodes all frames of a video as `read_windows` does, whose window i is frames i * n to (i + 1) * n here.

    Args:
        source: as `read_windows`.
        num_frames: minimum number of frames.
        fps: as `read_windows`.
        size: as `read_windows`.
        longest: maximum number of frames; `info["cut_off_at"]` records a cut.
        fit: as `read_windows`.
        stride: as `read_windows`.
        frame_sizes: as `read_windows`.
    Returns:
        A list with the track as its only clip.
    Raises:
        ClipError, MemoryError: as `read_windows`.
    """
    # One more frame shows whether the video continues.
    chosen, info = _read_grid(source, num_frames, longest + 1, fps, _sizes(size, frame_sizes), 0.0, fit, stride)
    return [_clip(chosen[:longest], info | ({"cut_off_at": longest} if len(chosen) > longest else {}))]


def read_clip(source: bytes | str | Path, num_frames: int, fps: float, size: int, start_seconds: float = 0.0) -> Clip:
    """Decodes the first clip of a video, see `read_windows`."""
    return read_windows(source, num_frames, fps, size, 1, start_seconds)[0]


def read_spans(
    source: bytes | str | Path,
    spans: Sequence[tuple[float, float | None]],
    num_frames: int,
    fps: float,
    size: int,
    windows: int = 1,
    longest: int | None = None,
    fit: Fit = "crop",
    stride: int | None = None,
    shots: dict[str, Any] | None = None,
    frame_sizes: Sequence[Sequence[int]] = (),
) -> list[list[Clip] | ClipError]:
    """Decodes spans of one video in one pass, each as a file that contains only the frames of the span.

    A span (start, end) has the frames stamped from start to before end, in seconds since the first displayed frame and
    to half a millisecond. Its grid begins at its first frame, so that it never shows a frame of the shot before. Where
    the packets have stamps, what lies between the spans is not decoded, except from the key frame before a span.

    Args:
        source: the bytes of a video file, or its path.
        spans: an end of None is the end of the video.
        num_frames: F, frames of each window, and the minimum of a track.
        fps: grid points per second.
        size: side of the square, in pixels.
        windows: maximum number of windows of a span.
        longest: maximum number of frames of a track; None for windows.
        fit: how a frame fills the square, or its frame size.
        stride: in frames; None uses the grid.
        shots: fields of a `ShotSpec`; each span is split into its shots, as `read_shots` does.
        frame_sizes: as `read_windows`; the first frame of a span decides that of all its shots.
    Returns:
        For each span what `read_windows`, `read_track` or `read_shots` returns or raises. Further reasons:
        `span_out_of_range`, for a span that begins after the end of the video or ends more than a second after it.
    Raises:
        ClipError: the video cannot be opened. MemoryError: the frames do not fit.
    """
    least, wanted = num_frames, num_frames * windows if longest is None else longest + 1
    spec = None if shots is None else ShotSpec(**shots)
    parts = any(span != (0.0, None) for span in spans)  # of the video: only then frames can be skipped
    sizes = _sizes(size, frame_sizes)
    results = _read_span_grids(source, spans, least, wanted, fps, sizes, fit, stride, spec, parts)
    return [
        grids
        if isinstance(grids, ClipError)
        else [clip for grid in grids for clip in _clips_of(grid, num_frames, windows, longest)]
        for grids in results
    ]


def read_shots(source: bytes | str | Path, **grid: Any) -> list[Clip]:
    """Decodes the windows of each shot of a video in one pass, each shot as a file that contains only its frames.

    The shots are those of `tasks.video.shots`. The info of a clip has its `shot`: its `number` among those that give a
    clip, how many there are (`of`), its `start` and `end` in seconds since the first frame of the video (None: until
    its end), and the number of shots that are left out because they are `too_short`.

    Args:
        source: the bytes of a video file, or its path.
        grid: as of `read_spans`.
    Raises:
        ClipError, MemoryError: as `read_windows`; `too_short` if no shot gives a window. MissingPackageError: the rule
            needs a package.
    """
    [clips] = read_spans(source, [(0.0, None)], **grid)
    if isinstance(clips, ClipError):
        raise clips
    return clips


def _sizes(size: int, frame_sizes: Sequence[Sequence[int]]) -> list[FrameSize]:
    return [FrameSize(*sides) for sides in frame_sizes] or [FrameSize(size, size)]


def _clips_of(grid: _Grid, num_frames: int, windows: int, longest: int | None) -> list[Clip]:
    if longest is not None:
        cut = {"cut_off_at": longest} if len(grid.chosen) > longest else {}
        return [_clip(grid.chosen[:longest], grid.info | cut)]
    return [
        _clip(grid.chosen[window * num_frames : (window + 1) * num_frames], grid.info | {"window": window})
        for window in range(len(grid.chosen) // num_frames)
    ]


def _clip(part: list[tuple[float, np.ndarray]], info: dict[str, Any], start_seconds: float = 0.0) -> Clip:
    times = np.asarray([t + start_seconds for t, _ in part], dtype=np.float32)
    return Clip(np.stack([pixels for _, pixels in part]), times, info)


class _Grid:
    """Takes the frames of one clip from a stream of frames: those displayed at its grid points, or every n-th.

    Frames stamped before `since`, in seconds from the begin of the grid, are not displayed.
    """

    def __init__(self, wanted: int, fps: float, stride: int | None, framing: Framing, since: float = 0.0) -> None:
        self._wanted, self._fps, self._stride = wanted, fps, stride
        self._framing, self._since = framing, since
        self._displayed: tuple[av.VideoFrame, float] | None = None
        self._count = 0
        self.chosen: list[tuple[float, np.ndarray]] = []
        self.duration = 0.0
        self.corrupt = self.backward = self.deinterlaced = 0
        self.info: dict[str, Any] = {}

    @property
    def is_complete(self) -> bool:
        return len(self.chosen) == self._wanted

    def add(self, frame: av.VideoFrame, now: float, was_interlaced: bool) -> None:
        """Adds the next frame, stamped `now` seconds after the begin of the grid."""
        self.corrupt += bool(frame.is_corrupt)
        self.deinterlaced += was_interlaced
        self.backward += self._displayed is not None and now < self._displayed[1]
        if self._stride is not None:
            self._displayed = frame, now
            if self._count % self._stride == 0:
                self._take()
        else:
            self._take_until(now)
        self._count += 1
        self.duration = max(self.duration, now)
        if now >= self._since:
            self._displayed = frame, now

    def finish(self, rate: float, end: float = math.inf) -> None:
        """Takes the remaining grid points that the last frame is displayed at: its own duration, at most one step.

        Args:
            rate: native frames per second, 0 if unknown.
            end: of the span, in seconds since the begin of the grid.
        """
        if self._stride is None:
            step = 1.0 / self._fps
            self._take_until(min(self.duration + min(1.0 / rate if rate > 0 else step / 2, step), end))

    def _take_until(self, now: float) -> None:
        step = 1.0 / self._fps
        while self._displayed is not None and not self.is_complete and len(self.chosen) * step < now - 1e-6:
            self._take()

    def _take(self) -> None:
        assert self._displayed is not None
        frame, time = self._displayed
        if self._stride is None and self.chosen and self.chosen[-1][0] == time:
            self.chosen.append(self.chosen[-1])
        else:
            self.chosen.append((time, self._framing.pixels(frame)))
        if len(self.chosen) == 1:
            self.info.update(
                pixel_format=frame.format.name,
                **colour_of(frame).record(),
                rotation=frame.rotation,
                pixel_aspect=self._framing.aspect,
                resize_crop=list(self._framing.box(frame)),
            )


def open_container(source: bytes | str | Path) -> InputContainer:
    """Opens the bytes of a video, or its path. Containers that list other addresses are not opened."""
    file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    return av.open(file, "r", options={"format_whitelist": CONTAINERS}, metadata_errors="ignore")


@contextmanager
def _open(source: bytes | str | Path) -> Iterator[tuple[InputContainer, VideoStream, dict[str, Any]]]:
    """Opens a video and yields its container, its stream and what is known of the stream."""
    with open_container(source) as container:
        stream = main_stream(container, lambda: open_container(source))
        if stream is None:
            raise ClipError("no_video_stream", "the file has no video stream")
        stream.thread_type = "SLICE"
        stream.codec_context.thread_count = 1  # automatic threads under many workers can deadlock
        info = {
            "decode_version": DECODE_VERSION,
            "codec": stream.codec_context.name,
            "container": container.format.name,
            "average_fps": float(stream.average_rate or 0),
            "width": stream.codec_context.width,
            "height": stream.codec_context.height,
        }
        if container.duration is not None and container.duration > 0:
            info["duration_seconds"] = round(container.duration / av.time_base, 3)
        if len(container.streams.video) > 1:
            info["video_stream"] = container.streams.video.index(stream)
        yield container, stream, info


def _read_grid(
    source: bytes | str | Path,
    least: int,
    wanted: int,
    fps: float,
    sizes: Sequence[FrameSize],
    start_seconds: float = 0.0,
    fit: Fit = "crop",
    stride: int | None = None,
    selective: bool = True,
) -> tuple[list[tuple[float, np.ndarray]], dict[str, Any]]:
    """Returns `least` to `wanted` frames (time, pixels) as `read_windows` takes them, and the `info` of a clip.

    `selective` decodes only the frames needed, with a full decode if the file is damaged or its references are unknown.
    """
    if stride is not None and (stride < 1 or start_seconds):
        raise ValueError(f"stride {stride} from {start_seconds:g} s on, expected at least 1 from 0 s on")
    broken = ""
    grid: _Grid | None = None
    first: float | None = None
    try:
        with _open(source) as (container, stream, info):
            aspect = float(stream.sample_aspect_ratio or 1)
            grid = _Grid(wanted, fps, stride, Framing(sizes, aspect, fit), since=-start_seconds)
            grid.info = info
            # A stride counts every frame.
            selective = selective and stride is None and has_display_stamps(container) and can_skip_frames(stream)
            if selective:
                frames = selected_frames(container, stream, wanted, 1.0 / fps, start_seconds)
            else:
                frames = decoded_frames(container, stream)
            for frame, was_interlaced in deinterlaced(frames):
                if frame.pts is None or frame.time is None:
                    raise ClipError("no_timestamps", "a frame has no presentation stamp")
                first = frame.time if first is None else first
                grid.add(frame, frame.time - first - start_seconds, was_interlaced)
                if grid.is_complete:
                    break
            grid.finish(float(stream.average_rate or fps))
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, ClipError | MemoryError):
            raise
        if selective and grid is not None and not isinstance(error, UnsupportedColourError):
            return _read_grid(source, least, wanted, fps, sizes, start_seconds, fit, stride, selective=False)
        broken = _broken(error, grid, stride, first)
        if grid is None or len(grid.chosen) < least:
            raise ClipError("damaged" if grid is not None and grid.chosen else "undecodable", broken) from error
    assert grid is not None
    _complete(grid, least, fps, stride, start_seconds, first, broken)
    return grid.chosen, grid.info


def _broken(error: Exception, grid: _Grid | None, stride: int | None, first: float | None) -> str:
    """Describes where decoding ended. Raises ClipError for errors that have a reason of their own."""
    if isinstance(error, UnsupportedColourError):
        raise ClipError("unsupported_colour", str(error)) from error
    if isinstance(error, av.EOFError) and first is None:
        raise ClipError("no_frames", "the file ends before its first frame") from error
    return f"{type(error).__name__} after {len(grid.chosen) if grid else 0} {'grid ' if stride is None else ''}frames"


def _complete(
    grid: _Grid,
    least: int,
    fps: float,
    stride: int | None,
    start_seconds: float,
    first: float | None,
    broken: str = "",
) -> None:
    """Adds what is counted to the info of a grid. Raises ClipError if it has too few frames."""
    if first is None:
        raise ClipError("no_frames", "the video stream has no frame that can be decoded")
    if len(grid.chosen) < least:
        raise ClipError(
            "too_short",
            f"{max(grid.duration, 0):.2f} s give {len(grid.chosen)} frames at "
            f"{f'{fps:g} fps' if stride is None else f'a stride of {stride}'}, expected at least {least}",
        )
    info = grid.info
    info |= {"corrupt_frames": grid.corrupt, "backward_stamps": grid.backward, "start_seconds": start_seconds}
    if grid.deinterlaced:
        info["deinterlaced_frames"] = grid.deinterlaced
    if broken:
        info["broken"] = broken


def _read_span_grids(
    source: bytes | str | Path,
    spans: Sequence[tuple[float, float | None]],
    least: int,
    wanted: int,
    fps: float,
    sizes: Sequence[FrameSize],
    fit: Fit,
    stride: int | None,
    shots: ShotSpec | None,
    selective: bool = True,
) -> list[list[_Grid] | ClipError]:
    """Returns the grid of each span, or those of its shots, or why it has none.

    `selective` skips what lies between the spans.
    """
    grids: list[_Grid | ShotSplitter[_Grid]] = []
    first: float | None = None
    last = 0.0
    error: Exception | None = None
    duration: float | None = None  # of the video, once it is known
    rate = fps
    starts = [start - SPAN_TOLERANCE for start, _ in spans]
    ends = [math.inf if end is None else end - SPAN_TOLERANCE for _, end in spans]
    begins: list[float | None] = [None] * len(spans)  # the stamp of the first frame of each span
    try:
        with _open(source) as (container, stream, info):
            aspect, rate = float(stream.sample_aspect_ratio or 1), float(stream.average_rate or fps)

            def new_grid(framing: Framing) -> _Grid:
                grid = _Grid(wanted, fps, stride, framing)
                grid.info = dict(info)
                return grid

            factories = [functools.partial(new_grid, Framing(sizes, aspect, fit)) for _ in spans]
            grids = [new() if shots is None else ShotSplitter(shots, new, rate) for new in factories]
            selective = selective and has_display_stamps(container) and alpha_decoder(stream) is None
            if selective:
                frames, first, duration = frames_of_spans(container, stream, starts, ends)
            else:
                frames = decoded_frames(container, stream)
            for frame, was_interlaced in deinterlaced(frames):
                if frame.pts is None or frame.time is None:
                    raise ClipError("no_timestamps", "a frame has no presentation stamp")
                first = frame.time if first is None else first
                now = frame.time - first
                last = max(last, now)
                for place, grid in enumerate(grids):
                    if starts[place] <= now < ends[place] and not grid.is_complete:
                        begin = begins[place] = now if begins[place] is None else begins[place]
                        assert begin is not None
                        grid.add(frame, now - begin, was_interlaced)
                # Whether a span ends within the video shows only at its end.
                if all(
                    now >= end or (grid.is_complete and (duration is not None or end == math.inf))
                    for grid, end in zip(grids, ends, strict=True)
                ):
                    break
            else:
                duration = max(last + (1.0 / rate if rate > 0 else 0.0), duration or 0.0)
            for grid, begin, (_, end) in zip(grids, begins, spans, strict=True):
                grid.finish(rate, math.inf if end is None else end - (begin or 0.0))
    except (av.FFmpegError, ValueError) as raised:
        if isinstance(raised, ClipError | MemoryError):
            raise
        if selective and not isinstance(raised, UnsupportedColourError):
            return _read_span_grids(source, spans, least, wanted, fps, sizes, fit, stride, shots, selective=False)
        if not grids:
            raise ClipError("undecodable", _broken(raised, None, stride, first)) from raised
        error = raised

    def result(place: int, grid: _Grid | ShotSplitter[_Grid]) -> list[_Grid] | ClipError:
        start, end = spans[place]
        if duration is not None and (start >= duration or (end is not None and end > duration + SPAN_OVERHANG)):
            shown = f"{start:g} s to {'the end' if end is None else f'{end:g} s'}"
            return ClipError("span_out_of_range", f"a span from {shown}, the video has {duration:.2f} s")
        if isinstance(grid, ShotSplitter):
            broken = "" if error is None else f"{type(error).__name__} after {len(grid.shots)} shots"
            return _shots_of(grid, begins[place] or 0.0, least, fps, stride, first, broken)
        broken = _broken(error, grid, stride, first) if error is not None and not grid.is_complete else ""
        if broken and len(grid.chosen) < least:
            return ClipError("damaged", broken)
        try:
            _complete(grid, least, fps, stride, 0.0, first, broken)
        except ClipError as too_short:
            return too_short
        return [grid]

    return [result(place, grid) for place, grid in enumerate(grids)]


def _shots_of(
    splitter: ShotSplitter[_Grid],
    begin: float,
    least: int,
    fps: float,
    stride: int | None,
    first: float | None,
    broken: str,
) -> list[_Grid] | ClipError:
    """Returns the grids of the shots that are long enough; the shots before a break of the file are complete."""
    complete, too_short = [], splitter.too_short
    for shot in splitter.shots:
        try:
            _complete(shot.grid, least, fps, stride, 0.0, first)
        except ClipError:
            too_short += 1
            continue
        end = None if shot.end is None else round(begin + shot.end, 3)
        number = {"number": len(complete), "start": round(begin + shot.start, 3), "end": end}
        shot.grid.info["shot"] = number
        complete.append(shot.grid)
    for grid in complete:
        grid.info["shot"] |= {"of": len(complete), "too_short": too_short}
        grid.info |= {"broken": broken} if broken else {}
    if complete:
        return complete
    if broken:
        return ClipError("damaged", broken)
    if first is None:
        return ClipError("no_frames", "the video stream has no frame that can be decoded")
    return ClipError("too_short", f"none of {too_short} shots gives {least} frames")
