"""Clips by stride and squashed clips equal a plain decode, and the protocol `cinn-exact` evaluates the right frames.

The last test goes from folders of frames to the report and from the report back to the frames.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from PIL import Image

from flows.cli.app import parse
from flows.layout import prepared_for
from infra import storage
from infra.cluster import ray_session
from tasks.encode.fingerprint import check_spec, fingerprint_of
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareSpec
from tasks.evaluate import generate
from tasks.evaluate.job import evaluate
from tasks.evaluate.protocol.presets import load_preset
from tasks.evaluate.protocol.protocol import load_protocol
from tasks.evaluate.spec import EvaluateSpec
from tasks.ingest.demo import write_demo_corpus
from tasks.ingest.drawing import draw_clip
from tasks.ingest.spec import SourceSpec
from tasks.metrics.extractors.files import ExtractorFiles
from tasks.metrics.extractors.loading import load_extractors
from tasks.metrics.frechet import Moments, frechet_distance
from tasks.records import UserError
from tasks.shards import ShardDataset
from tasks.video.decode import ClipError, read_track, read_windows
from tasks.video.frame import to_square
from tests.video.test_selective_decode import PAUSES, moving
from trip_model.config import Fit
from trip_model.images import load_image


def frames_of(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data), "r") as container:
        return list(container.decode(video=0))


def squares(data: bytes, size: int, fit: Fit = "crop") -> np.ndarray:
    """Returns all frames of a video as squares."""
    return np.stack([to_square(frame, size, 1.0, VideoReformatter(), fit) for frame in frames_of(data)])


@pytest.mark.parametrize("size", [32, 33, 128])
@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("gif", "gif")])
def test_a_squashed_frame_is_the_entire_frame_rescaled(container: str, codec: str, size: int) -> None:
    data = moving(container, codec)  # 98 x 64
    full = ColorRange.JPEG
    plain = [
        frame.reformat(
            size,
            size,
            "rgb24",
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
            src_color_range=full if codec == "gif" else ColorRange.MPEG,
            dst_color_range=full,
            threads=1,
        ).to_ndarray()
        for frame in frames_of(data)
    ]
    [clip] = read_windows(data, 16, 24.0, size, fit="squash", stride=1)
    np.testing.assert_array_equal(clip.pixels, plain[:16])
    assert clip.info["resize_crop"] == [size, size, 0, 0]
    [cropped] = read_windows(data, 16, 24.0, size, stride=1)
    assert (cropped.pixels != clip.pixels).any()


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize(
    ("container", "options"),
    [
        ("mp4", {}),
        ("matroska", {"stamps": PAUSES}),  # a rate that varies
        ("mp4", {"stamps": [7 + stamp for stamp in PAUSES]}),
        ("mpegts", {}),
        ("avi", {}),  # its stamps are synthetic
        ("mp4", {"params": ":open-gop=1"}),
        ("gif", {"codec": "gif"}),
    ],
)
def test_a_stride_takes_every_nth_decoded_frame(container: str, options: dict[str, Any], stride: int) -> None:
    data = moving(container, **options)
    expected = squares(data, 32)[::stride]
    windows = read_windows(data, 4, 4.0, 32, windows=2, stride=stride)
    assert len(windows) == 2
    np.testing.assert_array_equal(np.concatenate([clip.pixels for clip in windows]), expected[:8])
    times = np.array([frame.time for frame in frames_of(data)])
    times = (np.sort(times) if container == "avi" else times)[::stride]  # FFmpeg guesses the stamps of B-frames in AVI
    np.testing.assert_allclose(np.concatenate([clip.times for clip in windows]), (times - times[0])[:8], atol=1e-5)
    [track] = read_track(data, 4, 4.0, 32, longest=999, stride=stride)
    np.testing.assert_array_equal(track.pixels, expected)
    message = f"too_short: .* {len(expected)} frames at a stride of {stride}, expected at least 999"
    with pytest.raises(ClipError, match=message):
        read_windows(data, 999, 4.0, 32, stride=stride)


def test_two_frames_of_one_stamp_are_two_frames() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
        for level, pts in enumerate([0, 1, 1, 1, 2]):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 50 * level, np.uint8), format="rgb24")
            packets = stream.encode(frame.reformat(format="bgr0"))
            for packet in packets:
                packet.pts = packet.dts = pts
                container.mux(packet)
    [clip] = read_windows(buffer.getvalue(), 5, 4.0, 32, stride=1)
    assert clip.pixels[:, 0, 0, 0].tolist() == [0, 50, 100, 150, 200]
    assert clip.times.tolist() == pytest.approx([0, 0.04, 0.04, 0.04, 0.08])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_frames_of_a_folder_come_out_of_one_file_as_they_went_in(suffix: str, tmp_path: Path) -> None:
    """Equivalent to `ffmpeg -framerate 25 -i VIDEO/frame_%04d.jpg -c copy VIDEO.mov`, with the same libraries."""
    images = []
    for k, pixels in enumerate(draw_clip(3, 96)[0][:20], 1):
        Image.fromarray(pixels[:64]).save(path := tmp_path / f"frame_{k:04d}.{suffix}")
        images.append(path.read_bytes())
    buffer = io.BytesIO()
    with (
        av.open(str(tmp_path / f"frame_%04d.{suffix}"), format="image2", options={"framerate": "25"}) as folder,
        av.open(buffer, "w", format="mov") as file,
    ):
        stream = file.add_stream_from_template(folder.streams.video[0])
        for packet in folder.demux(video=0):
            if packet.size:
                packet.stream = stream
                file.mux(packet)
    for fit in ("crop", "squash"):
        [clip] = read_windows(buffer.getvalue(), 20, 4.0, 32, stride=1, fit=fit)
        np.testing.assert_array_equal(clip.pixels, np.concatenate([squares(image, 32, fit) for image in images]))
    if suffix == "png":  # equal to `load_image` where no scaling is needed
        [track] = read_windows(buffer.getvalue(), 20, 4.0, 64, stride=1)
        np.testing.assert_array_equal(track.pixels, [load_image(image, 64) for image in images])


def test_the_fingerprint_has_fit_and_stride_only_if_not_default(tiny_base: Path, tmp_path: Path) -> None:
    table = write_demo_corpus(tmp_path / "corpus", clips=2, size=32)
    spec = PrepareSpec(SourceSpec(table), str(tmp_path / "out"), str(tiny_base), size=32, num_frames=4, workers=0)
    default = fingerprint_of(spec)
    assert not {"fit", "stride"} & set(default)  # older data sets keep their fingerprint
    assert fingerprint_of(replace(spec, fit="squash", stride=2)) == default | {"fit": "squash", "stride": 2}
    prepare(spec)
    for change in ({"fit": "squash"}, {"stride": 1}):
        with pytest.raises(UserError, match=f"{next(iter(change))} .* -> .*another output"):
            prepare(replace(spec, **change))
    for name, value in (("fit", "pad"), ("stride", 0)):
        with pytest.raises(UserError, match=f"{name} .*{value}.*, expected"):
            check_spec(replace(PrepareSpec(), **{name: value}))


def test_a_protocol_defines_how_its_data_set_is_prepared() -> None:
    default = PrepareSpec(SourceSpec("t.csv"), "out", "base", size=64, windows_per_clip=8)
    cinn = prepared_for(default, "cinn-exact")
    assert cinn == replace(default, num_frames=17, stride=1, size=128, fit="squash", keep_pixels=True)
    clean = prepared_for(default, "dtdb-clean")
    assert clean == replace(default, num_frames=16, fps=4.0, size=256, keep_pixels=True)
    assert prepared_for(default, "folder") == replace(default, keep_pixels=True)
    assert parse(["prepare-latents", "--source", "dtdb", "--protocol", "cinn-exact"])["protocol"] == "cinn-exact"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_session(None, 2):
        yield


@pytest.mark.slow
def test_cinns_protocol_from_videos_to_the_report(
    cluster: None, tiny_base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Its metrics are those of real frames 1 to 16 and generated frames 2 to 17 on disk."""
    categories = load_preset("cinn-exact").categories
    for number in range(16):
        (folder := tmp_path / "dtdb" / categories[number % 4]).mkdir(parents=True, exist_ok=True)
        # A picture that moves with increasing speed.
        video = moving("mp4", stamps=[k + k * k // (number + 2) for k in range(19)], params=f":qp={5 + number}")
        (folder / f"video{number}.mp4").write_bytes(video)
    source = SourceSpec(str(tmp_path / "dtdb"), format="classes")
    spec = PrepareSpec(source, str(tmp_path / "data"), str(tiny_base), size=32, workers=0)
    prepared = prepare(prepared_for(spec, "cinn-exact"))
    data = ShardDataset(prepared.dataset)
    items = load_protocol("cinn-exact", data, 1.0, 1, seed=0).items
    assert len(items) == 80 and len({item.seed for item in items}) == 80
    first = next(item for item in items if "-video5-" in item.clip)
    video = (tmp_path / "dtdb" / first.category / "video5.mp4").read_bytes()
    np.testing.assert_array_equal(generate.real_pixels(data, first, 17), squares(video, 128, "squash")[:17])

    spec = EvaluateSpec(
        str(tiny_model), prepared.dataset, str(tmp_path / "out"), protocol="cinn-exact", steps=1, samples=1
    )
    report = evaluate(replace(spec, held_out_fraction=1.0, bootstrap=50, examples=1, batch=10), lambda line: None)
    content = storage.read_json(storage.join(report.uri, "report.json"))
    assert (report.items, report.clips) == (80, 16)
    assert content["counts"]["clips_by_category"] == dict.fromkeys(sorted(categories), 4)
    assert len(content["curves"]["consecutive"]["trip"]) == 16  # k = 2..17: the curve is not shifted
    notes = " ".join(content["notes"])
    assert "80 items of 16 unique clips" in notes and "17 frames at a stride of 1 native frames, 128 pixels" in notes

    extractor = load_extractors(ExtractorFiles())[1]
    found = []
    for category in categories:
        features: dict[str, list[np.ndarray]] = {"real": [], "trip": []}
        for item in (item for item in items if item.category == category):
            (path,) = Path(report.uri).glob(f"generations/*/{item.key}.npz")
            frames = {
                "real": generate.real_pixels(data, item, 17)[:16],
                "trip": generate.load_arrays(str(path))["frames"][1:],
            }
            for row, pixels in frames.items():
                assert pixels.shape == (16, 128, 128, 3)
                features[row].append(extractor.features(pixels, item.caption)["rfd_app"])
        trip, real = (Moments.of(np.concatenate(features[row])) for row in ("trip", "real"))
        found.append(frechet_distance(trip, real))
    assert report.metrics["trip"][extractor.info.metric]["value"] == pytest.approx(np.mean(found), rel=1e-9)
    with pytest.raises(UserError, match=r"takes 16 frames at 4 fps and 256 pixels .* holds 17 frames at a stride of 1"):
        load_protocol("dtdb-clean", data, 1.0, 1, seed=0)
