"""Sources as people have them: several files, other delimiters, lists of captions, tars, videos inside of Parquet."""

from __future__ import annotations

import errno
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.cli.app import main
from infra import storage
from infra.url_guard import written_url
from tasks.ingest.download import Fetched, download_clips
from tasks.ingest.samples import write_sample
from tasks.ingest.sources import count_rows, find_format, opened, read_rows, resolve_url, source_digest, source_identity
from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.ingest.survey import preview, survey
from tasks.records import ClipRef, Failure, UserError
from tasks.shards import writing
from tasks.shards.layout import PackedSample
from trip_model.folders import BaseFolderError, resolve_base
from trip_model.text import unescape_entities

HEADER = "videoid,contentUrl,name\n"
VIDEO = b"\x00\x00\x00\x18ftypmp42" + bytes(range(256)) * 40
FAST = DownloadSpec(attempts=1, total_seconds=5.0)


def keys(spec: SourceSpec) -> list[str]:
    return [row.key if isinstance(row, ClipRef) else row.reason for row in read_rows(spec)]


def fetch(spec: SourceSpec, **changes: Any) -> list[str]:
    rows = [row for row in read_rows(spec) if isinstance(row, ClipRef)]
    results = [result for _, result in download_clips(rows, opened(spec), DownloadSpec(attempts=1, **changes))]
    return ["ok" if isinstance(result, Fetched) else result.reason for result in results]


def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    for name in ("b", "a", "deep/c"):
        (parts / name).parent.mkdir(parents=True, exist_ok=True)
        (parts / f"{name}.csv").write_text(f"{HEADER}{name[-1]},v/{name[-1]}.bin,cap\n")
        (parts / name).parent.joinpath("v").mkdir(exist_ok=True)
        (parts / name).parent.joinpath("v", f"{name[-1]}.bin").write_bytes(VIDEO)
    (parts / "_SUCCESS").write_text("")
    (parts / "_more.csv").write_text("no table")
    both = f"{parts}/a.csv, {parts}/b.csv"
    for table, want in (
        (str(parts), ["a", "b", "c"]),
        (f"{parts}/*.csv", ["a", "b"]),
        (f"{parts}/[ab].csv", ["a", "b"]),
        (f"{parts}/**/*.csv", ["a", "b", "c"]),
        (both, ["a", "b"]),
        (f"{parts}/b.csv,{parts}/a.csv", ["b", "a"]),
    ):
        spec = SourceSpec(table)
        assert keys(spec) == want and count_rows(spec) == len(want), table
        assert fetch(spec) == ["ok"] * len(want), table
    assert source_digest(SourceSpec(both)) == source_digest(SourceSpec(f"{parts}/*.csv"))
    assert len({source_digest(SourceSpec(t)) for t in (both, f"{parts}/b.csv,{parts}/a.csv", str(parts))}) == 3
    assert opened(SourceSpec(both)).files == (f"{parts}/a.csv", f"{parts}/b.csv")
    one = SourceSpec(f"{parts}/a.cs*")
    assert source_identity(one) == source_identity(SourceSpec(f"{parts}/a.csv"))
    odd = tmp_path / "x,[y]*.csv"  # a file may have any name
    odd.write_text(HEADER + "o,o.mp4,cap\n")
    assert keys(SourceSpec(str(odd))) == ["o"]
    with pytest.raises(UserError, match="no file matches"):
        keys(SourceSpec(f"{parts}/*.parquet"))
    (parts / "d.jsonl").write_text("{}")
    with pytest.raises(UserError, match="files of several formats"):
        keys(SourceSpec(f"{parts}/a.csv,{parts}/d.jsonl"))


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_the_delimiter_is_that_of_the_header(tmp_path: Path, delimiter: str) -> None:
    table = tmp_path / "t.csv"
    rows = [["videoid", "contentUrl", "name"], ["1", "a.mp4", 'a "dog"'], ["2", "b.mp4", "x"], ["3", "c.mp4"]]
    table.write_text("\n".join(delimiter.join(row) for row in rows).replace('a "dog"', '"a ""dog"""') + "\n")
    first, second, third = read_rows(SourceSpec(str(table)))
    assert first == ClipRef("1", "a.mp4", 'a "dog"', 0) and isinstance(second, ClipRef)
    assert isinstance(third, Failure) and third.detail == "2 cells, the header has 3"


