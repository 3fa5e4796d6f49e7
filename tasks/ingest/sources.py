"""Reads the rows of a source of captioned videos, in any supported format, as a stream."""

from __future__ import annotations

import hashlib
import itertools
import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urljoin

import fsspec

from infra import storage
from tasks.ingest import annotations, folders, tables, tars
from tasks.ingest.files import ENDINGS, ending_of, files_of, folder_of, is_over_http, tables_in
from tasks.ingest.rows import MAX_KEY, NAMES, SPAN_NAMES, Cells, KeysSeen, Row, clean_key, read_span, reading
from tasks.ingest.spec import WEBVID_COLUMNS, SourceSpec
from tasks.records import ClipRef, Failure, UserError
from tasks.shards.split import SPLITS, span_key, split_of, written_key
from trip_model.text import ENTITY, unescape_entities

MAX_CAPTION = 4000
FORMATS = ("csv", "parquet", "jsonl", "json", "tar", "msrvtt", "sample", "folder", "classes")
_FOLDERS = ("folder", "classes")
_DOCUMENTS = ("msrvtt", "sample")  # of one file
_TABLES = ("csv", "parquet", "jsonl", "json", "tar")
_SPAN_CHARACTERS = 36  # that a span adds to a key, at most
# A sign of an entity in the bytes of a text table, also as JSON may write it.
_ENTITY_BYTES = re.compile(rb"(?:&|\\u0026)#?[0-9A-Za-z]{1,31};")


def read_rows(spec: SourceSpec, start: int = 0, stop: int | None = None) -> Iterator[ClipRef | Failure]:
    """Yields one record for each of the rows start (inclusive) to stop (exclusive): a clip or a failure.

    Failure reasons: `bad_row` (no key, URL or caption, or unreadable), `bad_span` (stamps that cannot be read, reversed
    or too far apart) and `duplicate_key` (an earlier row has the key). The key of a row with a span contains the span
    and a hash of the link. The source is always read from its first row, so that rows and duplicates do not depend on
    the range. Rows of other splits are not counted.

    Raises:
        UserError: the source is missing or unreadable, or a column or the split is missing.
    """
    if spec.limit is not None:
        stop = spec.limit if stop is None else min(stop, spec.limit)
    seen = KeysSeen()
    for row, written in enumerate(itertools.islice(_rows_of(spec), stop)):
        record = _parse_row(written, row, seen)
        if row >= start:
            yield record


def count_rows(spec: SourceSpec) -> int:
    """Returns how many rows `read_rows` yields, failures included."""
    if spec.split is None and spec.captions != "all" and find_format(spec) == "parquet":
        count = sum(map(tables.count_parquet, source_files(spec)))
        return count if spec.limit is None else min(count, spec.limit)
    return sum(1 for _ in itertools.islice(_rows_of(spec), spec.limit))


def source_digest(spec: SourceSpec) -> str:
    """Returns the sha256 of a source's content, which does not depend on its address.

    For a file it covers the bytes, for several files the bytes and the folders below their common one, in order. For a
    folder it covers the sorted names, the sizes and the captions of its videos, and for tars those of their samples, so
    it does not change if a video is replaced by one of the same size.
    """
    kind = find_format(spec)
    if kind in _FOLDERS:
        return folders.folder_digest(spec.table, kind)
    parts = [(folder, _file_digest(file, kind, _columns(spec, kind))) for file, folder in _placed_files(spec)]
    if len(parts) == 1 and not parts[0][0]:
        return parts[0][1]
    return hashlib.sha256("".join(json.dumps(part) + "\n" for part in parts).encode()).hexdigest()


def source_identity(spec: SourceSpec) -> dict[str, Any]:
    """Returns what determines the rows, except for `limit`: the digest and every option that this format uses."""
    kind = find_format(spec)
    spec = opened(spec)
    identity: dict[str, Any] = {"table_sha256": spec.sha256, "columns": dict(spec.columns)}
    if kind != "csv":
        identity["format"] = kind
    if spec.split is not None:
        identity["split"] = spec.split
        if kind != "msrvtt":
            identity["held_out"] = spec.held_out
    if kind == "msrvtt" or (kind in _TABLES and kind != "csv" and spec.captions != "first"):
        identity["captions"] = spec.captions
    # Options that are off are omitted, so that older data sets keep their fingerprint.
    if spec.encoding is not None and kind in ("csv", "jsonl"):
        identity["encoding"] = spec.encoding
    if spec.entities:
        identity["entities"] = "unescaped"
    return identity


