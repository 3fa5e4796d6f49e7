"""Pixels in and out: decodes clips on a time grid (Section 4.1) or a stride, reads photos, writes mp4, gif and png.

*Pixels* are always uint8 [F, H, W, 3] RGB, centre-cropped to a square after resizing the shorter side, unless a clip
is asked for with `fit="squash"`.
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError

from trip_model.frame import Fit, frame_box, has_full_range, square_box, to_square
from trip_model.sparing import can_spare, needed_frames

# Containers that carry their own frames. A playlist among the clips would make the decoder open what it names.
CONTAINERS = "mov,matroska,avi,ogg,flv,mpeg,mpegvideo,mpegts,asf,gif"
MAX_IMAGE_PIXELS = 64_000_000  # a photo larger than this is refused before it is unpacked (decompression bombs)
MAX_ASPECT = 20  # a photo's longer side over its shorter: the shorter is resized to the frame, the longer with it


class ClipError(ValueError):
    """A video that cannot become a clip: `reason` is a word to count by, `detail` a sentence for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ClipError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Clip:
    """A decoded window of a video, or the whole of it as a track."""

    pixels: np.ndarray  # uint8 [F, H, W, 3]
    times: np.ndarray  # float32 [F], seconds since the video's first shown frame, the true stamps
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

    The grid lies on presentation stamps relative to the first shown frame: grid point k takes the frame on show at
    `start + k / fps` (the last one stamped at or before it), so variable frame rates and late starts come out right.
    Every frame is converted at most once and only when a grid point needs it; one that nothing needs may not even be
    decoded, and what is wrong with it then goes unnoticed. A file that breaks off gives the windows before the break,
    and `info` says what broke; `info` also counts frames that the decoder had to mend (of all those that it decoded,
    shown or not) and stamps that run backwards.

    With a stride there is no grid: frames 0, stride, 2 * stride .. of all that the decoder gives are taken, whatever
    their stamps say.

    Args:
        source: the bytes of a video file, or its path.
        num_frames: F, frames of each clip. fps: grid points per second. size: side of the square, in pixels.
        windows: how many clips at most; clip w starts at `start_seconds + w * num_frames / fps`, or with a stride at
            frame `w * num_frames * stride`.
        fit: what of a frame comes into the square. stride: None takes the grid; there is no `start_seconds` with it.
    Raises:
        ClipError: `undecodable`, `no_video_stream`, `no_timestamps`, `damaged` (broken before the first window was
            whole) or `too_short`. MemoryError: the frames do not fit.
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
    """Decodes a whole video as `read_windows` does, whose window i is frames i * n to (i + 1) * n here.

    Args:
        num_frames: frames that the track has at least. longest: frames after which it is cut off; `info` then says so.
    Returns:
        The track alone, a list as `read_windows` gives it.
    Raises:
        ClipError, MemoryError: as `read_windows`.
    """
    # One more tells whether the video goes on.
    chosen, info = _read_grid(source, num_frames, longest + 1, fps, size, 0.0, fit, stride)
    return [_clip(chosen[:longest], info | ({"cut_off_at": longest} if len(chosen) > longest else {}))]


