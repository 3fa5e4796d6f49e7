"""Decodes videos into clips on a time grid (Section 4.1) or with a stride.

*Pixels* are uint8 [F, H, W, 3] RGB: the shorter side is resized and the centre cropped, or with `fit="squash"` the
entire frame is resized to the square.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from tasks.video.frame import frame_box, has_full_range, to_square
from tasks.video.selective_decode import can_skip_frames, selected_frames
from trip_model.config import Fit

# Containers that hold their own frames. A playlist would make the decoder open the addresses it lists.
CONTAINERS = "mov,matroska,avi,ogg,flv,mpeg,mpegvideo,mpegts,asf,gif"


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
        fit: how a frame fills the square.
        stride: in frames; None uses the grid. Needs `start_seconds` 0.
    Raises:
        ClipError: `undecodable`, `no_video_stream`, `no_timestamps`, `damaged` (broken before the end of the
            first window) or `too_short`. MemoryError: the frames do not fit.
    """
    chosen, info = _read_grid(source, num_frames, num_frames * windows, fps, size, start_seconds, fit, stride)
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
    Returns:
        A list with the track as its only clip.
    Raises:
        ClipError, MemoryError: as `read_windows`.
    """
    # One more frame shows whether the video continues.
    chosen, info = _read_grid(source, num_frames, longest + 1, fps, size, 0.0, fit, stride)
    return [_clip(chosen[:longest], info | ({"cut_off_at": longest} if len(chosen) > longest else {}))]


def read_clip(source: bytes | str | Path, num_frames: int, fps: float, size: int, start_seconds: float = 0.0) -> Clip:
    """Decodes the first clip of a video, see `read_windows`."""
    return read_windows(source, num_frames, fps, size, 1, start_seconds)[0]


def _clip(part: list[tuple[float, np.ndarray]], info: dict[str, Any], start_seconds: float = 0.0) -> Clip:
    times = np.asarray([t + start_seconds for t, _ in part], dtype=np.float32)
    return Clip(np.stack([pixels for _, pixels in part]), times, info)


def _read_grid(
    source: bytes | str | Path,
    least: int,
    wanted: int,
    fps: float,
    size: int,
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
    file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    step, half_step = 1.0 / fps, 0.5 / fps
    chosen: list[tuple[float, np.ndarray]] = []
    reformatter = VideoReformatter()
    corrupt = backward = 0
    broken = ""
    info: dict[str, Any] = {}
    duration = 0.0
    try:
        with av.open(file, "r", options={"format_whitelist": CONTAINERS}, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise ClipError("no_video_stream", "the file has no video stream")
            stream = container.streams.video[0]
            aspect = float(stream.sample_aspect_ratio or 1)
            stream.thread_type = "SLICE"
            stream.codec_context.thread_count = 1  # automatic threads under many workers can deadlock
            info = {
                "codec": stream.codec_context.name,
                "container": container.format.name,
                "average_fps": float(stream.average_rate or 0),
                "width": stream.codec_context.width,
                "height": stream.codec_context.height,
            }
            first: float | None = None
            displayed: av.VideoFrame | None = None
            displayed_time = 0.0

            def take() -> None:
                assert displayed is not None
                if stride is None and chosen and chosen[-1][0] == displayed_time:
                    chosen.append(chosen[-1])
                else:
                    chosen.append((displayed_time, to_square(displayed, size, aspect, reformatter, fit)))
                if len(chosen) == 1:
                    info.update(
                        pixel_format=displayed.format.name,
                        range="full" if has_full_range(displayed) else "limited",
                        rotation=displayed.rotation,
                        pixel_aspect=aspect,
                        resize_crop=list(frame_box(displayed, size, aspect, fit)),
                    )

            selective = selective and stride is None and can_skip_frames(stream)  # a stride counts every frame
            selected = selected_frames(container, stream, wanted, step, start_seconds)
            for count, frame in enumerate(selected if selective else container.decode(stream)):
                if frame.pts is None or frame.time is None:
                    raise ClipError("no_timestamps", "a frame has no presentation stamp")
                corrupt += bool(frame.is_corrupt)
                backward += displayed is not None and frame.time < displayed.time
                first = frame.time if first is None else first
                now = frame.time - first - start_seconds
                if stride is not None:
                    displayed, displayed_time = frame, now
                    if count % stride == 0:
                        take()
                else:
                    while displayed is not None and len(chosen) < wanted and len(chosen) * step < now - 1e-6:
                        take()
                duration = max(duration, now)
                if len(chosen) == wanted:
                    break
                if frame.time >= first:
                    displayed, displayed_time = frame, now
            # The last frame is displayed for its own duration, at most one grid step; unknown rates count half a step.
            rate = float(stream.average_rate or fps)
            end = duration + min(1.0 / rate if rate > 0 else half_step, step)
            while stride is None and displayed is not None and len(chosen) < wanted and len(chosen) * step < end - 1e-6:
                take()
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, ClipError | MemoryError):
            raise
        if selective:
            return _read_grid(source, least, wanted, fps, size, start_seconds, fit, stride, selective=False)
        broken = f"{type(error).__name__} after {len(chosen)} {'grid ' if stride is None else ''}frames"
        if len(chosen) < least:
            raise ClipError("damaged" if chosen else "undecodable", broken) from error

    if len(chosen) < least:
        raise ClipError(
            "too_short",
            f"{max(duration, 0):.2f} s give {len(chosen)} frames at "
            f"{f'{fps:g} fps' if stride is None else f'a stride of {stride}'}, expected at least {least}",
        )
    info |= {"corrupt_frames": corrupt, "backward_stamps": backward, "start_seconds": start_seconds}
    if broken:
        info["broken"] = broken
    return chosen, info
