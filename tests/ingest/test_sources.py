"""Sources of every format: the same rows give the same records, bad ones are counted, and no source is one sentence."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infra import storage
from tasks.ingest import sources
from tasks.ingest.rows import KeysSeen, clean_key
from tasks.ingest.sources import count_rows, read_rows
from tasks.ingest.spec import SourceSpec
from tasks.json_records import parse_record
from tasks.records import ClipRef, Failure, UserError, to_json

WEBVID_2M = "videoid,contentUrl,duration,page_dir,name\n"
WEBVID_10M = "videoid,name,page_idx,page_dir,duration,contentUrl\n"


def table(folder: Path, text: str, name: str = "t.csv") -> SourceSpec:
    (folder / name).write_text(text, encoding="utf-8")
    return SourceSpec(table=str(folder / name))


def captioned(key: str, url: str, caption: str) -> dict[str, str]:
    return {"videoid": key, "contentUrl": url, "name": caption}


def json_lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def test_both_published_column_orders_are_read_by_name(tmp_path: Path) -> None:
    small = table(tmp_path, WEBVID_2M + '21179416,https://host/a.mp4,,1_50,"Aerial shot, ""winter"" forest"\n')
    large = table(tmp_path, WEBVID_10M + "21179416,Aerial,1,1_50,PT00H00M11S,https://host/a.mp4\n", "l.csv")
    assert list(read_rows(small)) == [ClipRef("21179416", "https://host/a.mp4", 'Aerial shot, "winter" forest', 0)]
    assert list(read_rows(large)) == [ClipRef("21179416", "https://host/a.mp4", "Aerial", 0)]


def test_another_table_is_read_through_a_column_map(tmp_path: Path) -> None:
    spec = table(tmp_path, "text,link,id\nwaves,v/1.mp4,x\n")
    spec = SourceSpec(spec.table, {"key": "id", "url": "link", "caption": "text"})
    assert list(read_rows(spec)) == [ClipRef("x", "v/1.mp4", "waves", 0)]
    assert parse_record(SourceSpec, json.dumps(to_json(spec))) == spec


def test_rows_that_cannot_be_used_are_counted_with_their_reason(tmp_path: Path) -> None:
    spec = table(tmp_path, WEBVID_2M + "1,u,,,cap\n2,,,,cap\n3,u,,,\n,u,,,cap\n1,u2,,,again\n5\n\n6,u,,,cap\n")
    rows = list(read_rows(spec))
    reasons = [row.reason if isinstance(row, Failure) else "ok" for row in rows]
    assert reasons == ["ok", "bad_row", "bad_row", "bad_row", "duplicate_key", "bad_row", "ok"]
    assert [row.row for row in rows] == list(range(7)) and count_rows(spec) == 7


def test_a_quote_that_is_never_closed_costs_only_its_own_line(tmp_path: Path) -> None:
    whole = [f"{i},https://host/{i}.mp4,,,a cat\n" for i in range(9)]
    broken = whole.copy()
    broken[1] = '1,https://host/1.mp4,,,"a cat\n'  # closed by the next quote there is, three lines on
    broken[4] = '4,https://host/4.mp4,,,"a ""dog"", said the cat"\n'
    broken[6] = '6,"https://host/6.mp4,,,a cat\n'  # closed by nothing
    spec = table(tmp_path, WEBVID_2M + "".join(broken))
    reasons = [row.reason if isinstance(row, Failure) else row.key for row in read_rows(spec)]
    assert reasons == ["0", "bad_row", "2", "3", "4", "5", "bad_row", "7", "8"] and count_rows(spec) == 9
    endless = WEBVID_2M + '"1,' + whole[2] * 9000 + "x" * (1 << 21) + "\n" + whole[3]  # beyond a cell, beyond a line
    spec = table(tmp_path, endless, "endless.csv")
    assert count_rows(spec) == 9002
    assert [row.reason for row in read_rows(spec) if isinstance(row, Failure)].count("bad_row") == 2


def test_a_caption_of_several_lines_is_one_row(tmp_path: Path) -> None:
    spec = table(tmp_path, WEBVID_2M + '1,u.mp4,,,"waves,\nat, their, own, pace\n"\n2,v.mp4,,,sand\n')
    assert [row.caption for row in read_rows(spec) if isinstance(row, ClipRef)] == [
        "waves,\nat, their, own, pace",
        "sand",
    ]


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ("1,a.mp4,a dog", "a dog"),
        ("1,a.mp4,a dog,", "a dog"),  # as spreadsheets export empty columns
        ("1,a.mp4,a dog,,,", "a dog"),
        ('1,a.mp4,"a dog, a cat"', "a dog, a cat"),
        ('1,a.mp4,"a ""big"" dog"', 'a "big" dog'),
        ('1,a.mp4,a 12" pipe', 'a 12" pipe'),
        ('1,a.mp4,"C:\\"', "C:\\"),
        ("1,a.mp4,a dog, a cat", None),
        ("1,a.mp4,a dog,,x", None),
        ("1,a.mp4", None),
        ("1", None),
        ('1,a.mp4,"a \\"big\\" dog"', None),
        ('1,a.mp4,"a \\"big, brown\\" dog"', None),
        ('1,a.mp4,"a \\", dog"', None),
        ('1,a.mp4,"says \\""', None),
        ('1,a.mp4,"a "big" dog"', None),
        ('1,a.mp4,"Big" dog', None),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_caption_is_whole_or_its_row_is_bad(tmp_path: Path, line: str, caption: str | None, end: str) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(
        end.join(["videoid,contentUrl,name", line, "2,b.mp4,after", line, "3,c.mp4,last"]).encode() + end.encode()
    )
    first, second, third, fourth = read_rows(SourceSpec(str(table)))
    assert (first.caption if isinstance(first, ClipRef) else None) == caption
    assert isinstance(third, Failure) and third.reason == ("bad_row" if caption is None else "duplicate_key")
    assert [getattr(row, "caption", None) for row in (second, fourth)] == ["after", "last"]


def test_columns_of_a_header_may_be_empty_at_its_end(tmp_path: Path) -> None:
    spec = table(tmp_path, "videoid,contentUrl,name,,\n1,a.mp4,a dog\n2,b.mp4,a cat,,\n3,c.mp4,a cow,x,\n")
    assert [getattr(row, "caption", "bad") for row in read_rows(spec)] == ["a dog", "a cat", "bad"]


@pytest.mark.parametrize("story", ['"story:\n7,videos/x.mp4,fake row\nend"', '"\n7,videos/x.mp4,""fake"" row\n"'])
def test_a_caption_of_several_lines_adds_no_rows(tmp_path: Path, story: str) -> None:
    spec = table(tmp_path, f"videoid,contentUrl,name\n1,a.mp4,{story}\n2,b.mp4,sand\n")
    first, second = read_rows(spec)
    assert isinstance(first, ClipRef) and "7,videos/x.mp4" in first.caption
    assert isinstance(second, ClipRef) and second.key == "2"


def test_a_column_that_is_there_twice_is_refused_where_it_is_needed(tmp_path: Path) -> None:
    spare = pa.table([pa.array(["1"])] * 4, names=["videoid", "contentUrl", "name", "more"])
    for names, needed in (
        (["videoid", "contentUrl", "name", "name"], True),
        (["videoid", "contentUrl", "name", "x"], False),
    ):
        storage.write_bytes("memory://twice/t.parquet", parquet(spare.rename_columns(names)))
        storage.write_bytes("memory://twice/t.csv", (",".join([*names, "x"]) + "\n1,1,1,1,1\n").encode())
        for name in ("t.csv", "t.parquet"):
            spec = SourceSpec(f"memory://twice/{name}")
            if needed:
                with pytest.raises(UserError, match="has the column 'name' 2 times; rename or remove the others"):
                    list(read_rows(spec))
            else:
                assert list(read_rows(spec)) == [ClipRef("1", "1", "1", 0)]


def test_a_json_line_that_has_a_name_twice_is_a_bad_row(tmp_path: Path) -> None:
    good = json.dumps(captioned("k", "u", "c"))
    spec = table(tmp_path, good + "\n" + good[:-1].replace('"k"', '"l"') + ', "name": "d"}\n', "t.jsonl")
    first, second = read_rows(spec)
    assert isinstance(first, ClipRef) and isinstance(second, Failure) and second.reason == "bad_row"
    assert "'name' is there twice" in second.detail


def test_a_range_gives_the_same_rows_as_the_complete_table(tmp_path: Path) -> None:
    spec = table(tmp_path, WEBVID_2M + "".join(f"{i % 7},u{i},,,cap\n" for i in range(20)))
    whole = list(read_rows(spec))
    assert list(read_rows(spec, 5, 12)) == whole[5:12]
    limited = SourceSpec(spec.table, limit=9)
    assert list(read_rows(limited)) == whole[:9] and count_rows(limited) == 9


def test_keys_are_clean_and_stay_distinct() -> None:
    assert clean_key("1025449_a-B") == "1025449_a-B"
    odd = [clean_key(text) for text in ("vid.1", "vid.2", "vid/1", "vid-1", "ключ", "x" * 200, "x" * 201)]
    assert len(set(odd)) == len(odd)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) for key in odd)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("id,url\n1,u\n", r"no column 'videoid' \(columns found: 'id', 'url'\); name its columns"),
        ("", r"no column 'videoid' \(columns found: none\)"),
    ],
)
def test_a_missing_column_is_reported_with_the_existing_ones(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        list(read_rows(table(tmp_path, text)))


def test_a_table_that_cannot_be_opened_is_reported_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.csv.gz").write_bytes(gzip.compress(b"videoid,contentUrl,name\n" * 999)[:-20])
    places = {"none.csv": "no table at", ".": "contains no videos", "broken.csv.gz": "cannot be read"}
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


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=60, deadline=None)
@example([("\r", ",/", "")])  # the second line of this row in a CSV, taken alone, has a key and a link
@example([("\n", ",/", "\n")])
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=12))
def test_the_same_rows_give_the_same_records_in_every_format(rows: list[tuple[str, str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([("videoid", "contentUrl", "name"), *rows])
    objects = [captioned(*row) for row in rows]
    files = {
        "t.csv": text.getvalue().encode(),
        "t.jsonl": json_lines(objects),
        "t.jsonl.gz": gzip.compress(json_lines(objects)),
        "t.parquet": parquet(pa.Table.from_pylist(objects)),
    }
    found = []
    for name, data in files.items():
        storage.write_bytes(f"memory://same/{name}", data)
        spec = SourceSpec(f"memory://same/{name}")
        found.append(list(read_rows(spec)))
        assert count_rows(spec) == len(rows) == len(found[-1])
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_typed_tables_take_text_and_whole_numbers_and_nothing_else(name: str) -> None:
    rows = [
        {"videoid": 7, "contentUrl": "u", "name": "cap"},
        {"videoid": 8, "contentUrl": None, "name": "cap"},
        {"videoid": 7, "contentUrl": "u", "name": "again"},
    ]
    odd = [rows[0], {"videoid": 9, "contentUrl": "u", "name": ["a", "b"]}]
    for written, reasons in ((rows, ["ok", "no url", "an earlier row has this key"]), (odd[1:], ["type list"])):
        table = pa.Table.from_pylist(written)
        storage.write_bytes(f"memory://typed/{name}", json_lines(written) if name == "t.jsonl" else parquet(table))
        found = list(read_rows(SourceSpec(f"memory://typed/{name}")))
        for record, reason in zip(found, reasons, strict=True):
            assert reason in (record.detail if isinstance(record, Failure) else "ok")
    storage.write_bytes(
        f"memory://typed/{name}", json_lines(rows) if name == "t.jsonl" else parquet(pa.Table.from_pylist(rows))
    )
    assert next(read_rows(SourceSpec(f"memory://typed/{name}"))) == ClipRef("7", "u", "cap", 0)


def test_lines_that_are_no_objects_are_bad_rows_and_the_next_is_read(tmp_path: Path) -> None:
    lines = ["", "{", "[1]", "[" * 99_999, "null", '"' + "x" * (1 << 20), json.dumps(captioned("a", "u", "\ud800"))]
    (tmp_path / "t.jsonl").write_text("\n".join([json.dumps(captioned("k", "u", "c")), *lines]), encoding="utf-8")
    first, *bad, last = read_rows(SourceSpec(str(tmp_path / "t.jsonl")))
    assert first == ClipRef("k", "u", "c", 0) and last == ClipRef("a", "u", "?", 6)
    assert [record.row for record in bad if isinstance(record, Failure) and record.reason == "bad_row"] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_a_text_that_is_none_does_not_cost_the_parquet_table(tmp_path: Path) -> None:
    broken = pa.array([b"a", b"\xff"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"videoid": [1, 2], "contentUrl": ["u", "v"], "name": broken}), tmp_path / "t.parquet")
    assert [row.caption for row in read_rows(SourceSpec(str(tmp_path / "t.parquet"))) if isinstance(row, ClipRef)] == [
        "a",
        "\ufffd",
    ]


def test_a_parquet_table_is_counted_without_its_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([captioned(str(number), "u", "c") for number in range(3000)])
    pq.write_table(table, tmp_path / "t.pq")
    spec = SourceSpec(str(tmp_path / "t.pq"))
    assert count_rows(spec) == len(list(read_rows(spec))) == 3000
    assert count_rows(SourceSpec(spec.table, limit=7)) == 7
    assert count_rows(SourceSpec(spec.table, split="validation", held_out=0.1)) < 1000


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4000), max_size=4000))
def test_the_keys_seen_are_an_exact_set(numbers: list[int]) -> None:
    seen, known = KeysSeen(), set()
    for number in numbers:
        assert seen.add(str(number)) == (number not in known)
        known.add(number)


def test_ten_thousand_keys_are_seen_once_each() -> None:
    seen = KeysSeen()
    assert all(seen.add(str(number)) for number in range(10_000))
    assert not any(seen.add(str(number)) for number in range(10_000)) and seen.add("10000")


def test_reading_holds_little_more_than_a_mark_a_row(tmp_path: Path) -> None:
    spec = table(tmp_path, WEBVID_2M + "".join(f"{number},u,,,{'word ' * 20}\n" for number in range(30_000)))
    assert sum(1 for _ in read_rows(spec, 0, 10)) == 10  # what is imported and compiled on first use is not counted
    tracemalloc.start()
    try:
        assert sum(1 for row in read_rows(spec) if isinstance(row, ClipRef)) == 30_000
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 40 * 30_000
