"""Videos of several aspect ratios keep them: each takes the nearest frame size, and its samples are of that size."""

from __future__ import annotations

import io
import struct
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from flows.recipes import RECIPES, find_recipe
from infra import storage
from tasks.curate.compact import compact
from tasks.curate.samples import SampleChecker
from tasks.curate.verify import problems
from tasks.encode.fingerprint import fingerprint_of
from tasks.encode.job import prepare
from tasks.encode.show import show_sample
from tasks.encode.spec import PrepareSpec
from tasks.evaluate.generate import real_pixels
from tasks.evaluate.protocol.protocol import held_out_protocol
from tasks.ingest.spec import SourceSpec
from tasks.records import UserError
from tasks.shards import MANIFEST, PackedSample, ShardDataset
from tasks.video.decode import read_shots, read_spans, read_track, read_windows
from tasks.video.frame_sizes import FrameSize, common_frame_sizes, nearest_frame_size, parse_frame_sizes

FRAMES = 4
SIZES = common_frame_sizes(64)
# By name: the coded width and height, a pixel's width over its height, and the frame size to expect.
VIDEOS = {
    "wide": ((64, 36), 1, "88x48"),
    "standard": ((64, 48), 1, "72x56"),
    "square": ((48, 48), 1, "64x64"),
    "portrait": ((48, 64), 1, "56x72"),
    "tall": ((36, 64), 1, "48x88"),
    "turned": ((64, 36), 1, "48x88"),  # a quarter turn by its metadata
    "stretched": ((48, 48), Fraction(4, 3), "72x56"),
}