def test_text_in_another_encoding_is_told_and_read_with_the_option(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes((HEADER + "1,a.mp4,café\n2,b.mp4,plain\n").encode("cp1252"))
    bad, good = read_rows(SourceSpec(str(table)))
    assert isinstance(bad, Failure) and (bad.reason, bad.detail) == ("bad_row", "the caption is not UTF-8")
    assert isinstance(good, ClipRef)
    told = SourceSpec(str(table), encoding="cp1252")
    assert [row.caption for row in read_rows(told) if isinstance(row, ClipRef)] == ["café", "plain"]
    assert source_identity(told)["encoding"] == "cp1252" and "encoding" not in source_identity(SourceSpec(str(table)))
    table.write_bytes((HEADER + "1,a.mp4,café\n").encode("utf-16"))
    assert [row.caption for row in read_rows(SourceSpec(str(table))) if isinstance(row, ClipRef)] == ["café"]


def test_entities_are_unescaped_and_part_of_the_identity_only_where_they_are(tmp_path: Path) -> None:
    assert unescape_entities("Tom &amp; Jerry &amp;#39;s &lt;b&gt;") == "Tom & Jerry 's <b>"
    for plain in ("AT&T", "a&notb", "R&D; x", "50 &nonsense; 3", "&#; &"):
        assert unescape_entities(plain) == plain
    same = "a,a.mp4?x=1&y;z,Tom & Jerry\n"  # nothing to unescape in the caption
    for name, rows, has in (("a.csv", same, None), ("b.csv", same + "b,b.mp4,Tom &amp; Jerry\n", "unescaped")):
        (tmp_path / name).write_text(HEADER + rows)
        assert source_identity(SourceSpec(str(tmp_path / name))).get("entities") == has
    captions = ["Tom & Jerry", ["x", "&quot;y&quot;"]]
    for place, caption in enumerate(captions):
        table = pa.Table.from_pylist([{"videoid": "1", "contentUrl": "a.mp4", "name": caption}])
        pq.write_table(table, tmp_path / f"{place}.parquet")
        (tmp_path / f"{place}.jsonl").write_text(json.dumps(table.to_pylist()[0]).replace("&", "\\u0026") + "\n")
        for ending in ("parquet", "jsonl"):
            spec = SourceSpec(str(tmp_path / f"{place}.{ending}"), captions="all")
            assert ("entities" in source_identity(spec)) == bool(place)
            assert [r.caption for r in read_rows(spec) if isinstance(r, ClipRef)][-1] == (
                '"y"' if place else captions[0]
            )


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_captions_may_be_lists_and_keys_floats(tmp_path: Path, ending: str) -> None:
    rows = [
        {"videoid": 1.0, "contentUrl": "a.mp4", "name": ["one", "two"]},
        {"videoid": 2.5, "contentUrl": "b.mp4", "name": ["three"]},
        {"videoid": None, "contentUrl": "c.mp4", "name": []},
    ]
    path = tmp_path / f"t.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    assert find_format(SourceSpec(str(path))) == ending
    assert keys(SourceSpec(str(path))) == ["1", "bad_row", "bad_row"]
    assert keys(SourceSpec(str(path), captions="all")) == ["1-00", "1-01", "bad_row", "bad_row"]
    assert count_rows(SourceSpec(str(path), captions="all")) == 4
    drawn = {next(iter(read_rows(SourceSpec(str(path), captions=seed)))) for seed in range(12)}
    assert drawn == {ClipRef("1", "a.mp4", "one", 0), ClipRef("1", "a.mp4", "two", 0)}


def test_a_json_array_has_bad_rows_too(tmp_path: Path) -> None:
    good = '{"videoid": "0", "contentUrl": "u", "name": "a"}'
    path = tmp_path / "t.json"
    path.write_text(f'[{good}, {{"videoid": "1", "contentUrl": "u", "name": "a", "name": "b"}}, 3]')
    assert keys(SourceSpec(str(path))) == ["0", "bad_row", "bad_row"]
    path.write_text(f"{good}\n{good.replace('0', '1')}\n")
    assert keys(SourceSpec(str(path))) == ["0", "1"]


def test_keys_come_from_the_links_of_a_table_without_keys(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("contentUrl,name\nv/a.mp4,cap\nw/a.mp4,cap\nv/a.mp4,cap\n,cap\n")
    with pytest.raises(UserError, match=r"without such a column give --columns\.key ''"):
        keys(SourceSpec(str(tmp_path / "t.csv")))
    found = keys(SourceSpec(str(tmp_path / "t.csv"), columns={"key": ""}))
    assert found[0].startswith("a-") and found[1] != found[0] and found[2:] == ["duplicate_key", "bad_row"]


def write_tar(path: Path, names: list[str]) -> None:
    import webdataset

    with webdataset.TarWriter(str(path)) as tar:
        for name in names:
            tar.write({"__key__": name, "mp4": VIDEO + name.encode(), "json": {"caption": f"json {name}"}})
        tar.write({"__key__": "poor", "json": {"caption": "no video"}})
        tar.write({"__key__": "told", "MP4": VIDEO, "txt": "a text &amp; more"})


def test_tars_of_webdataset_give_their_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", ["000000001", "000000002"])
    write_tar(tmp_path / "00001.tar", ["000000001"])
    (tmp_path / "00000_stats.json").write_text("{}")
    pq.write_table(pa.table({"videoid": ["x"]}), tmp_path / "00000.parquet")
    spec = SourceSpec(str(tmp_path))
    assert find_format(spec) == "tar"
    rows = list(read_rows(spec))
    assert [r.key for r in rows if isinstance(r, ClipRef)] == [
        *("000000001", "000000002", "00000_told", "00001_000000001", "00001_told")
    ]
    assert [r.caption for r in rows if isinstance(r, ClipRef)][1:3] == ["json 000000002", "a text & more"]
    assert fetch(spec) == ["ok"] * 5 and fetch(spec, max_bytes=100)[0] == "too_large"
    first = next(r for r in rows if isinstance(r, ClipRef))
    [(_, got)] = download_clips([first], spec, FAST)
    assert isinstance(got, Fetched) and got.data == VIDEO + b"000000001"
    assert source_identity(spec)["format"] == "tar" and source_identity(spec)["entities"] == "unescaped"
    with pytest.raises(UserError, match="lie inside of its files"):
        write_sample(spec, 1, 0, str(tmp_path / "s.json"))
    data = (tmp_path / "00001.tar").read_bytes()
    for size in (len(VIDEO), 512, 1536, 3000):
        storage.write_bytes("memory://cut/cut.tar", data[:size])
        with pytest.raises(UserError, match=r"cut.tar cannot be read \("):
            keys(SourceSpec("memory://cut/cut.tar"))
    (tmp_path / "z").mkdir()
    with tarfile.open(tmp_path / "z" / "z.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.mp4"), io.BytesIO())
    with pytest.raises(UserError, match="uncompressed"):
        keys(SourceSpec(str(tmp_path / "z" / "z.tar.gz")))


def test_videos_inside_of_parquet_are_read_and_linked_ones_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked.mp4").write_bytes(VIDEO)
    videos = [{"bytes": VIDEO + b"0", "path": "a.mp4"}, {"bytes": None, "path": "linked.mp4"}, None]
    videos += [{"bytes": VIDEO + bytes([n]), "path": None} for n in range(4)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"video": pa.array(videos, kind), "caption": [f"c{n}" for n in range(7)]})
    pq.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet", row_group_size=3)
    spec = SourceSpec(str(tmp_path / "data" / "*.parquet"), {"key": "", "url": "video", "caption": "caption"})
    rows = list(read_rows(spec))
    assert [r.reason if isinstance(r, Failure) else "ok" for r in rows] == ["ok", "ok", "bad_row", *["ok"] * 4]
    refs = [r for r in rows if isinstance(r, ClipRef)]
    assert len({ref.key for ref in refs}) == 6 and refs[1].inside is None and refs[0].inside is not None
    results = [got for _, got in download_clips(refs, opened(spec), FAST)]
    data = [got.data for got in results if isinstance(got, Fetched)]
    assert data == [VIDEO + b"0", VIDEO, *(VIDEO + bytes([n]) for n in range(4))]