def source_name(spec: SourceSpec) -> dict[str, Any]:
    """Returns what a source is called: its name without the folder, and the options that choose among its rows.

    A table that grows keeps its name, and so does a moved one. Which rows it has is not part of it.
    """
    path, _, query = spec.table.partition("?")
    name: dict[str, Any] = {"name": path.rstrip("/").rsplit("/", 1)[-1] + ("?" + query if query else "")}
    options = {"limit": spec.limit, "split": spec.split, "captions": spec.captions, "columns": dict(spec.columns)}
    name |= {option: value for option, value in options.items() if value is not None}
    return name | ({"held_out": spec.held_out} if spec.split is not None else {})


def opened(spec: SourceSpec) -> SourceSpec:
    """Returns the source with its format, its files and the digest of its content filled in, if they are not set.

    Raises:
        UserError: the source is missing or unreadable.
    """
    if spec.format == "auto":
        spec = replace(spec, format=find_format(spec))
    if spec.sha256 is None:
        spec = replace(spec, files=tuple(source_files(spec)))
        spec = replace(spec, sha256=source_digest(spec), entities=_has_entities(spec))
    return spec


def find_format(spec: SourceSpec) -> str:
    """Returns the format of a source, from the spec or from its name and folder.

    Raises:
        UserError: an unknown format, files of several formats, or a folder with neither videos nor tables.
    """
    if spec.format != "auto":
        if spec.format not in FORMATS:
            raise UserError(f"format {spec.format!r} is not known; give auto, {', '.join(FORMATS)}")
        return spec.format
    files = files_of(spec.table)
    if len(files) > 1:
        kinds = {ENDINGS.get(ending_of(file), "csv") for file in files}
        if len(kinds) > 1:
            raise UserError(
                f"{spec.table} names files of several formats ({', '.join(sorted(kinds))}); give one format"
            )
        return kinds.pop()
    table = files[0]
    ending = ending_of(table)
    if ending == ".json":
        return annotations.kind_of_document(table)
    if ending in ENDINGS and not _is_folder_of_that_name(table):
        return ENDINGS[ending]
    if not folders.is_folder(table):
        return "csv"
    kind = folders.kind_of_folder(table)
    parts = tables_in(table) if kind is None else []
    if kind is None and not parts:
        raise UserError(
            f"folder {table} contains no videos ({', '.join(folders.VIDEO_SUFFIXES[:5])}, ...) and no tables"
            f" ({', '.join(ENDINGS)}); give another folder, or a table"
        )
    return kind or ENDINGS[ending_of(parts[0])]


def source_files(spec: SourceSpec) -> list[str]:
    """Returns the addresses of the files of a source in the order in which they are read; a folder of videos is one."""
    if spec.files is not None:
        return list(spec.files)
    files = files_of(spec.table)
    if len(files) == 1 and find_format(spec) in _TABLES and folders.is_folder(files[0]):
        return tables_in(files[0])
    return files


def resolve_url(spec: SourceSpec, url: str) -> str:
    """Returns the address of a row's video: a relative URL is resolved against `base_url` or the table."""
    if has_scheme(url):
        return url
    if spec.base_url is not None and is_over_http(spec.base_url):
        return urljoin(spec.base_url.rstrip("/") + "/", url)
    root = local_root(spec)
    if root is None:
        return urljoin(spec.table, url)
    if url.startswith("/"):
        return url  # an absolute path; the download rejects paths outside the root
    return storage.join(root, posixpath.normpath(url))


def addressed_rows(spec: SourceSpec) -> Iterator[tuple[ClipRef | Failure, str | None]]:
    """Yields the rows of a source, each with the resolved address of its link, or None without a valid one."""
    for row in read_rows(spec):
        try:
            yield row, resolve_url(spec, row.url) if isinstance(row, ClipRef) else None
        except ValueError:  # not a URL; the download reports it
            yield row, None


def local_root(spec: SourceSpec) -> str | None:
    """Returns the folder whose files rows may name: `base_url`, else the table's folder; None over HTTP."""
    if spec.base_url is not None:
        return None if is_over_http(spec.base_url) else storage.absolute(spec.base_url)
    if is_over_http(spec.table):
        return None
    table = storage.absolute(spec.table)
    files = list(spec.files) if spec.files is not None else files_of(spec.table)
    if len(files) == 1 and storage.absolute(files[0]) == table:
        is_folder = spec.format in _FOLDERS if spec.format != "auto" else _is_folder(table)
        return table if is_folder else storage.parent(table)
    return table if _is_folder(table) else folder_of(files)


