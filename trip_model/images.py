"""Reads a photo as the pixels of a frame and writes pixels as a video, a looping image or png files.

*Pixels* are uint8 [F, H, W, 3] RGB.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from trip_model.request_limits import MAX_ASPECT, MAX_PHOTO_PIXELS, readable_formats, without_png_text

# Pillow's names of the formats that `load_image` reads. Never EPS: Pillow opens it by running Ghostscript.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM")
FRAME_NAME = "{:03d}.png"
VIDEO_SUFFIXES = (".mp4", ".webm", ".gif", ".webp")
# One thread, no B-frames, no look-ahead: x264 then nearly always writes the same bytes for the same frames.
_CODECS = {
    "mp4": (
        "libx264",
        {"preset": "veryfast", "bf": "0", "mbtree": "0", "sc_threshold": "0", "rc-lookahead": "0"},
    ),
    "webm": ("libvpx-vp9", {"b": "0", "deadline": "good", "cpu-used": "4", "lag-in-frames": "0"}),
}
PhotoSource = bytes | str | Path | Image.Image | np.ndarray
PhotoFit = Literal["crop", "pad"]  # crop: cover the frame. pad: lie in it as a whole


def square_box(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Returns how to resize the shorter side to `size` and crop the centre: (new width, new height, left, top)."""
    return crop_box(width, height, (size, size))