def read_clip(source: bytes | str | Path, num_frames: int, fps: float, size: int, start_seconds: float = 0.0) -> Clip:
    """The first clip of a video, see `read_windows`."""
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
    sparing: bool = True,
) -> tuple[list[tuple[float, np.ndarray]], dict[str, Any]]:
    """`least` to `wanted` frames as `read_windows` takes them, (time, pixels), and what the decoder says of them.

    `sparing`: decodes only what is needed; a file for which that cannot be told, or damaged, is then read anew in full.
    """
    if stride is not None and (stride < 1 or start_seconds):
        raise ValueError(f"stride {stride} from {start_seconds:g} s on, expected at least 1 and from 0 s on")
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
                raise ClipError("no_video_stream", "the file holds no video stream")
            stream = container.streams.video[0]
            aspect = float(stream.sample_aspect_ratio or 1)
            stream.thread_type = "SLICE"
            stream.codec_context.thread_count = 1  # automatic threads under many workers can hang for good
            info = {
                "codec": stream.codec_context.name,
                "container": container.format.name,
                "average_fps": float(stream.average_rate or 0),
                "width": stream.codec_context.width,
                "height": stream.codec_context.height,
            }
            first: float | None = None
            shown: av.VideoFrame | None = None
            shown_time = 0.0

            def take() -> None:
                assert shown is not None
                if stride is None and chosen and chosen[-1][0] == shown_time:
                    chosen.append(chosen[-1])
                else:
                    chosen.append((shown_time, to_square(shown, size, aspect, reformatter, fit)))
                if len(chosen) == 1:
                    info.update(
                        pixel_format=shown.format.name,
                        range="full" if has_full_range(shown) else "limited",
                        rotation=shown.rotation,
                        pixel_aspect=aspect,
                        resize_crop=list(frame_box(shown, size, aspect, fit)),
                    )

            sparing = sparing and stride is None and can_spare(stream)  # frames are counted as they come
            some = needed_frames(container, stream, wanted, step, start_seconds)
            for count, frame in enumerate(some if sparing else container.decode(stream)):
                if frame.pts is None or frame.time is None:
                    raise ClipError("no_timestamps", "a frame carries no presentation stamp")
                corrupt += bool(frame.is_corrupt)
                backward += shown is not None and frame.time < shown.time
                first = frame.time if first is None else first
                now = frame.time - first - start_seconds
                if stride is not None:
                    shown, shown_time = frame, now
                    if count % stride == 0:
                        take()
                else:
                    while shown is not None and len(chosen) < wanted and len(chosen) * step < now - 1e-6:
                        take()
                duration = max(duration, now)
                if len(chosen) == wanted:
                    break
                if frame.time >= first:
                    shown, shown_time = frame, now
            # The last frame stays on show for its own length; half a grid step of grace covers a rounded-down end.
            rate = float(stream.average_rate or fps)
            end = duration + min(1.0 / rate if rate > 0 else half_step, step)
            while stride is None and shown is not None and len(chosen) < wanted and len(chosen) * step < end - 1e-6:
                take()
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, ClipError | MemoryError):
            raise
        if sparing:
            return _read_grid(source, least, wanted, fps, size, start_seconds, fit, stride, sparing=False)
        broken = f"{type(error).__name__} after {len(chosen)} {'grid ' if stride is None else ''}frames"
        if len(chosen) < least:
            raise ClipError("damaged" if chosen else "undecodable", broken) from error

    if len(chosen) < least:
        raise ClipError(
            "too_short",
            f"{max(duration, 0):.2f} s give {len(chosen)} frames at "
            f"{f'{fps:g} fps' if stride is None else f'a stride of {stride}'}, {least} are needed",
        )
    info |= {"corrupt_frames": corrupt, "backward_stamps": backward, "start_seconds": start_seconds}
    if broken:
        info["broken"] = broken
    return chosen, info


def load_image(source: bytes | str | Path | Image.Image | np.ndarray, size: int) -> np.ndarray:
    """A photo as uint8 [size, size, 3]: EXIF turn applied, transparency on white, centre-cropped like a video frame.

    Pixels of more than 8 bits are scaled: 16-bit ones (of Pillow's modes `I;16` and `I` too) from 0..65535, floats from
    0..1. An array is [H, W] or [H, W, C] with 1 to 4 channels (gray, gray and alpha, RGB, RGBA).

    Raises:
        ValueError: not an image, more than `MAX_IMAGE_PIXELS` pixels, a strip longer than `MAX_ASPECT` says, an
            array of another shape or type, or values outside their range.
    """
    if isinstance(source, np.ndarray):
        image = _from_array(source)
    elif isinstance(source, Image.Image):
        image = source
    else:
        name = "the given bytes" if isinstance(source, bytes) else str(source)
        try:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{name}: {image.width}x{image.height} pixels, at most {MAX_IMAGE_PIXELS} are taken")
            image.load()
        except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
            raise ValueError(f"{name} is not an image that can be read; give a JPEG, PNG or WebP photo") from error
        except OSError as error:
            if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
                raise ValueError(f"{name}: {error.strerror}; give the path of a photo") from error
            raise ValueError(f"{name} is damaged ({error}); give a whole JPEG, PNG or WebP photo") from error
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"a photo of {image.width}x{image.height} pixels, at most {MAX_ASPECT} times as long as wide")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion clips at 255
        image = _from_array(np.asarray(image), image.info.get("transparency"))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("RGB")
    width, height, left, top = square_box(image.width, image.height, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.uint8)