def has_scheme(url: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url) is not None


def _is_folder(table: str) -> bool:
    return (ending_of(table) not in ENDINGS or _is_folder_of_that_name(table)) and folders.is_folder(table)


def _is_folder_of_that_name(table: str) -> bool:
    """Returns whether a local folder has the name of a table, as Spark names the folder of its parts."""
    path = storage.local_path(table)
    return path is not None and path.expanduser().is_dir()


def _placed_files(spec: SourceSpec) -> Iterator[tuple[str, str]]:
    """Yields the files of a source, each with its folder relative to the one that rows resolve against."""
    files = source_files(spec)
    over_http = is_over_http(files[0])
    single = len(files) == 1 and files[0] == spec.table
    root = "" if over_http or single else local_root(replace(spec, files=tuple(files), base_url=None)) or ""
    for file in files:
        if over_http or single:
            yield file, ""
        else:
            yield file, storage.parent(storage.absolute(file)).removeprefix(root).strip("/")


def _columns(spec: SourceSpec, kind: str) -> dict[str, str]:
    """Returns the column map with the defaults; without a column of keys, if that is empty."""
    allowed = (*WEBVID_COLUMNS, *SPAN_NAMES)
    unknown = sorted(set(spec.columns) - set(allowed))
    if unknown:
        raise UserError(f"the column map names {unknown[0]!r}; it may name {', '.join(allowed)}")
    columns = WEBVID_COLUMNS | spec.columns
    if kind == "tar":  # key and video are members; WebVid's names mean that no field was named
        columns = {name: column for name, column in columns.items() if name in ("caption", *SPAN_NAMES)}
        columns["caption"] = "caption" if columns["caption"] == WEBVID_COLUMNS["caption"] else columns["caption"]
    empty = [name for name, column in columns.items() if not column]
    if set(empty) - {"key"}:
        raise UserError(f"the column map names no column of {empty[-1]}; only that of the key may be empty")
    return {name: column for name, column in columns.items() if column}


def _rows_of(spec: SourceSpec) -> Iterator[Row]:
    """Returns the rows of the source's split as written."""
    kind = find_format(spec)
    if kind == "msrvtt":
        return annotations.read_msrvtt(spec.table, spec.split, spec.captions)
    rows = _written_rows(spec, kind)
    if spec.split is None:
        return rows
    if spec.split not in SPLITS or not 0 < spec.held_out < 0.5:
        raise UserError(f"split {spec.split!r} at held_out {spec.held_out}, expected {', '.join(SPLITS)} at 0 to 0.5")
    # A row without a key is split by its number in the table, so that exactly one split counts it.
    return (row for number, row in enumerate(rows) if split_of(_key_of(row, number), spec.held_out) == spec.split)


def _written_rows(spec: SourceSpec, kind: str) -> Iterator[Row]:
    columns = _columns(spec, kind)
    if kind == "sample":
        yield from annotations.read_sample(spec.table)
    elif kind in _FOLDERS:
        yield from folders.read_folder(spec.table, kind)
    else:
        several = len(source_files(spec)) > 1
        for file, folder in _placed_files(spec):
            for row in _rows_of_file(spec, file, kind, columns):
                row = _placed(row, file, folder, several and spec.base_url is None)
                yield row if isinstance(row, str) or kind == "tar" or "key" in columns else _with_key(row)


def _rows_of_file(spec: SourceSpec, file: str, kind: str, columns: dict[str, str]) -> Iterator[Row]:
    match kind:
        case "csv":
            return tables.read_csv(file, columns, spec.encoding)
        case "jsonl":
            return tables.read_jsonl(file, columns, spec.captions, spec.encoding)
        case "json":
            return tables.read_json(file, columns, spec.captions)
        case "tar":
            return tars.read_tar(file, columns, spec.captions)
        case _:
            return tables.read_parquet(file, columns, spec.captions)


def _placed(row: Row, file: str, folder: str, several: bool) -> Row:
    """Returns a row with its link relative to the folder that the source's links resolve against."""
    if isinstance(row, str):
        return row
    if row.inside is not None:
        name = "/".join(part for part in (folder, posixpath.basename(file)) if part)
        return row._replace(url=f"{name}#{row.url.strip() or f'{row.inside.size}/{row.inside.offset}'}")
    url = row.url.strip()
    if not url or has_scheme(url) or url.startswith("/"):
        return row
    if is_over_http(file):
        return row._replace(url=urljoin(file, url)) if several else row
    return row._replace(url=f"{folder}/{url}") if folder else row


