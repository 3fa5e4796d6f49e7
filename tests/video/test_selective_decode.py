"""Selective decoding returns bitwise the clips of a full decode."""

from __future__ import annotations

import csv
import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tasks.video import decode as video
from tasks.video.decode import ClipError
from tasks.video.frame_sizes import FrameSize
from tasks.video.selective_decode import SelectiveDecodeError, selected_frames

GRIDS = [
    {"least": 16, "wanted": 16, "fps": 4.0},
    {"least": 1, "wanted": 99, "fps": 4.0},
    {"least": 1, "wanted": 7, "fps": 2.3, "start_seconds": 0.7},
    {"least": 99, "wanted": 99, "fps": 8.0},  # more than the file has
    {"least": 8, "wanted": 8, "fps": 4.0, "fit": "squash"},
    {"least": 1, "wanted": 9, "fps": 4.0, "stride": 3},
]
EVEN = list(range(96))


def moving(container: str, codec: str = "libx264", stamps: list[int] = EVEN, params: str = "", **options: Any) -> bytes:
    """A moving picture, frame k displayed from stamps[k] / 24 s on, with three B-frames between two others."""
    ground = np.random.default_rng(3).integers(0, 255, (8, 98, 3), dtype=np.uint8).repeat(8, 0)
    if codec == "libx264":
        options |= {"preset": "veryfast", "g": "30", "x264-params": f"bframes=3:b-adapt=0:scenecut=0{params}"}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = 98, 64, "bgr8" if codec == "gif" else "yuv420p"
        stream.options = options
        for k, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.roll(ground, k, axis=1), format="rgb24").reformat(
                format=stream.pix_fmt
            )
            frame.pts, frame.time_base = stamp, Fraction(1, 24)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def outcome(source: bytes | Path, selective: bool, grid: dict[str, Any]) -> Any:
    try:
        chosen, info = video._read_grid(source, sizes=[FrameSize(32, 32)], selective=selective, **grid)
    except ClipError as error:
        return str(error)
    return [(time, pixels.tobytes()) for time, pixels in chosen], info


def assert_the_same(source: bytes | Path) -> None:
    for grid in GRIDS:
        assert outcome(source, True, grid) == outcome(source, False, grid), grid


class DecodeCounter:
    """Counts the frames of selective decoding and its fallbacks."""

    def __init__(self) -> None:
        self.frames, self.fallbacks = 0, 0

    def __call__(self, *arguments: Any) -> Any:
        try:
            for frame in selected_frames(*arguments):
                self.frames += 1
                yield frame
        except (SelectiveDecodeError, av.FFmpegError):
            self.fallbacks += 1
            raise


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> DecodeCounter:
    counter = DecodeCounter()
    monkeypatch.setattr(video, "selected_frames", counter)
    return counter


PAUSES = [0, 1, 2, 3, 9, 10, 11, 12, 13, 40, 41, 42, 43, 44, 45, 46, 90, 91, 92, 93, 94, 95, 99, 101, 103, 105, 107]


@pytest.mark.parametrize(
    ("container", "options"),
    [
        ("mp4", {}),
        ("matroska", {}),
        ("mpegts", {}),  # starts late, and its packets are cut by a parser
        ("flv", {}),
        ("mp4", {"params": ":b-pyramid=none"}),
        ("mp4", {"params": ":b-pyramid=strict:ref=4:weightp=2:direct=temporal"}),
        ("mp4", {"params": ":open-gop=1"}),
        ("mp4", {"params": ":intra-refresh=1"}),
        ("mp4", {"params": ":slices=4"}),
        ("matroska", {"stamps": PAUSES}),
        ("mp4", {"stamps": [7 + stamp for stamp in PAUSES]}),
    ],
)
def test_frames_that_no_grid_point_needs_are_skipped(
    container: str, options: dict[str, Any], counter: DecodeCounter
) -> None:
    data = moving(container, **options)
    assert_the_same(data)
    assert not counter.fallbacks
    counter.frames = 0
    video.read_clip(data, 8, 4.0, 32)
    assert 8 <= counter.frames <= 36  # of 42 frames up to the last grid point


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", {"params": ":tff=1"}),
        ("avi", "libx264", {}),  # its packets have no presentation stamps or synthetic ones
        ("mp4", "libx265", {"x265-params": "log-level=none"}),
        ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
        ("avi", "mpeg4", {"bf": "2"}),
        ("mp4", "mpeg4", {"bf": "2"}),
        ("mpegts", "mpeg2video", {"bf": "2"}),
        ("gif", "gif", {}),
    ],
)
def test_other_codecs_are_decoded_in_full(
    container: str, codec: str, options: dict[str, Any], counter: DecodeCounter
) -> None:
    assert_the_same(moving(container, codec, **options))
    assert counter.fallbacks or not counter.frames


def test_a_stream_without_its_start_is_decoded_in_full(counter: DecodeCounter) -> None:
    data = moving("mpegts")
    for packet in range(20, 120, 9):  # of 188 bytes each
        assert_the_same(data[188 * packet :])
    assert counter.fallbacks


def test_a_damaged_file_gives_the_clip_of_a_full_decode() -> None:
    """Except for damage in a frame that no grid point needs, which leaves the clip intact."""
    rng = np.random.default_rng(0)
    data = moving("mp4", movflags="faststart")
    detected = 0
    for share in rng.uniform(0.1, 0.99, 12):
        assert_the_same(data[: int(len(data) * share)])
    for _ in range(12):
        damaged = bytearray(data)
        damaged[rng.integers(data.index(b"mdat") + 2000, len(data))] ^= 255
        selected, full = (outcome(bytes(damaged), selective, GRIDS[0]) for selective in (True, False))
        if selected != full:
            assert isinstance(selected, tuple) and selected[1]["corrupt_frames"] == 0
            assert selected == outcome(data, False, GRIDS[0])
        detected += selected == full != outcome(data, False, GRIDS[0])
    assert detected


@pytest.mark.slow
def test_real_clips_are_the_same(real_clips: Path, counter: DecodeCounter) -> None:
    with real_clips.open() as table:
        for row in csv.DictReader(table):
            assert_the_same(real_clips.parent / row["contentUrl"])
    assert counter.frames and not counter.fallbacks
