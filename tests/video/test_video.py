"""Clips follow the time grid, photos are read in every format, and invalid files are rejected with a reason."""

from __future__ import annotations

import io
import os
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import EpsImagePlugin, Image, features

from tasks.video.colour import colour_of
from tasks.video.decode import ClipError, read_clip, read_windows
from tasks.video.frame import _on_white, to_square
from trip_model.images import load_image, square_box, video_bytes, write_video


def ramp_video(stamps: list[int], size: tuple[int, int] = (64, 64), time_base: Fraction = Fraction(1, 100)) -> bytes:
    """A lossless video whose frame k is gray of level 10 k, shown from stamps[k] on."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "bgr0"
        stream.time_base = time_base
        stream.codec_context.time_base = time_base
        for k, stamp in enumerate(stamps):
            pixels = np.full((size[1], size[0], 3), 10 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = stamp, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def levels(pixels: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in pixels]


def test_frames_lie_on_the_time_grid() -> None:
    clip = read_clip(ramp_video(list(range(0, 240, 10))), num_frames=8, fps=4.0, size=32)
    # At 10 frames per second the grid points 0, 0.25, 0.5 .. show the frames displayed then.
    assert levels(clip.pixels) == [0, 2, 5, 7, 10, 12, 15, 17]
    np.testing.assert_allclose(clip.times, [0, 0.2, 0.5, 0.7, 1.0, 1.2, 1.5, 1.7], atol=1e-6)
    assert clip.pixels.shape == (8, 32, 32, 3) and clip.pixels.dtype == np.uint8


def test_variable_frame_rate_and_late_start_follow_the_stamps() -> None:
    stamps = [500, 510, 520, 600, 700]  # starts at 5 s; three quick frames, then two slow ones
    clip = read_clip(ramp_video(stamps), num_frames=5, fps=2.0, size=32)
    assert levels(clip.pixels) == [0, 2, 3, 3, 4]


def test_windows_follow_each_other_without_overlap() -> None:
    clips = read_windows(ramp_video(list(range(0, 240, 10))), num_frames=4, fps=5.0, size=32, windows=3)
    assert [levels(c.pixels) for c in clips] == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20, 22]]


def test_a_clip_that_starts_between_two_frames_begins_with_the_displayed_one() -> None:
    clip = read_clip(ramp_video(list(range(0, 240, 10))), num_frames=2, fps=4.0, size=32, start_seconds=0.55)
    assert levels(clip.pixels) == [5, 8]
    np.testing.assert_allclose(clip.times, [0.5, 0.8], atol=1e-6)


def test_pixels_that_are_not_square_are_stretched_before_the_crop() -> None:
    picture = np.zeros((64, 32, 3), np.uint8)
    picture[:16] = 255  # a band that a crop of the unstretched frame would lose
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    frame = read_clip(buffer.getvalue(), 2, 4.0, 32).pixels[0]
    assert frame[3].mean() > 240 and frame[16].mean() < 10


def coded(
    codec: str, pixel_format: str, container: str, picture: np.ndarray, frames: int = 8, **settings: object
) -> bytes:
    """A video at 4 fps that shows one picture, uint8 [H, W, 3] or [H, W, 4], in the given coding."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=4)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = pixel_format
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
        frame = frame.reformat(format=pixel_format, dst_color_range=settings.get("color_range"))
        for k in range(frames):
            frame.pts, frame.time_base = k, Fraction(1, 4)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


STEPS = np.repeat(np.repeat(np.array([[[0], [70]], [[140], [255]]], np.uint8), 32, 0), 32, 1).repeat(3, 2)


def corners(pixels: np.ndarray) -> list[int]:
    """The level in the middle of each quarter of a square, row by row."""
    quarter, far = len(pixels) // 4, len(pixels) * 3 // 4
    return [round(float(pixels[y, x].mean())) for y in (quarter, far) for x in (quarter, far)]


