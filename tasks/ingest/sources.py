"""Reads the rows of a source of captioned videos, in any supported format, as a stream."""

from __future__ import annotations

import hashlib
import itertools
import posixpath
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urljoin, urlsplit

import fsspec

from infra import storage
from tasks.ingest import annotations, folders, tables
from tasks.ingest.rows import KeysSeen, Row, clean_key, reading
from tasks.ingest.spec import WEBVID_COLUMNS, SourceSpec
from tasks.records import ClipRef, Failure, UserError
from tasks.shards.split import SPLITS, split_of

MAX_CAPTION = 4000
FORMATS = ("csv", "parquet", "jsonl", "msrvtt", "sample", "folder", "classes")
_FOLDERS = ("folder", "classes")
_ENDINGS = {".csv": "csv", ".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def read_rows(spec: SourceSpec, start: int = 0, stop: int | None = None) -> Iterator[ClipRef | Failure]:
    """Yields one record for each of the rows start (inclusive) to stop (exclusive): a clip or a failure.

    Failure reasons: `bad_row` (no key, URL or caption, or unreadable) and `duplicate_key` (an earlier row has the key).
    The source is always read from its first row, so that rows and duplicates do not depend on the range. Rows of other
    splits are not counted.

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
    if spec.split is None and find_format(spec) == "parquet":
        count = tables.count_parquet(spec.table)
        return count if spec.limit is None else min(count, spec.limit)
    return sum(1 for _ in itertools.islice(_rows_of(spec), spec.limit))


def source_digest(spec: SourceSpec) -> str:
    """Returns the sha256 of a source's content, which does not depend on its address.

    For a file it covers the bytes. For a folder it covers the sorted names, the sizes and the captions of its videos,
    so it does not change if a video is replaced by one of the same size.
    """
    kind = find_format(spec)
    if kind in _FOLDERS:
        return folders.folder_digest(spec.table, kind)
    hasher = hashlib.sha256()
    with reading(spec.table), fsspec.open(spec.table, "rb") as file:
        while piece := file.read(1 << 20):  # type: ignore[attr-defined]
            hasher.update(piece)
    return hasher.hexdigest()


def source_identity(spec: SourceSpec) -> dict[str, Any]:
    """Returns what determines the rows, except for `limit`: the digest and every option that this format uses."""
    kind = find_format(spec)
    identity: dict[str, Any] = {"table_sha256": opened(spec).sha256, "columns": dict(spec.columns)}
    if kind != "csv":
        identity["format"] = kind
    if spec.split is not None:
        identity["split"] = spec.split
        if kind != "msrvtt":
            identity["held_out"] = spec.held_out
    if kind == "msrvtt":
        identity["captions"] = spec.captions
    return identity


def opened(spec: SourceSpec) -> SourceSpec:
    """Returns the source with its format and the digest of its content filled in, if they are not set.

    Raises:
        UserError: the source is missing or unreadable.
    """
    if spec.format == "auto":
        spec = replace(spec, format=find_format(spec))
    return spec if spec.sha256 is not None else replace(spec, sha256=source_digest(spec))


def find_format(spec: SourceSpec) -> str:
    """Returns the format of a source, from the spec or from its name and folder. Raises UserError if it is unknown."""
    if spec.format != "auto":
        if spec.format not in FORMATS:
            raise UserError(f"format {spec.format!r} is not known; give auto, {', '.join(FORMATS)}")
        return spec.format
    ending = _ending(spec.table)
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    if ending == ".json":
        return "sample" if annotations.is_sample(spec.table) else "msrvtt"
    return folders.kind_of_folder(spec.table) if folders.is_folder(spec.table) else "csv"


def resolve_url(spec: SourceSpec, url: str) -> str:
    """Returns the address of a row's video: a relative URL is resolved against `base_url` or the table."""
    if has_scheme(url):
        return url
    if spec.base_url is not None and _over_http(spec.base_url):
        return urljoin(spec.base_url.rstrip("/") + "/", url)
    root = local_root(spec)
    if root is None:
        return urljoin(spec.table, url)
    if url.startswith("/"):
        return url  # an absolute path; the download rejects paths outside the root
    return storage.join(root, posixpath.normpath(url))


def local_root(spec: SourceSpec) -> str | None:
    """Returns the folder whose files rows may name: `base_url`, else the table's folder; None over HTTP."""
    if spec.base_url is not None:
        return None if _over_http(spec.base_url) else storage.absolute(spec.base_url)
    if _over_http(spec.table):
        return None
    table = storage.absolute(spec.table)
    if spec.format == "auto":
        is_folder = _ending(table) not in (*_ENDINGS, ".json") and folders.is_folder(table)
    else:
        is_folder = spec.format in _FOLDERS
    return table if is_folder else storage.parent(table)


def has_scheme(url: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url) is not None


def _over_http(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def _ending(table: str) -> str:
    path = urlsplit(table).path if _over_http(table) else table
    return posixpath.splitext(re.sub(r"\.(gz|bz2|xz|zst)$", "", path.lower()))[1]


def _rows_of(spec: SourceSpec) -> Iterator[Row]:
    """Returns the rows of the source's split as written."""
    kind = find_format(spec)
    if kind == "msrvtt":
        if spec.captions not in ("first", "all") and not isinstance(spec.captions, int):
            raise UserError(f"captions {spec.captions!r}, expected 'first', 'all' or the number of a seed")
        return annotations.read_msrvtt(spec.table, spec.split, spec.captions)
    unknown = sorted(set(spec.columns) - set(WEBVID_COLUMNS))
    if unknown:
        raise UserError(f"the column map names {unknown[0]!r}; it may name {', '.join(WEBVID_COLUMNS)}")
    columns = WEBVID_COLUMNS | spec.columns
    match kind:
        case "csv":
            rows = tables.read_csv(spec.table, columns)
        case "jsonl":
            rows = tables.read_jsonl(spec.table, columns)
        case "parquet":
            rows = tables.read_parquet(spec.table, columns)
        case "sample":
            rows = annotations.read_sample(spec.table)
        case _:
            rows = folders.read_folder(spec.table, kind)
    if spec.split is None:
        return rows
    if spec.split not in SPLITS or not 0 < spec.held_out < 0.5:
        raise UserError(f"split {spec.split!r} at held_out {spec.held_out}, expected {', '.join(SPLITS)} at 0 to 0.5")
    # A row without a key is split by its number in the table, so that exactly one split counts it.
    return (
        row for number, row in enumerate(rows) if split_of(_key_of(_texts(row)[0], number), spec.held_out) == spec.split
    )


def _parse_row(written: Row, row: int, seen: KeysSeen) -> ClipRef | Failure:
    texts = _texts(written)
    key = _key_of(texts[0], row)
    if isinstance(written, str):
        return Failure(key, row, "bad_row", written)
    _, url, caption = texts
    empty = [name for name, text in zip(WEBVID_COLUMNS, texts, strict=True) if not text]
    if empty:
        return Failure(key, row, "bad_row", f"no {' and no '.join(empty)}")
    if len(caption) > MAX_CAPTION:
        return Failure(key, row, "bad_row", f"a caption of {len(caption)} characters, at most {MAX_CAPTION}")
    if not seen.add(key):
        return Failure(key, row, "duplicate_key", "an earlier row has this key")
    return ClipRef(key, url, caption, row)


def _texts(written: Row) -> tuple[str, ...]:
    """Returns key, URL and caption without surrounding white space."""
    if isinstance(written, str):
        return "", "", ""
    return tuple(text.strip() for text in written)


def _key_of(text: str, row: int) -> str:
    return clean_key(text) if text else f"row-{row}"
