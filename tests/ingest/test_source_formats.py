"""Documents and folders as sources: MSR-VTT, captions next to videos, class folders, and the identity of a source."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import storage
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareSpec
from tasks.ingest import sources
from tasks.ingest.demo import write_demo_corpus
from tasks.ingest.download import download_clips
from tasks.ingest.rows import clean_key
from tasks.ingest.samples import write_sample
from tasks.ingest.sources import count_rows, read_rows
from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.records import ClipRef, Failure, UserError
from tasks.shards import ShardDataset


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder in fsspec's memory."""
    yield "memory://sources"
    storage.delete("memory://sources")


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


MSRVTT = {
    "info": {"contributor": "x"},
    "videos": [
        {"video_id": "video0", "url": "https://www.youtube.com/watch?v=0", "split": "train", "start time": 1.0},
        {"video_id": "video1", "split": "test"},
        {"video_id": "video2", "split": "test"},
        {"video_id": "video3", "split": "test"},
    ],
    "sentences": [
        {"sen_id": 3, "video_id": "video1", "caption": "a dog runs"},
        {"sen_id": 0, "video_id": "video0", "caption": "a car"},
        {"sen_id": 4, "video_id": "video1", "caption": "a brown dog"},
        {"sen_id": 5, "video_id": "video3", "caption": "waves"},
    ],
}


def test_msr_vtt_gives_one_caption_a_clip_or_all(memory: str) -> None:
    storage.write_json(f"{memory}/MSRVTT.json", MSRVTT)
    spec = SourceSpec(f"{memory}/MSRVTT.json", split="test")
    first, silent, last = read_rows(spec)
    assert isinstance(first, ClipRef)
    assert first == ClipRef("video1", "video1.mp4", "a dog runs", 0)
    assert isinstance(silent, Failure) and (silent.key, silent.detail) == ("video2", "no caption")
    assert last == ClipRef("video3", "video3.mp4", "waves", 2)
    every = [row.key for row in read_rows(SourceSpec(spec.table, captions="all"))]
    assert every == ["video0-00", "video1-00", "video1-01", "video2", "video3-00"]
    drawn = {next(read_rows(SourceSpec(spec.table, split="test", captions=seed))) for seed in range(20)}
    assert drawn == {first, ClipRef("video1", "video1.mp4", "a brown dog", 0)}
    assert sources.resolve_url(spec, first.url) == f"{memory}/video1.mp4"


def write_folder(root: str, files: dict[str, str]) -> SourceSpec:
    for name, text in files.items():
        storage.write_bytes(f"{root}/{name}", text.encode())
    return SourceSpec(root)


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_folder_gives_its_videos_with_the_captions_next_to_them(tmp_path: Path, memory: str, place: str) -> None:
    root = str(tmp_path / "clips") if place == "disk" else memory
    files = {"b.mp4": "bb", "b.txt": "a ball\n", "a.webm": "a", "deep/c.MP4": "c", "deep/c.txt": "cat", "d:e.mp4": "d"}
    spec = write_folder(root, files | {"notes.txt": "no clip", ".hidden.mp4": "x", "d:e.txt": ""})
    silent, ball, unsaid, cat = rows = list(read_rows(spec))
    assert sources.find_format(spec) == "folder" and count_rows(spec) == 4
    assert [row.key for row in rows] == ["a", "b", clean_key("d:e"), clean_key("deep/c")]
    assert [row.detail for row in (silent, unsaid) if isinstance(row, Failure)] == ["no caption"] * 2
    assert isinstance(ball, ClipRef) and isinstance(cat, ClipRef) and (ball.caption, cat.caption) == ("a ball", "cat")
    assert sources.resolve_url(spec, cat.url) == f"{storage.absolute(root)}/deep/c.MP4"
    assert sources.resolve_url(spec, "./d:e.mp4") == f"{storage.absolute(root)}/d:e.mp4"
    assert sources.local_root(spec) == sources.local_root(sources.opened(spec)) == storage.absolute(root)


def test_the_digest_of_a_folder_changes_with_names_sizes_and_captions(memory: str) -> None:
    spec = write_folder(memory, {"a.mp4": "a", "a.txt": "cat"})
    digests = [sources.source_digest(spec)]
    for name, text in (("a.txt", "dog"), ("a.mp4", "longer"), ("b.mp4", "b")):
        storage.write_bytes(f"{memory}/{name}", text.encode())
        digests.append(sources.source_digest(spec))
    assert len(set(digests)) == 4
    storage.write_bytes(f"{memory}/README", b"not a video")
    assert sources.source_digest(spec) == digests[-1]
    copy = write_folder(f"{memory}/copy/of", {"a.mp4": "longer", "a.txt": "dog", "b.mp4": "b"})
    assert sources.source_digest(copy) == digests[-1]


def test_class_folders_give_their_names_as_prompts(memory: str) -> None:
    spec = write_folder(memory, {"fire/x.avi": "x", "fire/y.avi": "y", "boiling_water/x.avi": "z"})
    assert sources.find_format(spec) == "classes"
    rows = [row for row in read_rows(spec) if isinstance(row, ClipRef)]
    assert [(row.url, row.caption) for row in rows] == [
        ("boiling_water/x.avi", "boiling water"),
        ("fire/x.avi", "fire"),
        ("fire/y.avi", "fire"),
    ]
    assert len({row.key for row in rows}) == 3


