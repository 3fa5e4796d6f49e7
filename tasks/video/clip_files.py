"""Videos as other programs write them for named clips: a file or a folder of numbered frames, read frame by frame."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from infra import storage
from tasks.records import UserError
from tasks.video.decode import ClipError, open_container
from tasks.video.frame import to_square
from tasks.video.streams import decoded_frames, deinterlaced, main_stream
from trip_model.images import load_image

SUFFIXES = (".npz", ".mp4", ".gif", ".webm", ".mov", ".avi", ".mkv", ".m4v")
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def files_of(folder: str, key: str, names: set[str]) -> tuple[str, ...]:
    """Addresses of KEY.npz, a video KEY.mp4, .gif .. or the frames in KEY/, in their order; none if there are none.

    Args:
        folder: where the videos are.
        key: the name of the clip.
        names: the names in the folder.
    Raises:
        UserError: frames whose order cannot be determined.
    """
    for suffix in SUFFIXES:
        for name in (key + suffix, key + suffix.upper()):
            if name in names:
                return (storage.join(folder, name),)
    if key not in names:
        return ()
    frames = storage.join(folder, key)
    frame_names = [n for n in storage.list_dir(frames) if n.lower().endswith(FRAME_SUFFIXES) and not n.startswith(".")]
    return tuple(storage.join(frames, name) for name in _numbered(frames, frame_names))


def _numbered(folder: str, names: Sequence[str]) -> list[str]:
    """The files of one video's frames by their number, however many digits it has.

    Names may hold several numbers; the frame's is the first that no two files share. Where there is none, as in
    SECOND_FRAME, all of them count, from left to right, if each has the same number of digits in every name.

    Raises:
        UserError: names that differ in more than numbers, two files of one number, or a number that is left out.
    """
    if len(names) < 2:
        return list(names)
    parts = {name: re.split(r"([0-9]+)", name.rpartition(".")[0]) for name in names}
    texts = {tuple(split[::2]) for split in parts.values()}
    if len(texts) > 1:
        first, second = sorted(next(n for n in names if tuple(parts[n][::2]) == text) for text in sorted(texts)[:2])
        raise UserError(
            f"the frames in {folder} differ in more than a number ({first!r}, {second!r}), so their order is not known;"
            " name them 000.png, 001.png, .."
        )
    groups = list(zip(*(split[1::2] for split in parts.values()), strict=True))
    for group in groups:
        numbers = sorted(map(int, group))
        if len({*numbers}) < len(numbers):
            continue
        steps = {after - before for before, after in itertools.pairwise(numbers)}
        if len(steps) > 1:
            gap = next(b for b, a in itertools.pairwise(numbers) if a - b > min(steps))
            raise UserError(f"the frames in {folder} have no number {gap + min(steps)}, which follows {gap}; add it")
        position = groups.index(group)
        return sorted(names, key=lambda name: int(parts[name][1::2][position]))
    order = {name: tuple(map(int, split[1::2])) for name, split in parts.items()}
    if len({*order.values()}) < len(names) or any(len({*map(len, group)}) > 1 for group in groups):
        raise UserError(
            f"the frames in {folder} share their numbers ({', '.join(map(repr, sorted(names)[:3]))}, ..), so their"
            " order is not known; name them 000.png, 001.png, .."
        )
    return sorted(names, key=lambda name: order[name])


def read_frames(files: Sequence[str], frames: int, size: int) -> NDArray[np.uint8]:
    """The first frames of one video, uint8 [frames, size, size, 3], resized and cropped as every clip here.

    Frames are taken one by one, whatever rate a file states: methods write the same 16 frames at 4, 8 or 10 a second.

    Raises:
        ClipError: `too_short` or `undecodable`.
    """
    try:
        if files[0].lower().endswith(FRAME_SUFFIXES):
            clip = [load_image(storage.read_bytes(file), size) for file in files[:frames]]
        elif files[0].lower().endswith(".npz"):
            clip = _arrays(storage.read_bytes(files[0]), frames, size)
        else:
            clip = _video(storage.read_bytes(files[0]), frames, size)
    except ClipError:
        raise
    except (ValueError, OSError, KeyError, av.FFmpegError) as error:
        raise ClipError("undecodable", f"{files[0]}: {error}") from error
    if len(clip) < frames:
        raise ClipError("too_short", f"{files[0]} has {len(clip)} frames, {frames} are needed")
    return np.stack(clip)


def _arrays(data: bytes, frames: int, size: int) -> list[NDArray[np.uint8]]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        pixels = file["frames" if "frames" in file.files else file.files[0]]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"frames of {pixels.dtype} {pixels.shape}, expected uint8 [F, H, W, 3]")
    return [f if f.shape[:2] == (size, size) else load_image(f, size) for f in pixels[:frames]]


def _video(data: bytes, frames: int, size: int) -> list[NDArray[np.uint8]]:
    frames_read: list[NDArray[np.uint8]] = []
    reformatter = VideoReformatter()
    with open_container(data) as container:
        stream = main_stream(container, lambda: open_container(data))
        if stream is None:
            raise ClipError("undecodable", "the file holds no video stream")
        stream.codec_context.thread_count = 1
        aspect = float(stream.sample_aspect_ratio or 1)
        for frame, _ in deinterlaced(decoded_frames(container, stream)):
            frames_read.append(to_square(frame, size, aspect, reformatter))
            if len(frames_read) == frames:
                break
    return frames_read
