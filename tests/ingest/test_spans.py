"""Spans of videos: a span gives what a file cut at its stamps gives, from one download and one pass of the decoder."""

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from infra import storage
from tasks.curate.forget import forget
from tasks.curate.verify import problems
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareSpec
from tasks.ingest.rows import clean_key, read_span
from tasks.ingest.sources import read_rows, source_identity
from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.records import Failure, UserError
from tasks.shards import ShardDataset
from tasks.shards.split import clip_hash, split_of, written_key
from tasks.video import decode
from tasks.video.decode import Clip, ClipError, read_spans, read_track, read_windows

RATE, SECONDS = 30, 14
GRID: dict[str, Any] = {"num_frames": 4, "fps": 4.0, "size": 32}
SPANS = [(0.0, 2.0), (1.5, 4.0), (7.3, 9.95), (9.95, 11.5), (12.0, None)]


def frames_of(data: bytes, container: str = "") -> Iterator[av.VideoFrame]:
    with av.open(io.BytesIO(data), format=container or None) as file:
        yield from file.decode(file.streams.video[0])


def encoded(frames: list[av.VideoFrame], codec: str, container: str, **options: str) -> bytes:
    """Encodes frames by their stamps."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv420p", options
        stream.time_base = Fraction(1, RATE)
        for frame in frames:
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def stamped(frames: list[av.VideoFrame], number_of: list[int]) -> list[av.VideoFrame]:
    stamped_frames = []
    for frame, number in zip(frames, number_of, strict=True):
        copy = av.VideoFrame.from_ndarray(frame.to_ndarray(), format=frame.format.name)
        copy.pts, copy.time_base = number, Fraction(1, RATE)
        stamped_frames.append(copy)
    return stamped_frames


def drawn(variable: bool = False) -> list[av.VideoFrame]:
    """A video whose frames all differ; `variable` leaves out a third of the frames."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    numbers = [n for n in range(RATE * SECONDS) if not variable or n % 7 not in (2, 5)]
    frames = [av.VideoFrame.from_ndarray(np.roll(noise, n, axis=1), format="rgb24") for n in numbers]
    return stamped([frame.reformat(format="yuv420p") for frame in frames], numbers)


@pytest.fixture(scope="module")
def videos() -> dict[str, bytes]:
    return {
        "h264 mp4": encoded(drawn(), "libx264", "mp4", g="45", bf="2"),
        "h264 mkv, variable rate": encoded(drawn(variable=True), "libx264", "matroska", g="40", bf="2"),
        "h264 mp4, open groups": encoded(drawn(), "libx264", "mp4", g="30", bf="3", x264opts="open-gop=1"),
        "mpeg4 avi": encoded(drawn(), "mpeg4", "avi", g="12"),
        "vp9 webm": encoded(drawn(), "libvpx-vp9", "webm", g="60", deadline="realtime"),
        "h264 ts": encoded(drawn(), "libx264", "mpegts", g="25", bf="2"),
    }


def cut(data: bytes, start: float, end: float | None) -> bytes:
    """A file with the frames of a span alone, without a loss."""
    frames = list(frames_of(data))
    first = frames[0].time
    assert first is not None
    kept = [f for f in frames if f.time is not None and start - 5e-4 <= f.time - first < (end or 1e9) - 5e-4]
    begin = kept[0].time
    assert begin is not None
    numbers = [round((f.time - begin) * RATE) for f in kept if f.time is not None]
    if frames[0].color_range:  # VP9, whose chroma lies elsewhere
        return encoded(stamped(kept, numbers), "libvpx-vp9", "mp4", lossless="1", deadline="realtime")
    return encoded(stamped(kept, numbers), "libx264", "mp4", qp="0")


@pytest.mark.parametrize(
    "name",
    ["h264 mp4", "h264 mkv, variable rate", "h264 mp4, open groups", "mpeg4 avi", "vp9 webm", "h264 ts"],
)
@pytest.mark.parametrize("kind", ["windows", "track"])
def test_a_span_gives_the_frames_of_a_file_that_is_cut_there(videos: dict[str, bytes], name: str, kind: str) -> None:
    data = videos[name]
    extra = {"windows": 2} if kind == "windows" else {"longest": 40}
    for (start, end), got in zip(SPANS, read_spans(data, SPANS, **GRID, **extra), strict=True):
        assert not isinstance(got, ClipError)
        read = read_windows if kind == "windows" else read_track
        want: list[Clip] = read(cut(data, start, end), **GRID, **extra)
        assert len(got) == len(want) > 0
        for one, other in zip(got, want, strict=True):
            frames = min(len(one.pixels), len(other.pixels))
            # A span ends at its end; a file shows its last frame for 1 / its average rate, which may be longer.
            assert len(one.pixels) == len(other.pixels) or (
                kind == "track" and name in ("h264 mkv, variable rate", "vp9 webm")
            )
            assert abs(len(one.pixels) - len(other.pixels)) <= 1
            np.testing.assert_array_equal(one.pixels[:frames], other.pixels[:frames])
            np.testing.assert_allclose(one.times[:frames], other.times[:frames], atol=2e-3)