@pytest.mark.parametrize(
    ("codec", "pixel_format", "container", "color_range", "expected_range"),
    [
        ("libx264", "yuv420p", "mp4", None, "limited"),
        ("libx264", "yuv420p", "matroska", 1, "limited"),
        ("libx264", "yuv420p", "matroska", 2, "full"),
        ("libx264", "yuvj420p", "mp4", None, "full"),
        ("libx265", "yuv420p10le", "matroska", 1, "limited"),
        ("libx265", "yuv420p10le", "matroska", 2, "full"),
        ("libx264", "gray", "matroska", None, "limited"),
        ("ffv1", "gray", "matroska", None, "full"),
        ("ffv1", "gray10le", "matroska", 2, "full"),
        ("ffv1", "yuv444p16le", "matroska", 1, "limited"),
        ("utvideo", "gbrp", "avi", None, "full"),
        ("mjpeg", "yuvj420p", "avi", None, "full"),
        ("mpeg4", "yuv420p", "avi", None, "limited"),
        ("libvpx-vp9", "yuv420p", "webm", 2, "full"),
        ("png", "rgb24", "mov", None, "full"),
    ],
)
def test_gray_levels_are_kept_in_every_codec(
    codec: str, pixel_format: str, container: str, color_range: int | None, expected_range: str
) -> None:
    settings = {"color_range": color_range} if color_range else {}
    source = STEPS
    if pixel_format == "gray" and codec == "libx264":  # becomes limited yuv420p, so its levels are limited
        source = (16 + STEPS * (219 / 255)).round().astype(np.uint8)
    clip = read_clip(coded(codec, pixel_format, container, source, **settings), 4, 4.0, 64)
    np.testing.assert_allclose(corners(clip.pixels[0]), [0, 70, 140, 255], atol=4)
    assert clip.info["range"] == expected_range and clip.info["corrupt_frames"] == 0


def test_gray_of_limited_range_is_spread_as_colour_is() -> None:
    dark = np.full((64, 64, 3), 16, np.uint8)
    dark[:, 32:] = 235
    settings = {"options": {"x265-params": "log-level=none"}, "color_range": 1}
    clip = read_clip(coded("libx265", "gray", "matroska", dark, **settings), 4, 4.0, 64)
    assert clip.info["pixel_format"] == "gray" and clip.info["range"] == "limited"
    np.testing.assert_allclose(corners(clip.pixels[0]), [0, 255, 0, 255], atol=3)


@pytest.mark.parametrize(
    ("codec", "pixel_format", "container"),
    [("qtrle", "argb", "mov"), ("png", "rgba", "mov"), ("ffv1", "yuva420p", "matroska"), ("ffv1", "bgra", "matroska")],
)
def test_transparency_is_composited_on_white_as_in_a_photo(codec: str, pixel_format: str, container: str) -> None:
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[:32, :32] = (200, 0, 0, 255)
    picture[:32, 32:] = (0, 0, 0, 0)
    picture[32:, :32] = (0, 0, 0, 128)
    picture[32:, 32:] = (0, 0, 200, 255)
    frame = read_clip(coded(codec, pixel_format, container, picture), 4, 4.0, 32).pixels[0]
    assert np.abs(frame.astype(int) - load_image(picture, 32))[[8, 8, 24, 24], [8, 24, 8, 24]].max() <= 5


@pytest.mark.parametrize("pixel_format", ["yuva420p", "yuva444p"])
def test_the_last_column_of_an_odd_width_is_as_transparent_as_the_others(pixel_format: str) -> None:
    picture = np.zeros((64, 65, 4), np.uint8)
    picture[:, 60:] = (200, 0, 0, 255)
    frame = av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pixel_format)
    np.testing.assert_allclose(
        _on_white(frame, colour_of(frame)).to_ndarray(format="rgb24")[:, 64], [[200, 0, 0]] * 64, atol=3
    )