@pytest.fixture
def site() -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """A server, the paths it was asked for, and its answers by path: (status, headers, body)."""
    asked: list[str] = []
    answers: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, headers, body = answers.get(self.path, (200, {}, VIDEO))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked, answers
    server.shutdown()
    server.server_close()


def one(url: str, spec: SourceSpec | None = None, **limits: Any) -> Fetched | Failure:
    source = spec or SourceSpec("/nowhere/t.csv", allow=("127.0.0.1",))
    [(_, result)] = download_clips([ClipRef("k", url, "c", 0)], source, DownloadSpec(attempts=1, **limits))
    return result


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("/a%2Fb%3Ac%27d%7Ee.mp4?X-Sig=a%2Bb%2f&q=~'()", "/a%2Fb%3Ac%27d%7Ee.mp4?X-Sig=a%2Bb%2f&q=~'()"),
        ("/a/../b/./c.mp4", "/a/../b/./c.mp4"),
        ("/a b/é.mp4?q=ü", "/a%20b/%C3%A9.mp4?q=%C3%BC"),
        ("/100%.mp4", "/100%.mp4"),
        ("/a+b;c=d,e@f:g.mp4?a=b+c&&d", "/a+b;c=d,e@f:g.mp4?a=b+c&&d"),
        ("", "/"),
        ("?x=%2F", "/?x=%2F"),
        ("/x.mp4#t=3", "/x.mp4"),
    ],
)
def test_a_link_is_requested_as_it_is_written(site: Any, written: str, wanted: str) -> None:
    url, asked, answers = site
    assert isinstance(one(url + written), Fetched) and asked == [wanted]
    assert isinstance(one(url.replace("http", "HTTP") + written), Fetched)
    if wanted != "/":
        answers["/hop"] = (302, {"Location": url + wanted}, b"")
        answers["/near"] = (302, {"Location": wanted}, b"")
        assert isinstance(one(f"{url}/hop"), Fetched) and asked[-1] == wanted
        if "/../" not in wanted:
            assert isinstance(one(f"{url}/near"), Fetched) and asked[-1] == wanted
    assert written_url("http://bücher.example/x%2Fy").raw_host == "xn--bcher-kva.example"