def _from_array(values: np.ndarray, transparent: int | None = None) -> Image.Image:
    """An array as an image of 8 bits; `transparent` is the value of a gray one whose pixels are. Raises ValueError."""
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or not values.size:
        raise ValueError(f"an array of shape {list(values.shape)}, expected [H, W] or [H, W, C] with 1 to 4 channels")
    values = values.reshape(*values.shape[:2], channels)
    kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
    if kind != "f" and (kind, bits) not in (("u", 8), ("u", 16), ("i", 32)):  # int32 is Pillow's mode `I`
        raise ValueError(f"an array of {values.dtype}, expected uint8, uint16 (0..65535) or floats (0..1)")
    pixels = values
    if values.dtype != np.uint8:
        most = 1.0 if kind == "f" else 65535
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= most):  # NaN too
            raise ValueError(f"pixels of {values.dtype} from {low:g} to {high:g}, expected 0 to {most:g}; scale them")
        pixels = np.rint(values.astype(np.float64) * (255 / most)).astype(np.uint8)
    if transparent is not None and channels == 1:
        pixels = np.concatenate([pixels, np.where(values == transparent, 0, 255).astype(np.uint8)], axis=2)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def video_bytes(pixels: np.ndarray, fps: float, format: str = "mp4", crf: int = 16) -> bytes:
    """Encodes pixels uint8 [F, H, W, 3] as an H.264 mp4 (web-playable, yuv420p) or a looping gif.

    Raises:
        ValueError: a format other than `mp4` or `gif`, or odd sides for mp4.
    """
    if format == "gif":
        frames = [Image.fromarray(f).quantize(128, dither=Image.Dither.NONE) for f in pixels]
        buffer = io.BytesIO()
        frames[0].save(
            buffer, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, optimize=False
        )
        return buffer.getvalue()
    if format != "mp4":
        raise ValueError(f"video format {format!r}, expected 'mp4' or 'gif'")
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames of {width}x{height}, mp4 needs even sides")
    # `faststart` reopens the file to move its index to the front, so a browser plays it before it is whole.
    with tempfile.TemporaryDirectory(prefix="trip-mp4-") as folder:
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            # One thread, no B-frames, no look-ahead: x264 then repeats its bytes for the same frames, nearly always.
            stream.options = {
                "crf": str(crf),
                "preset": "veryfast",
                "bf": "0",
                "mbtree": "0",
                "sc_threshold": "0",
                "rc-lookahead": "0",
            }
            stream.codec_context.thread_count = 1
            for frame in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        return path.read_bytes()


def write_video(path: str | Path, pixels: np.ndarray, fps: float, crf: int = 16) -> Path:
    """Writes pixels uint8 [F, H, W, 3] as `.mp4` or `.gif` by suffix, else as a folder of numbered png files."""
    path = Path(path)
    if path.suffix.lower() in (".mp4", ".gif"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(video_bytes(pixels, fps, path.suffix.lower()[1:], crf))
    elif path.suffix:
        raise ValueError(f"{path} ends in {path.suffix!r}; name an .mp4, a .gif, or a folder for png frames")
    else:
        path.mkdir(parents=True, exist_ok=True)
        for index, frame in enumerate(pixels):
            Image.fromarray(frame).save(path / f"{index:03d}.png")
    return path