@pytest.mark.parametrize("width", [64, 90, 91, 120, 301])
@pytest.mark.parametrize("aspect", [1.0, 1.5])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj420p", "yuv422p", "yuv420p10le", "gray", "nv12", "bgr0"])
def test_planes_and_packed_pixels_are_the_same_squares(pixel_format: str, aspect: float, width: int) -> None:
    """`to_square` uses whichever is faster; the pixels are the same."""
    picture = np.random.default_rng(width).integers(0, 255, (90, width, 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)
    reformatter, packed = VideoReformatter(), Packed()
    assert np.array_equal(to_square(frame, 64, aspect, reformatter), to_square(frame, 64, aspect, packed))


class Packed:
    """A reformatter that scales to packed pixels only, and then writes them as planes."""

    def __init__(self) -> None:
        self._scaler = VideoReformatter()

    def reformat(self, *args: Any, **options: Any) -> Any:
        return self._scaler.reformat(*args, **options | {"format": "rgb24"}).reformat(format=options["format"])


@pytest.mark.parametrize("size", [(65, 63), (33, 97), (1, 1), (2, 64)])
def test_odd_sides_are_decoded(size: tuple[int, int]) -> None:
    picture = np.full((*size, 3), 90, np.uint8)
    pixels = read_clip(coded("ffv1", "yuv420p", "matroska", picture), 4, 4.0, 32).pixels
    assert pixels.shape == (4, 32, 32, 3) and np.abs(pixels.astype(int) - 90).max() <= 3


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), [0, 70, 140, 255]),
        ((0, 1, -1, 0), [140, 0, 255, 70]),  # a quarter turn clockwise, as phones held upright write it
        ((0, -1, 1, 0), [70, 255, 0, 140]),
        ((-1, 0, 0, -1), [255, 140, 70, 0]),
        ((-1, 0, 0, 1), [70, 0, 255, 140]),  # mirrored
        ((1, 0, 0, -1), [140, 255, 0, 70]),
        ((0, 1, 1, 0), [0, 140, 70, 255]),
    ],
)
def test_turned_and_mirrored_videos_come_out_upright(matrix: tuple[int, int, int, int], shown: list[int]) -> None:
    data = coded("libx264", "yuv420p", "mp4", STEPS)
    a, b, c, d = (value << 16 for value in matrix)
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    track = data.index(plain, data.index(b"tkhd"))
    turned = data[:track] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[track + len(plain) :]
    clip = read_clip(turned, 4, 4.0, 64)
    np.testing.assert_allclose(corners(clip.pixels[0]), shown, atol=4)


def test_info_records_how_a_clip_was_decoded() -> None:
    info = read_clip(coded("libx264", "yuv420p", "mp4", STEPS.repeat(2, 1)), 4, 4.0, 32).info
    assert info["pixel_format"] == "yuv420p" and info["pixel_aspect"] == 1.0 and info["rotation"] == 0
    assert info["resize_crop"] == [64, 32, 16, 0] and info["backward_stamps"] == 0 and "broken" not in info


def test_frames_at_29_97_are_taken_at_their_own_stamps() -> None:
    step = Fraction(1001, 30000)
    clip = read_clip(ramp_video(list(range(25)), time_base=step), num_frames=3, fps=4.0, size=32)
    assert levels(clip.pixels) == [0, 7, 14]
    np.testing.assert_allclose(clip.times, [0, 7 * 1001 / 30000, 14 * 1001 / 30000], atol=1e-3)


def test_a_file_of_one_frame_is_too_short_for_a_clip_and_enough_for_a_frame() -> None:
    with pytest.raises(ClipError, match="too_short"):
        read_clip(ramp_video([0]), num_frames=2, fps=4.0, size=32)
    assert read_clip(ramp_video([0]), num_frames=1, fps=4.0, size=32).pixels.shape == (1, 32, 32, 3)


def noise_video(frames: int = 100) -> bytes:
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return video_bytes(np.stack([np.roll(picture, k, axis=1) for k in range(frames)]), 25.0)