def _with_key(row: Cells) -> Cells:
    """Returns a row of a table without a column of keys, with a key from the link."""
    url = row.url.strip()
    stem = posixpath.splitext(posixpath.basename(re.split(r"[?#]", url)[0]))[0]
    mark = hashlib.sha256(url.encode()).hexdigest()[:12]
    return row._replace(key=f"{clean_key(stem or 'video', MAX_KEY - _SPAN_CHARACTERS - 13)}-{mark}" if url else "")


def _parse_row(written: Row, row: int, seen: KeysSeen) -> ClipRef | Failure:
    key = _key_of(written, row)
    if isinstance(written, str):
        return Failure(key, row, "bad_row", written)
    texts = _stripped(written)
    caption = unescape_entities(texts.caption).strip()
    empty = [name for name, text in zip(NAMES, (texts.key, texts.url, caption), strict=True) if not text]
    if empty:
        return Failure(key, row, "bad_row", f"no {' and no '.join(empty)}")
    if len(caption) > MAX_CAPTION:
        return Failure(key, row, "bad_row", f"a caption of {len(caption)} characters, at most {MAX_CAPTION}")
    try:
        span = read_span(texts.start, texts.end)
    except ValueError as error:
        return Failure(key, row, "bad_span", str(error))
    if not seen.add(key):
        return Failure(key, row, "duplicate_key", "an earlier row has this key")
    size_bytes = texts.size_bytes
    if texts.inside is not None and texts.inside.column is None:
        size_bytes = texts.inside.size
    return ClipRef(key, texts.url, caption, row, *(span or (None, None)), texts.inside, size_bytes)


def _stripped(written: Cells) -> Cells:
    """Returns a row whose texts have no surrounding white space."""
    key, url, caption, start, end, inside, size_bytes = written
    return Cells(key.strip(), url.strip(), caption.strip(), start.strip(), end.strip(), inside, size_bytes)


def _key_of(written: Row, row: int) -> str:
    """Returns the key of a clip: that of its row, with a span also the span; without a key the row's number."""
    if isinstance(written, str):
        return f"row-{row}"
    texts = _stripped(written)
    if not texts.key:
        return f"row-{row}"
    try:
        span = read_span(texts.start, texts.end)
    except ValueError:
        span = None
    if span is None or written_key(texts.key) != texts.key:  # a sample has keys with their spans
        return clean_key(texts.key)
    return span_key(clean_key(texts.key, MAX_KEY - _SPAN_CHARACTERS), texts.url, *span)


def _file_digest(file: str, kind: str, columns: dict[str, str]) -> str:
    hasher = hashlib.sha256()
    if kind == "tar":
        for sample in tars.tar_samples(file, columns):
            hasher.update(json.dumps(sample).encode() + b"\n")
        return hasher.hexdigest()
    with reading(file), fsspec.open(file, "rb") as opened_file:
        while piece := opened_file.read(1 << 20):  # type: ignore[attr-defined]
            hasher.update(piece)
    return hasher.hexdigest()


def _has_entities(spec: SourceSpec) -> bool:
    """Returns whether a caption contains an HTML entity. Most tables are cleared by their bytes, without their rows."""
    kind = find_format(spec)
    if kind == "parquet":
        column = _columns(spec, kind)["caption"]
        if not any(tables.parquet_matches(file, column, ENTITY.pattern) for file in source_files(spec)):
            return False
    elif kind in ("csv", "jsonl", "json", *_DOCUMENTS) and not any(map(_may_have_entities, source_files(spec))):
        return False
    rows = _rows_of(replace(spec, split=None, captions="all"))
    captions = (row.caption for row in rows if isinstance(row, Cells))
    return any(ENTITY.search(caption) and unescape_entities(caption) != caption for caption in captions)


def _may_have_entities(file: str) -> bool:
    rest = b""
    with reading(file), fsspec.open(file, "rb", compression="infer") as opened_file:
        while piece := opened_file.read(1 << 20):  # type: ignore[attr-defined]
            data = (rest + piece).replace(b"\0", b"")  # UTF-16, whose ASCII has a zero for each second byte
            if _ENTITY_BYTES.search(data):
                return True
            rest = data[-64:]
    return False
