"""Are clips decoded on the time grid, photos read as they should be, and bad files refused with a reason?"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from trip_model.video import ClipError, load_image, read_clip, read_windows, square_box, video_bytes, write_video


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
    # At 10 frames a second the grid points 0, 0.25, 0.5 .. show the frames on display then.
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


def test_too_short_a_video_is_refused_with_its_length() -> None:
    with pytest.raises(ClipError, match="too_short: 0.90 s give 4 frames") as caught:
        read_clip(ramp_video(list(range(0, 100, 10))), num_frames=16, fps=4.0, size=32)
    assert caught.value.reason == "too_short"


@pytest.mark.parametrize("data", [b"", b"<html>404</html>" * 50, ramp_video([0, 10, 20])[:200]])
def test_what_is_no_video_is_undecodable(data: bytes) -> None:
    with pytest.raises(ClipError) as caught:
        read_clip(data, 2, 4.0, 32)
    assert caught.value.reason in ("undecodable", "too_short")


def test_square_box_keeps_the_shorter_side_and_the_middle() -> None:
    assert square_box(960, 540, 256) == (455, 256, 99, 0)
    assert square_box(64, 64, 64) == (64, 64, 0, 0)


@pytest.mark.parametrize("format", ["mp4", "gif"])
def test_what_is_written_can_be_read_back(format: str, tmp_path: Path) -> None:
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
    ],
)
def test_what_is_no_photo_is_one_clear_sentence(photo: bytes | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_image(photo, 32)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    with pytest.raises(ValueError, match="at most|not an image"):
        load_image(as_bytes(Image.new("1", (40_000, 40_000))), 32)