def test_a_truncated_file_gives_the_windows_before_the_break() -> None:
    complete = noise_video()
    cut = complete[: len(complete) // 2]
    want = read_windows(complete, 4, 5.0, 32, 9)
    got = read_windows(cut, 4, 5.0, 32, 9)
    assert 0 < len(got) < len(want) and got[0].info["broken"].startswith("InvalidDataError after")
    for clip, wanted in zip(got, want, strict=False):
        np.testing.assert_array_equal(clip.pixels, wanted.pixels)
    with pytest.raises(ClipError, match="damaged: InvalidDataError after"):
        read_clip(cut, 16, 5.0, 32)


def test_corrupt_frames_are_counted() -> None:
    data = bytearray(noise_video())
    start = data.index(b"mdat") + 2000
    for place in np.random.default_rng(1).integers(start, len(data) - 1, 10):
        data[place] ^= 255
    assert read_clip(bytes(data), 16, 5.0, 32).info["corrupt_frames"] > 0
    assert read_clip(noise_video(), 16, 5.0, 32).info["corrupt_frames"] == 0


@pytest.mark.parametrize("playlist", ["#EXTM3U\n#EXTINF:3.0,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n"])
def test_a_playlist_is_rejected(playlist: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video_bytes(np.zeros((8, 32, 32, 3), np.uint8), 4.0))
    (tmp_path / "list").write_text(playlist.format("a.mp4"))
    for source in (tmp_path / "list", (tmp_path / "list").read_bytes()):
        with pytest.raises(ClipError, match="undecodable"):
            read_clip(source, 2, 4.0, 32)


def test_a_short_video_is_rejected_with_its_length() -> None:
    with pytest.raises(ClipError, match=r"too_short: 0\.90 s give 4 frames") as caught:
        read_clip(ramp_video(list(range(0, 100, 10))), num_frames=16, fps=4.0, size=32)
    assert caught.value.reason == "too_short"


@pytest.mark.parametrize("data", [b"", b"<html>404</html>" * 50, ramp_video([0, 10, 20])[:200]])
def test_a_file_that_is_not_a_video_is_undecodable(data: bytes) -> None:
    with pytest.raises(ClipError) as caught:
        read_clip(data, 2, 4.0, 32)
    assert caught.value.reason in ("undecodable", "no_frames")


def test_square_box_keeps_the_shorter_side_and_the_middle() -> None:
    assert square_box(960, 540, 256) == (455, 256, 99, 0)
    assert square_box(64, 64, 64) == (64, 64, 0, 0)


@pytest.mark.parametrize("format", ["mp4", "gif"])
def test_a_written_video_can_be_read(format: str, tmp_path: Path) -> None:
    pixels = np.stack([np.full((32, 32, 3), 20 * k, np.uint8) for k in range(8)])
    path = write_video(tmp_path / f"clip.{format}", pixels, 4.0)
    back = read_clip(path, 8, 4.0, 32).pixels
    assert np.abs(back.astype(int) - pixels).mean() < 4
    again = read_clip(video_bytes(pixels, 4.0, format), 8, 4.0, 32).pixels
    assert np.abs(again.astype(int) - back).mean() < 1


def test_png_frames_are_lossless(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    folder = write_video(tmp_path / "frames", pixels, 4.0)
    assert np.array_equal(np.stack([np.asarray(Image.open(p)) for p in sorted(folder.iterdir())]), pixels)


def as_bytes(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_photos_of_every_kind_become_rgb_squares() -> None:
    red = Image.new("RGB", (80, 40), (200, 10, 10))
    turned = Image.new("RGB", (80, 40))
    turned.paste((0, 0, 255), (0, 0, 40, 40))
    exif = turned.getexif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    for photo, pixel in [
        (as_bytes(red), (200, 10, 10)),
        (as_bytes(red.convert("L")), (65, 65, 65)),
        (as_bytes(Image.new("RGBA", (9, 9), (0, 0, 0, 0))), (255, 255, 255)),
        (as_bytes(Image.new("RGB", (1, 1), (1, 2, 3))), (1, 2, 3)),
    ]:
        square = load_image(photo, 32)
        assert square.shape == (32, 32, 3) and np.abs(square[16, 16].astype(int) - pixel).max() <= 3
    assert load_image(as_bytes(red.convert("CMYK"), "JPEG"), 32).shape == (32, 32, 3)
    upright = load_image(as_bytes(turned, exif=exif), 40)
    assert upright[2, 20, 2] > 200 and upright[38, 20, 2] < 50


def ramp(top: float, dtype: str) -> np.ndarray:
    """From 0 at the left to `top` at the right: [80, 80]."""
    return np.tile(np.linspace(0, top, 80), (80, 1)).astype(dtype)


def deep(mode: str, values: np.ndarray) -> Image.Image:
    return Image.frombytes(mode, (80, 80), values.tobytes())


DEEP: dict[str, Any] = {
    "I;16": deep("I;16", ramp(65535, "<u2")),
    "I;16L": deep("I;16L", ramp(65535, "<u2")),
    "I;16B": deep("I;16B", ramp(65535, ">u2")),
    "I": deep("I", ramp(65535, "<i4")),
    "F": deep("F", ramp(1, "<f4")),
    "PNG of 16 bits": as_bytes(deep("I;16", ramp(65535, "<u2"))),
    "TIFF of 16 bits": as_bytes(deep("I;16B", ramp(65535, ">u2")), "TIFF"),
    "TIFF of floats": as_bytes(deep("F", ramp(1, "<f4")), "TIFF"),
    "PGM of 16 bits": as_bytes(deep("I", ramp(65535, "<i4")), "PPM"),
    "uint16": ramp(65535, "uint16"),
    "uint16 RGB": np.stack([ramp(65535, "uint16")] * 3, axis=2),
    "big-endian uint16": ramp(65535, ">u2"),
    "float32": ramp(1, "float32"),
    "float64 of one channel": ramp(1, "float64")[..., None],
    "float16 RGBA": np.stack([ramp(1, "float16")] * 3 + [np.ones((80, 80), "float16")], axis=2),
    "uint8": ramp(255, "uint8"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_pixels_of_more_than_8_bits_are_scaled(kind: str) -> None:
    picture = load_image(DEEP[kind], 80)
    assert np.abs(picture.astype(int) - ramp(255, "float64")[..., None]).max() <= 1.5


def test_16_bits_are_scaled_by_257_and_keep_their_turn_and_their_transparent_value() -> None:
    assert (load_image(as_bytes(Image.new("I;16", (80, 80), 200 * 257)), 32) == 200).all()
    assert (load_image(as_bytes(Image.new("I;16", (80, 80), 30000)), 32) == 117).all()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = load_image(as_bytes(deep("I;16", ramp(65535, "<u2")), exif=exif), 80)
    assert turned[0, 0, 0] > 250 and turned[0, -1, 0] < 5
    assert (load_image(as_bytes(Image.new("I;16", (80, 80), 30000), transparency=30000), 32) == 255).all()


@pytest.mark.parametrize(
    ("photo", "message"),
    [
        (Image.new("I", (80, 80), 70000), "pixels of int32 from 70000 to 70000, expected 0 to 65535"),
        (Image.new("I", (80, 80), -1), "from -1 to -1"),
        (Image.new("F", (80, 80), 200.0), "pixels of float32 from 200 to 200, expected 0 to 1; scale them"),
        (np.full((80, 80, 3), np.nan, np.float32), "from nan to nan"),
        (np.zeros((80, 80), np.int64), "an array of int64, expected uint8, uint16 .* or floats"),
        (np.zeros((80, 80), np.uint32), "an array of uint32"),
        (np.zeros((2, 80, 80, 3), np.uint8), r"shape \[2, 80, 80, 3\], expected \[H, W\] or"),
        (np.zeros((3, 80, 80), np.uint8), r"shape \[3, 80, 80\]"),
        (np.zeros((0, 80, 3), np.uint8), r"shape \[0, 80, 3\]"),
    ],
)
def test_an_invalid_array_is_rejected_in_one_sentence(photo: Image.Image | np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_image(photo, 32)


def test_a_photo_equals_the_video_frame_of_the_same_picture() -> None:
    rng = np.random.default_rng(1)
    picture = np.asarray(Image.fromarray(rng.integers(0, 255, (6, 9, 3), dtype=np.uint8)).resize((96, 64), 2))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=4)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    frame = read_clip(buffer.getvalue(), 2, 4.0, 64).pixels[0]
    assert np.abs(frame.astype(int) - load_image(picture, 64)).max() <= 2


@pytest.mark.parametrize(
    ("photo", "message"),
    [
        (b"not a picture", "not an image"),
        ("missing.png", "No such file"),
        (as_bytes(Image.new("RGB", (64, 64)))[:60], "image|damaged"),
        (as_bytes(Image.new("1", (1, 100_000))), "at most 20 times as long"),
    ],
)
def test_a_file_that_is_not_a_photo_is_rejected_in_one_sentence(photo: bytes | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_image(photo, 32)


@pytest.mark.parametrize("name", ["photo.eps", "photo.jpg", ""])
def test_an_eps_file_is_rejected_without_running_ghostscript(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ghostscript-ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow caches whether there is one
    eps = as_bytes(Image.new("RGB", (64, 64)), "EPS")
    (tmp_path / "photo").write_bytes(eps)
    source = (tmp_path / "photo").rename(tmp_path / name) if name else eps
    with pytest.raises(ValueError, match="not an image that can be read; give a JPEG, PNG or WebP photo"):
        load_image(source, 32)
    assert not (tmp_path / "ghostscript-ran").exists()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_every_photo_format_is_read(format: str) -> None:
    if not features.check({"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}.get(format, "pil")):
        pytest.skip(f"this Pillow has no {format}")
    square = load_image(as_bytes(Image.new("RGB", (80, 40), (200, 10, 10)), format), 32)
    assert np.abs(square[16, 16].astype(int) - (200, 10, 10)).max() <= 5


def test_a_decompression_bomb_is_rejected_before_it_is_decoded() -> None:
    with pytest.raises(ValueError, match=r"at most|not an image"):
        load_image(as_bytes(Image.new("1", (40_000, 40_000))), 32)
