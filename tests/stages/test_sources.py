"""Source tables: any column order, rows that cannot be used counted, and one sentence for a table that is not one."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from tasks.ingest import sources
from tasks.ingest.sources import SourceSpec, count_rows, read_rows
from tasks.records import ClipRef, Failure, UserError, from_json, to_json

WEBVID_2M = "videoid,contentUrl,duration,page_dir,name\n"
WEBVID_10M = "videoid,name,page_idx,page_dir,duration,contentUrl\n"


def table(folder: Path, text: str, name: str = "t.csv") -> SourceSpec:
    (folder / name).write_text(text, encoding="utf-8")
    return SourceSpec(table=str(folder / name))


def test_both_published_column_orders_are_read_by_name(tmp_path: Path) -> None:
    small = table(tmp_path, WEBVID_2M + '21179416,https://host/a.mp4,,1_50,"Aerial shot, ""winter"" forest"\n')
    large = table(tmp_path, WEBVID_10M + "21179416,Aerial,1,1_50,PT00H00M11S,https://host/a.mp4\n", "l.csv")
    assert list(read_rows(small)) == [ClipRef("21179416", "https://host/a.mp4", 'Aerial shot, "winter" forest', 0)]
    assert list(read_rows(large)) == [ClipRef("21179416", "https://host/a.mp4", "Aerial", 0)]


def test_another_table_is_read_through_a_column_map(tmp_path: Path) -> None:
    spec = table(tmp_path, "text,link,id\nwaves,v/1.mp4,x\n")
    spec = SourceSpec(spec.table, {"key": "id", "url": "link", "caption": "text"})
    assert list(read_rows(spec)) == [ClipRef("x", "v/1.mp4", "waves", 0)]
    assert from_json(SourceSpec, to_json(spec)) == spec


def test_rows_that_cannot_be_used_are_counted_with_their_reason(tmp_path: Path) -> None:
    spec = table(tmp_path, WEBVID_2M + "1,u,,,cap\n2,,,,cap\n3,u,,,\n,u,,,cap\n1,u2,,,again\n5\n\n6,u,,,cap\n")
    rows = list(read_rows(spec))
    reasons = [row.reason if isinstance(row, Failure) else "ok" for row in rows]
    assert reasons == ["ok", "bad_row", "bad_row", "bad_row", "duplicate_key", "bad_row", "ok"]
    assert [row.row for row in rows] == list(range(7)) and count_rows(spec) == 7


def test_a_range_gives_the_rows_that_the_whole_gives(tmp_path: Path) -> None:
    spec = table(tmp_path, WEBVID_2M + "".join(f"{i % 7},u{i},,,cap\n" for i in range(20)))
    whole = list(read_rows(spec))
    assert list(read_rows(spec, 5, 12)) == whole[5:12]
    limited = SourceSpec(spec.table, limit=9)
    assert list(read_rows(limited)) == whole[:9] and count_rows(limited) == 9


def test_keys_are_clean_and_stay_distinct() -> None:
    assert sources.clean_key("1025449_a-B") == "1025449_a-B"
    odd = [sources.clean_key(text) for text in ("vid.1", "vid.2", "vid/1", "vid-1", "ключ", "x" * 200, "x" * 201)]
    assert len(set(odd)) == len(odd)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) for key in odd)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("id,url\n1,u\n", r"no column 'videoid' \(columns found: 'id', 'url'\); name its columns"),
        ("", r"no column 'videoid' \(columns found: none\)"),
    ],
)
def test_a_missing_column_is_told_with_the_columns_found(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        list(read_rows(table(tmp_path, text)))


def test_a_table_that_cannot_be_opened_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.csv.gz").write_bytes(gzip.compress(b"videoid,contentUrl,name\n" * 999)[:-20])
    places = {"none.csv": "no table at", ".": "is a folder", "broken.csv.gz": "cannot be read"}
    for name, sentence in places.items():
        with pytest.raises(UserError, match=sentence):
            count_rows(SourceSpec(str(tmp_path / name)))
    with pytest.raises(UserError, match="cannot be read"):
        count_rows(SourceSpec("nowhere://x/t.csv"))


def test_a_binary_file_is_not_a_table(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(bytes(range(256)) * 100)
    with pytest.raises(UserError):
        list(read_rows(SourceSpec(str(tmp_path / "clip.mp4"))))


def test_a_byte_order_mark_and_a_cell_beyond_measure_do_not_stop_the_rest(tmp_path: Path) -> None:
    spec = table(tmp_path, "\ufeff" + WEBVID_2M + f"1,u,,,{'x' * 200_000}\n2,u,,,cap\n")
    first, second = read_rows(spec)
    assert isinstance(first, Failure) and first.reason == "bad_row" and isinstance(second, ClipRef)
    assert count_rows(spec) == 2


def test_relative_urls_resolve_against_the_table_or_the_declared_base() -> None:
    resolve = sources.resolve_url
    assert resolve(SourceSpec("/data/t.csv"), "videos/a.mp4") == "/data/videos/a.mp4"
    assert resolve(SourceSpec("s3://b/set/t.csv"), "videos/a.mp4") == "s3://b/set/videos/a.mp4"
    assert resolve(SourceSpec("https://host/set/t.csv"), "videos/a.mp4") == "https://host/set/videos/a.mp4"
    moved = SourceSpec("/data/t.csv", base_url="http://127.0.0.1:8000")
    assert resolve(moved, "videos/a.mp4") == "http://127.0.0.1:8000/videos/a.mp4"
    assert resolve(moved, "https://host/a.mp4") == "https://host/a.mp4"


def test_the_digest_is_of_the_rows_not_of_the_place(tmp_path: Path) -> None:
    one = table(tmp_path, WEBVID_2M + "1,u,,,cap\n", "one.csv")
    two = table(tmp_path, WEBVID_2M + "1,u,,,cap\n", "two.csv")
    three = table(tmp_path, WEBVID_2M + "1,u,,,Cap\n", "three.csv")
    assert sources.source_digest(one) == sources.source_digest(two) != sources.source_digest(three)