def test_a_whole_file_in_a_partial_or_compressed_answer_is_taken(site: Any) -> None:
    import gzip

    url, _, answers = site
    size = len(VIDEO)
    answers["/whole"] = (206, {"Content-Range": f"bytes 0-{size - 1}/{size}"}, VIDEO)
    answers["/part"] = (206, {"Content-Range": f"bytes 0-{size - 1}/{size + 9}"}, VIDEO)
    answers["/gzip"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(VIDEO))
    answers["/bomb"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(VIDEO + bytes(1 << 22)))
    answers["/cut"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(VIDEO)[:-20])
    answers["/plain"] = (200, {"Content-Encoding": "gzip"}, VIDEO)
    found = {path: one(url + path, max_bytes=1 << 20) for path in answers}
    assert {path: getattr(got, "reason", "ok") for path, got in found.items()} == {
        "/whole": "ok",
        "/part": "http_206",
        "/gzip": "ok",
        "/bomb": "too_large",
        "/cut": "truncated",
        "/plain": "ok",
    }
    assert all(got.data == VIDEO for got in found.values() if isinstance(got, Fetched))


def test_private_hosts_are_opened_by_name_and_nothing_else(site: Any, tmp_path: Path) -> None:
    url, asked, answers = site
    port = url.rpartition(":")[2]
    answers["/t.csv"] = (200, {}, (HEADER + f"1,v/a.mp4,cap\n2,http://127.0.0.2:{port}/b.mp4,cap\n").encode())
    assert fetch(SourceSpec(f"{url}/t.csv")) == ["ok", "blocked_address"]  # the table's own host
    for allow, want in (
        ((), "blocked_address"),
        (("127.0.0.1",), "ok"),
        ((f"127.0.0.1:{port}",), "ok"),
        (("127.0.0.1:9",), "blocked_address"),
        (("127.0.0.2",), "blocked_address"),
        (("localhost",), "blocked_address"),
        (("10.0.0.1", f"127.0.0.1:{port}"), "ok"),
    ):
        got = one(f"{url}/x", SourceSpec("/nowhere/t.csv", allow=allow))
        assert getattr(got, "reason", "ok") == want, allow
    name = SourceSpec("/nowhere/t.csv", allow=(f"localhost:{port}",))
    assert isinstance(one(f"http://localhost:{port}/x", name), Fetched)
    proxied = SourceSpec("/nowhere/t.csv", proxy=url)
    answers["http://clips.example/a%2Fb.mp4"] = (200, {}, VIDEO)
    assert isinstance(one("http://clips.example/a%2Fb.mp4", proxied), Fetched)
    assert asked[-1] == "http://clips.example/a%2Fb.mp4"
    assert getattr(one("http://10.0.0.1/x", proxied), "reason", "ok") == "blocked_address"
    for bad in (SourceSpec("t.csv", allow=("http//x",)), SourceSpec("t.csv", proxy="socks5://x:1")):
        with pytest.raises(UserError, match="give"):
            one("http://clips.example/a", bad)


def test_files_of_another_folder_or_bucket_are_opened_by_name(tmp_path: Path) -> None:
    storage.write_bytes("memory://bucket/v/a.mp4", VIDEO)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.mp4").write_bytes(VIDEO)
    (tmp_path / "t").mkdir()
    table = tmp_path / "t" / "t.csv"
    table.write_text(f"{HEADER}1,memory://bucket/v/a.mp4,cap\n2,{tmp_path}/far/b.mp4,cap\n")
    assert fetch(SourceSpec(str(table))) == ["blocked_address"] * 2
    assert fetch(SourceSpec(str(table), allow=("memory://bucket", str(tmp_path / "far")))) == ["ok", "ok"]
    assert fetch(SourceSpec(str(table), allow=("memory://buck", str(tmp_path / "fa")))) == ["blocked_address"] * 2