def crop_box(width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns how to cover (height, width) and crop the centre: (new width, new height, left, top)."""
    scale = max(size[0] / height, size[1] / width)
    new_height, new_width = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    return new_width, new_height, (new_width - size[1]) // 2, (new_height - size[0]) // 2


def frame_size(
    source: PhotoSource, side: int, multiple: int, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Returns the (height, width) nearest to a photo's aspect ratio, in multiples of `multiple`, in pixels.

    Without `height` and `width` the area is near side x side; with one of them, the other follows.
    """
    photo_width, photo_height = open_photo(source).size
    aspect = photo_width / photo_height

    def rounded(value: float) -> int:
        return max(multiple, round(value / multiple) * multiple)

    if height is not None:
        return height, width or rounded(height * aspect)
    if width is not None:
        return rounded(width / aspect), width
    return rounded(side / aspect**0.5), rounded(side * aspect**0.5)


def load_image(source: PhotoSource, size: int | tuple[int, int], fit: PhotoFit = "crop") -> np.ndarray:
    """Reads a photo as uint8 [H, W, 3]: EXIF rotation applied, transparency on white, cropped like a video frame.

    `size` is the side of a square, or (height, width). With `fit="crop"` the photo covers it and its centre is kept;
    with `pad` the whole photo lies in it, on black.

    Colours of an embedded ICC profile become sRGB; a profile that cannot be applied is ignored. Files and bytes are
    read in `PHOTO_FORMATS` only. Pixels of more than 8 bits are scaled: 16-bit pixels (also in
    Pillow's modes `I;16` and `I`) from 0..65535, floats from 0..1. An array is [H, W] or [H, W, C] with 1 to 4 channels
    (gray, gray and alpha, RGB, RGBA). An array that is uint8 [H, W, 3] already is returned as it is.

    Raises:
        ValueError: not an image of these formats, more than `MAX_PHOTO_PIXELS` pixels, sides whose ratio exceeds
            `MAX_ASPECT`, an array of another shape or type, or values outside their range.
    """
    size = (size, size) if isinstance(size, int) else size
    if isinstance(source, np.ndarray) and source.shape == (*size, 3) and source.dtype == np.uint8:
        return source
    image = open_photo(source)
    if fit == "pad":
        image = ImageOps.contain(image, (size[1], size[0]), Image.Resampling.BICUBIC)
        padded = Image.new("RGB", (size[1], size[0]))
        padded.paste(image, ((size[1] - image.width) // 2, (size[0] - image.height) // 2))
        return np.asarray(padded, dtype=np.uint8)
    width, height, left, top = crop_box(image.width, image.height, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size[1], top + size[0])), dtype=np.uint8)


def open_photo(source: PhotoSource) -> Image.Image:
    """Returns a photo at its own size, RGB and upright, as `load_image` describes; raises ValueError as it does."""
    if isinstance(source, np.ndarray):
        image = _from_array(source)
    elif isinstance(source, Image.Image):
        image = source
    else:
        name = "the given bytes" if isinstance(source, bytes) else str(source)
        try:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            image = Image.open(io.BytesIO(without_png_text(data)), formats=readable_formats(PHOTO_FORMATS))
            if image.width * image.height > MAX_PHOTO_PIXELS:
                raise ValueError(f"{name}: {image.width}x{image.height} pixels, expected at most {MAX_PHOTO_PIXELS}")
            image.load()
        except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
            raise ValueError(f"{name} is not an image that can be read; give a JPEG, PNG or WebP photo") from error
        except OSError as error:
            if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
                raise ValueError(f"{name}: {error.strerror}; give the path of a photo") from error
            raise ValueError(f"{name} is damaged ({error}); give a complete JPEG, PNG or WebP photo") from error
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(
            f"a photo of {image.width}x{image.height} pixels, expected at most {MAX_ASPECT} times as long as wide"
        )
    with contextlib.suppress(Exception):  # malformed EXIF: SyntaxError, struct.error or another, undocumented
        image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion clips at 255
        image = _from_array(np.asarray(image), image.info.get("transparency"))
    if profile or image.mode == "LAB":
        image = _to_srgb(image, profile)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts an image to sRGB by its ICC profile; returns it unchanged if the profile cannot be applied."""
    if image.mode in ("P", "PA", "1"):
        image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
    has_alpha = image.mode in ("RGBA", "LA")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
        if profile and ImageCms.getProfileDescription(source).startswith("sRGB"):
            return image
        opaque = image.convert("RGB" if image.mode == "RGBA" else "L") if has_alpha else image
        if "transparency" in image.info and not has_alpha:  # a colour of the source, which the conversion changes
            image = image.convert("RGBA")
            opaque, has_alpha = image.convert("RGB" if opaque.mode == "RGB" else "L"), True
        srgb = ImageCms.profileToProfile(
            opaque, source, ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # malformed, or of another colour space
        return image
    assert srgb is not None
    if has_alpha:
        srgb.putalpha(image.getchannel("A"))
    return srgb


def _from_array(values: np.ndarray, transparent: int | None = None) -> Image.Image:
    """Converts an array to an 8-bit image; gray pixels of the value `transparent` get alpha 0. Raises ValueError."""
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


def video_bytes(
    pixels: np.ndarray,
    fps: float,
    format: str = "mp4",
    crf: int = 16,
    metadata: Mapping[str, Any] | None = None,
) -> bytes:
    """Encodes pixels uint8 [F, H, W, 3] as one of `VIDEO_SUFFIXES`, without the dot.

    An mp4 is H.264, yuv420p, tagged BT.709, with its index at the front; a webm is VP9 of the same colours; gif and
    webp loop. A gif shows a frame for at least 20 ms, because browsers show shorter ones for 100 ms.

    Args:
        pixels: the frames.
        fps: frames per second.
        format: `mp4`, `webm`, `gif` or `webp`.
        crf: quality of mp4 and webm, lower is better.
        metadata: written into the file as JSON: the comment of mp4, webm and gif, the EXIF description of webp.
    Raises:
        ValueError: another format, or odd sides for mp4 or webm.
    """
    if f".{format}" not in VIDEO_SUFFIXES:
        known = ", ".join(repr(suffix[1:]) for suffix in VIDEO_SUFFIXES)
        raise ValueError(f"video format {format!r}, expected one of {known}")
    text = None if metadata is None else json.dumps(dict(metadata), sort_keys=True)
    if format in ("gif", "webp"):
        return _looping_image(pixels, fps, format, text)
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames of {width}x{height}, {format} needs even sides")
    import av  # only to write a video
    from av.video.reformatter import ColorRange, Colorspace

    # `faststart` reopens the file to move its index to the front, so that a browser plays it while it loads.
    options = {"movflags": "faststart"} if format == "mp4" else {"fflags": "+bitexact"}  # or a random id in each webm
    with tempfile.TemporaryDirectory(prefix="trip-video-") as folder:
        path = Path(folder) / f"video.{format}"
        with av.open(str(path), "w", format=format, options=options) as container:
            if text is not None:
                container.metadata["comment"] = text
            codec, settings = _CODECS[format]
            stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": str(crf), **settings}
            stream.codec_context.thread_count = 1
            # Without tags a player guesses the matrix from the size. The numbers are BT.709's in ITU-T H.273.
            stream.codec_context.color_range = ColorRange.MPEG
            stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
            for frame in pixels:
                rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                yuv = rgb.reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    src_color_range=ColorRange.JPEG,
                    dst_color_range=ColorRange.MPEG,
                )
                container.mux(stream.encode(yuv))
            container.mux(stream.encode())
        return path.read_bytes()


def generated_metadata(**values: Any) -> dict[str, Any]:
    """Returns what a file says of its origin: that it is generated, by which version, and the given values."""
    from trip_model import __version__

    return {"generated": True, "version": f"trip-i2v {__version__}"} | {
        name: value for name, value in values.items() if value is not None
    }


def _looping_image(pixels: np.ndarray, fps: float, format: str, text: str | None) -> bytes:
    buffer = io.BytesIO()
    unit, shortest = (10, 20) if format == "gif" else (1, 1)  # ms; a gif counts in hundredths of a second
    ends = [round(1000 * (index + 1) / fps / unit) for index in range(len(pixels))]
    durations = [max(shortest, (end - begin) * unit) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    if format == "gif":
        frames = [Image.fromarray(f).quantize(128, dither=Image.Dither.NONE) for f in pixels]
        comment = {} if text is None else {"comment": text.encode()}
        frames[0].save(
            buffer,
            "GIF",
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
            optimize=False,
            **comment,
        )
        return buffer.getvalue()
    frames = [Image.fromarray(f) for f in pixels]
    exif = Image.Exif()
    if text is not None:
        exif[ExifTags.Base.ImageDescription] = text
    frames[0].save(
        buffer, "WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=90, exif=exif
    )
    return buffer.getvalue()


def check_video_target(path: str | Path) -> None:
    """Checks, before a clip is made, that `write_video` can write it to `path`.

    Raises:
        ValueError: another suffix; a folder where a file is expected, or the reverse; a place that is not writable; or
            a folder for frames that contains anything but numbered frames, which `write_video` replaces.
    """
    path = Path(path)
    is_file = path.suffix.lower() in VIDEO_SUFFIXES
    if path.suffix and not is_file:
        files = ", ".join(VIDEO_SUFFIXES)
        raise ValueError(f"{path} ends in {path.suffix!r}; name a file of {files}, or a folder for png frames")
    if path.exists() and path.is_dir() == is_file:
        kind, expected = ("a folder", "a file") if is_file else ("a file", "a folder for png frames")
        raise ValueError(f"{path} is {kind}; name {expected}, or name a file of {', '.join(VIDEO_SUFFIXES)}")
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if existing != path and not existing.is_dir():
        raise ValueError(f"{path}: {existing} is not a folder; name another folder")
    if not os.access(existing, os.W_OK | (os.X_OK if existing.is_dir() else 0)):
        raise ValueError(f"{path}: {existing} is not writable; name another place")
    if path.is_dir():
        other = [p.name for p in path.iterdir() if not p.name.startswith(".") and not _is_frame(p)]
        if other:
            raise ValueError(f"{path} contains {min(other)}, which is not a frame; name a new or empty folder")


def write_video(
    path: str | Path, pixels: np.ndarray, fps: float, crf: int = 16, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Writes pixels uint8 [F, H, W, 3] as a file of `VIDEO_SUFFIXES`, else as a folder of numbered png files.

    Replaces what `path` is: the file, or the numbered frames of an earlier clip. `metadata` is as in `video_bytes`; a
    png has it as its text `Comment`. Raises ValueError as `check_video_target` does.
    """
    path = Path(path)
    check_video_target(path)
    if path.suffix:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(video_bytes(pixels, fps, path.suffix.lower()[1:], crf, metadata))
    else:
        path.mkdir(parents=True, exist_ok=True)
        for earlier in filter(_is_frame, list(path.iterdir())):
            earlier.unlink()
        text = PngImagePlugin.PngInfo()
        if metadata is not None:
            text.add_text("Comment", json.dumps(dict(metadata), sort_keys=True))
        for index, frame in enumerate(pixels):
            Image.fromarray(frame).save(path / FRAME_NAME.format(index), pnginfo=text)
    return path


def _is_frame(path: Path) -> bool:
    return path.suffix == ".png" and path.stem.isdecimal() and len(path.stem) >= 3
