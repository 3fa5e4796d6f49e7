"""Files of generated videos: codecs, tags, delays and what they say of their origin."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from trip_model.images import VIDEO_SUFFIXES, check_video_target, generated_metadata, video_bytes, write_video

RAMP = np.linspace(0, 255, 64, dtype=np.uint8)
PIXELS = np.stack([np.stack([np.roll(RAMP, 4 * f)[None].repeat(32, 0)] * 3, axis=-1) for f in range(6)])
METADATA = generated_metadata(model="demo", seed=7, prompt='a "red" circle: größer')


def comment(data: bytes, format: str) -> Any:
    if format in ("mp4", "webm"):
        with av.open(io.BytesIO(data)) as container:
            tags = {name.lower(): value for name, value in container.metadata.items()}
            return json.loads(tags["comment"])
    image = Image.open(io.BytesIO(data))
    return json.loads(image.info["comment"] if format == "gif" else image.getexif()[0x010E])


@pytest.mark.parametrize("format", [suffix[1:] for suffix in VIDEO_SUFFIXES])
def test_a_file_says_that_it_is_generated_by_what_and_from_what(format):
    data = video_bytes(PIXELS, 4, format, metadata=METADATA)
    said = comment(data, format)
    assert said == METADATA and said["generated"] is True and said["version"].startswith("trip-i2v ")
    assert data == video_bytes(PIXELS, 4, format, metadata=METADATA)  # nothing random is written


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_a_video_has_the_tags_of_bt709_and_its_frames(format):
    data = video_bytes(PIXELS, 5, format)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert context.codec.canonical_name == {"mp4": "h264", "webm": "vp9"}[format]
        assert context.pix_fmt == "yuv420p" and stream.average_rate == 5
        assert (context.colorspace, context.color_range) == (1, 1)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 6 and np.abs(np.stack(frames).astype(int) - PIXELS).mean() < 4
    if format == "mp4":
        assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads


@pytest.mark.parametrize(("fps", "delays"), [(4, {250}), (30, {30, 40}), (60, {20}), (12, {80, 90})])
def test_a_gif_shows_no_frame_so_short_that_browsers_slow_it_down(fps, delays):
    image: Any = Image.open(io.BytesIO(video_bytes(PIXELS, fps, "gif")))
    found = []
    for index in range(image.n_frames):
        image.seek(index)
        found.append(image.info["duration"])
    assert set(found) <= delays and len(found) == 6
    assert fps > 50 or sum(found) == round(6 * 100 / fps) * 10


def test_a_gif_of_equal_frames_lasts_as_long_as_the_clip():
    """Pillow joins equal neighbours to one frame, which is shown for their time."""
    still, stops = np.repeat(PIXELS[:1], 6, axis=0), PIXELS[[0, 1, 1, 1, 2, 2]]
    for pixels, delays in ((still, [1500]), (stops, [250, 750, 500])):
        image: Any = Image.open(io.BytesIO(video_bytes(pixels, 4, "gif")))
        found = []
        for index in range(image.n_frames):
            image.seek(index)
            found.append(image.info["duration"])
        assert found == delays


def test_a_webp_has_its_frames_and_loops():
    image: Any = Image.open(io.BytesIO(video_bytes(PIXELS, 4, "webp")))
    assert image.n_frames == 6 and image.info["loop"] == 0


def test_png_frames_have_the_text_too(tmp_path: Path):
    write_video(tmp_path / "frames", PIXELS, 4, metadata=METADATA)
    files = sorted((tmp_path / "frames").iterdir())
    assert [json.loads(Image.open(file).text["Comment"]) for file in files] == [METADATA] * 6  # type: ignore[attr-defined]
    assert np.array_equal(np.asarray(Image.open(files[3])), PIXELS[3])


def test_another_suffix_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"ends in '\.avi'; name a file of \.mp4, \.webm, \.gif, \.webp"):
        check_video_target(tmp_path / "x.avi")
    with pytest.raises(ValueError, match="'avi'"):
        video_bytes(PIXELS, 4, "avi")
