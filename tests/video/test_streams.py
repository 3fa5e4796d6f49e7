"""The main stream is decoded, in display order, deinterlaced, with its alpha layer."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from tasks.video.decode import ClipError, read_clip, read_windows

LEVELS = np.arange(40) * 6


def plain(levels: Any = LEVELS, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    return np.stack([np.full((*size, 3), level, np.uint8) for level in levels])


def written(
    clips: list[np.ndarray],
    container: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    default: int | None = None,
    metadata: dict[str, str] | None = None,
    **options: str,
) -> bytes:
    """A file with one video stream for each array uint8 [F, H, W, 3 or 4], at 24 fps."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        streams = []
        for index, pixels in enumerate(clips):
            stream = file.add_stream(codec, rate=24)
            stream.height, stream.width = pixels.shape[1:3]
            stream.pix_fmt, stream.options = pix_fmt, options
            stream.metadata.update(metadata or {})
            if default is not None:
                stream.disposition = Disposition.default if index == default else Disposition(0)
            streams.append(stream)
        for stream, pixels in zip(streams, clips, strict=True):
            for k, picture in enumerate(pixels):
                frame = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(picture), format="rgba" if picture.shape[2] == 4 else "rgb24"
                )
                frame.pts, frame.time_base = k, Fraction(1, 24)
                file.mux(stream.encode(frame.reformat(format=pix_fmt)))
            file.mux(stream.encode())
    return buffer.getvalue()


B_FRAMES = {"x264-params": "bframes=3:b-adapt=0:scenecut=0"}


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("avi", "libx264", B_FRAMES),
        ("avi", "mpeg4", {"bf": "2"}),
        ("avi", "mpeg2video", {"bf": "2"}),
        ("avi", "mjpeg", {}),
        ("asf", "mpeg4", {"bf": "2"}),
        ("flv", "libx264", B_FRAMES),
        ("mpeg2video", "mpeg2video", {"bf": "2"}),
    ],
)
def test_b_frames_are_displayed_in_order(container: str, codec: str, options: dict[str, str]) -> None:
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    clip = read_clip(written([plain()], container, codec, pix_fmt, **options), 8, 5.0, 32)
    levels = clip.pixels[:, 16, 16].mean(axis=1)
    expected = np.array([0, 4, 9, 14, 19, 24, 28, 33])  # displayed at multiples of 0.2 s
    np.testing.assert_allclose(levels, LEVELS[expected], atol=5)
    np.testing.assert_allclose(clip.times, expected / 24, atol=0.002)
    assert clip.info["backward_stamps"] == 0


def test_the_default_stream_is_taken_and_covers_and_single_frames_are_not() -> None:
    small, large = plain(LEVELS * 0 + 200, (32, 32)), plain()
    for default, expected in ((1, 1), (0, 0)):
        clip = read_clip(written([small, large], default=default), 8, 6.0, 32)
        assert clip.info["video_stream"] == expected, default
    for first in (plain([7], (128, 128)), plain([7], (32, 32))):  # a track of one frame, default or larger
        clip = read_clip(written([first, large], default=0), 8, 6.0, 32)
        assert clip.info["video_stream"] == 1


@pytest.mark.parametrize(
    ("container", "codec"),
    [("matroska", "libx264"), ("webm", "libvpx"), ("mpegts", "libx264"), ("avi", "mpeg4")],
)
def test_a_single_frame_is_found_where_the_container_does_not_count_frames(container: str, codec: str) -> None:
    options = {} if codec == "libvpx" else {"bf": "2"}
    [expected] = read_windows(written([plain()], container, codec, **options), 8, 6.0, 32)
    for single in (plain([7], (32, 32)), plain([7], (128, 128))):
        clip = read_clip(written([single, plain()], container, codec, default=0, **options), 8, 6.0, 32)
        assert clip.info["video_stream"] == 1
        np.testing.assert_allclose(clip.pixels, expected.pixels, atol=3)
        np.testing.assert_allclose(clip.times, expected.times, atol=0.002)
    with pytest.raises(ClipError, match="too_short"):
        read_clip(written([plain([7]), plain([9])], container, codec), 8, 6.0, 32)


def test_a_file_that_contains_nothing_but_a_picture_is_too_short() -> None:
    with pytest.raises(ClipError, match="too_short"):
        read_clip(written([plain([7])]), 8, 6.0, 32)


def test_a_stream_without_any_frame_has_its_own_reason() -> None:
    for container in ("matroska", "avi"):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=container) as file:
            stream = file.add_stream("mpeg4", rate=24)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            file.start_encoding()
        with pytest.raises(ClipError) as caught:
            read_clip(buffer.getvalue(), 8, 6.0, 32)
        assert caught.value.reason == "no_frames", container


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_the_alpha_layer_of_webm_is_composited_on_white(codec: str) -> None:
    picture = np.zeros((24, 64, 64, 4), np.uint8)
    picture[:, :, 32:] = (200, 0, 0, 255)
    options = {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"}
    data = written([picture], "webm", codec, "yuva420p", metadata={"alpha_mode": "1"}, **options)
    clip = read_clip(data, 4, 5.0, 32)
    assert clip.pixels[:, 16, 6].min() > 245 and np.abs(clip.pixels[0, 16, 26].astype(int) - [200, 0, 0]).max() <= 8
    assert clip.info["pixel_format"] == "yuva420p"
    np.testing.assert_allclose(clip.times, [0, 4 / 24, 9 / 24, 14 / 24], atol=0.002)


def interlaced(container: str = "mpeg", codec: str = "mpeg2video") -> bytes:
    """A bar that moves 6 pixels from field to field, top field first."""
    pictures = np.zeros((32, 128, 128, 3), np.uint8)
    for k, picture in enumerate(pictures):
        for field in (0, 1):
            left = 20 + (6 * (2 * k + field)) % 60
            picture[field::2, left : left + 20] = 255
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        if codec == "libx264":
            stream.options = {"x264-params": "tff=1:bframes=0", "crf": "10"}
        else:
            stream.options = {"flags": "+ildct+ilme", "qscale": "2", "b": "8M", "field_order": "tt", "top": "1"}
        for k, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = k, Fraction(1, 24)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def combing(frame: np.ndarray) -> float:
    """Mean difference of neighbouring lines less that of every second line."""
    luma = frame.astype(float).mean(axis=2)
    return float(np.abs(luma[1:] - luma[:-1]).mean() - np.abs(luma[2:] - luma[:-2]).mean())


@pytest.mark.parametrize(("container", "codec"), [("mpegts", "mpeg2video"), ("mp4", "libx264"), ("avi", "libx264")])
def test_interlaced_frames_are_deinterlaced_and_counted(container: str, codec: str) -> None:
    data = interlaced(container, codec)
    clip = read_clip(data, 6, 6.0, 128)
    with av.open(io.BytesIO(data)) as file:
        raw = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0) if frame.interlaced_frame]
    assert len(raw) == 32 and combing(raw[8]) > 20
    assert max(combing(frame) for frame in clip.pixels) < 5
    assert clip.info["deinterlaced_frames"] >= 20
    np.testing.assert_allclose(clip.times, np.arange(0, 24, 4) / 24, atol=0.003)


def test_progressive_frames_are_left_alone() -> None:
    data = written([plain()])
    [clip] = read_windows(data, 8, 6.0, 32)
    assert "deinterlaced_frames" not in clip.info