def test_what_lies_between_the_spans_is_not_decoded(videos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    whole = decode.frames_of_spans

    def counted(*arguments: Any) -> Any:
        frames, first, duration = whole(*arguments)
        taken = list(frames)
        counts.append(len(taken))
        return iter(taken), first, duration

    monkeypatch.setattr(decode, "frames_of_spans", counted)
    [clips] = read_spans(videos["h264 mp4"], [(9.0, 10.0)], **GRID)
    assert not isinstance(clips, ClipError) and counts[0] < 36  # a key frame is at 9 s, with 30 frames in the span
    fast = read_spans(videos["h264 mp4"], SPANS, **GRID)
    monkeypatch.setattr(decode, "frames_of_spans", lambda *_: (_ for _ in ()).throw(ValueError("no stamps")))
    slow = read_spans(videos["h264 mp4"], SPANS, **GRID)
    for one, other in zip(fast, slow, strict=True):
        assert isinstance(one, list) and isinstance(other, list)
        np.testing.assert_array_equal(one[0].pixels, other[0].pixels)


def test_a_span_that_ends_with_the_video_has_its_last_frames(videos: dict[str, bytes]) -> None:
    """The decoder holds the last frames until it is flushed; those need their time too."""
    data = videos["h264 mp4"]
    whole = [frame.time for frame in frames_of(data) if frame.time is not None]
    with av.open(io.BytesIO(data)) as file:
        frames, first, _ = decode.frames_of_spans(file, file.streams.video[0], [10.0], [99.0])
        times = [frame.time for frame in frames]
    kept = [time for time in whole if time - first >= times[0] - first]
    assert times == kept and len(kept) >= RATE * (SECONDS - 10)


@pytest.mark.parametrize("name", ["h264 mp4", "mpeg4 avi"])
def test_a_span_outside_of_the_video_has_its_reason(videos: dict[str, bytes], name: str) -> None:
    spans = [(13.0, 14.9), (20.0, 22.0), (14.0, None), (10.0, 15.5), (5.0, 5.5), (2.0, 4.0)]
    reasons = [p.reason if isinstance(p, ClipError) else "ok" for p in read_spans(videos[name], spans, **GRID)]
    assert reasons == ["ok", *["span_out_of_range"] * 3, "too_short", "ok"]


def test_a_broken_file_gives_the_spans_before_the_break(videos: dict[str, bytes]) -> None:
    data = videos["h264 ts"][: len(videos["h264 ts"]) // 2]
    first, last = read_spans(data, [(1.0, 3.0), (12.0, 13.5)], **GRID)
    assert isinstance(first, list) and isinstance(last, ClipError)
    with pytest.raises(ClipError, match="undecodable"):
        read_spans(b"\x00\x00\x00\x18ftypmp42" + b"noise" * 99, [(0.0, 1.0)], **GRID)


@pytest.mark.parametrize(
    ("start", "end", "span"),
    [
        ("", "", None),
        ("0", "2", (0.0, 2.0)),
        ("12.0004", "15.5006", (12.0, 15.501)),
        ("0:00:20.100", "0:00:29,100", (20.1, 29.1)),
        ("01:02:03.5", "01:02:04", (3723.5, 3724.0)),
        ("90", "1:35", (90.0, 95.0)),
        ("", "3", (0.0, 3.0)),
        ("7", "", (7.0, None)),
    ],
)
def test_stamps_are_read_in_seconds_or_hours(start: str, end: str, span: tuple[float, float | None] | None) -> None:
    assert read_span(start, end) == span


@pytest.mark.parametrize(
    ("start", "end", "sentence"),
    [
        ("5", "5", "not after its start"),
        ("5", "4.9", "not after its start"),
        ("-1", "3", "neither seconds nor HH:MM:SS.mmm"),
        ("a", "3", "neither seconds"),
        ("nan", "3", "neither seconds"),
        ("1e3", "2e3", "neither seconds"),
        ("0:99", "2:00", "neither seconds"),
        ("1:2:3:4", "5", "neither seconds"),
        ("12000", "24000", "a span of 12000 s, expected at most 3600"),
    ],
)
def test_stamps_that_make_no_span_are_a_reason(tmp_path: Path, start: str, end: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_span(start, end)
    table = tmp_path / "t.csv"
    table.write_text(f"videoid,contentUrl,name,from,to\n1,a.mp4,a dog,{start},{end}\n")
    [row] = read_rows(spanned(table))
    assert isinstance(row, Failure) and (row.key, row.reason) == ("1", "bad_span")


def spanned(table: Path, **changes: Any) -> SourceSpec:
    columns = {"key": "videoid", "url": "contentUrl", "caption": "name", "start": "from", "end": "to"}
    return SourceSpec(str(table), columns, **changes)


def test_a_clip_is_its_link_and_its_span(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    rows = ["v,a.mp4,c,0,2", "v,a.mp4,c,2,4", "v,a.mp4,c,2,4.0", "v,b.mp4,c,2,4", "w,a.mp4,c,4,", "v,a.mp4,whole,,"]
    table.write_text("videoid,contentUrl,name,from,to\n" + "\n".join(rows) + "\n")
    records = list(read_rows(spanned(table)))
    assert [r.reason if isinstance(r, Failure) else r.span for r in records] == [
        *((0.0, 2.0), (2.0, 4.0), "duplicate_key", (2.0, 4.0), (4.0, None), None)
    ]
    keys = [record.key for record in records]
    assert keys[5] == "v" and [written_key(key) for key in keys] == ["v", "v", "v", "v", "w", "v"]
    assert keys[0].endswith("-t0000000-0002000") and keys[4].endswith("-t0004000-end")
    assert clip_hash(keys[0]) == clip_hash(keys[1]) == clip_hash(keys[4]) != clip_hash(keys[3])
    assert len({split_of(key, 0.3) for key in (keys[0], keys[1], keys[4])}) == 1  # one video, one split
    plain = table.with_name("plain.csv")
    plain.write_text("videoid,contentUrl,name\nv,a.mp4,c\n")
    assert [r.key for r in read_rows(SourceSpec(str(plain)))] == ["v"] and "start" not in SourceSpec("x").columns
    assert source_identity(spanned(table))["columns"]["start"] == "from"
    assert all(len(clean_key("x" * 300)) == 80 and len(key) <= 80 for key in keys)


class _Counted(http.server.SimpleHTTPRequestHandler):
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_five_spans_are_one_request_and_five_samples(videos: dict[str, bytes], tiny_base: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "long.mp4").write_bytes(videos["h264 mp4"])
    (site / "other.mp4").write_bytes(videos["h264 ts"])
    for place, (start, end) in enumerate(SPANS):
        (site / f"cut{place}.mp4").write_bytes(cut(videos["h264 mp4"], start, end))
    stamps = [f"{start},{'' if end is None else end}" for start, end in SPANS]
    lines = [f"v,long.mp4,span {place},{stamp}" for place, stamp in enumerate(stamps)]
    lines[2:2] = ["o,other.mp4,another video,1,3", "v,long.mp4,late,30,32"]  # rows of other files in between
    (site / "spans.csv").write_text("videoid,contentUrl,name,from,to\n" + "\n".join(lines) + "\n")
    cuts = "".join(f"c{place},cut{place}.mp4,span {place}\n" for place in range(len(SPANS)))
    (site / "cuts.csv").write_text("videoid,contentUrl,name\n" + cuts)

    requests: list[str] = []
    handler = type("Handler", (_Counted,), {"requests": requests})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        common: dict[str, Any] = {"base": str(tiny_base), "num_frames": 4, "size": 32, "workers": 0}
        common |= {"keep_pixels": True, "download": DownloadSpec(attempts=1)}
        spec = PrepareSpec(spanned(site / "spans.csv", base_url=url), str(tmp_path / "spans"), **common)
        report = prepare(spec)
        assert (report.rows, report.encoded, report.failed) == (7, 6, {"span_out_of_range": 1})
        assert sorted(requests) == ["/long.mp4", "/other.mp4"]
        cut_report = prepare(PrepareSpec(SourceSpec(str(site / "cuts.csv")), str(tmp_path / "cuts"), **common))
    finally:
        server.shutdown()
        server.server_close()
    spans, cut_files = ShardDataset(report.dataset), ShardDataset(cut_report.dataset)
    of_long = [place for place in range(len(spans)) if spans.read(place, ("caption",))["caption"].startswith("span")]
    assert len(of_long) == len(cut_files) == 5
    for place, other in zip(of_long, range(5), strict=True):
        one, two = (
            d.read(p, ("pixels", "latents", "caption", "meta")) for d, p in ((spans, place), (cut_files, other))
        )
        np.testing.assert_array_equal(one["pixels"], two["pixels"])
        np.testing.assert_array_equal(one["latents"], two["latents"])
        assert one["caption"] == two["caption"] and one["meta"]["span"] == list(SPANS[other])
        assert "span" not in two["meta"]
    removed = forget(report.dataset, ["v"])  # as the table has the key: all spans of the video go
    assert (removed.rows, removed.unknown) == (6, ()) and list(problems(report.dataset)) == []
    with pytest.raises(UserError, match=r"1 of 7 clips .*forgotten 6"):
        prepare(spec)
    manifest = Path(report.dataset) / "manifest.json"
    for name, value in (("columns", {}), ("table_sha256", "0" * 64), ("limit", 1), ("limit", "x"), ("more", 1)):
        content = json.loads(manifest.read_text())
        content["source"][name] = value
        changed = storage.json_bytes(content)
        before = manifest.read_bytes()
        manifest.write_bytes(changed)
        assert any("its source has" in line for line in problems(report.dataset)), name
        manifest.write_bytes(before)


def test_spans_keep_the_order_of_their_rows(videos: dict[str, bytes]) -> None:
    late, early = read_spans(videos["h264 mp4"], [(4.0, 5.0), (0.0, 1.0)], **GRID)
    assert isinstance(late, list) and isinstance(early, list)
    np.testing.assert_array_equal(early[0].pixels, read_windows(videos["h264 mp4"], **GRID)[0].pixels)
    assert not np.array_equal(late[0].pixels, early[0].pixels)