def video(width: int, height: int, pixel_aspect: Fraction | int) -> bytes:
    """An mp4 of frames whose left half is brighter than their right half, and brighter in each frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        for number in range(FRAMES):
            pixels = np.full((height, width, 3), 20 + 10 * number, np.uint8)
            pixels[:, : width // 2] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def turned(data: bytes) -> bytes:
    """An mp4 that is displayed after a quarter turn clockwise."""
    place = data.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 36 << 16, 0, 1 << 30)
    return data[:place] + matrix + data[place + 36 :]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clips")
    for name, ((width, height), pixel_aspect, _) in VIDEOS.items():
        data = video(width, height, pixel_aspect)
        (folder / f"{name}.mp4").write_bytes(turned(data) if name == "turned" else data)
        (folder / f"{name}.txt").write_text(f"a bright half, {name}")
    return str(folder)


def spec_for(clips: str, base: Path, output: Path | str, **changes: Any) -> PrepareSpec:
    spec = PrepareSpec(SourceSpec(clips), str(output), str(base), num_frames=FRAMES, size=64, frames_per_batch=FRAMES)
    return replace(spec, **({"frame_sizes": SIZES, "clips_per_shard": 3, "workers": 0, "keep_pixels": True} | changes))


@pytest.fixture(scope="module")
def dataset(clips: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare(spec_for(clips, tiny_base, tmp_path_factory.mktemp("sizes") / "set", keep_logvar=True)).dataset


def test_each_video_takes_the_nearest_frame_size(dataset: str) -> None:
    data = ShardDataset(dataset)
    assert sorted(map(str, data.frame_sizes)) == sorted(SIZES)
    for i in range(len(data)):
        sample = data.read(i, ("latents", "logvar", "pixels", "first", "meta"))
        size = VIDEOS[data.clip_of(i)][2]
        width, height = map(int, size.split("x"))
        assert str(data.frame_size_of(i)) == size, data.clip_of(i)
        assert sample["pixels"].shape == (FRAMES, height, width, 3) and sample["first"].shape == (height, width, 3)
        assert sample["latents"].shape == sample["logvar"].shape == (FRAMES, 4, height // 8, width // 8)
        assert data.num_frames(i) == FRAMES


def test_the_aspect_ratio_is_that_of_the_displayed_frame(dataset: str) -> None:
    data = ShardDataset(dataset)
    for i in range(len(data)):
        first = data.read(i, ("first",))["first"].astype(int)
        height, width = first.shape[:2]
        rows = first[: height // 4].mean() - first[-height // 4 :].mean()
        columns = first[:, : width // 4].mean() - first[:, -width // 4 :].mean()
        if data.clip_of(i) == "turned":  # its bright half is on top
            assert rows > 100 and abs(columns) < 5
        else:
            assert columns > 100 and abs(rows) < 5


def test_the_report_counts_samples_by_frame_size_and_a_second_run_finds_them_done(
    clips: str, tiny_base: Path, tmp_path: Path
) -> None:
    spec = spec_for(clips, tiny_base, tmp_path / "set")
    report = prepare(spec)
    assert report.frame_sizes == dict(Counter(size for *_, size in VIDEOS.values()))
    assert "frame size of the samples" in Path(report.page).read_text()
    again = prepare(replace(spec, frame_sizes=SIZES[::-1]))  # in whatever order
    assert (again.manifest_sha, again.frame_sizes, again.shards_reused) == (
        report.manifest_sha, report.frame_sizes, report.shards,
    )  # fmt: skip


def test_verify_compact_and_show_keep_the_frame_size(clips: str, tiny_base: Path, tmp_path: Path) -> None:
    dataset = prepare(spec_for(clips, tiny_base, tmp_path / "set")).dataset
    assert list(problems(dataset)) == []
    before = {key: ShardDataset(dataset).frame_size_of(i) for i, key in enumerate(ShardDataset(dataset).keys)}
    compact(dataset, 100)
    data = ShardDataset(dataset)
    assert len(data.published.shards) == 1 and list(problems(dataset)) == []
    assert {key: data.frame_size_of(i) for i, key in enumerate(data.keys)} == before
    shown = show_sample(dataset, "turned", str(tiny_base), SourceSpec(clips))
    assert shown.original is not None, shown.why_no_original
    assert shown.original.shape == shown.decoded.shape == (FRAMES, 88, 48, 3)


def test_verify_finds_frames_of_another_size_than_the_index_says(dataset: str) -> None:
    data = ShardDataset(dataset)
    index = storage.read_json(str(next(Path(dataset).glob("shard-*.json"))))
    entry = index["samples"][0]
    shard = Path(dataset, index["shard"]).read_bytes()
    members = {name: shard[offset : offset + size] for name, (offset, size) in entry["members"].items()}
    right, wrong = FrameSize(*index["frame_sizes"][0]), FrameSize(8, 8)
    assert list(SampleChecker({}).problems(PackedSample(entry["key"], members, right))) == []
    (problem,) = SampleChecker({}).problems(PackedSample(entry["key"], members, wrong))
    assert f"frames of {right}, its index says 8x8" in problem
    assert data.published.schema_version == 4


def test_samples_of_one_frame_size_are_read_as_one_array_and_others_are_not(dataset: str) -> None:
    data = ShardDataset(dataset)
    places = data.frame_size_places(np.arange(len(data)))
    tall = np.flatnonzero(places == places[data.keys.index("turned_000")])
    assert data.stack(tall, "latents", [1, 1], 2)[0].shape == (2, 2, 4, 11, 6)
    assert data.stack(np.arange(len(data)), "tokens")[0].shape == (len(VIDEOS), 32)
    with pytest.raises(AssertionError, match="in one array"):
        data.stack(np.arange(len(data)), "latents")


def test_every_reader_of_a_video_takes_the_same_frame_size() -> None:
    data, sizes = turned(video(64, 36, 1)), parse_frame_sizes(SIZES)
    grid: dict[str, Any] = {"num_frames": FRAMES, "fps": 4.0, "size": 64, "frame_sizes": sizes}
    [spanned] = read_spans(data, [(0.0, None)], **grid)
    assert isinstance(spanned, list)
    read = [read_windows(data, **grid), read_track(data, longest=8, **grid), spanned]
    read.append(read_shots(data, shots={"least_seconds": 0.0}, **grid))
    for [clip] in read:
        assert np.array_equal(clip.pixels, read[0][0].pixels) and clip.pixels.shape == (FRAMES, 88, 48, 3)
    squashed = read_windows(data, fit="squash", **grid)[0]
    assert squashed.pixels.shape == (FRAMES, 88, 48, 3) and squashed.info["resize_crop"] == [88, 48, 0, 0]


def test_an_evaluation_compares_central_squares(dataset: str) -> None:
    data = ShardDataset(dataset)
    protocol = held_out_protocol(data, 1.0, len(VIDEOS), 0)
    assert {real_pixels(data, item, FRAMES).shape for item in protocol.items} == {(FRAMES, 64, 64, 3)}


def test_without_frame_sizes_nothing_names_them(clips: str, tiny_base: Path, tmp_path: Path) -> None:
    spec = spec_for(clips, tiny_base, tmp_path / "set", frame_sizes=())
    assert "frame_sizes" not in fingerprint_of(spec)
    for recipe in RECIPES.values():
        assert ("frame_sizes" in recipe().identity()["prepare"]) == recipe().name.endswith("-frame-sizes")
    dataset = prepare(spec).dataset
    for name in (MANIFEST, *(path.name for path in Path(dataset).glob("shard-*.json"))):
        content = Path(dataset, name).read_text()
        assert "frame_size" not in content and storage.read_json(str(Path(dataset, name)))["schema_version"] == 3
    with np.load(next(Path(dataset).glob("index-*.npz"))) as index:
        assert "frame_sizes" not in index.files
    data = ShardDataset(dataset)
    assert {data.read(i)["latents"].shape for i in range(len(data))} == {(FRAMES, 4, 8, 8)}


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (("abc",), "frame_sizes 'abc', expected width x height in pixels, such as '320x192'"),
        (("0x64",), "frame_sizes '0x64', expected width x height"),
        (("64x64", "640x64"), "frame_sizes '640x64', expected sides of at most 4096 pixels, the longer one at most 4"),
        (("64x64", "64x64"), "frame_sizes '64x64' and '64x64' have one aspect ratio; give one of them"),
        (("64x64", "72x72"), "frame_sizes '64x64' and '72x72' have one aspect ratio"),
        (("321x192",), "frame_sizes '321x192', expected multiples of 8, the factor of the VAE in .*'320x192'"),
    ],
)
def test_a_wrong_frame_size_is_one_sentence(
    clips: str, tiny_base: Path, tmp_path: Path, sizes: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        prepare(spec_for(clips, tiny_base, tmp_path / "set", frame_sizes=sizes))
    assert not (tmp_path / "set").exists()


def test_a_recipe_rejects_a_wrong_frame_size_before_anything_is_read() -> None:
    with pytest.raises(UserError, match="values of prepare: frame_sizes 'abc'"):
        find_recipe("demo", values=['prepare.frame_sizes=["abc"]'])
    recipe = find_recipe("demo", values=['prepare.frame_sizes=["64x64", "88x48"]'])
    assert recipe.prepare.frame_sizes == ("64x64", "88x48")


def test_frame_sizes_have_about_the_area_of_the_square() -> None:
    assert common_frame_sizes(256) == ("352x192", "288x224", "256x256", "224x288", "192x352")
    for size in (64, 128, 256, 512):
        sizes = parse_frame_sizes(common_frame_sizes(size))
        assert [size.aspect for size in sizes] == sorted(size.aspect for size in sizes) and len(sizes) == 5
        assert all(abs(width * height / size**2 - 1) < 0.04 for width, height in sizes)
        assert nearest_frame_size(sizes, 16 / 9) == sizes[-1] and nearest_frame_size(sizes, 0.1) == sizes[0]


@pytest.mark.slow
def test_real_clips_take_their_frame_sizes(real_clips: Path, tiny_base: Path, tmp_path: Path) -> None:
    spec = spec_for(str(real_clips), tiny_base, tmp_path / "set", clips_per_shard=8, keep_pixels=False)
    report = prepare(spec)
    assert sum(report.frame_sizes.values()) == report.samples and set(report.frame_sizes) <= set(SIZES)
    assert report.frame_sizes["72x56"] > 0 and report.frame_sizes["88x48"] > 0
    assert list(problems(report.dataset)) == []