def test_linked_class_folders_and_all_video_endings_are_read(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    endings = ("3gp", "mts", "m2ts", "mxf", "vob", "mp4")
    for ending in endings:
        (real / f"{ending}.{ending}").write_bytes(VIDEO)
    root = tmp_path / "set"
    (root / "fire").mkdir(parents=True)
    (root / "fire" / "a.mp4").write_bytes(VIDEO)
    (root / "water").symlink_to(real)
    (root / "fire" / "again").symlink_to(root)  # a folder that contains itself
    (root / "fire" / "gone.mp4").symlink_to(tmp_path / "nothing")
    (root / "fire" / "notes.pdf").write_text("")
    spec = SourceSpec(str(root))
    rows = [row for row in read_rows(spec) if isinstance(row, ClipRef)]
    assert {row.caption for row in rows} == {"fire", "water"} and len(rows) == 2 + len(endings)
    assert fetch(spec).count("missing_file") == 1
    assert survey(spec).passed_over == {".pdf": 1}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv.zip", b"no zip", "t.csv.zip cannot be read"),
        ("t.csv.gz", b"no gzip", "t.csv.gz cannot be read"),
        ("t.parquet", b"PAR1", "t.parquet cannot be read"),
        ("foo://x/t.csv", None, "foo"),
        ("gs://bucket/t.csv", None, "gs"),
        ("s3://no-such-bucket/t.csv", None, "s3"),
    ],
)
def test_a_store_or_library_that_fails_is_one_sentence(
    tmp_path: Path, name: str, content: bytes | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    address = name if content is None else str(tmp_path / name)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for read in (keys, opened, count_rows):
        with pytest.raises((UserError, storage.StorageError), match=sentence) as caught:
            read(SourceSpec(address))
        assert "\n" not in str(caught.value)


def test_a_zipped_table_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.csv.zip", "w") as archive:
        archive.writestr("t.csv", HEADER + "1,a.mp4,cap\n")
    assert keys(SourceSpec(str(tmp_path / "t.csv.zip"))) == ["1"]


def test_check_source_says_on_one_page_what_would_happen(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    rows = ["1,https://a.example/1.mp4,a dog", "2,https://b.example/2.mp4,a cat", "2,https://b.example/3.mp4,again"]
    rows += ["4,https://b.example/2.mp4,the same", "5,,nothing", "6,/etc/passwd," + "word " * 90]
    rows += ["7,c.mp4,caf\ufffd", '8,d.mp4,"[""a"", ""b""]"']
    table.write_text(HEADER + "\n".join(rows) + "\n")
    arguments = ["check-source", "--source", str(table), "--base", str(tiny_base), "--root", str(tmp_path / "root")]
    assert main(arguments) == 1
    page = capsys.readouterr().out
    for line in (
        "rows        8 in 1 file (csv)",
        "usable      6",
        "duplicate_key 1",
        "            row 4: no url",
        "note        1 usable rows repeat the link (and span) of an earlier row",
        "note        1 usable rows name files outside of the table's folder; allow them with --allow-host FOLDER",
        "note        1 captions contain U+FFFD",
        "note        1 captions look like lists",
        "note        1 captions have more than 32 tokens",
        "from        b.example: 2",
        "row 0: key 1, video https://a.example/1.mp4, caption 'a dog'",
    ):
        assert line in page, page
    assert len(page.splitlines()) < 40 and not (tmp_path / "root").exists()
    table.write_text(HEADER + rows[0] + "\n")
    assert main(arguments) == 0
    assert "usable      1" in capsys.readouterr().out
    assert main([*arguments[:2], str(tmp_path / "none.csv")]) == 2
    assert (
        preview(SourceSpec(str(table)))[1].startswith("row 0: key 1") and resolve_url(SourceSpec("/t.csv"), "a") == "/a"
    )


def test_a_mistyped_path_is_not_asked_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for base in ("runs/typo", "./runs", "~/none", "none"):
        with pytest.raises(BaseFolderError, match="is not a folder"):
            resolve_base(base) if base != "./runs" else resolve_base("./run")


def test_a_full_temporary_folder_is_not_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "_add_members", full)
    packed = PackedSample("k_000", {})
    with pytest.raises(UserError, match=r"the temporary folder .* set TMPDIR"):
        writing.write_shard(str(tmp_path), 0, (0, 1), [[packed]], "0" * 16)