def test_a_local_base_holds_the_files_and_bounds_them(tmp_path: Path) -> None:
    spec = SourceSpec("https://host/set/MSRVTT.json", base_url=str(tmp_path), format="msrvtt")
    assert sources.resolve_url(spec, "video0.mp4") == f"{tmp_path}/video0.mp4"
    assert sources.local_root(spec) == str(tmp_path)


def test_a_bucket_as_base_opens_no_private_host_of_its_name() -> None:
    spec = SourceSpec("s3://bucket/t.csv", base_url="s3://localhost")
    [(_, result)] = download_clips([ClipRef("k", "http://localhost:9/x", "c", 0)], spec, DownloadSpec(attempts=1))
    assert isinstance(result, Failure) and result.reason == "blocked_address"


def test_what_decides_the_rows_is_in_the_identity(memory: str) -> None:
    storage.write_json(f"{memory}/m.json", MSRVTT)
    specs = [
        SourceSpec(f"{memory}/m.json"),
        SourceSpec(f"{memory}/m.json", split="test"),
        SourceSpec(f"{memory}/m.json", captions="all"),
        SourceSpec(f"{memory}/m.json", captions=3),
        SourceSpec(f"{memory}/m.json", format="csv"),
        SourceSpec(f"{memory}/m.json", format="csv", split="train"),
        SourceSpec(f"{memory}/m.json", format="csv", split="train", held_out=0.1),
    ]
    identities = [json.dumps(sources.source_identity(spec), sort_keys=True) for spec in specs]
    assert len(set(identities)) == len(specs)
    assert set(sources.source_identity(specs[4])) == {"table_sha256", "columns"}  # as data sets of before say it


@pytest.mark.parametrize(
    ("name", "content", "changes", "sentence"),
    [
        ("t.jsonl", b'{"id": 1}\n', {}, r"no column 'videoid' \(columns found: 'id'\)"),
        ("t.parquet", parquet(pa.table({"id": [1]})), {}, r"no column 'videoid' \(columns found: 'id'\)"),
        ("t.parquet", b"videoid,contentUrl,name\n", {}, "cannot be read .* Parquet"),
        ("t.csv", b"", {"format": "xls"}, "format 'xls' is not known; give auto, csv"),
        ("t.csv", b"videoid\n", {"columns": {"link": "x"}}, "the column map names 'link'; it may name"),
        ("t.csv", b"videoid,contentUrl,name\n", {"split": "val"}, "split 'val' at .*, expected train, validation"),
        ("t.csv", b"videoid,contentUrl,name\n", {"split": "test", "held_out": 0.7}, "at held_out 0.7"),
        ("t.json", b'{"sentences": []}', {}, "has no videos with sentences"),
        ("t.json", b"[1, 2]", {}, r"no column 'videoid' \(columns found: none\)"),
        ("t.json", b"{}", {"format": "json"}, "is not an array of objects"),
        ("t.json", b"[" * 99_999, {}, "cannot be read .*nested"),
        ("t.json", b"\x00", {}, "cannot be read"),
        ("t.json", json.dumps(MSRVTT).encode(), {"split": "val"}, "no split 'val'; it has 'test', 'train'"),
        ("t.json", json.dumps(MSRVTT).encode(), {"captions": "best"}, "captions 'best', expected 'first'"),
        ("clips/notes.txt", b"", {}, "contains no videos"),
        ("none.json", None, {}, "no table at .*none.json"),
        ("none.parquet", None, {}, "no table at .*none.parquet"),
        ("none", None, {"format": "classes"}, "no folder at .*none"),
    ],
)
def test_bad_input_is_one_sentence(memory: str, name: str, content: bytes | None, changes: dict, sentence: str) -> None:
    if content is not None:
        storage.write_bytes(f"{memory}/{name}", content)
    address = f"{memory}/{name}".removesuffix("/notes.txt")
    with pytest.raises(UserError, match=sentence) as caught:
        list(read_rows(SourceSpec(address, **changes)))
    assert "\n" not in str(caught.value)


def test_a_folder_and_its_sample_are_prepared_like_a_table(tiny_base: Path, tmp_path: Path) -> None:
    table = Path(write_demo_corpus(tmp_path / "corpus", clips=3, size=32))
    folder = tmp_path / "clips"
    folder.mkdir()
    for ref in read_rows(SourceSpec(str(table))):
        assert isinstance(ref, ClipRef)
        (table.parent / ref.url).rename(folder / f"{ref.key}.mp4")
        (folder / f"{ref.key}.txt").write_text(ref.caption)
    report = write_sample(SourceSpec(str(folder)), 2, 0, str(folder / "two.json"))
    captions = []
    for source in (str(folder), report.sample):
        spec = PrepareSpec(SourceSpec(source), str(tmp_path / Path(source).stem), str(tiny_base), size=32, workers=0)
        dataset = ShardDataset(prepare(spec).dataset)
        captions.append({key: dataset.read(i, ("caption",))["caption"] for i, key in enumerate(dataset.keys)})
    assert len(captions[0]) == 3 and len(captions[1]) == 2 and captions[1].items() <= captions[0].items()
